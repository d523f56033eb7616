"""GGUF files as sources: the weights, the tokenizer, and the settings that transformers ignores."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import toy
from checkpoints import make_transformer
from gguf_files import ARCHITECTURES, write_gguf
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig

import ligerexport as lx
from ligerexport.checkpoint.gguf import read_header
from ligerexport.checkpoint.sources import resolve
from ligerexport.errors import CheckpointError, SourceError
from ligerexport.model.families import get_family

SIZES: dict[str, Any] = {"vocab_size": toy.VOCAB + 1, "intermediate_size": 64, "hidden_size": 64, "head_dim": 32,
                         "num_attention_heads": 4}  # fmt: skip
FREQUENCIES = np.linspace(1, 8, 16)
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, "attention_factor": 1.0,
          "short_factor": FREQUENCIES.tolist(), "long_factor": FREQUENCIES.tolist()}  # fmt: skip
PHI = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 0.75, "attention_factor": 1.25,
       "short_factor": FREQUENCIES[:12].tolist(), "long_factor": FREQUENCIES[4:].tolist(),
       "original_max_position_embeddings": 32}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any], dict[str, np.ndarray]]] = {
    "llama": ("llama", {"tie_word_embeddings": True}, {}, {}),
    "llama, factors": ("llama", {"rope_parameters": LLAMA3}, {}, {"rope_freqs": FREQUENCIES}),
    "llama, linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
                      {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}, {}),
    "qwen2": ("qwen2", {"rope_parameters": YARN}, {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                                   "rope.scaling.original_context_length": 16}, {}),
    "qwen3": ("qwen3", {}, {}, {}),
    "phi3": ("phi3", {"rope_parameters": PHI, "original_max_position_embeddings": 32, "sliding_window": 48,
                      "num_attention_heads": 2},
             {"rope.dimension_count": 24, "attention.sliding_window": 48, "rope.scaling.attn_factor": 1.25,
              "rope.scaling.original_context_length": 32},
             {"rope_factors_short": FREQUENCIES[:12], "rope_factors_long": FREQUENCIES[4:]}),
    "gemma3_text": ("gemma3_text", {"query_pre_attn_scalar": 32, "final_logit_softcapping": None,
                                    "layer_types": ["sliding_attention"] * 3, "rope_parameters": {
                                        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                                        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}},
                    {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "attention.sliding_window": 24}, {}),
}  # fmt: skip


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_gguf(make_transformer(tmp_path / "source", **SIZES), tmp_path / "tiny.gguf")


@pytest.mark.parametrize("case", CASES)
def test_model_is_that_of_the_file(case: str, tmp_path: Path) -> None:
    family, sizes, settings, factors = CASES[case]
    original = make_transformer(tmp_path / "source", family, **SIZES | sizes)
    source = resolve(write_gguf(original, tmp_path / "tiny.gguf", settings, **factors))
    expected, found = load_file(original / "model.safetensors"), load_file(source.path / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, weight in expected.items():  # a norm is stored in fp32, everything else in 8 bits
        error = 1e-6 if weight.ndim == 1 else weight.abs().max().item() / 127
        torch.testing.assert_close(found[name], weight, atol=error, rtol=0)
    ours, theirs = (get_family(family).attention(AutoConfig.from_pretrained(x)) for x in (source.path, original))
    for one, other in zip(ours, theirs, strict=True):
        assert one.window == other.window and math.isclose(one.scale, other.scale, rel_tol=1e-6)
        assert np.allclose(one.inv_freq, other.inv_freq, rtol=1e-6)


def test_every_family_that_transformers_reads() -> None:
    assert {family for family, *_ in CASES.values()} == set(ARCHITECTURES)


def test_tokenizer_and_facts(file: Path, cache: Path) -> None:
    source = resolve(file)
    assert (source.name, source.license) == ("tiny.gguf", "apache-2.0")
    tokenizer = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    assert tokenizer.encode("the </s>", add_special_tokens=False).ids == [toy.VOCAB, ord("e") - 33, 220, toy.EOS]
    settings = json.loads((source.path / "tokenizer_config.json").read_text())
    assert settings["model_max_length"] == 64
    assert (source.path / "chat_template.jinja").read_text() == toy.TEMPLATE
    assert json.loads((source.path / "generation_config.json").read_text())["eos_token_id"] == [toy.EOS, toy.USER]
    assert resolve(file) == source and [x.name for x in cache.iterdir() if x.is_dir()] == [source.path.name]


def test_conversion(file: Path, tmp_path: Path) -> None:
    made = lx.convert(file, tmp_path / "liger", window=16)
    origin = json.loads((made / "config.json").read_text())["liger_source"]
    assert origin["model"] == "tiny.gguf" and origin["revision"].startswith("sha256:")
    assert lx.load_model(made)(torch.arange(8)[None]).logits.isfinite().all()


def test_another_architecture(tmp_path: Path) -> None:
    path = write_gguf(make_transformer(tmp_path / "source", **SIZES), tmp_path / "x.gguf")
    path.write_bytes(path.read_bytes().replace(b"llama", b"mamba"))
    with pytest.raises(SourceError, match="architecture 'mamba'") as caught:
        resolve(path)
    assert "llama" in str(caught.value.hint)


def test_weights_that_transformers_drops(file: Path) -> None:
    """It ignores a tensor whose name it does not know, such as a bias of a Llama."""
    file.write_bytes(file.read_bytes().replace(b"blk.0.attn_norm.weight", b"blk.0.attn_none.weight"))
    with pytest.raises(SourceError, match="weights, the llama model that it describes has"):
        resolve(file)


def test_rotary_embedding_of_another_type(tmp_path: Path) -> None:
    original = make_transformer(tmp_path / "source", **SIZES)
    with pytest.raises(SourceError, match="rotary embedding of type 'other'"):
        resolve(write_gguf(original, tmp_path / "x.gguf", {"rope.scaling.type": "other"}))


@pytest.mark.parametrize("part", [0.999, 0.5, 0.01, 0.0])
def test_truncated(file: Path, part: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * part)])
    with pytest.raises(SourceError, match=r"announces|cannot be read|not a GGUF file") as caught:
        resolve(file)
    assert "download" in str(caught.value.hint)


@pytest.mark.parametrize("count", [2**40, 2**63])
def test_counts_that_the_file_cannot_hold(file: Path, count: int) -> None:
    data = bytearray(file.read_bytes())
    for place in (8, 16):  # tensors, settings
        file.write_bytes(data[:place] + struct.pack("<Q", count) + data[place + 8 :])
        with pytest.raises(SourceError, match="cannot be read"):
            read_header(file)


def test_damaged_headers(file: Path) -> None:
    data, rng = file.read_bytes(), np.random.default_rng(0)
    refused = 0
    for _ in range(150):
        damaged = bytearray(data)
        for place in rng.integers(8, 1500, 3):
            damaged[place] = rng.integers(256)
        file.write_bytes(damaged)
        try:
            read_header(file)
        except SourceError:
            refused += 1
    assert refused > 20


def test_one_of_several_parts(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x-00001-of-00002.gguf", "llama")
    writer.add_uint16("split.count", 2)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(SourceError, match="one of 2 parts"):
        resolve(tmp_path / "x-00001-of-00002.gguf")


def test_directory_with_nothing_else(file: Path, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file.rename(tmp_path / "there" / "tiny.gguf")
    (tmp_path / "there" / "config.json").write_text((tmp_path / "source" / "config.json").read_text())
    with pytest.raises(CheckpointError, match="GGUF weights only") as caught:
        lx.convert(tmp_path / "there", tmp_path / "liger")
    assert str(caught.value.hint).endswith("tiny.gguf")
