"""Level 1: the chunked op against the plain loop, for every gate and score: cuts, padding, strong gates, gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ligerexport.errors import UsageError
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.scores import SCORES
from ligerexport.model.state import MixerSpec, MixerState
from tests.checkpoints import EVERY_GATE
from tests.tolerances import OP_FP32, OP_FP64

SMALL = LigerConfig(window=8, sinks=2, attention_weight=0.7, recurrence_weight=0.3)
EVERY_SCORE = replace(SMALL, slots=tuple((name, 2 + i) for i, name in enumerate(SCORES) if name != "learned"))
FORESIGHT = replace(EVERY_SCORE, slots=(*EVERY_SCORE.slots[:2], ("learned", 3), *EVERY_SCORE.slots[2:-1]))
EVICTED = replace(
    SMALL, slots=(("peak_use", 3), ("novelty", 2)), attention_weight=1.0, recurrence_weight=0.9, recurrence="evicted",
    recurrence_distance=6,
)  # fmt: skip
CONFIGS = {
    "evicted": EVICTED,
    "evicted from the window": replace(EVICTED, slots=(), recurrence_weight=1.0),
    "liger": PRESETS["liger"].config,
    "sinks": PRESETS["sinks"].config,
    "memory": PRESETS["memory"].config,
    "every score": EVERY_SCORE,
    "foresight": FORESIGHT,
    "memories": replace(EVERY_SCORE, memories=3, gate="hgrn2"),
    "mom": replace(PRESETS["mom"].config, window=20),
    "window of one": replace(SMALL, window=1, sinks=0),
    **{gate: replace(SMALL, gate=gate) for gate in EVERY_GATE},
    **{name: replace(SMALL, slots=((name, 5),), recurrence_weight=0.0) for name in SCORES},
}
CAP = 40


def make(
    config: LigerConfig, length: int, dtype: torch.dtype = torch.float64, position: tuple[int, ...] = (0, 3)
) -> tuple[MixerSpec, list[Tensor], MixerState, Tensor]:
    """Return a layer with H_q != H_kv and d_k != d_v, inputs `[B, T, H, d]` and position, state, rotary table."""
    spec = MixerSpec(config, q_heads=6, kv_heads=2, d_k=8, d_v=12, scale=8**-0.5, max_distance=max(CAP, config.window))
    inputs = [torch.randn(len(position), length, heads, d, dtype=dtype) * 2 for heads, d in ((6, 8), (2, 8), (2, 12))]
    table = rotary_table(10.0 ** (-torch.arange(3) / 3), spec.max_distance, BLOCK, dtype)
    return spec, [*inputs, torch.tensor(position)], spec.initial_state(len(position), dtype), table


def foreseen(value: Tensor) -> Tensor:
    """Return learned scores for `value` `[B, T, H_kv, d_v]`: logarithms, none of them 0."""
    return -value.detach().norm(dim=-1)


def assert_states_equal(found: MixerState, expected: MixerState, tolerance: float) -> None:
    """Compare the meaning of states; empty slots may have any content."""
    filled = expected["slot_position"] >= 0
    assert torch.equal(found["slot_position"], expected["slot_position"])
    for name, tensor in expected.items():
        difference = (found[name] - tensor).abs()
        if name in ("slot_key", "slot_value"):
            difference = difference[filled]
        elif name == "slot_score":
            difference = difference * filled[:, :, None]
        assert difference.max() <= tolerance * max(1.0, tensor.abs().max().item()), name


CASES = [(name, length) for name in CONFIGS for length in (7, 65)] + [
    ("every score", 1),
    ("foresight", 150),
    ("every score", 63),
    ("every score", 64),
    ("memory", 150),
    ("liger", 150),
    ("evicted", 150),
    ("evicted", 1),
    ("gsa", 150),
    ("gsa", 1),
    ("mom", 150),
    ("mom", 1),
]


@pytest.mark.parametrize(("name", "length"), CASES)
def test_chunked_equals_the_loop(name: str, length: int) -> None:
    spec, inputs, state, table = make(CONFIGS[name], length)
    score = foreseen(inputs[2])
    expected, expected_state = liger_mixer_reference(*inputs, state, spec, table, score)
    found, found_state = liger_mixer(*inputs, state, spec, table, score)
    assert (found - expected).abs().max() <= OP_FP64
    assert_states_equal(found_state, expected_state, OP_FP64)


@pytest.mark.parametrize("name", ["liger", "memory", "every score", "foresight", "evicted", "gsa:4", "mlstm", "mom"])
def test_any_cut_gives_the_same(name: str) -> None:
    spec, (q, k, v, position), state, table = make(CONFIGS[name], 150)
    expected, expected_state = liger_mixer(q, k, v, position, state, spec, table, foreseen(v))
    outputs, cuts = [], [0, 1, 2, 30, 31, 94, 149, 150]
    for start, end in pairwise(cuts):
        piece = [x[:, start:end] for x in (q, k, v)]
        output, state = liger_mixer(*piece, position + start, state, spec, table, foreseen(piece[2]))
        outputs.append(output)
    assert (torch.cat(outputs, dim=1) - expected).abs().max() <= OP_FP64
    assert_states_equal(state, expected_state, OP_FP64)


@pytest.mark.parametrize(
    "name", ["every score", "foresight", "evicted", "gsa:4", "hgrn2:0.3", "mamba2", "mlstm", "rwkv6", "mom"]
)
@pytest.mark.parametrize("padding", [20, 2 * BLOCK])
def test_padding_on_the_left_changes_nothing(padding: int, name: str) -> None:
    spec, (q, k, v, _), state, table = make(CONFIGS[name], 70 + padding, position=(0, 0))
    score = foreseen(v)
    score[:, :padding] = 1e6
    position, pad = torch.tensor([0, 0]), torch.tensor([-padding, -padding])
    rest = [x[:, padding:] for x in (q, k, v, score)]
    alone, alone_state = liger_mixer(*rest[:3], position, state, spec, table, rest[3])
    padded, padded_state = liger_mixer(q, k, v, pad, state, spec, table, score)
    assert (padded[:, padding:] - alone).abs().max() <= OP_FP64
    assert padded.isfinite().all()
    assert_states_equal(padded_state, alone_state, OP_FP64)


@pytest.mark.parametrize("gate", EVERY_GATE)
def test_strong_gates_stay_exact(gate: str) -> None:
    spec, inputs, state, table = make(replace(SMALL, gate=gate), 130, torch.float32)
    inputs[1][..., 3], inputs[1][..., 5] = -100.0, 100.0
    exact = [x.double() for x in inputs[:3]]
    start = spec.initial_state(2, torch.float64)
    expected, expected_state = liger_mixer_reference(*exact, inputs[3], start, spec, table)
    found, found_state = liger_mixer(*inputs, state, spec, table)
    assert (found - expected).abs().max() <= OP_FP32 * expected.abs().max()
    for name in [name for name in expected_state if name.startswith("recurrent")]:
        difference = found_state[name] - expected_state[name]
        assert difference.abs().max() <= OP_FP32 * expected_state[name].abs().max()


@pytest.mark.parametrize("name", ["liger", "every score", "foresight", "evicted", "mom", *EVERY_GATE[1:]])
def test_gradients_equal_those_of_the_loop(name: str) -> None:
    spec, inputs, state, table = make(CONFIGS[name], 40, position=(0,))
    weight = torch.randn(1, 40, 6, 12, dtype=torch.float64)
    gradients = []
    for op in (liger_mixer, liger_mixer_reference):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        output, _ = op(*leaves, inputs[3], state, spec, table, foreseen(inputs[2]))
        gradients.append(torch.autograd.grad((output * weight).sum(), leaves))
    for found, expected in zip(*gradients, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_learned_pool_keeps_what_was_foreseen() -> None:
    """It keeps the tokens with the best scores among all that left the window; without scores it cannot choose."""
    config = LigerConfig(window=4, sinks=1, slots=(("learned", 3),), attention_weight=1.0, recurrence_weight=0.0)
    spec, inputs, state, table = make(config, 60, position=(0,))
    score = torch.randn(1, 60, 2) - 7
    _, after = liger_mixer(*inputs, state, spec, table, score)
    for head in range(2):
        best = score[0, 1:56, head].topk(3).indices + 1
        assert after["slot_position"][0, head].tolist() == [0, *best.sort().values.tolist(), 56, 57, 58, 59]
    with pytest.raises(ValueError, match="no score was given"):
        liger_mixer(*inputs, state, spec, table)
    with pytest.raises(UsageError, match="novelty and learned together"):
        replace(EVERY_SCORE, slots=(*EVERY_SCORE.slots, ("learned", 2)))


def test_drift_of_fp32_over_2048_steps() -> None:
    """Single steps in fp32 against one call in fp64: errors do not grow."""
    config = replace(EVERY_SCORE, window=24, gate="gla")
    spec, inputs, state, table = make(config, 2048, position=(0,))
    expected, expected_state = liger_mixer(*inputs, state, spec, table)
    q, k, v = (x.float() for x in inputs[:3])
    state = spec.initial_state(1, torch.float32)
    worst = torch.zeros(2048)
    for t in range(2048):
        output, state = liger_mixer(
            q[:, t : t + 1], k[:, t : t + 1], v[:, t : t + 1], torch.tensor([t]), state, spec, table
        )
        worst[t] = (output[0, 0] - expected[0, t]).abs().max()
    assert worst.max() <= OP_FP32
    assert worst[1024:].mean() <= 2 * worst[64:1024].mean()
    assert_states_equal(state, expected_state, 1e-4)


def test_exact_slots_beyond_the_rotary_cap_read_as_at_the_cap() -> None:
    """A sink's logit stops changing once it is farther away than the cap."""
    config = LigerConfig(window=4, sinks=1, attention_weight=1.0, recurrence_weight=0.0)
    spec, (q, k, v, _), state, table = make(config, 120, position=(0,))
    q[:], k[:] = q[:, :1], k[:, :1]
    output, _ = liger_mixer(
        q, k, v * 0 + (torch.arange(120) == 0)[None, :, None, None], torch.tensor([0]), state, spec, table
    )
    assert (output[:, CAP:] - output[:, CAP : CAP + 1]).abs().max() <= OP_FP64
    assert (output[:, 5:CAP] - output[:, CAP : CAP + 1]).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_many_evicted_values_do_not_overflow(dtype: torch.dtype) -> None:
    """Their sum soon exceeds the range of fp16, but only their mean is read."""
    spec = MixerSpec(EVICTED, 2, 1, 8, 8, 8**-0.5, 64)
    rotary, count = rotary_table(10.0 ** -torch.arange(4.0), 64, BLOCK), 30_000
    state = spec.initial_state(1, dtype, "cpu")
    state["recurrent_mass"][..., 0] = count
    state["recurrent_state"][..., 0, :] = 4.0 * count
    query, key = torch.zeros(1, 1, 2, 8, dtype=dtype), torch.zeros(1, 1, 1, 8, dtype=dtype)
    output, _ = liger_mixer(query, key, key, torch.tensor([count]), state, spec, rotary)
    torch.testing.assert_close(output.float(), torch.full_like(output, 4.0).float(), rtol=1e-2, atol=0)
