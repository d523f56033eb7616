"""Targets and precisions are rows: each is added here from outside the package, built, verified and run.

CONTRIBUTING.md describes this in words.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import MEMORY, make_checkpoint

import ligerexport as lx
from ligerexport.artifact.artifact import Artifact, Manifest, open_artifact
from ligerexport.cli.doctor import examine
from ligerexport.console import ProgressFactory
from ligerexport.errors import UsageError
from ligerexport.exporters.backend import Backend, BuildSettings, Check, SessionSettings
from ligerexport.exporters.build import BuildPlan
from ligerexport.exporters.onnx.graph import storage_of
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.onnx.weights import DATA_FILE, data_layout
from ligerexport.exporters.targets import TARGETS, WEIGHTS, Precision, Target


class Numbered(Backend):
    """The graph of the lowering `portable` with a file that has the number of layers."""

    def describe(self, plan: BuildPlan, weight_bytes: int) -> dict[str, Any]:
        return {"layers": len(plan.spec.mixers)}

    def finish(self, plan: BuildPlan, directory: Path, manifest: Manifest, progress: ProgressFactory) -> Manifest:
        (directory / "layers.txt").write_text(str(len(plan.spec.mixers)))
        return replace(manifest, device={"layers": len(plan.spec.mixers)})

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> OnnxSession:
        return OnnxSession(artifact, batch=settings.batch, threads=1)

    def examine(self, plugin: Path | None) -> list[Check]:
        return [Check("numbers", "there")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", MEMORY, num_hidden_layers=2)


def test_target(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = Target(f"{__name__}:Numbered", ("portable",), {}, ("fp32", "int8"), "for tests", chunk=32)
    monkeypatch.setitem(TARGETS, "numbered", row)
    plan = BuildPlan(checkpoint, tmp_path / "a", BuildSettings("numbered", weights="int8"))
    assert plan.describe()["layers"] == 2 and plan.settings.max_chunk == 32 and not (tmp_path / "a").exists()
    path = plan.run()
    manifest = open_artifact(path).manifest
    assert manifest.target == "numbered" and manifest.verification["passed"] and "layers.txt" in manifest.files
    session, same = lx.load(path, batch=2), OnnxSession(open_artifact(path), batch=2, threads=1)
    ids = np.arange(3, 23).reshape(2, 10)
    assert np.array_equal(session.prefill(ids), same.prefill(ids))
    assert "numbers" in {check.name for check in examine("numbered")} - {check.name for check in examine("onnx")}
    for wrong in (BuildSettings("numbered", lowering="ort"), BuildSettings("numbered", sms=(90,)),
                  BuildSettings("numbered", genai=True)):  # fmt: skip
        with pytest.raises(UsageError, match="numbered"):
            BuildPlan(checkpoint, tmp_path / "b", wrong)


@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_precision(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str) -> None:
    """Codes of 6 bits in bytes of 8 bits, which every kernel for 8 bits accepts."""
    monkeypatch.setitem(WEIGHTS, "int6", Precision("int6", 8, 0.1, "for tests", levels=64))
    monkeypatch.setitem(TARGETS, "onnx", replace(TARGETS["onnx"], weights=(*TARGETS["onnx"].weights, "int6")))
    path = lx.build(checkpoint, tmp_path / "a", lowering=lowering, weights="int6", block=16)
    artifact, spec = open_artifact(path), read_spec(checkpoint)
    assert artifact.manifest.precision == "int6" and artifact.manifest.block == 16
    assert artifact.manifest.verification["passed"] and artifact.manifest.quality is not None
    part = data_layout(spec, storage_of(artifact.manifest))["model.layers.0.mlp.down_proj.weight"]
    codes = np.fromfile(path / DATA_FILE, np.uint8, part.nbytes, offset=part.offset)
    assert 31 < codes.max() < 64
    assert np.isfinite(lx.load(path).prefill([3, 4, 5])).all()
