"""Level 1: fused steps against the plain loop: output, and state as a set ordered by position."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ligerexport.kernels.fused.mixer_step import Tiling, mixer_step
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.scores import SCORES
from ligerexport.model.state import MixerSpec, MixerState
from tests.checkpoints import EVERY_GATE, FUSED
from tests.tolerances import FUSED_BF16, FUSED_FP32

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
STEPS = 150 if GPU else 3
CAP = 40

SMALL = LigerConfig(window=8, sinks=2, attention_weight=0.7, recurrence_weight=0.3)
EVERY_SCORE = replace(SMALL, slots=tuple((name, 2 + i % 2) for i, name in enumerate(SCORES) if name != "learned"))
MEMORY = replace(PRESETS["memory"].config, window=14, slots=(("recent_use", 4), ("peak_effect", 3), ("novelty", 3)))
FORESIGHT = replace(MEMORY, slots=(("recent_use", 4), ("learned", 6)))
CONFIGS = {
    "liger": replace(PRESETS["liger"].config, window=16),
    "sinks": replace(PRESETS["sinks"].config, window=12),
    "memory": MEMORY,
    "memory and recurrence": replace(MEMORY, recurrence_weight=0.1),
    "every score": EVERY_SCORE,
    "foresight": FORESIGHT,
    "foresight and recurrence": replace(FORESIGHT, recurrence_weight=0.1),
    "evicted": replace(PRESETS["evicted"].config, window=14, slots=FORESIGHT.slots, recurrence_distance=12),
    "evicted from a window": replace(SMALL, attention_weight=1.0, recurrence_weight=0.8, recurrence="evicted"),
    "evicted, judged": replace(MEMORY, recurrence_weight=1.0, recurrence="evicted", recurrence_distance=30),
    "window of one": replace(SMALL, window=1, sinks=0),
    "window of one, scored": replace(SMALL, window=1, sinks=0, slots=(("use", 3), ("novelty", 2))),
    **{gate: replace(SMALL, gate=gate) for gate in EVERY_GATE},
    **{name: replace(SMALL, slots=((name, 5),), recurrence_weight=0.0) for name in SCORES},
}


def make_spec(config: LigerConfig, heads: tuple[int, int] = (3, 1), d_k: int = 24, d_v: int = 40) -> MixerSpec:
    return MixerSpec(config, *heads, d_k, d_v, scale=d_k**-0.5, max_distance=max(CAP, config.window))


def make_inputs(spec: MixerSpec, batch: int, length: int) -> list[Tensor]:
    """Return query, key and value `[B, T, H, d]` in fp64 and the rotary table."""
    widths = ((spec.q_heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v))
    inputs = [torch.randn(batch, length, heads, d, dtype=torch.float64) * 2 for heads, d in widths]
    rotated = max(1, spec.d_k * 3 // 8)
    return [*inputs, rotary_table(10.0 ** (-torch.arange(rotated) / rotated), spec.max_distance, BLOCK, torch.float64)]


def foreseen(value: Tensor) -> Tensor:
    """Return learned scores for `value` `[..., d_v]`: logarithms, none of them 0."""
    return -value.norm(dim=-1)


def to_device(state: MixerState, dtype: torch.dtype = torch.float32) -> MixerState:
    """Return a copy for the kernel: `dtype` for keys and values, fp32 for the rest."""
    types = {"slot_key": dtype, "slot_value": dtype, "slot_position": torch.int64}
    return {name: x.to(DEVICE, types.get(name, torch.float32), copy=True) for name, x in state.items()}


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error; NaN counts as infinite."""
    found, expected = found.detach().cpu().double(), expected.double()
    if not found.isfinite().all():
        return float("inf")
    return ((found - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_states_equal(found: MixerState, expected: MixerState, tolerance: float) -> None:
    """Compare the meaning of states: slots as sets, and empty slots may have any content."""
    found = {name: x.cpu() for name, x in found.items()}
    order, expected_order = (x["slot_position"].argsort(dim=-1) for x in (found, expected))
    assert torch.equal(found["slot_position"].gather(-1, order), expected["slot_position"].gather(-1, expected_order))
    filled = expected["slot_position"].gather(-1, expected_order) >= 0
    for name, tensor in expected.items():
        if name == "slot_position":
            continue
        pair = found[name].double(), tensor.double()
        if name in ("slot_key", "slot_value"):
            pair = tuple(
                x.gather(2, o[..., None].expand(-1, -1, -1, x.shape[-1]))[filled]
                for x, o in zip(pair, (order, expected_order), strict=True)
            )  # type: ignore[assignment]
        elif name == "slot_score":
            pair = tuple(
                x.gather(-1, o[:, :, None].expand(-1, -1, x.shape[2], -1)) * filled[:, :, None]
                for x, o in zip(pair, (order, expected_order), strict=True)
            )  # type: ignore[assignment]
        assert error(*pair) <= tolerance, name


def run(
    spec: MixerSpec, inputs: list[Tensor], position: Tensor, state: MixerState, tiling: Tiling | None = None
) -> Tensor:
    """Mix the tokens of `inputs` `[B, T, ...]` one by one in fp32, `state` in place; outputs `[B, T, H_q, d_v]`."""
    q, k, v, table = (x.to(DEVICE, torch.float32) for x in inputs)
    columns = torch.stack([position + t for t in range(q.shape[1])], dim=1).to(DEVICE)
    outputs = []
    for t in range(q.shape[1]):
        out = torch.full((q.shape[0], spec.q_heads, spec.d_v), torch.nan, device=DEVICE)
        now = columns[:, t]
        step, score = (q[:, t], k[:, t], v[:, t]), foreseen(v[:, t])
        outputs.append(mixer_step(step, now, state, spec, table, out=out, tiling=tiling, score=score))
    return torch.stack(outputs, dim=1)


def prefilled(spec: MixerSpec, length: int, starts: tuple[int, ...]) -> MixerState:
    """Return the state after `length` random tokens, in fp64; empty slots hold NaN."""
    q, k, v, table = make_inputs(spec, len(starts), length)
    start = spec.initial_state(len(starts), torch.float64)
    _, state = liger_mixer(q, k, v, torch.tensor(starts), start, spec, table, foreseen(v))
    empty = state["slot_position"] < 0
    state["slot_key"][empty], state["slot_value"][empty] = torch.nan, torch.nan
    return state


def check(spec: MixerSpec, before: int, steps: int, starts: tuple[int, ...] = (0, 3), tiling: Tiling | None = None):
    """Compare `steps` tokens after a prompt of `before` with the loop."""
    state = prefilled(spec, before, starts) if before else spec.initial_state(len(starts), torch.float64)
    inputs, position = make_inputs(spec, len(starts), steps), torch.tensor(starts) + before
    score = foreseen(inputs[2])
    expected, expected_state = liger_mixer_reference(*inputs[:3], position, state, spec, inputs[3], score)
    found_state = to_device(state)
    found = run(spec, inputs, position, found_state, tiling)
    assert max(error(found[:, t], expected[:, t]) for t in range(steps)) <= FUSED_FP32
    assert_states_equal(found_state, expected_state, FUSED_FP32)


@pytest.mark.parametrize("name", CONFIGS)
def test_steps_equal_the_loop(name: str) -> None:
    """After a prompt that fills every pool, and beyond the rotary cap."""
    check(make_spec(CONFIGS[name]), before=CAP + 10, steps=STEPS)


@pytest.mark.parametrize("name", CONFIGS if GPU else ["memory and recurrence"])
def test_steps_from_nothing_equal_the_loop(name: str) -> None:
    check(make_spec(CONFIGS[name]), before=0, steps=150 if GPU else 34, starts=(0, 3) if GPU else (0,))


@pytest.mark.parametrize("name", ["liger", "memory", "memory and recurrence"])
@pytest.mark.parametrize("tiling", [Tiling(64, 32, 4), Tiling(32, 16, 8, 16), Tiling(16, 64, 2)], ids=str)
def test_every_tiling_gives_the_same(name: str, tiling: Tiling) -> None:
    check(make_spec(CONFIGS[name]), before=50, steps=150 if GPU else 2, tiling=tiling)


@pytest.mark.parametrize(
    ("heads", "d_k", "d_v"),
    [((2, 2), 32, 32), ((8, 1), 40, 24), ((5, 1), 32, 72)]
    + [((32, 8), 128, 128), ((9, 3), 64, 64), ((16, 2), 256, 256), ((4, 4), 80, 96)] * GPU,
)
def test_shapes(heads: tuple[int, int], d_k: int, d_v: int) -> None:
    spec = make_spec(CONFIGS["memory and recurrence"], heads, d_k, d_v)
    check(spec, before=50, steps=40 if GPU else 2, starts=(0,))


@pytest.mark.parametrize("slots", [(), (("peak_effect", 6),)], ids=str)
def test_values_in_tiles(slots: tuple[tuple[str, int], ...]) -> None:
    """Too many slots for all of their values to fit at once."""
    spec = make_spec(replace(SMALL, window=140, slots=slots), (2, 1), 32, 96)
    check(spec, before=160, steps=20 if GPU else 1, starts=(0,))


@pytest.mark.gpu
@pytest.mark.parametrize("preset", FUSED)
def test_presets_at_full_size(preset: str) -> None:
    check(make_spec(PRESETS[preset].config, (4, 2), 64, 64), before=200, steps=150)


@pytest.mark.parametrize("name", ["memory and recurrence", "foresight", "evicted"])
def test_rows_of_the_pools(name: str) -> None:
    """Sequences are anywhere in pools whose other rows are NaN; one is skipped, one is padding."""
    spec = make_spec(CONFIGS[name])
    state = prefilled(spec, 50, (0, 3, 1))
    rows, live = torch.tensor([4, -1, 0, 2]), torch.tensor([0, 2, 3])
    pools = {
        n: torch.full((6, *x.shape[1:]), torch.nan if x.is_floating_point() else 10**6, dtype=x.dtype)
        for n, x in state.items()
    }
    for n, x in state.items():
        pools[n][rows[live]] = x
    inputs = make_inputs(spec, 4, 1)
    position = torch.tensor([50, 7, -3, 51])
    before, after = to_device(pools), to_device(pools)
    q, k, v, table = (x.to(DEVICE, torch.float32) for x in inputs)
    out = torch.full((4, spec.q_heads, spec.d_v), torch.nan, device=DEVICE)
    for index in (rows, rows.int()):
        after = to_device(pools)
        step, now, index = (q[:, 0], k[:, 0], v[:, 0]), position.to(DEVICE), index.to(DEVICE)
        mixer_step(step, now, after, spec, table, index=index, out=out, score=foreseen(v[:, 0]))
        assert (out[1:3] == 0).all()
        real = torch.tensor([0, 3])
        kept = {n: x[[0, 2]] for n, x in state.items()}
        pieces = [x[real] for x in inputs[:3]]
        score = foreseen(pieces[2])
        expected, expected_state = liger_mixer_reference(*pieces, position[real], kept, spec, inputs[3], score)
        assert error(out[real], expected[:, 0]) <= FUSED_FP32
        assert_states_equal({n: x[rows[real].to(DEVICE)] for n, x in after.items()}, expected_state, FUSED_FP32)
        untouched = torch.tensor([0, 1, 3, 5], device=DEVICE)
        for n, x in after.items():
            assert torch.equal(x[untouched].nan_to_num(7), before[n][untouched].nan_to_num(7)), n


def test_state_goes_back_to_the_chunked_op() -> None:
    """Prompt, fused steps and prompt give the same result as one prompt."""
    spec = make_spec(EVERY_SCORE)
    *inputs, table = make_inputs(spec, 2, 60)
    position = torch.tensor([0, 3])
    start = spec.initial_state(2, torch.float64)
    expected, expected_state = liger_mixer(*inputs, position, start, spec, table)
    _, state = liger_mixer(*(x[:, :40] for x in inputs), position, start, spec, table)
    state = to_device(state)
    run(spec, [x[:, 40:43] for x in inputs] + [table], position + 40, state)
    state = {n: x.cpu().double() if x.is_floating_point() else x.cpu() for n, x in state.items()}
    found, state = liger_mixer(*(x[:, 43:] for x in inputs), position + 43, state, spec, table)
    assert error(found, expected[:, 43:]) <= FUSED_FP32
    assert_states_equal(state, expected_state, FUSED_FP32)


def test_views_of_one_projection() -> None:
    spec = make_spec(CONFIGS["liger"], (4, 2), 32, 32)
    state = prefilled(spec, 20, (0, 3))
    *inputs, table = make_inputs(spec, 2, 1)
    position = torch.tensor([20, 23])
    expected, _ = liger_mixer_reference(*inputs, position, state, spec, table)
    fused = torch.cat([x[:, 0] for x in inputs], dim=1).to(DEVICE, torch.float32)
    views = fused.split([4, 2, 2], dim=1)
    found = mixer_step(views, position.to(DEVICE), to_device(state), spec, table.to(DEVICE, torch.float32))
    assert error(found, expected[:, 0]) <= FUSED_FP32


@pytest.mark.parametrize("gate", EVERY_GATE)
def test_strong_gates_stay_exact(gate: str) -> None:
    spec = make_spec(replace(SMALL, gate=gate))
    state = prefilled(spec, 20, (0,))
    *inputs, table = make_inputs(spec, 1, 3)
    inputs[1][..., 3], inputs[1][..., 5] = -100.0, 100.0
    expected, expected_state = liger_mixer_reference(*inputs, torch.tensor([20]), state, spec, table)
    found_state = to_device(state)
    found = run(spec, [*inputs, table], torch.tensor([20]), found_state)
    assert error(found, expected) <= 10 * FUSED_FP32  # logits of a few hundred
    assert error(found_state["recurrent_state"], expected_state["recurrent_state"]) <= FUSED_FP32


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["liger", "memory and recurrence"])
def test_half_precision(name: str, dtype: torch.dtype) -> None:
    """Each step starts from the loop's state, so that near ties do not add up."""
    spec = make_spec(CONFIGS[name])
    state = prefilled(spec, 50, (0, 3))
    *inputs, table = make_inputs(spec, 2, 50 if GPU else 3)
    inputs = [x.to(dtype).double() for x in inputs]
    for t in range(inputs[0].shape[1]):
        state |= {n: state[n].to(dtype).double() for n in ("slot_key", "slot_value")}
        now, step = torch.tensor([50, 53]) + t, [x[:, t : t + 1] for x in inputs]
        expected, expected_state = liger_mixer_reference(*step, now, state, spec, table)
        found_state = to_device(state, dtype)
        q, k, v = (x[:, 0].to(DEVICE, dtype) for x in step)
        found = mixer_step((q, k, v), now.to(DEVICE), found_state, spec, table.to(DEVICE, torch.float32))
        assert found.dtype == dtype
        assert error(found, expected[:, 0]) <= FUSED_BF16
        assert_states_equal(found_state, expected_state, FUSED_BF16)
        state = expected_state
