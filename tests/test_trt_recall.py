"""Artifacts of `recall` for TensorRT on a machine without a GPU: what is verified, written and refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import make_checkpoint

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.exporters.tensorrt import backend, pack
from ligerexport.model.config import LigerConfig

RECALL = LigerConfig(window=8, sinks=2, slots=(("learned", 5),), attention_weight=1.0, recurrence_weight=0.0)


@pytest.mark.parametrize(
    ("kind", "heads"), [("int8", ("12+9 3", "30 4")), ("float16", ()), ("activation", ("12+9 3", "30 4"))]
)
def test_graphs_are_verified(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, heads: tuple[str, ...]
) -> None:
    packed: list[Any] = []
    monkeypatch.setattr(pack, "write_pack", lambda specs, path, **options: packed.append(path.write_bytes(b"kernels")))
    liger = replace(RECALL, state_dtype=kind, heads=heads)
    checkpoint = make_checkpoint(tmp_path / "model", liger, num_hidden_layers=2)
    path = lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(90,), max_batch=2)
    manifest = open_artifact(path).manifest
    assert manifest.verification["passed"] and manifest.format_version == 2
    assert manifest.device is not None and manifest.device["contract"] == 3
    assert len(packed) == 1
    stored = "float16" if kind == "activation" else kind
    assert [x.dtype for x in manifest.state if x.past.startswith("past.0.slot_")] == [
        stored, stored, *(["float16"] * 2 if kind == "int8" else []), "int32", "float32",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"recurrence": "evicted", "recurrence_weight": 1.0, "state_dtype": "int8"}, "slots in int8 together with"),
        ({"slots": (("recent_use", 5),), "heads": ("9+5 4", "4+3 8+1")}, "sizes for each KV head together with"),
    ],
)
def test_memories_without_kernels_are_refused(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", replace(RECALL, **changes), num_hidden_layers=2)
    with pytest.raises(UsageError, match=what):
        lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(90,))
    assert not (tmp_path / "a").exists()


def test_rtx_engine(tmp_path: Path) -> None:
    """The state of the engine has codes and scales."""
    try:
        backend.rtx()
    except MissingDependency as error:
        pytest.skip(error.message)
    liger = replace(RECALL, state_dtype="int8", heads=("12+9 3",))
    checkpoint = make_checkpoint(tmp_path / "model", liger, num_hidden_layers=1)
    path = lx.build(checkpoint, tmp_path / "a", target="trt-rtx", sms=(89,), max_batch=2, max_chunk=16)
    manifest = open_artifact(path).manifest
    assert manifest.verification["passed"] and manifest.format_version == 2
    assert [x.dtype for x in manifest.graph.inputs[2:]] == ["int8", "int8", "float16", "float16", "int32", "float32"]
    engine = (path / "model.engine").read_bytes()
    assert all(x.name.encode() in engine for x in (*manifest.graph.inputs, *manifest.graph.outputs))
