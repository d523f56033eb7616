"""Mixture-of-Memories: the whole way of a conversion, choices that tie, states that rest, and settings."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import make_checkpoint, make_transformer

import ligerexport as lx
from ligerexport.errors import UsageError, VerificationError
from ligerexport.exporters.build import build
from ligerexport.exporters.verify import compare, locate, verify
from ligerexport.kernels import memories
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.state import MixerSpec

MOM = replace(PRESETS["mom"].config, window=12)


def test_a_memory_that_is_not_chosen_rests() -> None:
    """Key channels m, m + M, ... vote for memory m; the shared state takes every token."""
    spec = MixerSpec(MOM, q_heads=4, kv_heads=2, d_k=8, d_v=6, scale=1.0, max_distance=20)
    table = rotary_table(torch.ones(3), 20, BLOCK, torch.float64)
    state = {name: torch.randn_like(x) for name, x in spec.initial_state(1, torch.float64).items() if "memory" in name}
    state = spec.initial_state(1, torch.float64) | state
    query, key, value = (torch.randn(1, 1, heads, d, dtype=torch.float64) for heads, d in ((4, 8), (2, 8), (2, 6)))
    key[0, 0, 0, 1::4], key[0, 0, 0, 2::4], key[0, 0, 1, 0::4], key[0, 0, 1, 3::4] = 9.0, 8.0, 9.0, 8.0
    _, after = liger_mixer(query, key, value, torch.tensor([0]), state, spec, table)
    changed = (after["memory_state"] != state["memory_state"]).flatten(3).any(dim=-1)[0]
    assert changed.tolist() == [[False, True, True, False, True], [True, False, False, True, True]]


@pytest.mark.parametrize("gate", ["mamba2", "hgrn2:0.3"])
def test_all_the_way(tmp_path: Path, gate: str) -> None:
    """Convert, build in every lowering, and hand one state on from each runtime to the next."""
    model = lx.convert(make_transformer(tmp_path / "source"), tmp_path / "liger", preset="mom", window=12, gate=gate)
    (model / "tokenizer.json").unlink()  # it knows no word, which would leave verification without a text
    ids = np.random.default_rng(0).integers(0, 131, 90)
    sessions = [lx.load(model)]
    for lowering in ("ort", "portable", "native"):
        sessions.append(lx.load(build(model, tmp_path / lowering, lowering=lowering, max_chunk=32)))
        assert sessions[-1].artifact.manifest.verification["passed"]
        assert [t.shape for t in sessions[-1].artifact.manifest.state if "memory" in t.past] == [
            ("B", 2, 5, 16, 16)
        ] * 3
    sessions[0].prefill(ids)
    expected, start = [sessions[0].step(int(i)) for i in ids[:12]], 0
    sessions[0].reset()
    sessions[0].prefill(ids)
    for session, following in zip(sessions, [*sessions[1:], sessions[0]], strict=True):
        for i in range(start, start + 3):
            assert np.abs(session.step(int(ids[i])) - expected[i]).max() < 2e-4
        following.restore(session.snapshot())
        start += 3


def test_choices_that_tie_are_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch chooses the other one of two memories whose logits are close, in the middle of calls too."""
    model = make_checkpoint(tmp_path / "model", MOM)
    choose = memories.choose

    def otherwise(logits: torch.Tensor, active: int) -> tuple[torch.Tensor, torch.Tensor]:
        moved = torch.arange(logits.shape[-1]) % 2 * 1e-2
        chosen, _ = choose(logits + moved, active)
        weights = logits.masked_fill(~chosen[..., :-1], -torch.inf).softmax(dim=-1)
        return chosen, torch.nn.functional.pad(weights, (0, 1), value=1.0)

    monkeypatch.setattr(memories, "choose", otherwise)
    with pytest.raises(VerificationError, match=r"layer \d is the first that differs"):
        build(model, tmp_path / "strict")
    loose = replace(compare.tolerance_of("float32"), tie=3e-2)
    for module in (verify, locate):
        monkeypatch.setattr(module, "tolerance_of", lambda dtype: loose)
    result = json.loads((build(model, tmp_path / "engine") / "manifest.json").read_text())["verification"]
    assert result["passed"] and 0 < result["near_ties"] < result["checks"] / 2


def test_only_conversions_with_memories_write_their_number() -> None:
    assert not {"memories", "active"} & LigerConfig().to_dict().keys()
    assert LigerConfig.from_dict(MOM.to_dict()) == MOM
    assert not MOM.fuses and not replace(MOM, recurrence_weight=0.0).routed


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"memories": -1}, "2 active of -1 memories"),
        ({"active": 5}, "5 active of 4 memories"),
        ({"active": 0}, "0 active of 4 memories"),
        ({"memories": 2.0}, "memories 2.0"),
        ({"recurrence": "evicted", "attention_weight": 1.0}, "4 memories, but the recurrence is 'evicted'"),
        ({"gate": "gsa"}, "4 memories with the gate 'gsa', whose rows have keys"),
        ({"gate": "mlstm"}, "4 memories with the gate 'mlstm', which has a normaliser"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        replace(MOM, **changes)  # type: ignore[arg-type]


def test_more_memories_than_channels_are_refused() -> None:
    with pytest.raises(UsageError, match="9 memories"):
        MixerSpec(replace(MOM, memories=9), q_heads=2, kv_heads=1, d_k=8, d_v=8, scale=1.0, max_distance=20)
