"""The manifest of compiled kernels: which files there are, and what an operator launches with them, as plain data.

It is made by `ligerexport.kernels.aot`. A caller without Python, such as the TensorRT plugin, needs nothing else.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

MANIFEST = "kernels.json"
FORMAT_VERSION = 1
ALIGNMENT = 16
"""What Triton asks of pointers, in bytes, and of integers; what it is promised decides how wide loads are."""
HIDDEN = ("global_scratch", "profile_scratch")
"""Pointers that every Triton kernel takes after its own arguments; null where their size is 0."""


@dataclass(frozen=True)
class Argument:
    """A kernel's argument: a pointer (`*bf16`), `i32`, `i64` or `fp32`.

    `divisible` is what the caller promises: the address in bytes, or the integer, is a multiple of it.
    """

    name: str
    type: str
    divisible: int = 1


@dataclass(frozen=True)
class Cubin:
    """A kernel compiled for one compute capability.

    Attributes:
        file: Beside the manifest.
        symbol: Its name in the file.
        sha256: Of the file, in hex.
        bytes: Of the file.
        threads: Threads a block, all along x.
        shared: Bytes of dynamic shared memory; over 48 KiB needs CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES.
        global_scratch: Bytes a program of the first hidden argument; usually 0, and then it is null.
        global_scratch_align: Its alignment in bytes.
        profile_scratch: The same as `global_scratch` of the second hidden argument.
        registers: A thread; None where no cuobjdump was found, as the next.
        local: Bytes of stack a thread, which is where registers spill.
        ptx: File with the same as PTX, which a driver compiles for any later GPU; "" where none was asked for.
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
        name: Of the function in `module`.
        module: Where it is written.
        arguments: In the order of the launch; `Manifest.hidden` come after them.
        constants: What is compiled in, tile sizes among them; to be read by people.
        options: Warps, stages, most registers, as Triton was told.
        cubins: By compute capability, `90` for 9.0. One of 8.x also runs on later 8.x, others on their own only.
    """

    name: str
    module: str
    arguments: tuple[Argument, ...]
    constants: dict[str, Any]
    options: dict[str, Any]
    cubins: dict[str, Cubin] = field(default_factory=dict)


@dataclass(frozen=True)
class Buffer:
    """What a pointer points into.

    Attributes:
        role: `input`, `output`, `state` (read and written), `scratch` (for one call), `persistent` (kept from call to
            call; calls that share it must not overlap) or `table` (made by the host from the axes).
        type: `bf16`, `fp32`, ..
        shape: Expressions. Strides that are no axes follow from the shape, the last is always 1.
        fill: What must be in it before: "" for anything, "zero" before each call, "zero once", or what a table holds.
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
    """One operator of one layer: launches in order, on one stream. Strings are expressions over the axes, valid C.

    Attributes:
        operator: Row of `OPERATORS`.
        spec: The layer, fields of `MixerSpec`.
        dtype: Of activations.
        sms: Compute capabilities that it is for.
        axes: What the caller chooses; `query_stride_1` is a stride in elements.
        derived: Further axes, each after those that it needs.
        ranges: First and last value of axes for which this plan counts; None for no end.
        buffers: By name.
        launches: In order.
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
    """What `kernels.json` says: `plans` say what to launch, `kernels` with which files."""

    triton: str
    kernels: dict[str, Kernel]
    plans: tuple[Plan, ...]
    hidden: tuple[str, ...] = HIDDEN
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Return the file's text; equal manifests give equal text."""
        return json.dumps(asdict(self), indent=1) + "\n"
