"""The manifest of compiled kernels: their files, and what an operator launches with them, as plain data.

`ligerexport.kernels.aot` writes it. A caller without Python, such as the TensorRT plugin, needs nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MANIFEST = "kernels.json"
FORMAT_VERSION = 1
ALIGNMENT = 16
"""Alignment of pointers in bytes, and divisor of integers, that let Triton use wide loads."""
HIDDEN = ("global_scratch", "profile_scratch")
"""Pointers that every Triton kernel takes after its own arguments; null if their size is 0."""


@dataclass(frozen=True)
class Argument:
    """A kernel's argument: a pointer (`*bf16`), `i32`, `i64` or `fp32`.

    The caller promises that the address in bytes, or the integer, is a multiple of `divisible`.
    """

    name: str
    type: str
    divisible: int = 1


@dataclass(frozen=True)
class Cubin:
    """A kernel compiled for one compute capability.

    Attributes:
        file: Name of the file beside the manifest.
        symbol: Name of the kernel in the file.
        sha256: Hash of the file, in hexadecimal.
        bytes: Size of the file.
        threads: Threads per block, all along x.
        shared: Bytes of dynamic shared memory; over 48 KiB needs CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
        global_scratch: Bytes per program of the first hidden argument; usually 0, and then the argument is null.
        global_scratch_align: Alignment of that memory in bytes.
        profile_scratch: Bytes per program of the second hidden argument.
        registers: Registers per thread; None without cuobjdump, which `local` also needs.
        local: Bytes of stack per thread, where registers spill.
        ptx: File with the kernel as PTX, which a driver compiles for any later GPU; "" if none was requested.
    """

    file: str
    symbol: str
    sha256: str
    bytes: int
    threads: int
    shared: int
    global_scratch: int
    global_scratch_align: int
    profile_scratch: int
    registers: int | None
    local: int | None
    ptx: str = ""


@dataclass(frozen=True)
class Kernel:
    """A kernel with its constants.

    Attributes:
        name: Name of the function in `module`.
        module: Module that defines it.
        arguments: Arguments in the order of the launch; `Manifest.hidden` follow them.
        constants: Values that are compiled in, such as tile sizes; for human readers.
        options: Warps, stages and largest number of registers, as passed to Triton.
        cubins: Cubins by compute capability, `90` for 9.0. One of 8.x also runs on later 8.x, others on their own only.
    """

    name: str
    module: str
    arguments: tuple[Argument, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    cubins: dict[str, Cubin] = field(default_factory=dict)


@dataclass(frozen=True)
class Buffer:
    """A buffer that a pointer points into.

    Attributes:
        role: `input`, `output`, `state` (read and written), `scratch` (for one call), `persistent` (kept from call to
            call; calls that share it must not overlap), `table` (made by the host from the axes) or `constant`.
        type: Type of an element, such as `bf16`.
        shape: Sizes as expressions. Strides that are not axes follow from the shape; the last is always 1.
        fill: Content before the launch: "" for anything, "zero" before each call, "zero once", a table's content in
            words, or the integers of a constant with blanks between.
    """

    role: str
    type: str
    shape: tuple[str, ...]
    fill: str = ""


@dataclass(frozen=True)
class Value:
    """An argument of a launch: an address (`buffer`, and an `offset` in bytes), an integer, or a float."""

    buffer: str | None = None
    offset: str | None = None
    integer: str | None = None
    number: float | None = None


@dataclass(frozen=True)
class Launch:
    """A kernel by its key in `Manifest.kernels`, its grid x, y, z, and a value for each of its arguments."""

    kernel: str
    grid: tuple[str, ...]
    values: tuple[Value, ...]


@dataclass(frozen=True)
class Plan:
    """One operator of one layer: launches in order, on one stream. Strings are expressions over the axes, and valid C.

    Attributes:
        operator: Row of `OPERATORS`.
        spec: The fields of the layer's `MixerSpec`.
        dtype: Type of activations.
        sms: Compute capabilities that the plan is for.
        axes: Sizes that the caller chooses; `query_stride_1` is a stride in elements.
        derived: Further axes, each after those that it depends on.
        ranges: First and last value of axes for which this plan holds; None for no end.
        buffers: Buffers by name.
        launches: Launches in order.
    """

    operator: str
    spec: dict[str, Any]
    dtype: str
    sms: tuple[int, ...]
    axes: tuple[str, ...]
    derived: dict[str, str]
    ranges: dict[str, tuple[int, int | None]]
    buffers: dict[str, Buffer]
    launches: tuple[Launch, ...]


@dataclass(frozen=True)
class Manifest:
    """The content of `kernels.json`: `plans` list the launches, `kernels` their files."""

    triton: str
    kernels: dict[str, Kernel]
    plans: tuple[Plan, ...]
    hidden: tuple[str, ...] = HIDDEN
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the file's text; equal manifests give equal text."""
        return json.dumps(asdict(self), indent=1) + "\n"
