"""Adapters at run time: each sequence of a batch has its own, and the result is that of merged weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import make_transformer
from peft import LoraConfig, get_peft_model
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load
from safetensors.torch import save_file as save
from transformers import AutoModelForCausalLM

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import ArtifactError, UsageError
from ligerexport.exporters.onnx.lora import read_adapter
from ligerexport.exporters.targets import TARGETS

MEMORY: dict[str, Any] = {"window": 8, "sinks": 2, "slots": (("recent_use", 4),)}
TARGETED = {
    "a": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "b": ["v_proj", "up_proj"],
    "packed": ["qkv_proj", "o_proj", "gate_up_proj"],
}
IDS = np.random.default_rng(0).integers(0, 131, 40)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama and a Phi-3, their conversions, and adapters of ranks 3 and 2."""
    place = tmp_path_factory.mktemp("lora")
    for family, names in (("llama", ["a", "b"]), ("phi3", ["packed"])):
        model = make_transformer(place / family, family, num_hidden_layers=2)
        lx.convert(model, place / f"{family}-liger", **MEMORY)
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            base = AutoModelForCausalLM.from_pretrained(model)
            settings = LoraConfig(r=3 - seed, lora_alpha=2, target_modules=TARGETED[name], init_lora_weights=False)
            get_peft_model(base, settings).save_pretrained(place / name)
    return place


def merged(place: Path, family: str, name: str) -> np.ndarray:
    """Return the logits after all ids of a conversion of the merged model."""
    liger = place / f"{family}-{name}"
    if not liger.exists():
        lx.convert(place / family, liger, merge=place / name, **MEMORY)
    with torch.no_grad():
        return lx.load_model(liger)(torch.tensor(IDS)[None]).logits[0, -1].numpy()


@pytest.mark.parametrize("weights", ["fp32", "int4"])
@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_each_row_has_its_own(place: Path, tmp_path: Path, lowering: str, weights: str) -> None:
    liger, settings = place / "llama-liger", {"lowering": lowering, "weights": weights, "max_chunk": 16}
    plain = lx.build(liger, tmp_path / "plain", verify=False, **settings)
    built = lx.build(liger, tmp_path / "built", lora=3, **settings)
    assert open_artifact(built).manifest.format_version == 3
    session = lx.load(built, batch=3, adapters={"a": place / "a", "b": place / "b"})
    rows = np.split(np.tile(IDS, (3, 1)), [17], axis=1)
    none = [session.prefill(part).copy() for part in rows][-1]
    session.reset()
    session.use(["a", None, "b"])
    found = [session.prefill(part).copy() for part in rows][-1]
    np.testing.assert_allclose(found[1], none[1], atol=1e-5)
    if weights == "fp32":
        np.testing.assert_allclose(none[0], lx.load(plain).prefill(IDS)[0], atol=1e-4)
        for row, name in ((0, "a"), (2, "b")):
            np.testing.assert_allclose(found[row], merged(place, "llama", name), atol=1e-4)
    else:
        assert min(abs(found[row] - none[row]).max() for row in (0, 2)) > 0.1
    session.reset()
    session.use("b")
    np.testing.assert_allclose([session.prefill(part).copy() for part in rows][-1][2], found[2], atol=1e-4)
    assert session.sibling().adapters == (None,)


def test_types_of_an_adapter(place: Path, tmp_path: Path) -> None:
    """bfloat16, in which recover may write, is read without torch."""
    manifest = open_artifact(lx.build(place / "llama-liger", tmp_path / "built", lora=3, verify=False)).manifest
    expected = read_adapter(place / "a", manifest)
    for dtype in (torch.bfloat16, torch.float16):
        other = shutil.copytree(place / "a", tmp_path / str(dtype))
        tensors = {name: x.to(dtype) for name, x in load(other / "adapter_model.safetensors").items()}
        save(tensors, other / "adapter_model.safetensors")
        found = read_adapter(other, manifest)
        assert found.keys() == expected.keys()
        assert all(np.allclose(found[name], x, rtol=0.01, atol=0.01) for name, x in expected.items())


def test_no_prompt_cache_with_an_adapter(place: Path, tmp_path: Path) -> None:
    built = lx.build(place / "llama-liger", tmp_path / "built", lora=3, verify=False)
    session = lx.load(built, adapters={"a": place / "a"})
    session.use("a")
    with pytest.raises(UsageError, match="prompt_cache with an adapter"):
        lx.generate(session, [1, 2, 3], prompt_cache=tmp_path / "cache")


def test_packed_projections(place: Path, tmp_path: Path) -> None:
    built = lx.build(place / "phi3-liger", tmp_path / "built", lora=4, verify=False)
    session = lx.load(built, adapters={"x": place / "packed"})
    session.use("x")
    np.testing.assert_allclose(session.prefill(IDS)[0], merged(place, "phi3", "packed"), atol=1e-4)


def test_without_a_rank_nothing_changes(place: Path, tmp_path: Path) -> None:
    built = lx.build(place / "llama-liger", tmp_path / "built", verify=False)
    assert b"lora" not in (built / "model.onnx").read_bytes()
    with pytest.raises(UsageError, match="takes no adapters"):
        lx.load(built, adapters={"a": place / "a"})
    with pytest.raises(UsageError, match="no adapter 'a' was loaded"):
        lx.load(built).use("a")
    with pytest.raises(UsageError, match="adapters with a checkpoint"):
        lx.load(place / "llama-liger", adapters={"a": place / "a"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lora": -1}, "rank -1"), ({"lora": 8, "genai": True}, "onnxruntime-genai"), ({"lora": 9999}, "rank 9999")],
)
def test_builds_that_are_refused(place: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lx.build(place / "llama-liger", tmp_path / "built", **settings)


def test_adapters_that_are_refused(place: Path, tmp_path: Path) -> None:
    built = lx.build(place / "llama-liger", tmp_path / "built", lora=2, verify=False)

    def changed(config: dict[str, Any], old: str = "", new: str = "", crop: int | None = None) -> Path:
        target = tmp_path / f"changed-{len([*tmp_path.iterdir()])}"
        target.mkdir()
        settings = json.loads((place / "b" / "adapter_config.json").read_text()) | config
        (target / "adapter_config.json").write_text(json.dumps(settings))
        tensors = {
            x.replace(old, new): y[:, :crop].copy()
            for x, y in load_file(place / "b" / "adapter_model.safetensors").items()
        }
        save_file(tensors, target / "adapter_model.safetensors")
        return target

    for path, kind, message in (
        (place / "a", UsageError, "rank 3, this artifact takes up to 2"),
        (changed({}, "layers.1", "layers.7"), ArtifactError, r"changes model.layers.7.*which this artifact does not"),
        (changed({"use_dora": True}), ArtifactError, "more than LoRA"),
        (changed({}, "lora_A", "lora_C"), ArtifactError, "more than LoRA"),
        (changed({}, crop=1), ArtifactError, "has LoRA of"),
        (place / "llama", ArtifactError, "adapter_config.json"),
    ):
        with pytest.raises(kind, match=message):
            lx.load(built, adapters={"x": path})
    session = lx.load(built, batch=2, adapters={"b": place / "b"})
    for names, message in (("c", "no adapter 'c' was loaded"), (["b"], "1 adapters for 2 sequences")):
        with pytest.raises(UsageError, match=message):
            session.use(names)
