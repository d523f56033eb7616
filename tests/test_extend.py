"""Families, gates and scores are rows: each is added here from outside the package and built into a graph.

CONTRIBUTING.md describes this in words. The headers of the C++ operators follow from the tables too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import headers
import pytest
import torch
from checkpoints import make_transformer

from ligerexport.checkpoint.convert import convert
from ligerexport.checkpoint.loading import load_model
from ligerexport.errors import UsageError
from ligerexport.exporters.build import build
from ligerexport.exporters.onnx import native
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.layers.mixer import layer_specs
from ligerexport.model.families import FAMILIES, Family
from ligerexport.model.gates import GATES, Gate
from ligerexport.model.scores import SCORES, Score
from tests.tolerances import OP_FP64

EXPORTERS = Path(native.__file__).parents[2]


def take_all_the_way(path: Path, family: str = "llama", **changes: Any) -> None:
    """Convert a random model, compare the op with its reference, and build artifacts, each verified with torch."""
    converted = convert(make_transformer(path / "transformer", family), path / "converted", window=12, **changes)
    (converted / "tokenizer.json").unlink()  # it knows no word, which would leave verification without a text
    spec = next(iter(layer_specs(load_model(converted).config)))
    assert spec is not None
    sizes = (spec.q_heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v)
    q, k, v = (torch.randn(2, 70, heads, width, dtype=torch.float64) for heads, width in sizes)
    table = rotary_table(10.0 ** (-torch.arange(4) / 4), spec.max_distance, BLOCK, torch.float64)
    inputs = q, k, v, torch.tensor([0, 3]), spec.initial_state(2, torch.float64), spec, table
    (found, state), (expected, expected_state) = liger_mixer(*inputs), liger_mixer_reference(*inputs)
    assert (found - expected).abs().max() <= OP_FP64
    assert torch.equal(state["slot_position"], expected_state["slot_position"])
    for lowering in ("ort", "portable", "native"):
        artifact = build(converted, path / lowering, lowering=lowering, max_chunk=32)
        assert json.loads((artifact / "manifest.json").read_text())["verification"]["passed"]


def test_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "seed_oss", Family("seed_oss", "SeedOss"))
    take_all_the_way(tmp_path, "seed_oss", preset="sinks")


def test_gate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GATES, "toy", Gate("one_minus_sigmoid", "softmax", 4.0, "this test"))
    take_all_the_way(tmp_path, preset="liger", gate="toy")


def test_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCORES, "toy", Score("received", "this test's", "sum", by_value=True, horizon=50.0))
    take_all_the_way(tmp_path, preset="memory", sinks=2, slots=(("toy", 6), ("novelty", 4)))


def test_unknown_map() -> None:
    with pytest.raises(UsageError, match="unknown feature map 'sigmoid'"):
        Gate("sigmoid", "softmax", 1.0, "a typing error")  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "file"), [("native", "onnx/native"), ("plugin", "tensorrt/plugin")])
def test_headers(name: str, file: str) -> None:
    """The command in tests/headers.py writes them again."""
    assert (EXPORTERS / file / "operands.h").read_text() == getattr(headers, name)()
