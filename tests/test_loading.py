"""Every verb reads a checkpoint as transformers does, or refuses it by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

import ligerexport as lx
from ligerexport.checkpoint.adapter import check_student, write_merged
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import convert, convert_in_memory, load_model
from ligerexport.checkpoint.loading import load_any, load_transformer
from ligerexport.checkpoint.seal import SEAL
from ligerexport.errors import CheckpointError, LigerError, UsageError
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.measure.opened import open_model
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.train.model import load_teacher
from tests import toy
from tests.test_model import make_teacher

SINGLE = "model.safetensors"
HEAD, EMBEDDING, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.layers.1.input_layernorm.weight"
MAP = "model.layers.0.self_attn.o_proj.weight"
TIE = "tie_word_embeddings"
IDS = torch.arange(1, 61)[None]
WHOLE: dict[str, Any] = {
    "window": 64, "sinks": 0, "slots": (), "attention_weight": 1.0, "recurrence_weight": 0.0, "max_distance": 64
}  # fmt: skip
"""A conversion that equals the Transformer on `IDS`."""


def make(path: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None, **settings: Any) -> Path:
    """Write a random checkpoint whose weights and config.json are changed afterwards; None deletes a setting."""
    family = settings.pop("family", "llama")
    make_teacher(path, family, vocab_size=toy.VOCAB, tie_word_embeddings=False)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    tensors = load_file(path / SINGLE)
    change(tensors)
    save_file(tensors, path / SINGLE, metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text()) | settings
    kept = {key: value for key, value in config.items() if value is not None or key not in settings}
    (path / "config.json").write_text(json.dumps(kept))
    return path


@torch.no_grad()
def logits(model: Any) -> Tensor:
    return model.eval()(IDS, use_cache=False).logits


def close(one: Tensor, other: Tensor) -> bool:
    return bool((one - other).abs().max() < 2e-4)


# Heads and ties

HEADS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "own": lambda tensors: None,
    "equal": lambda tensors: tensors.update({HEAD: tensors[EMBEDDING].clone()}),
    "none": lambda tensors: tensors.pop(HEAD),
}


CASES = [("llama", head, says) for head in HEADS for says in (True, False, None)]
CASES += [("gemma3_text", head, None) for head in ("own", "none")]  # a family that is tied where nothing is said


@pytest.mark.parametrize(("family", "head", "says"), CASES)
def test_a_head_that_is_stored_wins_and_none_is_the_embedding(
    tmp_path: Path, family: str, head: str, says: bool | None
) -> None:
    source = make(tmp_path / "source", HEADS[head], family=family, tie_word_embeddings=says)
    tensors = load_file(source / SINGLE)
    reference = AutoModelForCausalLM.from_pretrained(source).eval()
    reference.lm_head.weight = torch.nn.Parameter(tensors.get(HEAD, tensors[EMBEDDING]))
    expected, tied = logits(reference), head != "own"

    liger = convert(source, tmp_path / "liger", **WHOLE)
    assert json.loads((liger / "config.json").read_text())["tie_word_embeddings"] is tied
    assert check_checkpoint(source).tied is check_checkpoint(liger).tied is read_spec(liger).tied is tied
    plain, converted = load_any(check_checkpoint(source), torch.float32), load_model(liger)
    assert torch.equal(logits(plain), expected)
    assert close(logits(converted), expected)
    assert torch.equal(logits(load_teacher(check_checkpoint(liger), None, torch.float32)), expected)
    memory = LigerConfig.from_dict(converted.config.liger)
    assert torch.equal(logits(convert_in_memory(reference, memory)), logits(converted))

    config = json.loads((liger / "config.json").read_text()) | {"tie_word_embeddings": says}  # of earlier versions
    (liger / "config.json").write_text(json.dumps({key: x for key, x in config.items() if key != TIE or x is not None}))
    assert torch.equal(logits(load_model(liger)), logits(converted)) and read_spec(liger).tied is tied
    load_model(liger).save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(load_model(tmp_path / "saved")), logits(converted))
    (tmp_path / "merged").mkdir()
    write_merged(tmp_path / "merged", check_checkpoint(liger), {}, 1.0, {})
    assert torch.equal(logits(load_model(tmp_path / "merged")), logits(converted))


@pytest.mark.parametrize(("head", "says"), [("own", True), ("none", None)])
def test_the_artifact_has_that_head(tmp_path: Path, head: str, says: bool | None) -> None:
    source = make(tmp_path / "source", HEADS[head], tie_word_embeddings=says)
    liger = convert(source, tmp_path / "liger", **WHOLE)
    session = lx.load(lx.build(liger, tmp_path / "onnx"))
    assert close(torch.from_numpy(session.prefill(IDS.numpy())), logits(load_model(liger))[:, -1])


# Names and shapes


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint and its conversion."""
    place = tmp_path_factory.mktemp("sound")
    source = make(place / "source")
    return source, convert(source, place / "liger", **WHOLE)


def damaged(sound: tuple[Path, Path], place: Path, change: Callable[[dict[str, Tensor]], object]) -> tuple[Path, Path]:
    """Copy both, and change their weights without changing the record of the old ones."""
    for path in sound:
        shutil.copytree(path, place / path.name)
        tensors = load_file(path / SINGLE)
        change(tensors)
        save_file(tensors, place / path.name / SINGLE, metadata={"format": "pt"})
        (place / path.name / SEAL).unlink(missing_ok=True)
    return place / "source", place / "liger"


def renamed(change: Callable[[str], str]) -> Callable[[dict[str, Tensor]], None]:
    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[change(name)] = tensors.pop(name)

    return rename


NAMES = {
    "module": lambda name: f"module.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "both": lambda name: f"module._orig_mod.{name}",
    "inside": lambda name: name.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
    "doubled": lambda name: f"model.{name}",
    "without": lambda name: name.removeprefix("model."),
}


@pytest.mark.parametrize("kind", NAMES)
def test_prefixes_of_wrappers_are_stripped(tmp_path: Path, sound: tuple[Path, Path], kind: str) -> None:
    expected = logits(load_any(check_checkpoint(sound[0]), torch.float32))
    source, liger = damaged(sound, tmp_path, renamed(NAMES[kind]))
    assert torch.equal(logits(load_any(check_checkpoint(source), torch.float32)), expected)
    again = convert(source, tmp_path / "again", **WHOLE)
    assert set(load_file(again / SINGLE)) == set(FAMILIES["llama"].weights(check_checkpoint(source).config)[0])
    assert close(logits(load_model(again)), expected) and close(logits(load_model(liger)), expected)
    for read in (read_spec, check_student):
        with pytest.raises(CheckpointError, match=" calls ") as caught:
            read(liger)
        assert "save_pretrained" in str(caught.value.hint)
    load_model(liger).save_pretrained(tmp_path / "saved")  # as the hint says
    assert check_checkpoint(tmp_path / "saved", tokenizer=False).plain


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "no projection": (lambda x: x.pop(MAP), f"{MAP} is missing"),
    "no norm": (lambda x: x.pop(NORM), f"{NORM} is missing"),
    "another name": (lambda x: x.update({f"{MAP}s": x.pop(MAP)}), f"{MAP}s, which the model in config.json"),
    "a bias": (lambda x: x.update({MAP.replace("weight", "bias"): torch.zeros(64)}), "o_proj.bias, which"),
    "wide": (lambda x: x.update({MAP: torch.zeros(64, 65)}), r"is \[64, 65\], config.json says \[64, 64\]"),
    "turned": (lambda x: x.update({"model.norm.weight": torch.ones(1, 64)}), r"is \[1, 64\]"),
    "head": (lambda x: x.update({HEAD: torch.zeros(3, 64)}), r"lm_head.weight is \[3, 64\]"),
    "twice": (lambda x: x.update({f"module.{NORM}": torch.ones(64)}), "has both"),
    "integers": (lambda x: x.update({MAP: torch.ones(64, 64, dtype=torch.int8)}), "is stored as I8"),
    "scales": (lambda x: x.update({f"{MAP}_scale_inv": torch.ones(1, 1)}), "weight_scale_inv, which"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_missing_extra_or_misshapen_is_named_in_every_verb(
    tmp_path: Path, sound: tuple[Path, Path], fault: str
) -> None:
    change, message = FAULTS[fault]
    source, liger = damaged(sound, tmp_path, change)
    verbs: list[Callable[[], object]] = [
        lambda: convert(source, tmp_path / "out", preset="memory"),
        lambda: convert(liger, tmp_path / "out", preset="memory"),
        lambda: open_model(source, scoring=True),
        lambda: open_model(liger, scoring=True),
        lambda: load_model(liger),
        lambda: load_transformer(source, json.loads((source / "config.json").read_text()), torch.float32),
        lambda: lx.build(liger),
        lambda: check_student(liger),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=message) as caught:
            verb()
        assert caught.value.hint
    assert not (tmp_path / "out").exists() and not (liger / "onnx").exists()


def test_what_transformers_skips_is_skipped(tmp_path: Path) -> None:
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    liger = convert(make(tmp_path / "source", lambda x: x.update(old)), tmp_path / "liger", **WHOLE)
    assert not set(old) & set(read_spec(liger).weights)
    load_model(liger)


def test_a_family_that_is_not_converted_is_held_to_the_same(tmp_path: Path) -> None:
    from transformers import StableLmConfig, StableLmForCausalLM

    sizes = {"hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "vocab_size": toy.VOCAB}  # fmt: skip
    StableLmForCausalLM(StableLmConfig(**sizes)).save_pretrained(tmp_path)
    info = check_checkpoint(tmp_path, tokenizer=False)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(logits(load_any(info, torch.float32)), expected)
    tensors = load_file(tmp_path / SINGLE)
    weight = tensors.pop(NORM)
    for more, message in (({}, "is missing"), ({NORM: weight, "x.weight": weight.clone()}, "x.weight has no place")):
        save_file(tensors | more, tmp_path / SINGLE, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            load_any(info, torch.float32)


# Values and caches


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_is_not_finite_is_named(
    tmp_path: Path, sound: tuple[Path, Path], value: float, dtype: torch.dtype
) -> None:
    def plant(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: tensor.to(dtype) for name, tensor in tensors.items()}
        tensors[MAP][3, 5] = value

    source, liger = damaged(sound, tmp_path, plant)
    verbs: list[Callable[[], object]] = [
        lambda: convert(source, tmp_path / "out", preset="memory"), lambda: open_model(source, scoring=True),
        lambda: load_model(liger), lambda: lx.build(liger),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(LigerError, match=f"{MAP} in .* not finite"):
            verb()


def test_a_cache_of_another_kind_is_refused(sound: tuple[Path, Path]) -> None:
    model = load_model(sound[1])
    for cache in (DynamicCache(), DynamicCache(config=model.config)):
        with pytest.raises(UsageError, match="a DynamicCache cannot hold") as caught:
            model.generate(IDS, past_key_values=cache, max_new_tokens=2)
        assert "LigerCache(model.config)" in str(caught.value.hint)
