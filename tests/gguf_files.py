"""Tiny GGUF files, written from checkpoints as llama.cpp's converter writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import toy
from safetensors.torch import load_file

ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "phi3": "phi3", "gemma3_text": "gemma3"}
"""llama.cpp's name of each family that transformers reads from GGUF."""


def write_gguf(checkpoint: Path, path: Path, settings: dict[str, Any] | None = None, **factors: np.ndarray) -> Path:
    """Write the weights of a checkpoint, toy's tokenizer and the settings of its architecture to a GGUF file.

    Args:
        checkpoint: A Transformer whose vocabulary is toy's with one token more.
        path: File to write.
        settings: Other settings of the architecture, by their keys in the file.
        **factors: Divisors of the rotary frequencies, by the tensor's name without `.weight`.
    """
    config = json.loads((checkpoint / "config.json").read_text())
    name = ARCHITECTURES[config["model_type"]]
    writer = gguf.GGUFWriter(path, name)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    for key, value in {
        "context_length": config["max_position_embeddings"], "block_count": config["num_hidden_layers"],
        "embedding_length": config["hidden_size"], "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"], "attention.key_length": config["head_dim"],
        "vocab_size": config["vocab_size"], "rope.freq_base": rope["rope_theta"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"], **(settings or {}),
    }.items():  # fmt: skip
        add = {float: writer.add_float32, int: writer.add_uint32, str: writer.add_string}[type(value)]
        add(f"{name}.{key}", value)
    _add_tokenizer(writer)
    names = gguf.get_tensor_name_map(_architecture(name), config["num_hidden_layers"])
    for key, tensor in load_file(checkpoint / "model.safetensors").items():
        module, _, kind = key.rpartition(".")
        values = tensor.float().numpy()
        if name == "llama" and module.endswith(("q_proj", "k_proj")):  # llama.cpp rotates neighbours
            heads = len(values) // config["head_dim"]
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        if name == "gemma3" and "norm" in module:
            values = values + 1
        stored = values if values.ndim == 1 else gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
        raw = None if values.ndim == 1 else gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(f"{names.get_name(module)}.{kind}", np.ascontiguousarray(stored), raw_dtype=raw)
    for key, divisors in factors.items():
        writer.add_tensor(f"{key}.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _architecture(name: str) -> gguf.MODEL_ARCH:
    return next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    vocabulary = toy.tokenizer().get_vocab()
    tokens = [*sorted(vocabulary, key=lambda token: vocabulary[token]), "th"]
    kinds = [gguf.TokenType.CONTROL if token in ("<s>", "</s>", "<user>") else gguf.TokenType.NORMAL
             for token in tokens]  # fmt: skip
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(toy.BOS)
    writer.add_eos_token_id(toy.EOS)
    writer.add_eot_token_id(toy.USER)
    writer.add_chat_template(toy.TEMPLATE)
    writer.add_string("general.license", "apache-2.0")
