"""Level 1: steps over ragged slots in Triton against plain torch: output, and state bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ligerexport.checkpoint.convert import load_model
from ligerexport.kernels.fused.ragged_step import choose_block, ragged_step
from ligerexport.kernels.library.mixer_step import CHANGED, mixer_step
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.layers import mixer
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import STATE_DTYPES, LigerConfig
from ligerexport.model.state import MixerSpec, MixerState
from tests.checkpoints import make_checkpoint
from tests.tolerances import FUSED_BF16, FUSED_FP32, MODEL_FP32

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SOFTMAX = LigerConfig(window=8, sinks=2, slots=(("learned", 5),), attention_weight=0.9, recurrence_weight=0.0)
RAGGED = replace(SOFTMAX, heads=("3 8+5 1+20",))
CONFIGS = {
    **{kind: replace(RAGGED, state_dtype=kind) for kind in STATE_DTYPES},
    "no scores": replace(RAGGED, heads=("3 20 1",), sinks=0, state_dtype="int8"),
    "equal heads": replace(SOFTMAX, state_dtype="int8"),
}


def make_spec(config: LigerConfig, heads: tuple[int, int] = (6, 3), d_k: int = 24, d_v: int = 40) -> MixerSpec:
    return MixerSpec(config, *heads, d_k, d_v, scale=d_k**-0.5, max_distance=max(40, config.window))


def make_inputs(spec: MixerSpec, batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return query, key, value `[B, T, H, d]` in fp32, rounded to `dtype`, and scores `[B, T, H_kv]` with ties."""
    widths = ((spec.q_heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v))
    heads = [(torch.randn(batch, length, h, d) * 2).to(dtype).float() for h, d in widths]
    return [*heads, torch.randint(-8, 8, (batch, length, spec.kv_heads)).float()]


def make_rotary(spec: MixerSpec) -> Tensor:
    """Return the table for heads of which a quarter is not rotated."""
    rotated = spec.d_k * 3 // 8
    return rotary_table(100.0 ** (-torch.arange(rotated) / rotated), spec.max_distance, BLOCK, turns=True)


def prefilled(spec: MixerSpec, position: Tensor, length: int) -> MixerState:
    """Return the state after `length` random tokens from plain torch in fp32."""
    *heads, score = make_inputs(spec, len(position), length)
    start = spec.initial_state(len(position), torch.float32)
    _, state = liger_mixer(*heads, position, start, spec, make_rotary(spec), score)
    return state


def to_device(state: MixerState, spec: MixerSpec, dtype: torch.dtype = torch.float32) -> MixerState:
    """Return a copy for the kernels with activations in `dtype`; empty slots hold NaN or another number."""
    types = {"slot_key": dtype, "slot_value": dtype} if spec.config.state_dtype == "activation" else {}
    made = {name: x.to(DEVICE, types.get(name, x.dtype), copy=True) for name, x in state.items()}
    for name in made.keys() - {"slot_position", "slot_score"}:
        made[name][made["slot_position"] < 0] = torch.nan if made[name].is_floating_point() else 99
    return made


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error; NaN counts as infinite."""
    found = found.detach().cpu().double()
    return ((found - expected).norm() / expected.norm()).item() if found.isfinite().all() else float("inf")


def assert_same(found: MixerState, expected: MixerState, spec: MixerSpec) -> None:
    """Compare two states bit for bit, with the slots of each head in the order of their positions."""
    start = scored = 0
    for head in spec.heads:
        slots = slice(start, start + head.config.num_slots)
        scores = slice(scored, scored + head.config.num_slots)
        start, scored = slots.stop, scores.stop if head.config.slots else scored
        sides = []
        for state in (found, expected):
            position, order = state["slot_position"][:, slots].cpu().sort(dim=1)
            side = {"slot_position": position}
            for name, x in state.items():
                if name == "slot_score" and not head.config.slots:
                    continue
                part = x[:, 0, scores] if name == "slot_score" else x[:, slots]
                part = part.cpu().float()
                part = part.gather(1, order.view(*order.shape, *[1] * (part.ndim - 2)).expand_as(part))
                side[name] = part[position >= 0]
            sides.append(side)
        for name, x in sides[0].items():
            assert torch.equal(x, sides[1][name]), name


def check(
    spec: MixerSpec, state: MixerState, position: Tensor, steps: int, dtype: torch.dtype, block: int
) -> MixerState:
    """Compare `steps` tokens with one call of plain torch on the CPU; return the state after the fused steps."""
    tolerance = FUSED_FP32 if dtype == torch.float32 else FUSED_BF16
    *heads, score = make_inputs(spec, len(position), steps, dtype)
    rotary, found_state = make_rotary(spec), to_device(state, spec, dtype)
    expected, expected_state = liger_mixer(*heads, position, state, spec, rotary, score)
    q, k, v = (x.to(DEVICE, dtype) for x in heads)
    score, rotary, position = score.to(DEVICE), rotary.to(DEVICE), position.to(DEVICE)
    for t in range(steps):
        step = q[:, t], k[:, t], v[:, t]
        found = ragged_step(step, position + t, found_state, spec, rotary, block=block, score=score[:, t])
        assert found.dtype == dtype and error(found, expected[:, t]) <= tolerance, t
    assert_same(found_state, expected_state, spec)
    return found_state


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_plain_torch(name: str) -> None:
    """While some heads have empty slots and others must give up tokens, and beyond the rotary cap on a GPU."""
    spec, position, steps = make_spec(CONFIGS[name]), torch.tensor([12]), 400 if GPU else 6
    check(spec, prefilled(spec, position - 12, 12), position, steps, torch.float32, block=16)


def test_prompts_go_on_from_the_slots_of_steps() -> None:
    spec, position = make_spec(CONFIGS["int8"]), torch.tensor([30])
    *heads, score = make_inputs(spec, 1, 25)
    state = prefilled(spec, position - 30, 30)
    expected, expected_state = liger_mixer(*heads, position, state, spec, make_rotary(spec), score)
    state = to_device(state, spec)
    heads, score, rotary = [x.to(DEVICE) for x in heads], score.to(DEVICE), make_rotary(spec).to(DEVICE)
    for t in range(3):
        step = tuple(x[:, t] for x in heads)
        ragged_step(step, position.to(DEVICE) + t, state, spec, rotary, block=16, score=score[:, t])
    rest = [x[:, 3:] for x in (*heads, score)]
    found, state = liger_mixer(*rest[:3], position.to(DEVICE) + 3, state, spec, rotary, rest[3])
    assert error(found, expected[:, 3:]) <= FUSED_FP32
    assert_same(state, expected_state, spec)


def test_rows_of_the_pools() -> None:
    """Sequences are anywhere in pools whose other rows are NaN; one is skipped, one is padding."""
    spec, live, rows = make_spec(CONFIGS["int8"]), torch.tensor([0, 3]), torch.tensor([4, -1, 0, 2])
    state, position = prefilled(spec, torch.tensor([0, 3]), 14), torch.tensor([14, 7, -3, 17])
    pools = {
        name: torch.full((6, *x.shape[1:]), torch.nan if x.is_floating_point() else 9, dtype=x.dtype)
        for name, x in state.items()
    }
    for name, x in to_device(state, spec).items():
        pools[name][rows[live]] = x.cpu()
    *heads, score = make_inputs(spec, 4, 1)
    expected, expected_state = liger_mixer(
        *(x[live] for x in heads), position[live], state, spec, make_rotary(spec), score[live]
    )
    after = {name: x.to(DEVICE, copy=True) for name, x in pools.items()}
    fused = torch.cat([x[:, 0] for x in (heads[0], heads[1])], dim=1).to(DEVICE)
    q, k = fused.split([spec.q_heads, spec.kv_heads], dim=1)  # views of one projection
    out = torch.full((4, spec.q_heads, spec.d_v), torch.nan, device=DEVICE)
    step, now, index = (q, k, heads[2][:, 0].to(DEVICE)), position.to(DEVICE), rows.int().to(DEVICE)
    ragged_step(step, now, after, spec, make_rotary(spec).to(DEVICE), index, out, 16, score[:, 0].to(DEVICE))
    assert not out[1:3].any() and error(out[live], expected[:, 0]) <= FUSED_FP32
    assert_same({name: x[rows[live]] for name, x in after.items()}, expected_state, spec)
    for name, x in after.items():
        assert torch.equal(x.cpu()[[0, 1, 3, 5]].nan_to_num(7), pools[name][[0, 1, 3, 5]].nan_to_num(7)), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_half_precision(state_dtype: str, dtype: torch.dtype) -> None:
    """Codes, scales and scores are those of fp32; an output is rounded."""
    spec, position = make_spec(CONFIGS[state_dtype]), torch.tensor([0])
    *heads, score = make_inputs(spec, 1, 14, dtype)
    state = spec.initial_state(1, torch.float32)
    _, state = liger_mixer(*heads, position, state, spec, make_rotary(spec), score)
    check(spec, state, position + 14, 100 if GPU else 1, dtype, block=16)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "d"), [((9, 3), 64), ((12, 3), 128)])
def test_full_size(heads: tuple[int, int], d: int, dtype: torch.dtype) -> None:
    """After a prompt by the kernels for whole prompts, which go on from the unordered slots; the same bits twice."""
    config = replace(SOFTMAX, sinks=4, heads=("16 256+384 1024+2048",), state_dtype="int8")
    spec = replace(make_spec(config, heads, d, d), max_distance=4000)
    *prompt, score = (x.to(DEVICE) for x in make_inputs(spec, 2, 4500, dtype))
    position, rotary = torch.tensor([0, -3], device=DEVICE), make_rotary(spec).to(DEVICE)
    start = spec.initial_state(2, dtype, DEVICE)
    _, state = liger_mixer(*(x.to(dtype) for x in prompt), position, start, spec, rotary, score)
    state, position = {name: x.cpu() for name, x in state.items()}, position.cpu() + 4500
    results = []
    for block in (32, 64, 256, 64):
        torch.manual_seed(1)
        results.append(check(spec, state, position, 60, dtype, block))
    after = results[1]
    assert all(torch.equal(x, results[3][name]) for name, x in after.items())
    *heads_after, score = make_inputs(spec, 2, 50, dtype)
    ordered = {name: x.cpu() for name, x in after.items()}
    expected, expected_state = liger_mixer(*heads_after, position + 60, ordered, spec, rotary.cpu(), score)
    step = (x.to(DEVICE, dtype) for x in heads_after)
    found, found_state = liger_mixer(*step, position.to(DEVICE) + 60, after, spec, rotary, score.to(DEVICE))
    assert error(found, expected) <= (FUSED_FP32 if dtype == torch.float32 else FUSED_BF16)
    assert_same(found_state, expected_state, spec)


def test_the_operator_takes_ragged_slots() -> None:
    spec, position = make_spec(CONFIGS["int8"]), torch.tensor([14, 17], device=DEVICE)
    state = {name: x.to(DEVICE) for name, x in prefilled(spec, torch.tensor([0, 3]), 14).items()}
    q, k, v, score = (x[:, 0].to(DEVICE) for x in make_inputs(spec, 2, 1))
    rotary, tensors = make_rotary(spec).to(DEVICE), [state[name].clone() if name in state else None for name in CHANGED]
    torch.library.opcheck(
        torch.ops.ligerexport.mixer_step.default, (q, k, v, position, *tensors, rotary, None, score, spec.text)
    )
    for change in ({"slots": (("novelty", 5),)}, {"recurrence_weight": 0.1}, {"slots": (("use", 5),)}):
        other: Any = replace(spec, config=replace(CONFIGS["equal heads"], **change))
        assert not other.splits
        with pytest.raises(ValueError, match="no fused step"):
            mixer_step(q, k, v, position, state, other, rotary, score=score)


def test_a_model_steps_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU by the kernels; on the CPU plain torch stands in for them."""
    steps = []
    monkeypatch.setattr(mixer, "fused", lambda x: True)
    monkeypatch.setattr(mixer, "mixer_step", lambda *args, **more: steps.append(1) or mixer_step(*args, **more))
    config = replace(SOFTMAX, heads=("6+9 20", "20 3", "3 12+8"))
    model = load_model(make_checkpoint(tmp_path / "model", config), torch.float32).to(DEVICE)
    ids = torch.randint(131, (2, 60), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = LigerCache(model.config)
        parts = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([33, *[1] * 20, 7], dim=1)]
    assert len(steps) == 20 * 3
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= MODEL_FP32


def test_tiles_grow_with_the_work() -> None:
    spec = make_spec(replace(SOFTMAX, heads=("16 256+384 1024+2048",), state_dtype="int8"), d_k=128, d_v=128)
    assert [choose_block(spec, batch) for batch in (1, 20, 21, 42)] == [64, 64, 128, 256]


def test_a_table_without_turns_is_refused() -> None:
    spec, position = make_spec(CONFIGS["int8"]), torch.tensor([3])
    heads = tuple(x[:, 0] for x in make_inputs(spec, 1, 1)[:3])
    with pytest.raises(ValueError, match="the last of turns"):
        ragged_step(heads, position, spec.initial_state(1, torch.float32), spec, make_rotary(spec)[:, :-1])
