"""The kinds of hostile input: how each is mutated, and how a user then uses it."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from hostile_bases import IDS, LIGER, TEMPLATE
from hostile_mutate import (
    OUTSIDE,
    damage,
    mutate_graph,
    mutate_json,
    mutate_safetensors,
    mutate_tensors,
)
from hostile_pack import PACK, mutate_pack, read_pack
from hostile_templates import template
from safetensors.numpy import load, save

import ligerexport as lx
from ligerexport.artifact.snapshot import digest
from ligerexport.cli.inspect import inspect
from ligerexport.model.config import read_memory
from ligerexport.run.generate import Conversation

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the sea"}]
CONFIG_KEYS: dict[str, Any] = {
    "auto_map": {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil--repo.Model"},
    "trust_remote_code": True,
    "attn_implementation": "evil/kernel",
    "_attn_implementation": "evil/kernel",
    "quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "dtype": "load",
    "torch_dtype": "os",
    "rope_scaling": {"rope_type": "yarn", "factor": 1e9},
    "rope_parameters": {"rope_type": "linear", "factor": 0},
    "num_hidden_layers": 10**9,
    "vocab_size": 10**12,
    "hidden_size": 2**40,
    "num_attention_heads": 0,
    "num_key_value_heads": 3,
    "head_dim": 10**9,
    "max_position_embeddings": 10**12,
    "model_type": "liger_evil",
    "text_config": {"vocab_size": 1},
    "liger": {"window": 10**9},
    "hidden_act": "__import__",
    "use_kernels": True,
    "rms_norm_eps": "x",
    "tie_word_embeddings": 3,
    "liger_source": {"evil": 1},
    "liger_recovery": [],
    "pad_token_id": 10**9,
    "_name_or_path": OUTSIDE,
    "transformers_weights": OUTSIDE,
    "architectures": ["Evil"],
    "device_map": "auto",
    "eos_token_id": {"a": 1},
    "tokenizer_class": "Evil",
    "torchscript": True,
    "gguf_file": OUTSIDE,
    "id2label": [1],
}
TOKENIZER_KEYS: dict[str, Any] = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [{"type": "Replace", "pattern": {"String": "a"}, "content": "aaaa"}] * 30,
    },
    "pre_tokenizer": {
        "type": "Split",
        "pattern": {"Regex": "(t|e|h|te|he)+$"},
        "behavior": "Isolated",
        "invert": False,
    },
    "decoder": {
        "type": "Sequence",
        "decoders": [{"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 9}] * 30,
    },
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "x", "type_id": 0}}],
        "pair": [],
        "special_tokens": {},
    },
    "added_tokens": [
        {
            "id": 2**32 - 1,
            "content": "",
            "single_word": False,
            "lstrip": True,
            "rstrip": True,
            "normalized": True,
            "special": True,
        }
    ],
    "padding": {
        "strategy": {"Fixed": 10**12},
        "direction": "Left",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    },
    "truncation": {"max_length": 0, "stride": 10, "strategy": "LongestFirst", "direction": "Right"},
}


def reseal(artifact: Path) -> None:
    """Write the files' current hashes into the manifest, as a forger would."""
    with suppress(ValueError, TypeError, KeyError, AttributeError, OSError):
        manifest = json.loads((artifact / "manifest.json").read_text())
        for name in manifest["files"]:
            data = (artifact / name).read_bytes()
            manifest["files"][name] = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
        (artifact / "manifest.json").write_text(json.dumps(manifest))


def look(place: Path) -> None:
    """Inspect an artifact, then use it."""
    inspect(place / "artifact", json=True)
    inspect(place / "artifact")
    use(place)


def use(place: Path, chat: bool = False) -> None:
    """Load an artifact and write text."""
    artifact = place / "artifact"
    session = lx.load(artifact, threads=1)
    session.prefill(IDS[:5])
    session.step(4)
    session.restore(session.snapshot())
    for _ in lx.generate(session, "the sea", max_new_tokens=3):
        pass
    if chat:
        for _ in lx.generate(session, messages=MESSAGES, max_new_tokens=3):
            pass
        talk = Conversation(session, max_new_tokens=2)
        for _ in range(2):
            for _ in talk.say("the sea"):
                pass


def resume(place: Path) -> None:
    """Continue from a file, first as a prompt cache, then as a saved state."""
    session = lx.load(place / "artifact", threads=1)
    for _ in lx.generate(session, IDS, max_new_tokens=2, prompt_cache=place / "cache"):
        pass
    session.reset()
    session.restore(lx.Snapshot.load(place / "cache"))
    session.step(4)
    session.prefill(IDS[:20])


def convert(place: Path, **options: Any) -> None:
    """Inspect a Transformer and convert it."""
    inspect(place / "source")
    lx.convert(place / "source", place / "out", **options or LIGER)
    inspect(place / "out")


def adapt(place: Path) -> None:
    """Convert with an adapter."""
    lx.convert(place / "source", place / "out", adapter=place / "adapter")


def build(place: Path) -> None:
    """Inspect a converted checkpoint, build an artifact from it without verification, and run that."""
    inspect(place / "liger", json=True)
    inspect(place / "liger")
    lx.build(place / "liger", place / "out", verify=False, max_chunk=16)
    lx.load(place / "out", threads=1).step(1)


def memory(place: Path) -> None:
    """Read a file with the memory of layers."""
    read_memory(place / "memory.json")


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        bases: Results of `make_bases` to copy, each with its new name; one of several at random.
        mutate: Changes the copy.
        action: Function that uses the copy.
        count: Number of inputs in the long form.
        modules: Modules that are loaded before the forks; torch makes them slow.
        apart: Whether the action is a separate program, which limits itself and returns the input's result.
    """

    bases: tuple[dict[str, str], ...]
    mutate: Callable[[Path, random.Random], None]
    action: Callable[[Path], Any]
    count: int
    modules: tuple[str, ...] = ("onnxruntime", "ligerexport.exporters.onnx.session", "packaging.specifiers")
    apart: bool = False


def _file(pattern: str, change: Callable[[bytes, random.Random], bytes], seal: bool = True) -> Any:
    """Return a function that changes one of the files that match a pattern."""

    def mutate(place: Path, rng: random.Random) -> None:
        file = rng.choice(sorted(place.glob(pattern)))
        file.write_bytes(change(file.read_bytes(), rng))
        if seal:
            reseal(place / "artifact")

    return mutate


def _template(place: Path, rng: random.Random) -> None:
    source = template(TEMPLATE, rng)
    if rng.random() < 0.2:
        file = place / "artifact" / "tokenizer_config.json"
        (place / "artifact" / "chat_template.jinja").unlink()
        file.write_text(json.dumps({"bos_token": "<s>", "chat_template": source.decode(errors="replace")}))
    else:
        (place / "artifact" / "chat_template.jinja").write_bytes(source)
    reseal(place / "artifact")


def _cache(place: Path, rng: random.Random) -> None:
    from safetensors import safe_open

    file = place / "cache"
    if rng.random() < 0.3:
        file.write_bytes(mutate_safetensors(file.read_bytes(), rng))
        return
    with safe_open(file, "numpy") as opened:
        header = opened.metadata()
    if rng.random() < 0.1:
        header = rng.choice(({}, None, {"ligerexport.snapshot": "2"}, header | {"model": "x"}, header | {"model": ""}))
    tensors = mutate_tensors(load(file.read_bytes()), rng)
    tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
    if header and rng.random() < 0.9:
        header = header | {"sha256": digest(tensors)}
    file.write_bytes(save(tensors, metadata=header))


def _links(folder: str, place: Path, rng: random.Random) -> None:
    """Put a link to the outside, a directory or a pipe where a file is expected, or add unexpected files."""
    directory = place / folder
    file = rng.choice(sorted(directory.iterdir()))
    outside = place / "outside" / "copy"
    outside.unlink(missing_ok=True)
    shutil.copyfile(file, outside)
    match rng.randrange(7):
        case 0 | 1:
            file.unlink()
            file.symlink_to(rng.choice((outside, "../outside/copy")))
        case 2:
            name = rng.choice(
                (
                    "special_tokens_map.json",
                    "LICENSE",
                    "added_tokens.json",
                    "vocab.json",
                    "generation_config.json",
                    "tokenizer_config.json",
                    "chat_template.jinja",
                    "config.json",
                    "link.bin",
                )
            )
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(outside)
        case 3:
            file.unlink()
            rng.choice((file.mkdir, partial(os.mkfifo, file), partial(file.symlink_to, file.name)))()
        case 4:
            for name in (
                "libliger_run.so",
                "libligerexport_trt.so",
                "evil.py",
                "configuration_evil.py",
                "sitecustomize.py",
                "liger-0.so",
                "ort_operator.cc",
                "kernels.liger",
                "model.bin",
                "pytorch_model.bin",
            ):
                (directory / name).write_bytes(b"\x7fELF" + b"\x00" * 60)
        case 5:
            shutil.move(file, outside)
            shutil.rmtree(directory) if rng.random() < 0.1 else None
        case _:
            (directory / "sub").symlink_to(place / "outside")
            with suppress(OSError):
                manifest = json.loads((directory / "manifest.json").read_text())
                info = manifest["files"].pop(file.name, None)
                manifest["files"]["sub/copy"] = info
                (directory / "manifest.json").write_text(json.dumps(manifest))


def _gguf(place: Path, rng: random.Random) -> None:
    """Leave only a GGUF file, which is not read."""
    for file in (place / "source").glob("*.safetensors*"):
        file.unlink()
    data = b"GGUF" + bytes([3, 0, 0, 0]) + rng.getrandbits(64).to_bytes(8, "little") * rng.randrange(1, 200)
    (place / "source" / rng.choice(("model.gguf", "model.bin", "x.pt"))).write_bytes(damage(data, rng))


def _target(place: Path, rng: random.Random) -> None:
    """Make it an artifact of another target, with libraries beside it that the manifest lists."""
    artifact = place / "artifact"
    manifest = json.loads((artifact / "manifest.json").read_text())
    names = ("libliger_run.so", "libligerexport_trt.so", "kernels.liger", "model.engine", "model.engine.json")
    for name in names:
        (artifact / name).write_bytes(b"\x7fELF" + rng.getrandbits(400).to_bytes(50, "little"))
        manifest["files"][name] = {}
    manifest |= {"target": rng.choice(("trt", "trt", "trt-rtx")), "lowering": "plugin", "requires": {}}
    manifest["device"] = {
        "sms": [90],
        "max_batch": 8,
        "contract": 1,
        "kernels": names[2],
        "plugin": names[1],
        "engine": names[3],
        "tensorrt": "10.0",
    }
    (artifact / "manifest.json").write_text(json.dumps(manifest))
    reseal(artifact)
    if rng.random() < 0.7:
        _file("artifact/manifest.json", mutate_json, seal=False)(place, rng)


_ARTIFACTS = tuple({name: "artifact"} for name in ("ort", "native", "portable", "recall"))
_SOURCE, _LIGER = {"source": "source"}, {"liger": "liger"}
_CONFIG = partial(mutate_json, keys=CONFIG_KEYS)
_SETTINGS = {
    "eos_token_id": [[1]],
    "bos_token": 3,
    "bos_token_id": "x",
    "chat_template": [{"name": "default"}],
    "add_bos_token": "x",
    "x_token": {"content": {"a": 1}},
}

_TORCH = (
    "onnxruntime",
    "ligerexport.checkpoint.convert",
    "ligerexport.layers.mixer",
    "ligerexport.checkpoint.calibrate",
    "safetensors.torch",
    "ligerexport.exporters.verify.verify",
    "ligerexport.exporters.onnx.genai",
    "ligerexport.exporters.tensorrt.backend",
    "transformers.models.llama.modeling_llama",
    "ligerexport.exporters.onnx.weights",
)

KINDS: dict[str, Kind] = {
    "manifest": Kind(_ARTIFACTS, _file("artifact/manifest.json", mutate_json, seal=False), look, 3000),
    "graph": Kind(_ARTIFACTS, _file("artifact/model.onnx", mutate_graph), use, 5000),
    "weights": Kind(_ARTIFACTS, _file("artifact/model.onnx.data", damage), use, 400),
    "tokenizer": Kind(
        _ARTIFACTS[:1], _file("artifact/tokenizer.json", partial(mutate_json, keys=TOKENIZER_KEYS)), use, 1500
    ),
    "template": Kind(_ARTIFACTS[:1], _template, partial(use, chat=True), 1200),
    "settings": Kind(
        _ARTIFACTS[:1],
        _file("artifact/*[gn]_config.json", partial(mutate_json, keys=_SETTINGS)),
        partial(use, chat=True),
        1000,
    ),
    "links": Kind(_ARTIFACTS[:1], partial(_links, "artifact"), partial(use, chat=True), 400),
    "state": Kind(
        tuple({name: "artifact", f"{name}.cache": "cache"} for name in ("ort", "native", "recall")),
        _cache,
        resume,
        2500,
    ),
    "source config": Kind((_SOURCE,), _file("source/config.json", _CONFIG), convert, 1000, _TORCH),
    "converted config": Kind((_LIGER,), _file("liger/config.json", _CONFIG), build, 1500, _TORCH),
    "source weights": Kind((_SOURCE,), _file("source/*.safetensors", mutate_safetensors), convert, 600, _TORCH),
    "converted weights": Kind((_LIGER,), _file("liger/*.safetensors", mutate_safetensors), build, 800, _TORCH),
    "index": Kind((_LIGER,), _file("liger/*.index.json", mutate_json), build, 400, _TORCH),
    "adapter": Kind((_SOURCE | {"adapter": "adapter"},), _file("adapter/*.json", mutate_json), adapt, 800, _TORCH),
    "adapter weights": Kind(
        (_SOURCE | {"adapter": "adapter"},), _file("adapter/*.safetensors", mutate_safetensors), adapt, 500, _TORCH
    ),
    "source links": Kind((_SOURCE,), partial(_links, "source"), convert, 200, _TORCH),
    "converted links": Kind((_LIGER,), partial(_links, "liger"), build, 200, _TORCH),
    "other weights": Kind((_SOURCE,), _gguf, convert, 200, _TORCH),
    "engine": Kind(_ARTIFACTS[:1], _target, look, 500),
    "memory": Kind(({"memory.json": "memory.json"},), _file("memory.json", mutate_json), memory, 300),
    "kernel pack": Kind(
        ({"pack": "pack"},), _file(f"pack/{PACK}", mutate_pack, seal=False), read_pack, 5000, (), apart=True
    ),
}
