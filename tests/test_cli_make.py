"""The commands `convert` and `build`: dry runs, a model from source to text, and bad inputs."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import toy
from checkpoints import make_transformer
from test_cli import Cli, cli  # noqa: F401

from ligerexport.console import silent
from ligerexport.errors import LigerError
from ligerexport.model.config import PRESETS


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, as transformers saves it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "source"
    config = LlamaConfig(
        vocab_size=toy.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    return path


def test_dry_runs_write_nothing(cli: Cli, source: Path, tmp_path: Path) -> None:
    result = cli("convert", source, "-o", tmp_path / "liger", "--preset", "sinks", "--window", 8, "--dry-run", "--json",
                 "--verbose")  # fmt: skip
    plan = json.loads(result.out)
    slots = 8 + PRESETS["sinks"].config.sinks
    assert result.code == 0 and plan["exact_slots"] == slots
    assert plan["state_bytes"] == 2 * 2 * slots * (8 * 4 * 2 + 8)
    assert plan["kv_cache_larger_from"] == plan["state_bytes"] // (2 * 2 * 8 * 2 * 4) + 1
    assert "would write" in result.err and "window=8" in result.err
    assert list(tmp_path.iterdir()) == []


def test_from_a_transformer_to_text(cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    liger = tmp_path / "my liger"
    result = cli("convert", source, "-o", liger, "--window", 8, "--slots", "peak_use=4,novelty=4",
                 "--layer-memory", "1:window=6,peak_use=2,novelty=2")  # fmt: skip
    build = f"ligerexport build '{liger}'"
    assert result.code == 0 and f"{build} --weights int4 --lowering native -o engine" in result.err, result
    told = json.loads(cli("inspect", liger, "--json").out)
    assert told["kind"] == "converted checkpoint" and told["liger"]["slots"] == [["peak_use", 4], ["novelty", 4]]
    assert told["supported"] and told["next"] == f"{build} --weights int4 --lowering native -o engine"
    shown = cli("inspect", liger).out
    assert re.search(r"^1 +6 +peak_use=2,novelty=2 *$", shown, re.MULTILINE) and "layer_memory" not in shown

    monkeypatch.chdir(liger)
    assert json.loads(cli("build", "--dry-run", "--json").out)["state_bytes"] == told["state_bytes"]
    assert not (liger / "onnx").exists()
    result = cli("build", "--target", "onnx")
    assert result.code == 0 and "ligerexport run onnx" in result.err, result
    manifest = json.loads(cli("inspect", "onnx", "--json").out)
    assert manifest["verification"]["passed"] is True and manifest["state_bytes"] == told["state_bytes"]
    before = (liger / "onnx" / "manifest.json").read_bytes()
    assert cli("build").code == 2
    assert (liger / "onnx" / "manifest.json").read_bytes() == before
    told = json.loads(cli("run", "onnx", "hello", "-n", 5, "--json").out)
    assert told["new_tokens"] == 5 and told["state_bytes"] == manifest["state_bytes"]


def test_inspect_says_first_whether_a_model_is_supported(cli: Cli, source: Path, tmp_path: Path) -> None:
    def first(model: Path, **changes: object) -> str:
        file = model / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
        told = json.loads(cli("inspect", model, "--json").out)
        line = cli("inspect", model).out.splitlines()[0]
        assert line.startswith("supported" if told["supported"] else "not supported: ") and (told["why"] or "") in line
        return line

    plain = shutil.copytree(source, tmp_path / "plain")
    gemma = make_transformer(tmp_path / "gemma", "gemma3_text")
    assert first(plain) == f"supported; next: ligerexport convert {plain} -o liger"
    assert re.search(r"^supported with a limit: \d of \d layers keep the sliding window", first(gemma))
    assert "attn_logit_softcapping 50.0 in config.json is not supported" in first(gemma, attn_logit_softcapping=50.0)
    assert "the family 'gpt2' cannot be converted; those of these can: gemma3_text" in first(plain, model_type="gpt2")


def test_a_model_is_not_converted_over_itself(cli: Cli, source: Path) -> None:
    before = (source / "config.json").read_bytes()
    result = cli("convert", source, "-o", source, "--force")
    assert result.code == 2 and "is the model itself" in result.err
    assert (source / "config.json").read_bytes() == before


def test_build_of_a_model_that_is_not_converted(cli: Cli, source: Path) -> None:
    result = cli("build", source)
    assert result.code in (1, 2) and "not converted" in result.err and "ligerexport convert" in result.err
    assert not (source / "onnx").exists()


def test_run_of_a_model(cli: Cli, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model is prepared once; a changed one again. A path with a typing error is not looked for on the hub."""
    from ligerexport.checkpoint import convert
    from ligerexport.exporters import prepare

    model = shutil.copytree(source, tmp_path / "tiny")
    monkeypatch.setattr(convert, "DEFAULT_PRESET", "memory")  # a tiny model is too small for a fit
    monkeypatch.setattr(prepare, "cache_dir", lambda: tmp_path / "cache")
    first = cli("run", model, "hello", "-n", 5, "--json")
    assert first.code == 0 and "converting" in first.err and "native" in first.err, first
    (kept,) = [path for path in (tmp_path / "cache" / "artifacts").iterdir() if path.is_dir()]
    manifest = json.loads((kept / "manifest.json").read_text())
    assert manifest["precision"] == "int4" and manifest["verification"]["passed"] is True
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_make", lambda *_: pytest.fail("it is in the cache"))
        again = cli("run", model, "hello", "-n", 5, "--json")
        assert json.loads(again.out)["text"] == json.loads(first.out)["text"] and "converting" not in again.err
        assert f"did you mean {model}?" in cli("run", f"{tmp_path}/tinny", "hello").err
    os.utime(model / "model.safetensors", (1, 1))
    assert prepare.prepare(model) != kept
    assert not list((tmp_path / "cache" / "artifacts").glob(".*"))


def test_prepare_after_a_killed_run_and_without_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a killed run has left is removed, also if the next one fails; a place for no cache is named."""
    from ligerexport.checkpoint import convert
    from ligerexport.exporters import prepare

    def fails(model: str, output: Path, **settings: Any) -> None:
        assert not output.exists()
        output.mkdir()
        raise LigerError("no such model")

    monkeypatch.setattr(convert, "ConvertPlan", fails)
    (left := tmp_path / ".made.converted").mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    with pytest.raises(LigerError, match="no such model"):
        prepare._make("model", tmp_path / "made", silent)
    assert not list(tmp_path.iterdir())
    (model := tmp_path / "model").mkdir()
    (file := tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(prepare, "cache_dir", lambda: file)
    with pytest.raises(LigerError, match=r"cannot write .*artifacts") as failure:
        prepare.prepare(model)
    assert "LIGEREXPORT_CACHE" in str(failure.value.hint)
