"""`build(genai=True)`: an unmodified onnxruntime-genai writes the tokens that our own session writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checkpoints import FORESIGHT, MEMORY, make_checkpoint

import ligerexport as lx
from ligerexport.errors import UsageError
from ligerexport.exporters.verify import compare
from ligerexport.model.config import PRESETS, LigerConfig

genai = pytest.importorskip("onnxruntime_genai")

STEPS = 100
CONFIGS = {
    "paper": (LigerConfig(window=20), "llama"),
    "memory": (MEMORY, "llama"),
    "foresight": (FORESIGHT, "qwen3"),
    "evicted": (PRESETS["evicted"].config, "llama"),
    "softmax": (LigerConfig(window=20, keep_softmax=(0, 2)), "llama"),
    "gemma": (LigerConfig(window=20, keep_softmax=(1,)), "gemma3_text"),
}


def theirs(path: Path, pieces: list[np.ndarray], steps: int) -> list[int]:
    """Return greedy tokens of onnxruntime-genai after a prompt in pieces."""
    model = genai.Model(str(path))
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=1000)
    generator, found = genai.Generator(model, params), []
    for piece in pieces:
        generator.append_tokens(piece[None].astype(np.int32))
    for _ in range(steps):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


def ours(path: Path, ids: np.ndarray, steps: int) -> list[int]:
    session = lx.load(path)
    logits, found = session.prefill(ids), []
    for _ in range(steps):
        found.append(int(logits[0].argmax()))
        logits = session.step(found[-1])
    return found


@pytest.mark.parametrize(("name", "lowering"), [*((name, "ort") for name in CONFIGS), ("memory", "portable")])
def test_the_same_tokens(tmp_path: Path, name: str, lowering: str) -> None:
    """A prompt of several chunks, and one that continues in a second turn."""
    liger, family = CONFIGS[name]
    source = make_checkpoint(tmp_path / "liger", liger, family)
    path = Path(lx.build(source, tmp_path / "engine", lowering=lowering, max_chunk=32, genai=True, verify=False))
    ids = np.random.default_rng(0).integers(0, 131, 150)
    expected = ours(path, ids, STEPS)
    assert len(set(expected)) > 1
    config = json.loads((path / "genai_config.json").read_text())
    config["model"]["eos_token_id"] = min(set(range(131)) - set(expected))  # no text ends before its time
    (path / "genai_config.json").write_text(json.dumps(config))
    assert theirs(path, [ids], STEPS) == expected
    assert theirs(path, [ids[:130], ids[130:]], STEPS) == expected


@pytest.mark.parametrize(
    ("lowering", "weights", "level"),
    [
        ("ort", "fp32", "ORT_DISABLE_ALL"),
        ("ort", "fp16", "ORT_ENABLE_BASIC"),
        ("ort", "int8", "ORT_DISABLE_ALL"),
        ("ort", "int4", "ORT_DISABLE_ALL"),
        ("portable", "int4", "ORT_ENABLE_ALL"),
    ],
)
def test_the_same_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str, weights: str, level: str
) -> None:
    """Equal bit for bit, because both load alike: rounded activations would amplify any difference."""
    source = make_checkpoint(tmp_path / "liger", MEMORY)
    tolerance_of = compare.tolerance_of
    monkeypatch.setattr(compare, "tolerance_of", lambda dtype: replace(tolerance_of(dtype), logits=0.0))
    path = lx.build(source, tmp_path / "engine", lowering=lowering, weights=weights, genai=True, verify=False)
    options = json.loads((Path(path) / "genai_config.json").read_text())["model"]["decoder"]["session_options"]
    assert options["graph_optimization_level"] == level


def test_refused_before_any_work(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "liger", MEMORY)
    with pytest.raises(UsageError, match="native"):
        lx.build(source, tmp_path / "engine", lowering="native", genai=True)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"eos_token_id": None}))
    (source / "generation_config.json").unlink()
    with pytest.raises(UsageError, match="eos_token_id"):
        lx.build(source, tmp_path / "engine", genai=True)
