"""Launch a kernel again without specialising it again.

Triton inspects every argument of every launch, which takes longer than a kernel of a few microseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

from torch import Tensor

MOST = 4096
"""Largest number of launches that are remembered, since the length of a text has no limit."""

_COMPILED: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def layout(*tensors: Tensor | None) -> Hashable:
    """Return everything about a caller's tensors on which compilation and the sizes of a launch can depend."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0) for x in tensors
    )


@lru_cache(maxsize=1024)
def same(*things: Hashable) -> Hashable:
    """Return one object for equal values, which is faster to look up than the values themselves."""
    return object()


def launch(
    key: Hashable, kernel: Any, grid: tuple[int, int, int], *arguments: Any, constants: Callable[[], dict[str, Any]]
) -> None:
    """Run `kernel[grid](*arguments, **constants())`.

    Args:
        key: Determines everything else: equal keys promise equal integers and constants, and tensors of equal dtype and
            alignment.
        kernel: A function of `triton.jit`.
        grid: Number of programs along each axis.
        *arguments: The first arguments of the kernel, which vary.
        constants: Returns the other arguments and Triton's options; called once per key.
    """
    known = _COMPILED.get((id(kernel), key))
    if known is not None:
        compiled, rest = known
        compiled[grid](*arguments, *rest)
        return
    named = constants()
    compiled = kernel[grid](*arguments, **named)
    if len(_COMPILED) >= MOST:
        _COMPILED.clear()
    if hasattr(compiled, "function"):  # the interpreter and the recorder of launches return other objects
        _COMPILED[id(kernel), key] = compiled, tuple(named[name] for name in kernel.arg_names[len(arguments) :])
