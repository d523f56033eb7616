"""A whole chunk of `liger_mixer` over ragged slots in kernels only, as `ligerexport.kernels.ragged` does it with torch.

The slots of all heads are spread out, with room for the largest head, for the kernels of equal heads, which read the
sizes of each one. New keys and values are rounded to the type of the state before. The slots that remain are copied as
codes, from the old state or from what was rounded, so no code is computed twice.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from functools import cache, lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from ligerexport.kernels.fused.attend import attend
from ligerexport.kernels.fused.candidates import EMPTY, Candidates, gather_candidates, narrowed
from ligerexport.kernels.fused.launch import launch, layout, same
from ligerexport.kernels.fused.prefill import blend_outputs
from ligerexport.kernels.fused.ragged_step import FIELDS, code_scale, to_codes
from ligerexport.kernels.fused.slots import deaths, old_table, present_candidates
from ligerexport.kernels.tuning import cdiv, power_of_two
from ligerexport.model.state import MixerSpec, MixerState

Codes = tuple[Tensor, Tensor | None]
"""Vectors in the type of the state `[..., d]`, and their scales `[...]` if they are codes of 8 bits."""

ROWS = 16
"""Slots or tokens of a program."""


def ragged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    score: Tensor | None,
    position: Tensor,
    state: MixerState,
    spec: MixerSpec,
    rotary: Tensor,
) -> tuple[Tensor, MixerState]:
    """Run `liger_mixer` for a layer with `spec.splits`; arguments and results are the same, with slots in any order.

    Where activations are bf16, products are in fp16, which holds codes times scales with eight times less error.
    """
    kind = torch.float16 if query.dtype == torch.bfloat16 and spec.config.state_dtype != "activation" else query.dtype
    call = same(layout(query, key, value, score, position, rotary, *state.values()), spec.text)
    key, new_key = _rounded(key, spec, kind, (call, "key"))
    value, new_value = _rounded(value, spec, kind, (call, "value"))
    places = places_on(spec.text, query.device)
    wide = roomy(spec)
    past = _spread(state, spec, wide, places, kind, call)
    found = gather_candidates(query, key, value, score, position, past, wide, rotary, call, kind)
    death = deaths(found)  # scores are complete when a token arrives
    table = old_table(found, death)
    present = _keep(found, table, state, (new_key, new_value), spec, places)
    output, _ = attend(found, death, table, spec.d_v, dtype=query.dtype)
    assert output is not None
    if spec.config.attention_weight == 1:
        return output, present
    return blend_outputs(output, output, spec), present


def roomy(spec: MixerSpec) -> MixerSpec:
    """Return the layer with room for its largest head and the sizes of each one."""
    return spec.roomy or _equal(spec)


@lru_cache(maxsize=256)
def _equal(spec: MixerSpec) -> MixerSpec:
    ((_, group),) = spec.groups
    sizes = spec.config.window, spec.config.kept - spec.config.sinks
    return replace(group, sizes=(sizes,) * spec.kv_heads)


@cache
def places_on(text: str, device: torch.device) -> Tensor:
    """Return `[H_kv, FIELDS]`: first slot, slots, first score, and whether the head keeps scores."""
    spec = MixerSpec.from_text(text)
    counts = spec.slots_per_head
    kept = [bool(head.config.slots) for head in spec.heads]
    starts = [0, *accumulate(counts)]
    scores = [0, *accumulate(n * scored for n, scored in zip(counts, kept, strict=True))]
    rows = [(starts[h], counts[h], scores[h], int(kept[h])) for h in range(spec.kv_heads)]
    return torch.tensor([(*row, *[0] * (FIELDS.value - len(row))) for row in rows], dtype=torch.int32, device=device)


def _rounded(x: Tensor, spec: MixerSpec, dtype: torch.dtype, call: Hashable) -> tuple[Tensor, Codes]:
    """Return vectors `[B, T, H_kv, d]` rounded to the type of the state, and as they are stored."""
    if spec.config.state_dtype == "activation":
        return x, (x, None)
    batch, tokens, heads, width = x.shape
    scaled = spec.config.scaled
    rounded, codes = (
        x.new_empty(x.shape, dtype=dtype),
        x.new_empty(x.shape, dtype=torch.int8 if scaled else torch.float16),
    )
    scale = x.new_empty(batch, tokens, heads, dtype=torch.float16) if scaled else None
    launch(
        call, _round_kernel, (cdiv(tokens, ROWS), heads, batch),
        x, rounded, codes, scale, *x.stride()[:3], tokens,
        constants=lambda: {
            "H": heads, "D": width, "WIDTH": power_of_two(width), "ROWS": ROWS, "num_warps": 4,
        },
    )  # fmt: skip
    return rounded, (codes, scale)


def _spread(
    state: MixerState, spec: MixerSpec, wide: MixerSpec, places: Tensor, dtype: torch.dtype, call: Hashable
) -> MixerState:
    """Return the state of `wide`, in which a head has its slots at the end of its row, and empty ones before."""
    position, room = state["slot_position"], wide.config.num_slots
    batch, slots = position.shape
    score = state.get("slot_score")
    lanes = (batch, spec.kv_heads, room)
    past = {
        "slot_key": position.new_empty(*lanes, spec.d_k, dtype=dtype),
        "slot_value": position.new_empty(*lanes, spec.d_v, dtype=dtype),
        "slot_position": position.new_empty(lanes),
    }
    if score is not None:
        past["slot_score"] = score.new_empty(batch, spec.kv_heads, 1, room)
    launch(
        call, _spread_kernel, (cdiv(room, ROWS), spec.kv_heads, batch),
        *(state[name] for name in ("slot_key", "slot_value")), state.get("slot_key_scale"),
        state.get("slot_value_scale"), position, score, places,
        *past.values(), *(() if score is not None else (None,)), slots, 0 if score is None else score.shape[2],
        constants=lambda: _widths(spec) | {"N": room},
    )  # fmt: skip
    return past


def _keep(
    found: Candidates,
    table: Tensor,
    state: MixerState,
    new: tuple[Codes, Codes],
    spec: MixerSpec,
    places: Tensor,
) -> MixerState:
    """Return the state after the last token; `new` has keys and values of the new tokens."""
    present = {name: torch.empty_like(x) for name, x in state.items()}
    (key, key_scale), (value, value_scale) = new
    names = ("slot_key", "slot_value", "slot_key_scale", "slot_value_scale")
    score, config = state.get("slot_score"), found.spec.config
    launch(
        found.call, _keep_kernel, (cdiv(max(spec.slots_per_head), ROWS), spec.kv_heads, len(key)),
        *(state.get(name) for name in names), key, value, key_scale, value_scale,
        found.time, found.source, found.score, table, found.position, found.sizes, places,
        *(present.get(name) for name in (*names, "slot_position", "slot_score")), *key.stride()[:3],
        *value.stride()[:3], found.length, found.blocks, state["slot_position"].shape[1],
        0 if score is None else score.shape[2],
        constants=lambda: _widths(spec) | {
            "N": config.num_slots, "KEPT": config.kept, "KEPT_PADDED": power_of_two(max(config.kept, 1)),
        },
    )  # fmt: skip
    return present


def _widths(spec: MixerSpec) -> dict[str, int]:
    """Return the constants that a copy of slots needs."""
    return {
        "H": spec.kv_heads, "D_K": spec.d_k, "WIDTH_K": power_of_two(spec.d_k), "D_V": spec.d_v,
        "WIDTH_V": power_of_two(spec.d_v), "FIELDS": FIELDS, "ROWS": ROWS, "num_warps": 4,
    }  # fmt: skip


@triton.jit
def _round_kernel(
    p_x, p_rounded, p_codes, p_scale, x_b, x_t, x_h, tokens,
    H: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round new vectors to the type of the state. Grid: (T / ROWS, H, B)."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    t, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (t < tokens)[:, None] & (o_d < D)[None, :]
    x = tl.load(p_x + b * x_b + t.to(tl.int64)[:, None] * x_t + h * x_h + o_d[None, :], mask=mask, other=0.0)
    x, row = x.to(tl.float32), (b * tokens + t) * H + h
    factor = tl.full((ROWS,), 1.0, tl.float32)
    if p_scale is not None:
        factor = code_scale(x)
        tl.store(p_scale + row, factor.to(tl.float16), mask=t < tokens)
    codes = to_codes(x, factor[:, None], p_codes.dtype.element_ty)
    to = row[:, None] * D + o_d[None, :]
    tl.store(p_codes + to, codes.to(p_codes.dtype.element_ty), mask=mask)
    tl.store(p_rounded + to, narrowed(codes * factor[:, None], p_x, p_rounded), mask=mask)


@triton.jit
def _spread_rows(
    p_from, p_scale, p_to, slot, to, held, m_n, D: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Copy vectors of slots, as numbers."""
    o_d = tl.arange(0, WIDTH)
    m_d = (o_d < D)[None, :]
    x = tl.load(p_from + slot[:, None] * D + o_d[None, :], mask=held[:, None] & m_d, other=0.0).to(tl.float32)
    if p_scale is not None:
        x *= tl.load(p_scale + slot, mask=held, other=0.0).to(tl.float32)[:, None]
    tl.store(p_to + to[:, None] * D + o_d[None, :], x.to(p_to.dtype.element_ty), mask=m_n[:, None] & m_d)


@triton.jit
def _spread_kernel(
    p_slot_key, p_slot_value, p_key_scale, p_value_scale, p_slot_position, p_slot_score, p_places,
    p_wide_key, p_wide_value, p_wide_position, p_wide_score, slots, scored,
    H: tl.constexpr, N: tl.constexpr, D_K: tl.constexpr, WIDTH_K: tl.constexpr, D_V: tl.constexpr,
    WIDTH_V: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Put the slots of a head at the end of a row of N. Grid: (N / ROWS, H, B)."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    p_places += h * FIELDS
    first, count = tl.load(p_places), tl.load(p_places + 1)
    n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    at = n - (N - count)
    m_n, held = n < N, (n < N) & (at >= 0)
    slot, to = b * slots + first + at, (b * H + h) * N + n
    position = tl.load(p_slot_position + slot, mask=held, other=-1)
    tl.store(p_wide_position + to, position, mask=m_n)
    if p_slot_score is not None:
        keeps = held & (tl.load(p_places + 3) > 0)
        score = tl.load(p_slot_score + b * scored + tl.load(p_places + 2) + at, mask=keeps, other=0.0)
        tl.store(p_wide_score + to, score, mask=m_n)
    held &= position >= 0  # an empty slot may hold any number
    _spread_rows(p_slot_key, p_key_scale, p_wide_key, slot, to, held, m_n, D_K, WIDTH_K)
    _spread_rows(p_slot_value, p_value_scale, p_wide_value, slot, to, held, m_n, D_V, WIDTH_V)


@triton.jit
def _keep_rows(
    p_old, p_new, p_old_scale, p_new_scale, p_present, p_scale, new_b, new_t, new_h, old_slot, old, t, row, new, slot,
    m_slot, b, h, D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Copy codes and scales of old slots and of new tokens; 0 for neither."""
    o_d = tl.arange(0, WIDTH)
    m_d = (o_d < D)[None, :]
    carried = tl.load(p_old + old_slot[:, None] * D + o_d[None, :], mask=old[:, None] & m_d, other=0)
    p_new += b * new_b + h * new_h
    arrived = tl.load(p_new + t[:, None] * new_t + o_d[None, :], mask=new[:, None] & m_d, other=0)
    codes = tl.where(old[:, None], carried, arrived.to(carried.dtype))
    tl.store(p_present + slot[:, None] * D + o_d[None, :], codes, mask=m_slot[:, None] & m_d)
    if p_scale is not None:
        scale = tl.load(p_old_scale + old_slot, mask=old, other=0.0)
        scale = tl.where(old, scale, tl.load(p_new_scale + row, mask=new, other=0.0))
        tl.store(p_scale + slot, scale, mask=m_slot)


@triton.jit
def _keep_kernel(
    p_slot_key, p_slot_value, p_key_scale, p_value_scale, p_new_key, p_new_value, p_new_key_scale, p_new_value_scale,
    p_time, p_source, p_score, p_table, p_position, p_sizes, p_places,
    p_kept_key, p_kept_value, p_kept_key_scale, p_kept_value_scale, p_kept_position, p_kept_score,
    key_b, key_t, key_h, value_b, value_t, value_h, length, blocks, slots, scored,
    H: tl.constexpr, N: tl.constexpr, KEPT: tl.constexpr, KEPT_PADDED: tl.constexpr, D_K: tl.constexpr,
    WIDTH_K: tl.constexpr, D_V: tl.constexpr, WIDTH_V: tl.constexpr, FIELDS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the slots of a head after the last token. Grid: (slots of the largest head / ROWS, H, B)."""
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    bh, p_row = b * H + h, p_places + h * FIELDS
    first, count = tl.load(p_row), tl.load(p_row + 1)
    at = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_at, empty = at < count, N - count
    c = present_candidates(p_table, p_sizes, h, bh, empty + at, m_at, length, blocks, N, KEPT, KEPT_PADDED, RAGGED=True)
    candidates = bh * (N + length) + c
    time = tl.load(p_time + candidates, mask=c >= 0, other=EMPTY)
    full, slot = time != EMPTY, b * slots + first + at
    tl.store(p_kept_position + slot, tl.where(full, time + tl.load(p_position + b), -1).to(tl.int32), mask=m_at)
    if p_kept_score is not None:
        keeps = m_at & (tl.load(p_row + 3) > 0)
        score = tl.load(p_score + candidates, mask=full & keeps, other=0.0)
        tl.store(p_kept_score + b * scored + tl.load(p_row + 2) + at, score, mask=keeps)

    old, new = full & (c < N), full & (c >= N)
    source = tl.load(p_source + bh * N + c, mask=old, other=0)
    old_slot, t = b * slots + first + source - empty, (c - N).to(tl.int64)
    row = (b * length + t) * H + h
    _keep_rows(
        p_slot_key, p_new_key, p_key_scale, p_new_key_scale, p_kept_key, p_kept_key_scale, key_b, key_t, key_h,
        old_slot, old, t, row, new, slot, m_at, b, h, D_K, WIDTH_K,
    )  # fmt: skip
    _keep_rows(
        p_slot_value, p_new_value, p_value_scale, p_new_value_scale, p_kept_value, p_kept_value_scale, value_b, value_t,
        value_h, old_slot, old, t, row, new, slot, m_at, b, h, D_V, WIDTH_V,
    )  # fmt: skip
