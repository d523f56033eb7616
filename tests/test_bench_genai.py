"""onnxruntime-genai as a side of `bench` and of the page."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM

from ligerexport.errors import MissingDependency, UsageError
from ligerexport.measure.bench.genai import GenAI, in_genai
from ligerexport.measure.opened import open_model

LONGEST = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("peers") / "source"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=toy.VOCAB, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=LONGEST,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    toy.tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def test_onnxruntime_genai_writes_what_torch_writes(source: Path) -> None:
    """The cache counts what is in use, sequences are apart, and a text that is too long is refused."""
    pytest.importorskip("onnxruntime_genai")
    output = source.parent / "original"
    words = [
        "-m",
        "onnxruntime_genai.models.builder",
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-i",
        source,
        "-o",
        output,
        "-c",
        output,
    ]
    subprocess.run([sys.executable, *words], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True)
    assert in_genai(str(output)) and not in_genai(str(source))
    peer, theirs = GenAI(output, 1, 1), open_model(source, threads=1)
    assert (peer.grows, peer.fills, peer.precision) == (True, False, "float32")
    assert (peer.vocab_size, peer.trained_length) == (theirs.vocab_size, LONGEST)
    ids, other = [list(range(5, 25))], peer.sibling()
    for _ in range(6):
        token = peer.advance(ids)
        assert token == theirs.advance(ids) and peer.state_bytes == theirs.state_bytes
        ids = [token]
    assert other.state_bytes == 0 and other.advance([[7, 8]]) == theirs.sibling().advance([[7, 8]])
    with pytest.raises(UsageError, match=f"room for {LONGEST} tokens"):
        peer.advance([[1] * LONGEST])
    with pytest.raises(UsageError, match="--batch 2"):
        peer.sibling(2)


def test_a_program_that_is_not_installed_is_named(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(MissingDependency, match="onnxruntime-genai"):
        GenAI(source, 1, 1)
