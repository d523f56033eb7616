"""Files of earlier versions give the same results, or an error that explains how to make them again.

`data/make.py` wrote the files with the code of the date in their names: a converted checkpoint, its artifact, a saved
state, and the tokens after it.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ligerexport as lx
from ligerexport.artifact.artifact import MANIFEST
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.checkpoint.adapter import RECORD, read_record
from ligerexport.errors import ArtifactError, CheckpointError, LigerError, UsageError
from ligerexport.exporters.targets import TARGETS
from ligerexport.run.prompt_cache import PromptCache
from ligerexport.run.runtime import Session

DATA = Path(__file__).parent / "data"
FIRST = "2026-11-22"
"""Files of the first commit, whose conversions, manifests and states have fewer fields than later ones."""


@pytest.fixture(params=sorted(path.stem for path in DATA.glob("*.zip")))
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with zipfile.ZipFile(DATA / f"{request.param}.zip") as file:
        file.extractall(tmp_path / request.param)
    return tmp_path / request.param


@pytest.fixture
def said(old: Path) -> dict[str, Any]:
    return json.loads((old / "recorded.json").read_text())


def greedy(session: Session, logits: np.ndarray, count: int) -> list[int]:
    tokens = []
    for _ in range(count):
        tokens.append(int(logits.argmax()))
        logits = session.step(tokens[-1])
    return tokens


def test_there_is_one_of_each_lowering() -> None:
    """In the format of manifests that artifacts had before any memory had sizes for each KV head."""
    manifests = [json.loads(zipfile.ZipFile(path).read(f"engine/{MANIFEST}")) for path in DATA.glob("*.zip")]
    assert {row["lowering"] for row in manifests if row["format_version"] == 1} == set(TARGETS["onnx"].lowerings)


def test_artifact_and_state(old: Path, said: dict[str, Any]) -> None:
    session = lx.load(old / "engine")
    assert greedy(session, session.prefill(said["prompt"]), len(said["tokens"])) == said["tokens"]
    session.reset()
    session.restore(Snapshot.load(old / "state.safetensors"))
    first, *rest = said["tokens"]
    assert greedy(session, session.step(first), len(rest)) == rest


def test_prompt_cache(old: Path, said: dict[str, Any]) -> None:
    session, cache = lx.load(old / "engine"), PromptCache(old / "state.safetensors")
    prompt = np.array([*said["prompt"], said["tokens"][0]])
    if Snapshot.load(cache.path).ids is None:  # a plain state
        with pytest.raises(LigerError, match="not a prompt cache") as caught:
            cache.restore(session, prompt)
        assert caught.value.hint == "choose another file"
    else:
        assert cache.restore(session, prompt) == len(said["prompt"])
        assert greedy(session, session.step(prompt[-1]), 5) == said["tokens"][1:6]


def test_checkpoint(old: Path, said: dict[str, Any], tmp_path: Path) -> None:
    """A new build gives the same tokens, except for codes, which a later version may choose differently."""
    lx.build(old / "liger", tmp_path / "engine", max_chunk=16, lowering=said["lowering"], weights=said["weights"])
    session = lx.load(tmp_path / "engine")
    tokens = greedy(session, session.prefill(said["prompt"]), len(said["tokens"]))
    assert tokens == said["tokens"] or said["weights"] != "fp32"
    if said["written"] == FIRST:  # the conversion is written with more settings now, and is another model to a state
        with pytest.raises(UsageError, match="belongs to another model") as caught:
            session.restore(Snapshot.load(old / "state.safetensors"))
        assert caught.value.hint == "load the artifact that it was saved with"


def test_a_manifest_that_lacks_what_is_needed(old: Path) -> None:
    file = old / "engine" / MANIFEST
    manifest = json.loads(file.read_text())
    file.write_text(json.dumps(manifest | {"format_version": 0, "graph": {"file": "model.onnx"}}))
    with pytest.raises(ArtifactError, match="is damaged") as caught:
        lx.load(old / "engine")
    assert "ligerexport build MODEL --target onnx -o DIRECTORY --force" in str(caught.value.hint)


def test_an_adapter_that_does_not_say_what_it_fits(tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(json.dumps({"model": "0123456789abcdef", "data": "", "recipe": "paper"}))
    with pytest.raises(CheckpointError, match="an earlier version") as caught:
        read_record(tmp_path)
    assert "ligerexport recover LIGER --data" in str(caught.value.hint)
