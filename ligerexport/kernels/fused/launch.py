"""Launch a kernel again without working out again what it was compiled for.

Triton looks at every argument of every launch; for kernels of some microseconds that takes longer than they run.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from typing import Any

from torch import Tensor

MOST = 4096
"""Launches that are remembered; lengths of text may vary without end."""

_COMPILED: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}


def layout(*tensors: Tensor | None) -> Hashable:
    """Return all that compilation and the sizes of a launch can depend on in a caller's tensors."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0) for x in tensors
    )


@lru_cache(maxsize=1024)
def same(*things: Hashable) -> Hashable:
    """Return one object for equal things; it is quicker to look up than they are."""
    return object()


def launch(
    key: Hashable, kernel: Any, grid: tuple[int, int, int], *arguments: Any, constants: Callable[[], dict[str, Any]]
) -> None:
    """Run `kernel[grid](*arguments, **constants())`.

    Args:
        key: What all else follows from; equal keys promise equal integers and constants, and tensors of equal dtype and
            alignment.
        kernel: A function of `triton.jit`.
        grid: Programs.
        *arguments: The first arguments of the kernel, all that vary.
        constants: Makes the rest and Triton's options; called once for a key.
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
    if hasattr(compiled, "function"):  # the interpreter and whoever records launches return something else
        _COMPILED[id(kernel), key] = compiled, tuple(named[name] for name in kernel.arg_names[len(arguments) :])
