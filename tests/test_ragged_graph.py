"""Artifacts of memories with sizes for each KV head and slots in small types: against torch, verified, and run."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from checkpoints import make_checkpoint
from test_onnx_graph import CHUNK, INV_FREQ, OUTPUT, STATE, WORDS, MixerSession, check_model, compare_states, foreseen
from test_onnx_graph import mixer_graph as graph_of
from test_ragged import CASES, CONFIGS, SOFTMAX

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import UsageError, VerificationError
from ligerexport.exporters.build import build
from ligerexport.exporters.onnx import packed
from ligerexport.exporters.onnx.graph import build_graph, nodes_by_layer
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.kernels.ops import liger_mixer, rotary_table
from ligerexport.model.config import LigerConfig
from ligerexport.model.state import MixerSpec
from ligerexport.run.runtime import load

HEADS: dict[str, Any] = {"num_attention_heads": 8, "num_key_value_heads": 4}
SIZES = replace(SOFTMAX, heads=("12+9 3 12+9 1+12", "6+20 6+20 6+20 6+20", "30 3+2 4 3+2"), state_dtype="int8")
KEPT = replace(SIZES, heads=("", SIZES.heads[0], ""))


@pytest.mark.parametrize(
    ("name", "kind", "lowering"),
    [(*case, lowering) for case in CASES for lowering in ("ort", "native", "portable")[: 2 + (case[1] == "int8")]],
)
def test_mixer_is_the_torch_op(name: str, kind: str, lowering: str) -> None:
    check_mixer(replace(CONFIGS[name], state_dtype=kind), 4, lowering)


def test_many_sizes() -> None:
    """More groups than a node of `portable` may have inputs or outputs."""
    heads = tuple(f"{size}+{size % 3}" if size % 3 else f"{size}" for size in range(1, 18))
    model = check_mixer(replace(SOFTMAX, heads=(" ".join(heads),), state_dtype="int8"), 17, "portable")
    assert max(len(node.input) + len(node.output) for node in model.graph.node) == Portable.max_tensors


def check_mixer(config: LigerConfig, kv_heads: int, lowering: str) -> onnx.ModelProto:
    """Compare the graph of a layer with torch; return it.

    The prompt is cut, one sequence has padding on its left, d_k != d_v, and there are two query heads per key head.
    """
    spec = MixerSpec(
        config.for_layer(0), q_heads=2 * kv_heads, kv_heads=kv_heads, d_k=16, d_v=24, scale=0.25, max_distance=40
    )
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, 90, heads, 16, generator=generator) * 1.5 for heads in (2 * kv_heads, kv_heads))
    value = torch.randn(2, 90, kv_heads, 24, generator=generator)
    model, position, found = graph_of(spec, lowering), torch.tensor([0, -9]), []
    session = MixerSession(model, spec, 2)
    for part in torch.arange(90).split([40, 1, 1, 7, 41]):
        found.append(session.run(query[:, part], key[:, part], value[:, part], position + part[0]))
    start, table = spec.initial_state(2, torch.float32), rotary_table(INV_FREQ, 40, CHUNK)
    expected, state = liger_mixer(query, key, value, position, start, spec, table, foreseen(value))
    real = position[:, None] + torch.arange(90) >= 0
    assert (torch.cat(found, dim=1) - expected)[real].abs().max() < OUTPUT
    compare_states(state, session.state, STATE, spec)
    return model


@pytest.mark.parametrize(("family", "liger"), [("llama", SIZES), ("gemma3_text", KEPT)])
def test_model_is_the_torch_model(tmp_path: Path, family: str, liger: LigerConfig) -> None:
    """Two sequences, without rounding, which small errors would decide; layers with a sliding window are kept."""
    path = make_checkpoint(tmp_path / "model", replace(liger, state_dtype="activation"), family, **WORDS, **HEADS)
    check_model(read_spec(path), tmp_path)


@pytest.mark.parametrize(
    ("lowering", "weights", "family", "liger"),
    [
        ("ort", "fp32", "llama", SIZES),
        ("portable", "int4", "llama", SIZES),
        ("ort", "int4", "gemma3_text", KEPT),
        ("portable", "fp32", "llama", replace(SOFTMAX, state_dtype="float16")),
        ("native", "fp32", "llama", SIZES),
        ("native", "int4", "gemma3_text", KEPT),
        ("native", "fp32", "llama", replace(SOFTMAX, state_dtype="float16")),
    ],
)
def test_artifact_is_verified_and_runs(
    tmp_path: Path, lowering: str, weights: str, family: str, liger: LigerConfig
) -> None:
    model = make_checkpoint(tmp_path / "model", liger, family, **HEADS)
    path = build(model, tmp_path / "engine", lowering=lowering, weights=weights, block=16)
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["verification"]["passed"] and manifest["format_version"] == 2
    assert 0 <= manifest["quality"]["kl"] < 0.5
    session = load(path)
    types = {tensor.past: tensor.dtype for tensor in session.artifact.manifest.state}
    assert types["past.1.slot_key"] == types["past.1.slot_value"] == liger.state_dtype
    assert types["past.1.slot_position"] == "int32"
    ids = np.random.default_rng(1).integers(3, 131, 70)
    session.prefill(ids)
    spec = read_spec(model)
    assert session.artifact.manifest.bytes.state_per_sequence == sum(
        tensor.nbytes() for mixer in spec.mixers if mixer is not None for tensor in mixer.state()
    )
    session.snapshot().save(tmp_path / "state")
    expected = [session.step(token).copy() for token in (5, 6, 7)]
    again = load(path, batch=2)
    again.prefill(np.stack([ids[:20], ids[20:40]]), padding=[0, 3])
    again.restore(Snapshot.load(tmp_path / "state"), row=1)
    found = [again.step([token, token])[1].copy() for token in (5, 6, 7)]
    np.testing.assert_allclose(found, np.concatenate(expected), atol=1e-2)
    session.reset()
    assert all((x == -1).all() for name, x in session.snapshot().tensors.items() if name.endswith("slot_position"))


def shifted(widths: Any, heads: Any, places: Callable[..., np.ndarray] = packed.places) -> np.ndarray:
    """Begin one slot too early in all heads but the first."""
    found = places(widths, heads)
    return np.maximum(found - 1, 0) if widths and heads[0] and max(widths) > 4 else found


FAULTS: dict[str, tuple[Any, str, Any, str]] = {
    "wrong head offset": (packed, "places", shifted, r"layer 0 is the first that differs \(its slot_\w+ of head [13]"),
    "wrong scale": (packed, "MOST", 126, r"layer 0.*slot_key_scale"),
    "swapped heads": (
        packed.Heads, "join", lambda self, parts, axis, widths=1: packed.concat(self._g, self._most, parts, axis),
        r"layer 0 is the first that differs \(its slot_\w+ of head",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Each fault is in every layer and shows in the first."""
    owner, name, wrong, message = FAULTS[fault]
    model = make_checkpoint(tmp_path / "model", SIZES, **HEADS)
    monkeypatch.setattr(owner, name, wrong)
    with pytest.raises(VerificationError, match=message):
        build(model, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_nodes_depend_on_groups(tmp_path: Path) -> None:
    """Sizes add no nodes, and heads of equal sizes share theirs."""
    path = make_checkpoint(tmp_path / "model", SIZES, **HEADS)
    three, one, other = nodes_by_layer(build_graph(read_spec(path)).graph)
    larger = replace(SIZES, heads=("50+90 7 50+90 2+60", *SIZES.heads[1:]))
    path = make_checkpoint(tmp_path / "larger", larger, **HEADS)
    assert nodes_by_layer(build_graph(read_spec(path)).graph) == [three, one, other]
    assert one < other < 3 * one and one < three < 3 * one


def test_onnxruntime_genai_refuses(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", SIZES, **HEADS)
    with pytest.raises(UsageError, match="onnxruntime-genai carries no state"):
        build(path, tmp_path / "engine", lowering="ort", genai=True)
