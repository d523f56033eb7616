"""Checkpoints whose files are not plain, or have changed: quantised, with an adapter, of two versions."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import ligerexport as lx
from ligerexport.checkpoint.adapter import RECORD, RECOVERY, check_student, write_merged
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import convert, load_model
from ligerexport.checkpoint.loading import load_any, load_transformer
from ligerexport.checkpoint.seal import SEAL
from ligerexport.cli import main
from ligerexport.errors import CheckpointError
from ligerexport.measure.opened import open_model
from tests.test_loading import SINGLE, WHOLE, close, logits, make
from tests.test_model import make_teacher

INDEX = "model.safetensors.index.json"


# Quantised weights


def fp8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise the projections to FP8 with a scale for each block of 16 by 16; return their values in bf16."""
    meant = {}
    for name in [name for name in tensors if "_proj" in name]:
        blocks = tensors[name].unflatten(0, (-1, 16)).unflatten(2, (-1, 16))  # [rows / 16, 16, columns / 16, 16]
        scale = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        meant[name] = (codes.float() * scale[:, None, :, None]).reshape(tensors[name].shape).bfloat16()
        tensors[name] = codes.reshape(tensors[name].shape)
        tensors[f"{name}_scale_inv"] = scale
    return meant


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [16, 16]}


def test_fp8_weights_are_turned_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    meant: dict[str, Tensor] = {}
    source = make(tmp_path / "source", lambda x: meant.update(fp8(x)), quantization_config=FP8, dtype="bfloat16")
    liger = convert(source, tmp_path / "liger", **WHOLE)
    assert "fp8 weights were dequantised to bfloat16" in capsys.readouterr().err
    config = json.loads((liger / "config.json").read_text())
    assert config["liger_source"]["dequantised"] == "fp8" and "quantization_config" not in config
    stored = load_file(liger / SINGLE)
    assert len(meant) == 21 and all(torch.equal(stored[name], weight) for name, weight in meant.items())
    assert {x.dtype for x in stored.values()} == {torch.bfloat16}
    assert [file.name for file in liger.iterdir() if file.is_dir()] == []
    plain = load_any(check_checkpoint(source), torch.float32)
    assert plain.dtype == torch.float32
    assert close(logits(load_model(liger)), logits(plain))
    lx.build(liger)


@pytest.mark.parametrize(
    ("settings", "method", "names"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 32}}, "gptq", ["qweight", "scales"]),
        ({"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 32}}, "awq", ["qweight", "qzeros"]),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "bitsandbytes", ["SCB"]),
        ({"quantization_config": {"load_in_4bit": True}}, "bitsandbytes", ["weight.absmax"]),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", ["weight_packed"]),
        ({"quantization_config": {"quant_method": "torchao"}}, "torchao", []),
        ({"quantization_config": {"quant_method": "new"}}, "new", ["weight_new"]),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors", ["weight_packed"]),
        ({"quantization": {"bits": 4, "group_size": 32}}, "MLX", ["scales", "biases"]),
    ],
)
def test_what_cannot_be_turned_back_is_refused(
    tmp_path: Path, settings: dict[str, Any], method: str, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if "_proj" in name]:
            tensors[name] = (127 * tensors[name] / tensors[name].abs().max()).to(torch.int8)
            tensors |= {name.replace("weight", other): torch.ones(64) for other in names}

    source = make(tmp_path / "source", quantise, **settings)
    verbs: list[Callable[[], object]] = [
        lambda: convert(source, tmp_path / "liger"),
        lambda: open_model(source, scoring=True),
        lambda: load_transformer(source, check_checkpoint(source).config, torch.float32),
    ]
    for verb in verbs:
        with pytest.raises(CheckpointError, match=f"quantised by {method}") as caught:
            verb()
        assert "quantised from" in str(caught.value.hint)
    assert not (tmp_path / "liger").exists()
    if method in ("gptq", "awq", "new", "MLX"):  # of the others only the weights show it
        (tmp_path / "text.txt").write_text("words " * 99)
        for words in (["convert", str(source), "-o", "liger"], ["eval", str(source), "--text", f"{tmp_path}/text.txt"]):
            with pytest.raises(SystemExit) as ended:
                main([*words, "--dry-run"])
            assert ended.value.code == 1 and f"quantised by {method}" in capsys.readouterr().err.replace("\n", " ")


# Files


def test_a_single_file_wins_over_shards(tmp_path: Path) -> None:
    make_teacher(tmp_path / "source", shard="40KB")
    older = {file.name for file in (tmp_path / "source").glob("model-*")}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    model.save_pretrained(tmp_path / "newer")
    shutil.copyfile(tmp_path / "newer" / SINGLE, tmp_path / "source" / SINGLE)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "source"))
    assert torch.equal(expected, logits(model))
    liger = convert(tmp_path / "source", tmp_path / "liger", **WHOLE)
    assert not {file.name for file in liger.iterdir()} & {*older, INDEX}
    assert close(logits(load_model(liger)), expected)
    assert torch.equal(logits(load_any(check_checkpoint(tmp_path / "source"), torch.float32)), expected)


def add_adapter(source: Path) -> Tensor:
    """Put a LoRA adapter beside the weights of a checkpoint; return transformers' logits with it."""
    from peft import LoraConfig, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(source), settings)
    model.save_pretrained(source)
    return logits(AutoModelForCausalLM.from_pretrained(source))


def test_an_adapter_beside_the_weights_is_applied(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("peft")
    source = make(tmp_path / "source")
    without = logits(AutoModelForCausalLM.from_pretrained(source))
    expected = add_adapter(source)
    assert not close(without, expected)
    said = "its adapter adapter_model.safetensors was merged"
    assert close(logits(load_any(check_checkpoint(source), torch.float32)), expected)
    assert said in capsys.readouterr().err
    liger = convert(source, tmp_path / "liger", **WHOLE)
    assert said in capsys.readouterr().err
    assert json.loads((liger / "config.json").read_text())["liger_source"]["adapter"] == "adapter_model.safetensors"
    assert close(logits(load_model(liger)), expected)
    assert not list(liger.glob("adapter*"))
    tensors = load_file(source / "adapter_model.safetensors")
    save_file(dict(list(tensors.items())[1:]), source / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        convert(source, tmp_path / "broken")
    shutil.copyfile(source / "adapter_config.json", liger / "adapter_config.json")
    with pytest.raises(CheckpointError, match="without adapter_model"):
        load_model(liger)
    shutil.copyfile(source / "adapter_model.safetensors", liger / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="is converted and has an adapter") as caught:
        load_model(liger)
    assert "--adapter" in str(caught.value.hint)


def test_an_adapter_of_any_kind_is_applied_as_peft_applies_it(tmp_path: Path) -> None:
    """DoRA's magnitudes, which transformers leaves out, and an output projection that was the embedding."""
    peft = pytest.importorskip("peft")
    source = make(tmp_path / "source", lambda x: x.pop("lm_head.weight"), tie_word_embeddings=True)
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=4, target_modules=["v_proj", "lm_head"], use_dora=True, task_type="CAUSAL_LM")
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(source), settings)
    for parameter in (x for x in model.parameters() if x.requires_grad):
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(source)
    liger = convert(source, tmp_path / "liger", **WHOLE)
    assert close(logits(load_model(liger)), logits(model.eval()))
    tensors = load_file(source / "adapter_model.safetensors")
    tensors |= {name.replace("layers.0", "layers.9"): x.clone() for name, x in tensors.items() if "layers.0" in name}
    save_file(tensors, source / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.9\..* which the model does not have") as caught:
        convert(source, tmp_path / "extra")
    assert "adapter_config.json" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("adapter_model.safetensors", "is a LoRA adapter"),
        ("model.Q4_K_M.gguf", "has GGUF weights only"),
        ("pytorch_model.bin", "pickle weights only"),
    ],
)
def test_other_weights_alone_are_named(tmp_path: Path, file: str, message: str) -> None:
    (tmp_path / file).write_bytes(b"x")
    for verb in (lambda: convert(tmp_path, tmp_path / "liger"), lambda: open_model(tmp_path, scoring=True)):
        with pytest.raises(CheckpointError, match=message) as caught:
            verb()
        assert caught.value.hint
    if "adapter" in file:
        (tmp_path / RECORD).write_text("{}")
        with pytest.raises(CheckpointError) as caught:
            check_checkpoint(tmp_path)
        assert f"--adapter {tmp_path}" in str(caught.value.hint)


# Weights that change after the conversion


def test_weights_that_changed_are_seen(tmp_path: Path) -> None:
    source, other = make(tmp_path / "source"), make(tmp_path / "other")
    liger = convert(source, tmp_path / "liger", **WHOLE)
    shutil.copytree(liger, tmp_path / "copy")
    os.utime(source / SINGLE, ns=(1, 1))  # its link has that time too
    before = (liger / SEAL).read_text()
    for path in (liger, tmp_path / "copy"):
        load_model(path)
        assert json.loads((path / SEAL).read_text())["files"][SINGLE]["mtime_ns"] == (path / SINGLE).stat().st_mtime_ns
    assert (liger / SEAL).read_text() != before
    load_model(liger).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / SEAL).exists()

    (source / SINGLE).write_bytes((other / SINGLE).read_bytes())  # as cp does, and the link follows
    verbs: list[Callable[[], object]] = [
        lambda: load_model(liger), lambda: lx.build(liger), lambda: check_student(liger),
        lambda: convert(liger, tmp_path / "out", preset="memory"), lambda: open_model(liger, scoring=True),
    ]  # fmt: skip
    for verb in verbs:
        with pytest.raises(CheckpointError, match="has other weights than when it was made") as caught:
            verb()
        assert "convert the model again" in str(caught.value.hint)
    (liger / SEAL).unlink()  # as the hint says, for whoever meant it
    load_model(liger)
    load_model(tmp_path / "copy")
    load_model(tmp_path / "saved")
    (tmp_path / "copy" / SEAL).write_text("[]")
    with pytest.raises(CheckpointError, match=SEAL):
        load_model(tmp_path / "copy")


def test_recovered_weights_that_changed_are_seen(tmp_path: Path) -> None:
    liger, merged = convert(make(tmp_path / "source"), tmp_path / "liger", **WHOLE), tmp_path / "merged"
    merged.mkdir()
    write_merged(merged, check_checkpoint(liger), {}, 1.0, {})
    load_model(merged)
    tensors = load_file(merged / SINGLE)
    save_file(tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}, merged / SINGLE)
    with pytest.raises(CheckpointError, match="has other weights"):
        load_model(merged)


def test_a_recovered_checkpoint_is_not_converted_again(tmp_path: Path) -> None:
    liger = convert(make(tmp_path / "source"), tmp_path / "liger", **WHOLE)
    config = json.loads((liger / "config.json").read_text())
    (liger / "config.json").write_text(json.dumps(config | {RECOVERY: {"steps": 1}}))
    with pytest.raises(CheckpointError, match="was recovered") as caught:
        convert(liger, tmp_path / "again", preset="sinks")
    assert f"ligerexport build {liger}" in str(caught.value.hint)
    assert "ligerexport convert source" in str(caught.value.hint)
