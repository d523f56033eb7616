"""Every verb once, on a tiny model, which must work with every release of dependencies that pyproject.toml allows.

`.ci/run` runs this file against the installed wheel, outside the checkout, in environments with the newest and the
oldest releases, and imports the demo there. So this imports only `toy` from `tests`.
"""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM

from ligerexport.checkpoint.convert import load_model
from ligerexport.cli import main
from ligerexport.layers.mixer import CACHE

CLOSE = 1e-4
"""Largest difference of two logits that differ only by the order of sums in fp32."""


def ligerexport(*arguments: object) -> None:
    """Run a command in this process; it must succeed."""
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--quiet"])
    assert ended.value.code == 0


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, one of its three layers kept as softmax, converted."""
    place = tmp_path_factory.mktemp("smoke")
    sizes: dict[str, Any] = {
        "vocab_size": toy.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    }  # fmt: skip
    torch.manual_seed(0)  # a module's fixture comes before the seeds of its tests
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(place / "source")
    toy.tokenizer().save(str(place / "source" / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": toy.TEMPLATE}
    (place / "source" / "tokenizer_config.json").write_text(json.dumps(settings))
    ligerexport("convert", place / "source", "-o", place / "liger", "--preset", "memory", "--keep-softmax", 1)
    return place / "liger"


@pytest.fixture(scope="module")
def artifact(liger: Path) -> Path:
    """The artifact of `liger`, which `build` verifies."""
    ligerexport("build", liger, "-o", liger.with_name("artifact"))
    return liger.with_name("artifact")


@torch.no_grad()
def test_cached_steps_equal_the_whole_call(liger: Path) -> None:
    model = load_model(liger).eval()
    ids = torch.randint(0, toy.BYTES, (1, 40))
    whole = model(ids).logits
    out = model(ids[:, :30], use_cache=True)
    logits = [out.logits]
    for step in ids[:, 30:].split(1, dim=1):
        out = model(step, use_cache=True, **{CACHE: out[CACHE]})
        logits.append(out.logits)
    assert (torch.cat(logits, dim=1) - whole).abs().max() < CLOSE
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    assert int(answer[0, 40]) == int(whole[0, -1].argmax()) and answer.shape == (1, 44)


def test_a_build_is_verified(artifact: Path) -> None:
    assert json.loads((artifact / "manifest.json").read_text())["verification"]["passed"] is True


def test_run(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ligerexport("run", artifact, "Once upon", "--max-new-tokens", 8, "--json")
    assert capsys.readouterr().out


def test_chat(artifact: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand again\n"))
    ligerexport("chat", artifact, "--max-new-tokens", 4, "--json")
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["turns"]) == 2


def test_recover_one_step(liger: Path) -> None:
    data, output = liger.with_name("chats.jsonl"), liger.with_name("recovered")
    data.write_text("".join(json.dumps({"prompt": f"say {i}", "response": f"{i} it is"}) + "\n" for i in range(20)))
    ligerexport("recover", liger, "--data", data, "-o", output, "--steps", 1, "--length", 32, "--batch-tokens", 64)
    assert json.loads((output / "recovery.json").read_text())["steps"] == 1
    assert load_model(output)
