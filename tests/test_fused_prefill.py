"""Level 1: a whole chunk with fused launches against the op: every preset with them, padding, and a carried state."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from ligerexport.kernels.fused.prefill import prefill
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.state import MixerSpec
from tests.tolerances import FUSED_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = LigerConfig(window=8, sinks=2)
CONFIGS = {
    "recurrent": replace(PRESETS["liger"].config, window=8),
    "weighted": replace(SMALL, slots=(("recent_use", 5),), recurrence_weight=0.3, attention_weight=0.6),
    **{gate: replace(SMALL, gate=gate) for gate in ("mamba2", "mlstm", "gsa:8")},
    "sinks": SMALL,
    "foresight": replace(SMALL, slots=(("recent_use", 3), ("learned", 4))),
    "judged": replace(SMALL, slots=(("novelty", 3), ("recent_use", 4))),
    "evicted": replace(PRESETS["evicted"].config, window=8, sinks=2, slots=(("recent_use", 3), ("learned", 4))),
}


def layer(config: LigerConfig) -> MixerSpec:
    return MixerSpec(config, 4, 2, 32, 48, 32**-0.5, 200)


@pytest.mark.parametrize(("name", "tokens"), [*((name, 20) for name in CONFIGS), ("evicted", 130), ("judged", 130)])
def test_a_chunk_is_the_op(name: str, tokens: int) -> None:
    spec = layer(CONFIGS[name])
    tokens = 9 if spec.config.keyed and DEVICE == "cpu" else tokens  # read one by one
    rotary = rotary_table(10.0 ** (-torch.arange(16, device=DEVICE) / 4), spec.max_distance, BLOCK)
    position = torch.tensor([-7, 90], device=DEVICE)
    state = spec.initial_state(2, torch.float32, DEVICE)
    narrow = {key: x.int() if x.dtype == torch.int64 else x for key, x in state.items()}  # as callers have it
    for _ in range(2):
        fused = torch.randn(2, tokens, 4 * 32 + 2 * 32 + 2 * 48, device=DEVICE)  # so that heads have a wider stride
        q, k, v = fused.split((4 * 32, 2 * 32, 2 * 48), dim=-1)
        q, k, v = (x.unflatten(-1, (heads, -1)) for x, heads in ((q, 4), (k, 2), (v, 2)))
        score = torch.randn(2, tokens, 2, device=DEVICE) if spec.config.foresees else None
        expected, state = liger_mixer(q, k, v, position, state, spec, rotary, score)
        output, narrow = prefill(q, k, v, score, position.int(), narrow, spec, rotary)
        real = position[:, None] + torch.arange(tokens, device=DEVICE) >= 0  # what padding gives does not count
        torch.testing.assert_close(output[real], expected[real], rtol=FUSED_FP32, atol=FUSED_FP32)
        assert torch.equal(narrow["slot_position"], state["slot_position"].int())
        filled = state["slot_position"] >= 0  # an empty slot may hold anything
        masks = {"slot_key": filled[..., None], "slot_value": filled[..., None], "slot_score": filled[:, :, None]}
        for key in state.keys() - {"slot_position"}:
            mask = masks.get(key, torch.tensor(True, device=DEVICE))
            found, wanted = (torch.where(mask, x[key], 0.0) for x in (narrow, state))
            torch.testing.assert_close(found, wanted, rtol=FUSED_FP32, atol=FUSED_FP32)
        position = position + tokens
