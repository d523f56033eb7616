"""The valid inputs that are mutated into hostile ones: small files of every kind, as the product writes them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from checkpoints import make_checkpoint
from safetensors.numpy import save
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from trt_packs import make_harness

import ligerexport as lx
from ligerexport.checkpoint.adapter import ADAPTER, ADAPTER_CONFIG, RECORD, model_id
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.model.config import PRESETS

IDS = list(range(1, 50))
TEMPLATE = (
    "{% for message in messages %}{{ bos_token }}{{ message['role'] }}: {{ message['content'] | trim }}\n"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)
LIGER: dict[str, Any] = {"preset": "liger", "window": 8, "sinks": 2, "slots": (("peak_use", 4),), "keep_softmax": (1,)}


def make_bases(place: Path) -> None:
    """Write a Transformer, its conversion, an adapter for it, artifacts of three lowerings, and a kernel pack."""
    if not (place / "pack").is_dir():
        (place / "pack").mkdir(parents=True)
        make_harness(place / "pack")
    sizes = {"vocab_size": 264, "intermediate_size": 96, "num_hidden_layers": 2, "max_position_embeddings": 256}
    memory = make_checkpoint(place / "memory", PRESETS["memory"].config, shard="50KB", **sizes)
    write_tokenizer(memory)
    config = json.loads((memory / "config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("liger")}
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (memory / "config.json").write_text(json.dumps(config))
    (memory / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": {"content": "</s>"}}')
    (memory / "generation_config.json").write_text('{"eos_token_id": [3]}')
    (memory / "chat_template.jinja").write_text(TEMPLATE)
    memory.rename(place / "source")
    lx.convert(place / "source", place / "liger", **LIGER)
    write_tokenizer(make_checkpoint(place / "evicted", PRESETS["evicted"].config, shard="50KB", **sizes))
    recall = replace(PRESETS["recall"].config, heads=("12+9 5", "4 7+6"))
    write_tokenizer(make_checkpoint(place / "sized", recall, shard="50KB", **sizes))
    lx.build(place / "liger", place / "ort", max_chunk=16)
    lx.build(place / "liger", place / "portable", lowering="portable", weights="int8", max_chunk=16)
    lx.build(place / "evicted", place / "native", lowering="native", weights="int4", max_chunk=16)
    lx.build(place / "sized", place / "recall", lowering="native", weights="int4", max_chunk=16)
    info = check_checkpoint(place / "liger")
    adapter = place / "adapter"
    adapter.mkdir()
    (adapter / RECORD).write_text(json.dumps({"model": model_id(info), "liger": info.config["liger"]}))
    (adapter / ADAPTER_CONFIG).write_text(json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA"}))
    name, size = "base_model.model.model.layers.0.self_attn.q_proj", info.config["hidden_size"]
    lora = {
        f"{name}.lora_A.weight": np.ones((2, size), np.float32),
        f"{name}.lora_B.weight": np.ones((size, 2), np.float32),
    }
    (adapter / ADAPTER).write_bytes(save(lora))
    for name in ("ort", "native", "recall"):
        session = lx.load(place / name, threads=1)
        for _ in lx.generate(session, IDS, max_new_tokens=1, prompt_cache=place / f"{name}.cache"):
            pass
    (place / "memory.json").write_text(json.dumps({"window": 8, "slots": [["peak_use", 4]], "layer_memory": []}))


def write_tokenizer(directory: Path) -> None:
    """Write a tokenizer with all optional parts: one token per byte, some pairs, special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pairs = [("t", "h"), ("th", "e"), ("i", "n")]
    vocabulary = {token: i for i, token in enumerate([*letters, *("".join(pair) for pair in pairs)])}
    made = Tokenizer(models.BPE(vocabulary, pairs))
    made.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace("  ", " ")])
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d|\s+"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>"])
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", made.token_to_id("<s>"))]
    )
    made.save(str(directory / "tokenizer.json"))
