"""Conversion: no weight byte changes, provenance is kept, and bad inputs are refused in one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from ligerexport.artifact.artifact import open_artifact
from ligerexport.checkpoint.calibrate import digest, score_shapes
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import convert, convert_in_memory, load_model, load_transformer
from ligerexport.checkpoint.scores import packaged_scores
from ligerexport.checkpoint.sources import BUILTIN_MODELS, Source
from ligerexport.errors import CheckpointError, LigerError, UsageError
from ligerexport.exporters.build import build
from ligerexport.model.config import PRESETS, LigerConfig, get_preset
from ligerexport.model.families import FAMILIES
from ligerexport.train.model import load_teacher
from tests import toy
from tests.test_model import make_teacher


def test_weights_are_the_same_files(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", shard="40KB")
    output = convert(teacher, tmp_path / "liger", preset="memory")
    for file in teacher.glob("*.safetensors*"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    shard = next(teacher.glob("*.safetensors"))
    assert (output / shard.name).stat().st_ino == shard.stat().st_ino
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "liger_llama"
    assert config["liger_source"]["model"] == "teacher"
    assert LigerConfig.from_dict(config["liger"]) == PRESETS["memory"].config
    with safe_open(output / shard.name, "pt") as weights:
        assert list(weights.keys())


def test_a_converted_checkpoint_converts_to_another_preset(tmp_path: Path) -> None:
    first = convert(make_teacher(tmp_path / "teacher"), tmp_path / "memory", preset="memory")
    second = convert(first, tmp_path / "sinks", preset="sinks")
    assert load_model(second).config.liger["slots"] == []


def test_a_source_is_never_replaced(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    before = sorted(path.name for path in teacher.iterdir())
    with pytest.raises(UsageError, match="is the model itself"):
        convert(teacher, teacher, force=True)
    with pytest.raises(UsageError, match="not converted"):
        convert(make_teacher(tmp_path / "other"), teacher, force=True)
    assert sorted(path.name for path in teacher.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}}, "'proportional' is not"),
        ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0"),
        ({"model_type": "phi3", "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 7, "long_factor": [2.0] * 8,
        }}, "short_factor"),
    ],
)  # fmt: skip
def test_unsupported_checkpoints(tmp_path: Path, change: dict[str, object], message: str) -> None:
    family = change.get("model_type")
    teacher = make_teacher(tmp_path / "teacher", str(family) if family in FAMILIES else "llama")
    config = json.loads((teacher / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if key not in change or value is not None}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(LigerError, match=message) as error:
        convert(teacher, tmp_path / "liger")
    assert error.value.hint
    assert not (tmp_path / "liger").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"max_distance": 100, "window": 16}, "changes its frequencies beyond 64"),
     ({"keep_softmax": (1,)}, "layers that keep softmax, with a rotary")],
)  # fmt: skip
def test_rotary_embeddings_that_change_with_the_length(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(UsageError, match=message):
        convert(make_teacher(tmp_path / "teacher", rope_parameters=rope), tmp_path / "liger", **changes)


def test_another_family_is_named_with_those_that_can_be_converted(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"model_type": "mamba2"}))
    with pytest.raises(CheckpointError, match="family 'mamba2' cannot be converted") as error:
        convert(teacher, tmp_path / "liger")
    assert ", ".join(sorted(FAMILIES)) in str(error.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "glaa"}, "unknown gate"),
        ({"gate": "gla:3"}, "gate 'gla:3'"),
        ({"gate": "gsa:x"}, "gate 'gsa:x'"),
        ({"gate": "gsa:2.5"}, "gate 'gsa:2.5'"),
        ({"preset": "liger", "gate": "gsa:5"}, "16 key channels"),
        ({"gate": "hgrn2:1"}, "gate 'hgrn2:1'"),
        ({"preset": "evicted", "gate": "gsa"}, "gate 'gsa'"),
        ({"memories": 4}, "the recurrence has no weight"),
        ({"slots": (("peak", 3),)}, "unknown score"),
        ({"slots": (("use", 0),)}, "0 slots"),
        ({"slots": (("use", 1), ("use", 2))}, "twice"),
        ({"window": 0}, "window"),
        ({"recurrence_weight": -1.0}, "mix weights"),
        ({"max_distance": 3}, "smaller than the window"),
        ({"keep_softmax": (99,)}, "keep_softmax"),
        ({"preset": "sinks", "layer_memory": ((99, 8, ()),)}, "layer_memory"),
        ({"layer_memory": ((0, 8, (("use", 2),)),)}, "other scores"),
        ({"layer_memory": ((0, 8, ()), (0, 9, ()))}, "two memories"),
        ({"layer_memory": ((0, 8, ()),), "keep_softmax": (0,)}, "two memories"),
        ({"preset": "sinks", "layer_memory": ((0, 0, ()),)}, "window 0"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        convert(make_teacher(tmp_path / "teacher"), tmp_path / "liger", **changes)
    assert error.value.hint


def test_unknown_preset_and_setting() -> None:
    with pytest.raises(UsageError, match="unknown preset") as error:
        get_preset("memorry")
    assert "memory" in str(error.value.hint)
    with pytest.raises(UsageError, match="unknown setting"):
        LigerConfig.from_dict({"windw": 3})


# Learned scores

SCORES_KEYS = {"from", "windows", "tokens", "seed", "explained", "sha256"}
SMALL = {"window": 16, "slots": (("recent_use", 4), ("learned", 8))}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text" / "a.txt"
    path.parent.mkdir()
    path.write_text("".join(f"on day {i} the sea was calm and {i * i} gulls came by. " for i in range(200)))
    return path.parent


def readable_teacher(path: Path, shard: str = "1GB", family: str = "llama") -> Path:
    """A teacher with a usable tokenizer and a trained length that is enough for a fit."""
    make_teacher(path, family, shard=shard, vocab_size=toy.VOCAB, max_position_embeddings=512)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    return path


def foresee(path: Path, **settings: object) -> Path:
    return convert(path.parent / "teacher", path, preset="foresight", **SMALL | settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("shard", ["1GB", "100KB"], ids=["single", "sharded"])
def test_a_fit_goes_beside_the_weights(tmp_path: Path, text: Path, shard: str) -> None:
    teacher = readable_teacher(tmp_path / "teacher", shard)
    liger = foresee(tmp_path / "liger", calibrate=[text], windows=3, keep_softmax=(1,))
    before, after = check_checkpoint(teacher), check_checkpoint(liger)
    assert [f.name for f in after.files] == [
        f"model-{i + 1:05}-of-{len(after.files):05}.safetensors" for i in range(len(before.files) + 1)
    ]
    for old, new in zip(before.files, after.files, strict=False):
        assert old.stat().st_ino == new.stat().st_ino
    tensors = load_file(after.files[-1])
    facts = after.config["liger_scores"]
    assert {name: tuple(x.shape) for name, x in tensors.items()} == score_shapes(
        after.config, LigerConfig.from_dict(after.config["liger"])
    )
    assert len(tensors) == 4  # a layer kept as softmax has none
    assert facts.keys() == SCORES_KEYS and facts["sha256"] == digest(tensors) and 0 < facts["explained"] < 1
    assert (facts["from"], facts["windows"], facts["tokens"]) == ("fit", 3, 3 * 512)
    model = load_model(liger)
    for name, tensor in tensors.items():
        assert torch.equal(model.get_parameter(name), tensor)
    ids = torch.randint(0, toy.VOCAB, (1, 80))
    logits = model(ids).logits
    in_memory = convert_in_memory(load_transformer(teacher, before.config, torch.float32),
                                  LigerConfig.from_dict(after.config["liger"]), tensors)  # fmt: skip
    assert torch.equal(in_memory(ids).logits, logits)
    built = open_artifact(build(liger, tmp_path / "onnx"))
    assert built.manifest.verification["passed"] and after.files[-1].name in built.manifest.source.files
    model.get_parameter("model.layers.0.self_attn.score_proj.weight").data.neg_()
    assert not torch.equal(model(ids).logits, logits)


def test_layers_that_keep_their_window_need_no_score(tmp_path: Path, text: Path) -> None:
    readable_teacher(tmp_path / "teacher", family="gemma3_text")
    liger = foresee(tmp_path / "liger", calibrate=[text], windows=1)
    info = check_checkpoint(liger)
    names = {name for name in info.tensors if ".score_proj." in name}
    assert names == {f"model.layers.1.self_attn.score_proj.{kind}" for kind in ("weight", "bias")}
    assert info.config["liger"]["keep_window"] == [0, 2]
    memories = [layer.self_attn.spec.config for layer in load_model(liger).model.layers]
    assert [memory.num_slots for memory in memories] == [24, 32, 24] and memories[0] == memories[2]
    sinks = load_model(convert(liger, tmp_path / "sinks", preset="sinks", keep_window=()))
    assert [layer.self_attn.spec.config.num_slots for layer in sinks.model.layers] == [64, 64, 64]
    with pytest.raises(UsageError, match="keep_window") as error:
        convert(liger, tmp_path / "other", preset="sinks", keep_window=(1,))
    assert "layer 1 has no sliding window" in str(error.value.hint)


def test_scores_go_from_one_conversion_to_the_next(
    tmp_path: Path, text: Path, caplog: pytest.LogCaptureFixture
) -> None:
    readable_teacher(tmp_path / "teacher")
    first = foresee(tmp_path / "first", calibrate=[str(text)], windows=2)
    file = first / "model-00002-of-00002.safetensors"
    facts = json.loads((first / "config.json").read_text())["liger_scores"]

    given = foresee(tmp_path / "given", scores=file)
    assert check_checkpoint(given).config["liger_scores"] == facts | {"from": "file"}
    again = convert(first, tmp_path / "again", preset="foresight")  # its own
    assert check_checkpoint(again).config["liger_scores"] == facts
    assert (again / file.name).stat().st_ino == file.stat().st_ino
    fewer = convert(first, tmp_path / "fewer", preset="foresight", keep_softmax=(0,))
    assert len(load_file(fewer / file.name)) == 4
    other = convert(first, tmp_path / "other", preset="foresight", calibrate=[text], windows=1)
    assert check_checkpoint(other).config["liger_scores"]["sha256"] != facts["sha256"]
    without = convert(first, tmp_path / "without", preset="sinks")
    assert [f.name for f in check_checkpoint(without).files] == ["model.safetensors"]
    assert "liger_scores" not in check_checkpoint(without).config

    caplog.clear()
    for path in (first, again, fewer, other, without):
        model = load_model(path)
    load_teacher(check_checkpoint(first), None, torch.float32)
    convert_in_memory(load_model(first), LigerConfig.from_dict(model.config.liger))
    assert "score_proj" not in caplog.text
    LlamaForCausalLM.from_pretrained(first)
    assert "score_proj" in caplog.text  # what the above is without

    load_model(first).save_pretrained(tmp_path / "saved")
    toy.tokenizer().save(str(tmp_path / "saved" / "tokenizer.json"))
    kept = convert(tmp_path / "saved", tmp_path / "kept", preset="foresight")
    assert check_checkpoint(kept).config["liger_scores"] == facts
    with pytest.raises(CheckpointError, match="among other weights") as caught:
        convert(tmp_path / "saved", tmp_path / "refused", preset="sinks")
    assert caught.value.hint and not (tmp_path / "refused").exists()


def test_scores_of_the_package(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = readable_teacher(tmp_path / "teacher")
    file = foresee(tmp_path / "first", calibrate=[text], windows=1) / "model-00002-of-00002.safetensors"
    builtin = Source(teacher, "smollm2-135m", BUILTIN_MODELS["smollm2-135m"].requirement)
    package = tmp_path / "package"
    (package / "data" / "scores").mkdir(parents=True)
    shutil.copyfile(file, package / "data" / "scores" / "smollm2-135m.safetensors")
    monkeypatch.setitem(packaged_scores.__globals__, "DATA", package / "data")
    monkeypatch.setitem(convert.__globals__, "resolve", lambda *_, **__: builtin)
    assert packaged_scores(Source(tmp_path, "smollm2-135m")) is None  # a directory of that name
    second = convert("smollm2-135m", tmp_path / "second", preset="foresight")
    facts = check_checkpoint(second).config["liger_scores"]
    assert (facts["from"], facts["windows"]) == ("package", 1)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({}, "has to be fitted first", "--calibrate"),
        ({"scores": "absent"}, "no file absent", "--calibrate"),
        ({"calibrate": ["absent"]}, "no file or directory absent", "--calibrate"),
        ({"calibrate": ["a.txt"], "scores": "a.txt"}, "both --calibrate and --scores", "one"),
        ({"calibrate": ["a.txt"], "windows": 0}, "0 windows", "at least one"),
        ({"calibrate": ["a.txt"], "preset": "memory"}, "--calibrate is for a learned score", "--preset foresight"),
        ({"scores": "a.txt", "preset": "sinks"}, "--scores is for a learned score", "--preset foresight"),
        ({"calibrate": ["a.txt"]}, "the text has", "more text"),
        ({"scores": "a.txt"}, "a.txt", "damaged"),
        ({"scores": "short.safetensors"}, r"layers.2.self_attn.score_proj.weight is missing", "another model"),
        ({"scores": "wide.safetensors"}, r"is \[2, 65\] in .* needs \[2, 64\]", "another model"),
        ({"scores": "nan.safetensors"}, "not finite", "again"),
    ],
)
def test_scores_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str, hint: str
) -> None:
    readable_teacher(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("too short")

    def write(name: str, layers: int, width: int, value: float) -> None:
        tensors = {}
        for layer in range(layers):
            prefix = f"model.layers.{layer}.self_attn.score_proj"
            tensors |= {f"{prefix}.weight": torch.full((2, width), value), f"{prefix}.bias": torch.zeros(2)}
        save_file(tensors, tmp_path / f"{name}.safetensors")

    write("short", 2, 64, 0.0)
    write("wide", 3, 65, 0.0)
    write("nan", 3, 64, float("nan"))
    with pytest.raises(LigerError, match=message) as error:
        convert("teacher", "liger", **{"preset": "foresight"} | settings)  # type: ignore[arg-type]
    assert hint in str(error.value.hint)
    assert not (tmp_path / "liger").exists()


def test_in_memory_a_learned_pool_needs_scores(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    model = load_transformer(teacher, json.loads((teacher / "config.json").read_text()), torch.float32)
    with pytest.raises(UsageError, match=r"needs model.layers.0.self_attn.score_proj"):
        convert_in_memory(model, get_preset("foresight"))


def test_the_command_fits_and_tells(tmp_path: Path, text: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from ligerexport.cli import main

    def command(*arguments: object) -> tuple[dict[str, object], str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in (*arguments, "--json")])
        said = capfd.readouterr()
        assert caught.value.code == 0, said.err
        return json.loads(said.out), said.err

    teacher, liger = readable_teacher(tmp_path / "teacher"), tmp_path / "liger"
    arguments = ["convert", teacher, "-o", liger, "--preset", "foresight", "--calibrate", text, "--windows", 2]
    plan, said = command(*arguments, "--dry-run")
    assert plan["fit"] == "2 windows of 512 tokens, of 1 text files" and not liger.exists()
    assert plan["fit_text_bytes"] == (text / "a.txt").stat().st_size
    assert "fit memory" in said and "fit tflop" in said
    facts, said = command(*arguments)
    explained = json.loads((liger / "config.json").read_text())["liger_scores"]["explained"]
    assert facts["scores_explain"] == explained
    assert "fitting the scores" in said and f"{explained:.0%} of the variance" in said
