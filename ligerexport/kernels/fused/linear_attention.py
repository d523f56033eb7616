"""Gated linear attention on the GPU: launches and gradients of the kernels beside this file.

Forward is five launches, or three if each sequence is a single segment; only the segments' states are kept for the
backward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused import linear_attention_backward as backward_kernels
from ligerexport.kernels.fused import linear_attention_forward as forward_kernels
from ligerexport.kernels.fused import strong_channels
from ligerexport.kernels.fused.launch import launch, layout
from ligerexport.kernels.fused.segments import Segments, cut, cut_batch, segment_length
from ligerexport.kernels.tuning import WIDEST, Tile, get_tile, padded, target
from ligerexport.model.gates import get_gate

SCANNED = 1024
"""Number of state elements that a program of `scan_states` carries."""

TOGETHER = strong_channels.TOGETHER.value

INTERPRETED = triton.knobs.runtime.interpret


@dataclass(frozen=True, eq=False)
class _Call:
    """Values that all launches share for tensors of one layout, found once; also the key of their compiled kernels."""

    tokens: int
    heads: int
    group: int
    d_k: int
    d_v: int
    sequences: int
    query_map: str
    key_map: str
    decay: tuple[str, float, float]
    itemsize: int
    operand: tl.dtype
    precision: str
    saved: torch.dtype

    def tile(self, kernel: str) -> Tile:
        # value channels are divided into blocks, so more of them than any row of the table need no other tile
        return get_tile(kernel, max(padded(self.d_k), min(padded(self.d_v), WIDEST)), self.itemsize)

    @cached_property
    def chunk(self) -> int:
        return self.tile("prepare").chunk

    @cached_property
    def segment(self) -> int:
        return segment_length(self.tokens, self.heads, self.d_k, self.d_v, self.itemsize)

    @cached_property
    def grouped(self) -> str:
        """Name of the tile of `scaled_gradient`."""
        return "scaled_gradient_group" if self.group > 1 else "scaled_gradient"

    @cached_property
    def blocks(self) -> dict[str, int]:
        """Number of blocks into which each kernel divides the channels of a head."""
        found = {
            name: triton.cdiv(self.d_v, self.block_v(name))
            for name in ("segment_states", "attend_segments", "value_gradient")
        }
        return found | {name: triton.cdiv(self.d_k, self.block_k(name)) for name in ("prepare", "finish_gradient")}

    def block_v(self, kernel: str) -> int:
        return min(self.tile(kernel).block_v, padded(self.d_v))

    def block_k(self, kernel: str) -> int:
        # maps and decays may need all channels of a head in one program
        return padded(self.d_k) if self.query_map != "none" else min(self.tile(kernel).block_k, padded(self.d_k))

    def mapped(self, kernel: str) -> str:
        """Return the name of a kernel's tile, which differs if the kernel also computes feature maps."""
        return kernel if self.query_map == "none" else kernel + "_maps"

    def cut(self, cu_seqlens: Tensor | None, length: int, device: torch.device) -> Segments:
        if cu_seqlens is None:
            return cut_batch(self.sequences, self.tokens // max(1, self.sequences), length, self.chunk, device)
        return cut(cu_seqlens, self.tokens, length, self.chunk)

    def walk(self, kernel: str) -> dict[str, Any]:
        """Return the arguments of all kernels that work on states."""
        return {
            "HEADS": self.heads, "GROUP": self.group, "K": self.d_k, "V": self.d_v, "BK": padded(self.d_k),
            "BV": self.block_v(kernel), "C": self.chunk, "OPERAND": self.operand, "PRECISION": self.precision,
            "num_warps": self.tile(kernel).warps,
        }  # fmt: skip

    def maps(self) -> dict[str, Any]:
        """Return the arguments of all kernels that read raw projections."""
        return {"QUERY_MAP": self.query_map, "KEY_MAP": self.key_map, "DECAY": self.decay}

    def elementwise(self, kernel: str) -> dict[str, Any]:
        """Return the arguments of `prepare` or `finish_gradient`."""
        tile = self.tile(self.mapped(kernel))
        return {
            "HEADS": self.heads, "GROUP": self.group, "K": self.d_k, "BK": self.block_k(kernel), "C": self.chunk,
            "OPERAND": self.operand, "PRECISION": self.precision, "num_warps": tile.warps, "STAGES": tile.stages,
            **self.maps(),
        }  # fmt: skip


@lru_cache(maxsize=1024)
def _call(layouts: Any, sequences: int, packed: bool, gate: str | None, target: int) -> _Call:
    """Return the call for the `layout` of query, key, value `[T, H, d]` and all other inputs.

    `packed` decides the number of segments and `target` the tiles, so calls that differ in them share nothing.
    """
    (tokens, q_heads, d_k), _, dtype, *_ = layouts[0]
    (_, heads, _), (_, _, d_v) = layouts[1][0], layouts[2][0]
    row = None if gate is None else get_gate(gate)
    exact = dtype == torch.float32
    return _Call(
        tokens=tokens,
        heads=heads,
        group=q_heads // heads,
        d_k=d_k,
        d_v=d_v,
        sequences=sequences,
        query_map="none" if row is None else row.query_map,
        key_map="none" if row is None else row.key_map,
        decay=("given", 1.0, 0.0) if row is None else row.kernel_decay,
        itemsize=dtype.itemsize,
        operand=tl.float32 if exact or INTERPRETED else tl.bfloat16,  # the interpreter has no bf16 product
        precision="tf32x3" if exact else "tf32",
        saved=torch.float32 if exact else torch.bfloat16,
    )


def _strides(*tensors: Tensor) -> list[int]:
    """Return token and head strides `[T, H, d]`."""
    return [stride for x in tensors for stride in x.stride()[:2]]


@dataclass(frozen=True)
class _Prepared:
    """The results of `prepare`.

    Queries `[T, H_q, d_k]` and keys `[T, H_kv, d_k]` that carry their decay. For each chunk `[chunks, H_kv]`, the
    factors `[.., 3, d_k]` of the state and whether a channel is strong; if one is, its scores `[chunks, H_q, C, C]`.
    """

    query: Tensor
    key: Tensor
    factors: Tensor
    flags: Tensor
    strong: Tensor


def _prepare(call: _Call, chunks: Segments, query: Tensor, key: Tensor, decay: Tensor, scale: float) -> _Prepared:
    q_heads, blocks = call.heads * call.group, call.blocks["prepare"]
    new_flags = torch.empty if blocks == 1 else torch.zeros  # several blocks of channels add to it
    made = _Prepared(
        query.new_empty(query.shape, dtype=call.saved),
        query.new_empty(key.shape, dtype=call.saved),
        query.new_empty(chunks.count, call.heads, 3, call.d_k, dtype=torch.float32),
        new_flags(chunks.count, call.heads, dtype=torch.int32, device=query.device),
        query.new_empty(chunks.count, q_heads, call.chunk, call.chunk, dtype=call.saved),
    )
    launch(
        call, forward_kernels.prepare, (call.heads, chunks.count, blocks),
        query, key, decay, made.query, made.key, made.factors, made.flags, chunks.table, scale,
        *_strides(query, key, decay), constants=lambda: call.elementwise("prepare"),
    )  # fmt: skip
    launch(
        call, strong_channels.strong_pairs, (q_heads, triton.cdiv(chunks.count, TOGETHER), 1),
        query, key, decay, made.factors, made.flags, made.strong, chunks.table, chunks.count, scale,
        *_strides(query, key, decay),
        constants=lambda: {
            "HEADS": call.heads, "GROUP": call.group, "K": call.d_k, "BK": padded(call.d_k), "C": call.chunk,
            "num_warps": call.tile("strong_channels").warps, **call.maps(),
        },
    )  # fmt: skip
    return made


def _segment_states(
    call: _Call, segments: Segments, prepared: _Prepared, other: Tensor, states: Tensor | None,
    chunk_states: Tensor | None, reverse: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Launch `segment_states`: sums and decays of the segments, or the state of every chunk into `chunk_states`."""
    store = chunk_states is not None
    starts, decays = states is not None and store, prepared.factors
    if chunk_states is None:
        chunk_states = states = other.new_empty(segments.count, call.heads, call.d_k, call.d_v, dtype=torch.float32)
        decays = other.new_empty(segments.count, call.heads, call.d_k, dtype=torch.float32)
    elif states is None:
        states = prepared.factors
    assert states is not None
    launch(
        (call, reverse, store, starts), forward_kernels.segment_states,
        (call.blocks["segment_states"], call.heads, segments.count),
        prepared.query if reverse else prepared.key, other, prepared.factors, prepared.flags, states, decays,
        chunk_states, segments.table, *_strides(other),
        constants=lambda: call.walk("segment_states") | {
            "GROUP": call.group if reverse else 1, "REVERSE": reverse, "STORE_CHUNKS": store, "STATES": starts,
            "STAGES": call.tile("segment_states").stages,
        },
    )  # fmt: skip
    return states, decays


def _scan(
    call: _Call, segments: Segments, states: Tensor, decays: Tensor, initial: Tensor | None, final: Tensor | None,
    reverse: bool,
) -> None:  # fmt: skip
    """Launch `scan_states`."""
    launch(
        (call, reverse, initial is None, final is None), forward_kernels.scan_states,
        (triton.cdiv(call.d_k * call.d_v, SCANNED), call.heads, call.sequences),
        states, decays, states if initial is None else initial, states if final is None else final, segments.offsets,
        constants=lambda: {
            "HEADS": call.heads, "K": call.d_k, "V": call.d_v, "BLOCK": SCANNED, "INITIAL": initial is not None,
            "FINAL": final is not None, "REVERSE": reverse,
        },
    )  # fmt: skip


def _flat(x: Tensor) -> Tensor:
    """Return `[B, T, H, d]` as `[B T, H, d]` with contiguous channels, without a copy where strides allow."""
    x = x.flatten(0, 1)
    return x if x.stride(-1) == 1 else x.contiguous()


def _whole(state: Tensor | None) -> Tensor | None:
    """Return a state, which may be some heads of another one, as the kernels count its elements."""
    return None if state is None else state.contiguous()


def forward(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor | None, initial_state: Tensor | None,
    cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run the recurrence; arguments and first two results are those of `ligerexport.kernels.library.linear_attention`.

    Returns:
        Output, final state, and the states before each segment `[S, H_kv, d_k, d_v]` fp32 for `backward`; S is 0 if
        each sequence is one segment.
    """
    batch, length = query.shape[:2]
    sequences = batch if cu_seqlens is None else cu_seqlens.numel() - 1
    output = value.new_empty(batch, length, query.shape[2], value.shape[3])
    initial_state = _whole(initial_state)
    q, k, v = _flat(query), _flat(key), _flat(value)
    g = k if decay is None else _flat(decay)
    call = _call(layout(q, k, v, g, initial_state), sequences, cu_seqlens is not None, gate, target())
    segments = call.cut(cu_seqlens, call.segment, q.device)
    chunks = call.cut(cu_seqlens, call.chunk, q.device)
    prepared = _prepare(call, chunks, q, k, g, scale)
    states = initial_state
    if not segments.single:
        states, decays = _segment_states(call, segments, prepared, v, None, None, reverse=False)
        _scan(call, segments, states, decays, initial_state, None, reverse=False)
    final = query.new_empty(sequences, call.heads, call.d_k, call.d_v, dtype=torch.float32)
    o = output.flatten(0, 1)
    launch(
        call, forward_kernels.attend_segments, (call.blocks["attend_segments"], call.heads, segments.count),
        prepared.query, prepared.key, v, prepared.factors, prepared.flags, prepared.strong, o,
        final if states is None else states, final, segments.table, *_strides(v, o),
        constants=lambda: call.walk("attend_segments") | {
            "STATES": states is not None, "FINAL": True,
            "STAGES": call.tile("attend_segments").stages if call.group <= 4 else 1,
        },
    )  # fmt: skip
    return output, final, final.new_empty(0, *final.shape[1:]) if states is None or segments.single else states


def backward(
    d_output: Tensor, d_final: Tensor | None, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None],
    states: Tensor, cu_seqlens: Tensor | None, gate: str | None, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Return the gradients of `inputs`: query, key, value, decay and initial state."""
    query, key, value, decay, initial_state = inputs
    initial_state, d_final = _whole(initial_state), _whole(d_final)
    sequences = query.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    q, k, v, do = (_flat(x) for x in (query, key, value, d_output))
    g = k if decay is None else _flat(decay)
    call = _call(layout(q, k, v, g, initial_state, do, d_final), sequences, cu_seqlens is not None, gate, target())
    segments = call.cut(cu_seqlens, call.segment, q.device)
    chunks = call.cut(cu_seqlens, call.chunk, q.device)
    prepared = _prepare(call, chunks, q, k, g, scale)

    before = q.new_empty(chunks.count, call.heads, call.d_k, call.d_v, dtype=call.saved)
    after = torch.empty_like(before)
    entry = initial_state if segments.single else states
    _segment_states(call, segments, prepared, v, entry, before, reverse=False)
    adjoints, d_initial = d_final, None
    if not segments.single or initial_state is not None:
        adjoints, decays = _segment_states(call, segments, prepared, do, None, None, reverse=True)
        d_initial = None if initial_state is None else torch.empty_like(initial_state)
        _scan(call, segments, adjoints, decays, d_final, d_initial, reverse=True)
    _segment_states(call, segments, prepared, do, adjoints, after, reverse=True)

    d_value = torch.empty_like(value, memory_format=torch.contiguous_format)
    dv = d_value.flatten(0, 1)
    launch(
        call, backward_kernels.value_gradient, (call.blocks["value_gradient"], call.heads, chunks.count),
        prepared.query, prepared.key, prepared.flags, prepared.strong, do, dv, after, chunks.table, *_strides(do, dv),
        constants=lambda: call.walk("value_gradient"),
    )  # fmt: skip
    # a softmax's gradient is a difference of numbers that rounding would make equal
    saved = call.saved if gate is None else torch.float32
    scaled_dq, scaled_dk = (
        torch.empty_like(x, dtype=saved, memory_format=torch.contiguous_format) for x in (query, key)
    )
    d_decay = None if decay is None else torch.empty_like(decay, memory_format=torch.contiguous_format)
    dg = torch.empty_like(prepared.key) if d_decay is None else d_decay.flatten(0, 1)
    launch(
        call, backward_kernels.scaled_gradient, (call.heads, chunks.count, 1),
        prepared.query, prepared.key, v, prepared.factors, prepared.flags, do, scaled_dq, scaled_dk, dg, before, after,
        chunks.table, *_strides(v, do, dg), constants=lambda: call.walk(call.grouped),
    )  # fmt: skip
    launch(
        call, strong_channels.strong_gradient, (call.heads, triton.cdiv(chunks.count, TOGETHER), 1),
        q, k, v, g, prepared.factors, prepared.flags, do, scaled_dq, scaled_dk, dg, chunks.table, chunks.count, scale,
        *_strides(q, k, v, g, do, dg), constants=lambda: call.walk("strong_channels") | call.maps(),
    )  # fmt: skip
    same = saved == query.dtype  # same dtype: write in place
    d_query, d_key = (x if same else torch.empty_like(x, dtype=query.dtype) for x in (scaled_dq, scaled_dk))
    dq, dk = d_query.flatten(0, 1), d_key.flatten(0, 1)
    launch(
        call, backward_kernels.finish_gradient, (call.heads, chunks.count, call.blocks["finish_gradient"]),
        q, k, g, scaled_dq, scaled_dk, dg, prepared.flags, dq, dk, chunks.table, scale, *_strides(q, k, g, dg, dq, dk),
        constants=lambda: call.elementwise("finish_gradient"),
    )  # fmt: skip
    return d_query, d_key, d_value, d_decay, d_initial
