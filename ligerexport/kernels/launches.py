"""Record what an operator launches, without a GPU: its eager host code runs on tensors without data.

Sizes, strides and grids become expressions over named axes, found from calls of many sizes that must all agree. So
ahead-of-time compilation, in `ligerexport.kernels.aot`, needs no list of arguments of its own.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ligerexport.dtypes import BY_KERNEL
from ligerexport.errors import LigerError
from ligerexport.kernels.tuning import cdiv

TYPES = {row.torch: name for name, row in BY_KERNEL.items()}
DIVISORS = tuple(1 << i for i in range(1, 13))
OPERATORS: dict[type[ast.operator], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
}  # fmt: skip


def evaluate(expression: str, axes: Mapping[str, int]) -> int:
    """Return the value of an expression of integers, axes, `+ - *` and `cdiv(a, b)`; it is also valid C.

    An axis may be a stride, `query_stride_1`.

    Raises:
        LigerError: The expression has a different form, or an axis is missing.
    """

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(number)):
                return number
            case ast.Name(id=name) if name in axes:
                return axes[name]
            case ast.BinOp(left=left, op=op, right=right) if type(op) in OPERATORS:
                return OPERATORS[type(op)](value(left), value(right))
            case ast.Call(func=ast.Name(id="cdiv"), args=[a, b]):
                return cdiv(value(a), value(b))
        raise LigerError(f"cannot evaluate '{ast.unparse(node)}' over {', '.join(axes)}")

    return value(ast.parse(expression, mode="eval").body)


@dataclass(frozen=True)
class Call:
    """One call of an operator on tensors without data.

    Attributes:
        axes: Sizes that the caller chooses, and strides of inputs as `NAME_stride_AXIS`.
        tensors: Inputs, outputs and state by name.
        run: Makes the call; may return further outputs by name.
        roles: Roles of `tensors` that are not `input`.
    """

    axes: dict[str, int]
    tensors: dict[str, Tensor]
    run: Callable[[], Any]
    roles: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Pointer:
    """A tensor argument of a kernel: its buffer, and its offset there."""

    buffer: str
    type: str
    offset: int


@dataclass
class Recorded:
    """One launch.

    Attributes:
        kernel: The `triton.JITFunction`.
        grid: Programs along x, y, z.
        arguments: Arguments at run time, in order: pointers, integers and floats.
        constants: Values that are compiled in, by the parameter's name; None for a pointer that is absent.
        options: Options of Triton, such as `num_warps`.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]

    def identity(self) -> tuple[Any, ...]:
        """Return what must be equal in calls of other sizes for this to be the same launch."""
        kinds = [
            (name, (x.buffer, x.type) if isinstance(x, Pointer) else x if isinstance(x, float) else "int")
            for name, x in self.arguments.items()
        ]
        options = sorted(self.options.items())
        return self.kernel.__name__, str(kinds), str(self.constants), str(options)


@dataclass
class Memory:
    """A buffer of one call: a tensor in it, its role, and its content before: "", zero, zero once or table."""

    tensor: Tensor
    role: str
    fill: str = ""

    def shape(self) -> tuple[int, ...]:
        """Return the sizes of the buffer; scratch is flat, since a kernel may have received a part of it."""
        if self.role in ("scratch", "persistent"):
            return (self.tensor.untyped_storage().nbytes() // self.tensor.element_size(),)
        return tuple(self.tensor.shape)


@dataclass
class Recording:
    """All launches of one call in order, and its buffers."""

    axes: dict[str, int]
    launches: list[Recorded] = field(default_factory=list)
    buffers: dict[str, Memory] = field(default_factory=dict)


class _Creations(TorchDispatchMode):
    """Note how each storage was created."""

    def __init__(self) -> None:
        super().__init__()
        self.fills: dict[int, str] = {}
        self.kept: list[Tensor] = []  # the address of a freed storage may be used again

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        inputs = {_storage(x) for x in args if isinstance(x, Tensor)}
        for x in result if isinstance(result, (tuple, list)) else (result,):
            if not isinstance(x, Tensor) or (_storage(x) in inputs and name != "zero_"):
                continue
            self.kept.append(x)
            zero = "zeros" in name or name == "zero_"
            self.fills[_storage(x)] = "zero" if zero else "" if "empty" in name else f"computed by {name}"
        return result


def _storage(x: Tensor) -> int:
    return int(x.untyped_storage()._cdata)


@contextmanager
def _noting(note: Callable[..., None]) -> Iterator[None]:
    """Make Triton's launches call `note(kernel, args, kwargs, grid)` and do nothing else."""
    from triton.runtime.jit import JITFunction

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        note(kernel, args, kwargs, grid)

    before = JITFunction.run
    JITFunction.run = run
    try:
        yield
    finally:
        JITFunction.run = before


def record(call: Call, tables: Sequence[str] = ()) -> Recording:
    """Return the launches of a call.

    Args:
        tables: Parameters of kernels, without `p_`, for which the host makes tables; the caller of a kernel must make
            them too.

    Raises:
        LigerError: A kernel reads data that torch computed in between.
    """
    made = Recording(dict(call.axes))
    creations = _Creations()
    launches: list[tuple[Any, dict[str, Any], dict[str, Any], Any]] = []

    def note(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], grid: Any) -> None:
        names = kernel.signature.parameters
        bound = kernel.signature.bind(*args, **{k: v for k, v in kwargs.items() if k in names})
        bound.apply_defaults()
        options = {k: v for k, v in kwargs.items() if k not in names and v is not None}
        launches.append((kernel, bound.arguments, options, grid(bound.arguments) if callable(grid) else grid))

    with torch.no_grad(), _noting(note):
        call.run()  # creates what the operator keeps between calls
        launches.clear()
        with creations:
            outputs = call.run()
    outputs = outputs if isinstance(outputs, dict) else {}
    named = {_storage(x): (name, Memory(x, call.roles.get(name, "input"))) for name, x in call.tensors.items()}
    named |= {_storage(x): (name, Memory(x, "output")) for name, x in outputs.items() if _storage(x) not in named}
    for kernel, bound, options, grid in launches:
        arguments: dict[str, Any] = {}
        constants: dict[str, Any] = {}
        for parameter in kernel.params:
            x = bound[parameter.name]
            if parameter.is_constexpr or x is None:
                constants[parameter.name] = x
            elif not isinstance(x, Tensor):
                arguments[parameter.name] = x
            else:
                name = parameter.name.removeprefix("p_")
                if name in tables:  # equal tables may share a storage
                    memory = Memory(x, "table", "table")
                else:
                    if _storage(x) not in named:
                        name = _new_name(name, {*made.buffers, *call.tensors, *outputs})
                        named[_storage(x)] = name, _scratch(x, name, creations)
                    name, memory = named[_storage(x)]
                made.buffers[name] = memory
                arguments[parameter.name] = Pointer(name, TYPES[x.dtype], int(x.storage_offset()) * x.element_size())
        made.launches.append(Recorded(kernel, (*grid, 1, 1)[:3], arguments, constants, options))
    return made


def _new_name(wanted: str, taken: set[str]) -> str:
    return next(name for i in range(len(taken) + 1) if (name := f"{wanted}_{i + 1}" if i else wanted) not in taken)


def _scratch(x: Tensor, name: str, creations: _Creations) -> Memory:
    """Describe a buffer that the operator made itself."""
    fill = creations.fills.get(_storage(x))
    if fill is None:  # older than the call
        return Memory(x, "persistent", "zero once")
    if fill not in ("", "zero"):
        raise LigerError(f"'{name}' is {fill} before the launch, which no cubin does")
    return Memory(x, "scratch", fill)


class Expressions:
    """Finds integers of several recordings as one expression over their axes.

    Args:
        axes: The axes of each recording.
    """

    def __init__(self, axes: Sequence[Mapping[str, int]]) -> None:
        self._found: dict[tuple[int, ...], str] = {}
        self._made: list[tuple[str, Any]] = []
        self._rest = self._generate({name: np.array([a[name] for a in axes]) for name in axes[0]})

    @staticmethod
    def _generate(axes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        """Yield texts and values, the simplest first."""
        sizes = {name: x for name, x in axes.items() if "_stride_" not in name}
        yield from axes.items()
        quotients = {f"cdiv({name}, {n})": -(-x // n) for name, x in sizes.items() for n in DIVISORS}
        yield from quotients.items()
        pairs = combinations_with_replacement((sizes | quotients).items(), 2)
        products = {f"{a} * {b}": x * y for (a, x), (b, y) in pairs}
        yield from products.items()
        yield from ((f"cdiv({text}, {n})", -(-x // n)) for text, x in products.items() for n in DIVISORS)

    def find(self, values: Sequence[int], what: str) -> str:
        """Return an expression, a factor times a candidate plus a number, that has these values.

        Raises:
            LigerError: There is no such expression; `what` names the purpose.
        """
        key = tuple(values)
        if key not in self._found:
            self._found[key] = self._search(np.array(values), what)
        return self._found[key]

    def _search(self, values: Any, what: str) -> str:
        if (values == values[0]).all():
            return str(values[0])
        for text, x in self._candidates():
            low, high = x.argmin(), x.argmax()
            if x[low] == x[high]:
                continue
            factor, rest = divmod(int(values[high] - values[low]), int(x[high] - x[low]))
            if rest == 0 and (x * factor + (plus := int(values[low]) - factor * int(x[low])) == values).all():
                scaled = text if factor == 1 else f"{factor} * {text}"
                return scaled if plus == 0 else f"{scaled} {'+' if plus > 0 else '-'} {abs(plus)}"
        raise LigerError(f"{what} is no expression over the axes: {values[:8]}")

    def _candidates(self) -> Iterator[tuple[str, Any]]:
        """Yield known candidates, then new ones."""
        yield from self._made
        for candidate in self._rest:
            self._made.append(candidate)
            yield candidate
