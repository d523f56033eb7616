"""The launches of a layer as data: operators are called at many sizes, and their launches are written as plans.

The schema is in `ligerexport.kernels.launch_manifest`; `ligerexport.kernels.aot` compiles the kernels.
"""

from __future__ import annotations

import hashlib
import json
import random
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ligerexport.dtypes import DTYPES
from ligerexport.errors import LigerError, look_up
from ligerexport.kernels.fused.segments import segment_length
from ligerexport.kernels.launch_manifest import ALIGNMENT, Argument, Buffer, Kernel, Launch, Plan, Value
from ligerexport.kernels.launches import TYPES, Call, Expressions, Pointer, Recorded, Recording, evaluate, record
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.ops import BLOCK
from ligerexport.kernels.tuning import targeting
from ligerexport.model.state import MixerSpec, MixerState


@dataclass(frozen=True)
class Operator:
    """How to call an operator for its plans.

    Attributes:
        calls: Returns calls of many sizes, from a layer, a dtype and the largest batch.
        derived: Returns further axes as name and expression, from a layer and a dtype.
        tables: Content of the host's tables, by the kernel's parameter: words for one that depends on the axes, or a
            function that returns the integers of one that depends on the layer and on what is recorded.
        by: Axis whose value decides the launches; "" if they are always the same.
        limits: Returns the largest value of axes that have a limit, from a layer and the largest batch.
    """

    calls: Callable[[Any, torch.dtype, int], Iterator[Call]]
    derived: Callable[[Any, torch.dtype], dict[str, str]] = lambda spec, dtype: {}
    tables: Mapping[str, str | Callable[[MixerSpec, Recording], Tensor]] = field(default_factory=dict)
    by: str = ""
    limits: Callable[[Any, int], dict[str, int]] = lambda spec, max_batch: {}


def spec_fields(spec: MixerSpec | LinearSpec) -> dict[str, Any]:
    """Return the fields of a layer or a product as plain data."""
    return spec.to_dict() if isinstance(spec, MixerSpec) else asdict(spec)


def layer_digest(layer: Mapping[str, Any]) -> str:
    """Return the name by which the TensorRT plugin looks up a layer's kernels, from its `spec_fields`."""
    text = json.dumps(layer, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def make_plans(
    name: str, spec: MixerSpec | LinearSpec, dtype: str, sm: int, max_batch: int
) -> Iterator[tuple[Plan, dict[str, tuple[Kernel, Recorded]]]]:
    """Yield the plans of an operator, one for each range of sizes, with their kernels by key.

    A `LinearSpec` has one operator, and `name` is its name in the plans.

    Raises:
        UsageError: There is no such operator or dtype.
        LigerError: A launch cannot be written as a plan.
    """
    ragged = isinstance(spec, MixerSpec) and spec.config.ragged
    rows = RAGGED_OPERATORS if ragged else OPERATORS
    row = PRODUCT if isinstance(spec, LinearSpec) else look_up("operator", name, rows)
    activation = look_up("dtype", dtype, {text: x for x, text in TYPES.items() if x.is_floating_point})
    groups: dict[Any, list[Recording]] = {}
    with targeting(sm):
        derived = row.derived(spec, activation)
        for call in row.calls(spec, activation, max_batch):
            recording = record(call, tuple(row.tables))
            for axis, expression in derived.items():
                recording.axes[axis] = evaluate(expression, recording.axes)
            groups.setdefault(tuple(x.identity() for x in recording.launches), []).append(recording)
    if len(groups) > 1 and not row.by:
        raise LigerError(f"the launches of '{name}' depend on the sizes of a call")
    spans = [
        (min(values), max(values)) if (values := [x.axes[row.by] for x in group if row.by]) else (0, 0)
        for group in groups.values()
    ]
    for span, group in zip(spans, groups.values(), strict=True):
        if any(span[0] <= other[1] and other[0] <= span[1] for other in spans if other is not span):
            raise LigerError(f"the launches of '{name}' depend on more than '{row.by}'")
        if 0 < len({x.axes["tokens"] for x in group if "tokens" in x.axes}) < 4:
            raise LigerError(f"too few lengths were tried to tell what '{name}' does with them")
        limits: dict[str, int | None] = {**row.limits(spec, max_batch)}
        ranges = {axis: (1, limit) for axis, limit in limits.items()}
        if row.by:
            ranges[row.by] = span[0], limits.get(row.by) if span == max(spans) else span[1]
        plan, kernels = _make_plan(name, spec, row, group)
        yield replace(plan, spec=spec_fields(spec), dtype=dtype, sms=(sm,), ranges=ranges, derived=derived), kernels


def _make_plan(
    name: str, spec: Any, row: Operator, group: list[Recording]
) -> tuple[Plan, dict[str, tuple[Kernel, Recorded]]]:
    """Return launches and buffers of calls that differ only in sizes."""
    found = Expressions([x.axes for x in group])
    kernels: dict[str, tuple[Kernel, Recorded]] = {}
    launches = []
    for i, first in enumerate(group[0].launches):
        same = [x.launches[i] for x in group]
        what = f"of {first.kernel.__name__} in '{name}'"
        arguments, values = [], []
        for argument, x in first.arguments.items():
            if isinstance(x, float):
                arguments.append(Argument(argument, "fp32"))
                values.append(Value(number=x))
                continue
            pointer = isinstance(x, Pointer)
            numbers = [y.arguments[argument].offset if pointer else y.arguments[argument] for y in same]
            text = found.find(numbers, f"'{argument}' {what}")
            # alignment of addresses, strides and constants is promised; for other sizes it would be a coincidence
            promised = pointer or "_stride_" in text or len(set(numbers)) == 1
            divisible = ALIGNMENT if promised and not any(n % ALIGNMENT for n in numbers) else 1
            arguments.append(Argument(argument, f"*{x.type}" if pointer else "i32", divisible))
            values.append(Value(buffer=x.buffer, offset=text) if pointer else Value(integer=text))
        constants = {
            key: x if x is None or isinstance(x, (int, float, str, tuple)) else str(x)
            for key, x in first.constants.items()
        }
        kernel = Kernel(first.kernel.__name__, first.kernel.__module__, tuple(arguments), constants, first.options)
        digest = hashlib.sha256(json.dumps(asdict(kernel), sort_keys=True).encode()).hexdigest()
        key = f"{kernel.name.strip('_')}-{digest[:12]}"
        kernels[key] = kernel, first
        grid = tuple(found.find([x.grid[axis] for x in same], f"the grid {what}") for axis in range(3))
        launches.append(Launch(key, grid, tuple(values)))
    buffers = {}
    for buffer, memory in group[0].buffers.items():
        sizes = zip(*(x.buffers[buffer].shape() for x in group), strict=True)
        shape = tuple(found.find(axis, f"the size of '{buffer}' in '{name}'") for axis in sizes)
        role, fill = memory.role, memory.fill
        if role == "table":
            content = row.tables[buffer]
            if isinstance(content, str):
                fill = content
            else:
                role, fill = "constant", " ".join(map(str, content(spec, group[0]).flatten().tolist()))
        buffers[buffer] = Buffer(role, TYPES[memory.tensor.dtype], shape, fill)
    text = json.dumps([asdict(x) for x in launches])
    axes = tuple(axis for axis in group[0].axes if "_stride_" not in axis or axis in text)
    return Plan(name, {}, "", (), axes, {}, {}, buffers, tuple(launches)), kernels


class _Inputs:
    """Make tensors without data, with strides that differ from call to call."""

    def __init__(self, spec: MixerSpec, dtype: torch.dtype, seed: int) -> None:
        self.spec = spec
        self.dtype = dtype
        self.random = random.Random(seed)
        self.tensors: dict[str, Tensor] = {}
        self.axes: dict[str, int] = {}

    def add(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Make a contiguous tensor."""
        self.tensors[name] = torch.empty(shape, dtype=dtype or self.dtype, device="meta")
        return self.tensors[name]

    def add_heads(self, *sizes: int) -> list[Tensor]:
        """Make query, key and value `[*sizes, H, d]` with any strides of heads and tokens; batches are contiguous."""
        spec, made = self.spec, []
        for name, heads, width in (
            ("query", spec.q_heads, spec.d_k), ("key", spec.kv_heads, spec.d_k), ("value", spec.kv_heads, spec.d_v)
        ):  # fmt: skip
            shape, strides = (*sizes, heads, width), [1]
            for i, size in enumerate(reversed(shape[1:])):
                padding = ALIGNMENT * self.random.randrange(1, 1 << 10) if i < 2 else 0
                strides.insert(0, strides[0] * size + padding)
            self.axes |= {f"{name}_stride_{axis}": stride for axis, stride in enumerate(strides[:-1])}
            self.tensors[name] = torch.empty_strided(shape, strides, dtype=self.dtype, device="meta")
            made.append(self.tensors[name])
        return made

    def add_state(self, batch: int, prefix: str = "", part: str = "") -> MixerState:
        """Make the tensors of the state whose names begin with `part`; int64 becomes int32, which every caller has."""
        types = {"int64": torch.int32, "activation": self.dtype}
        return {
            x.name: self.add(prefix + x.name, batch, *x.shape, dtype=types.get(x.dtype) or DTYPES[x.dtype].torch)
            for x in self.spec.state() if x.name.startswith(part)
        }  # fmt: skip

    def add_rotary(self) -> Tensor:
        """Make the table of `rotary_table` for fully rotated heads."""
        spec = self.spec
        return self.add("rotary", 2, spec.max_distance + BLOCK + 1, spec.d_k // 2, dtype=torch.float32)


def _step(spec: MixerSpec, dtype: torch.dtype, max_batch: int) -> Iterator[Call]:
    from ligerexport.kernels.fused.mixer_step import mixer_step
    from ligerexport.kernels.fused.ragged_step import ragged_step

    operator = ragged_step if spec.config.ragged else mixer_step
    for seed in range(2 * max_batch):
        batch, x = 1 + seed // 2, _Inputs(spec, dtype, seed)
        query, key, value = x.add_heads(batch)
        position, state, rotary = x.add("position", batch, dtype=torch.int32), x.add_state(batch), x.add_rotary()
        output = x.add("output", batch, spec.q_heads, spec.d_v)
        score = x.add("score", batch, spec.kv_heads, dtype=torch.float32) if spec.config.foresees else None
        run = partial(operator, (query, key, value), position, state, spec, rotary, out=output, score=score)
        yield Call({"batch": batch} | x.axes, x.tensors, run, {"output": "output"} | dict.fromkeys(state, "state"))


def _prefill_sizes(longest: int) -> Iterator[tuple[int, int]]:
    """Yield batches and tokens, with every remainder of tokens divided by 128, by which no tile of tokens is larger.

    There are at least two tokens, because torch drops the stride of an axis of size one.
    """
    chance = random.Random(0)
    for rest in range(128):
        least, most = rest < 2, (longest - rest) // 128
        if least <= most:
            span = 2 if rest % 2 else 1 << chance.randrange(10)
            yield (1, 2, 3, 5, 8, 61, 500)[rest % 7], 128 * chance.randint(least, min(most, max(span, least))) + rest
    yield from ((batch, longest) for batch in (1, 3))


def _linear_attention(spec: MixerSpec, dtype: torch.dtype, max_batch: int) -> Iterator[Call]:
    from ligerexport.kernels.fused.linear_attention import forward

    def run(query: Tensor, key: Tensor, value: Tensor, past: Tensor) -> dict[str, Tensor]:
        output, present, _ = forward(query, key, value, None, past, None, spec.config.gate, 1.0)
        return {"output": output, "present_recurrent_state": present}

    spec = replace(spec, d_v=spec.columns)
    for seed, (batch, tokens) in enumerate(_prefill_sizes(1 << 16)):
        x = _Inputs(spec, dtype, seed)
        query, key, value = x.add_heads(batch, tokens)
        past = x.add("past_recurrent_state", batch, spec.kv_heads, spec.d_k, spec.d_v, dtype=torch.float32)
        yield Call({"batch": batch, "tokens": tokens} | x.axes, x.tensors, partial(run, query, key, value, past))


def _linear_attention_axes(spec: MixerSpec, dtype: torch.dtype) -> dict[str, str]:
    def segment(tokens: int) -> int:
        return segment_length(tokens, spec.kv_heads, spec.d_k, spec.columns, dtype.itemsize)

    first = record(next(_linear_attention(spec, dtype, 1)), tuple(LINEAR_ATTENTION_TABLES))
    return {
        "chunk": str(first.launches[0].constants["C"]),
        "segment": f"{segment(1)} * cdiv(batch * tokens, {bisect_right(range(1, 1 << 24), segment(1), key=segment)})",
        "pieces": "cdiv(tokens, segment)",
    }


_ROWS = "[start, end, b, 1 for the last of a sequence else 0, number of the first chunk] for b < batch, then i <"
LINEAR_ATTENTION_TABLES = {
    "segments": f"{_ROWS} pieces: start = b * tokens + i * segment, end = min(start + segment, (b + 1) * tokens), "
    "first chunk = b * cdiv(tokens, chunk) + i * (segment / chunk)",
    "chunks": f"{_ROWS} cdiv(tokens, chunk): as segments, with chunk in the place of segment",
    "offsets": "b * pieces for b <= batch",
}


def _memory_attention(spec: MixerSpec, dtype: torch.dtype, max_batch: int) -> Iterator[Call]:
    from ligerexport.kernels.fused.memory_attention import forward

    def run(*args: Any) -> dict[str, Tensor]:
        made = forward(*args)
        return {"output": made.output} | {f"present_{name}": x for name, x in made.present.items()}

    score = "arrival" if spec.config.judged or spec.config.foresees else None
    return _chunks(spec, dtype, run, score, "slot_")


def _chunks(
    spec: MixerSpec, dtype: torch.dtype, run: Callable[..., Any], score: str | None, part: str = ""
) -> Iterator[Call]:
    """Yield calls of `run` with whole chunks, a score named `score`, and the state whose names begin with `part`."""
    for seed, (batch, tokens) in enumerate(_prefill_sizes(spec.max_distance + 1)):
        x = _Inputs(spec, dtype, seed)
        projections = x.add_heads(batch, tokens)
        scores = x.add(score, batch, tokens, spec.kv_heads, dtype=torch.float32) if score else None
        position, state = x.add("position", batch, dtype=torch.int32), x.add_state(batch, "past_", part)
        call = partial(run, *projections, scores, position, state, spec, x.add_rotary())
        yield Call({"batch": batch, "tokens": tokens} | x.axes, x.tensors, call)


def _memory_attention_axes(spec: MixerSpec, dtype: torch.dtype) -> dict[str, str]:
    config = spec.config
    return {
        "candidates": f"tokens + {config.num_slots}",
        "events": f"tokens + {config.kept}",
        "blocks": "cdiv(tokens, 64)",
        "rows": "blocks + 1",
    }


def _prefill(spec: MixerSpec, dtype: torch.dtype, max_batch: int) -> Iterator[Call]:
    from ligerexport.kernels.fused.prefill import prefill
    from ligerexport.kernels.fused.ragged_prefill import ragged_prefill

    operator = ragged_prefill if spec.config.ragged else prefill

    def run(*args: Any) -> dict[str, Tensor]:
        output, present = operator(*args)
        return {"output": output} | {f"present_{name}": x for name, x in present.items()}

    return _chunks(spec, dtype, run, "score" if spec.config.foresees else None)


def _prefill_axes(spec: MixerSpec, dtype: torch.dtype) -> dict[str, str]:
    chunked = spec.config.recurrent and not spec.config.keyed
    linear = _linear_attention_axes(spec, dtype) if chunked else {"pieces": "cdiv(tokens, tokens)"}
    return linear | _memory_attention_axes(spec, dtype) | (_judge_axes(spec) if spec.config.judged else {})


def _ragged_prefill_axes(spec: MixerSpec, dtype: torch.dtype) -> dict[str, str]:
    from ligerexport.kernels.fused.ragged_prefill import roomy

    wide = roomy(spec)
    events = wide.config.num_slots - min(window for window, _ in wide.sizes)
    return _memory_attention_axes(wide, dtype) | {"events": f"tokens + {events}"}


def _division(spec: MixerSpec, recording: Recording) -> Any:
    from ligerexport.kernels.fused.ragged_step import plan_on

    return plan_on(spec.text, recording.launches[0].constants["TILE"], torch.device("cpu"))


def _places_of(spec: MixerSpec, recording: Recording) -> Tensor:
    from ligerexport.kernels.fused.ragged_prefill import places_on

    return places_on(spec.text, torch.device("cpu"))


def _sizes_of(spec: MixerSpec, recording: Recording) -> Tensor:
    from ligerexport.kernels.fused.ragged_prefill import roomy

    return torch.tensor(roomy(spec).sizes)


def _judge_axes(spec: MixerSpec) -> dict[str, str]:
    from ligerexport.kernels.fused.recall_error import segment_tokens

    def segment(tokens: int) -> int:
        return segment_tokens(1, tokens, spec.kv_heads, spec.d_k, spec.d_v)[0]

    longest = bisect_right(range(1, 1 << 24), segment(1), key=segment)
    return {
        "judge_segment": f"{segment(1)} * cdiv(batch * tokens, {longest})",
        "judge_pieces": "cdiv(tokens, judge_segment)",
    }


def _linear(spec: LinearSpec, dtype: torch.dtype, max_batch: int) -> Iterator[Call]:
    from ligerexport.kernels.fused.linear import linear

    def make(name: str, *shape: int, kind: torch.dtype = torch.float32) -> Tensor:
        tensors[name] = torch.empty(shape, dtype=kind, device="meta")
        return tensors[name]

    n, k, normed = spec.outputs, spec.inputs, spec.epsilon is not None
    height = n if spec.activation is None else 2 * n
    stored = (k, n) if spec.indexed else (height, k)
    for rows in (*range(1, 70), 97, 128, 129, 255, 1000, 4096, 5001):
        tensors: dict[str, Tensor] = {}
        if spec.indexed:
            x = make("input", rows, 1, kind=torch.int32)
        else:
            x = make("input", rows, k, kind=torch.float32 if normed else dtype)
        weight = make("weight", *stored, kind=torch.uint8 if spec.coded else dtype)
        scale = make("scale", stored[0]) if spec.coded else None
        norm = make("norm", k) if normed else None
        bias = make("bias", height) if spec.bias else None
        residual = make("residual", rows, n) if spec.residual else None
        out = make("output", rows, n, kind=torch.float32 if spec.wide else dtype)
        side = None
        if spec.side:
            side = make("side_weight", spec.side, k), make("side_bias", spec.side), make("side_output", rows, spec.side)
        run = partial(linear, x, weight, norm, bias, residual, spec, out=out, side=side, scale=scale)
        roles = {"output": "output"} | ({"side_output": "output"} if spec.side else {})
        yield Call({"rows": rows}, tensors, run, roles)


OPERATORS: dict[str, Operator] = {
    "step": Operator(_step, by="batch", limits=lambda spec, max_batch: {"batch": max_batch}),
    "linear_attention": Operator(_linear_attention, _linear_attention_axes, LINEAR_ATTENTION_TABLES, by="pieces"),
    "memory_attention": Operator(
        _memory_attention, _memory_attention_axes, limits=lambda spec, max_batch: {"tokens": spec.max_distance + 1}
    ),
    "prefill": Operator(
        _prefill, _prefill_axes, LINEAR_ATTENTION_TABLES, by="pieces",
        limits=lambda spec, max_batch: {"tokens": spec.max_distance + 1},
    ),
}  # fmt: skip
"""Operators that can be compiled: a whole step of one token; for chunks the recurrence, the memory's softmax, and the
whole mixer."""
RAGGED_OPERATORS: dict[str, Operator] = {
    "step": replace(
        OPERATORS["step"],
        tables={"tiles": lambda *of: _division(*of).tiles, "heads": lambda *of: _division(*of).heads},
    ),
    "prefill": replace(
        OPERATORS["prefill"], derived=_ragged_prefill_axes, tables={"places": _places_of, "sizes": _sizes_of}, by=""
    ),
}
"""The same for layers with ragged slots and a fused step."""
PRODUCT = Operator(_linear, by="rows")
"""The operator of a `LinearSpec`."""
