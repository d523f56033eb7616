"""What a checkpoint directory must hold, checked from `config.json` and the headers of its safetensors files alone.

A damaged or incomplete checkpoint is told here in one line, before anything is loaded; nothing here reads a weight.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ligerexport.errors import CheckpointError, quoted
from ligerexport.reading import leads_away, read_json

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again"
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # safetensors' own limit; more is not a header

COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
"""What the names of files start with that belong to a checkpoint beside config and weights."""


class TensorInfo(NamedTuple):
    """A tensor as its file's header describes it: dtype in safetensors' spelling (`F32`, `BF16`), shape, file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that passed `check_checkpoint`.

    Attributes:
        path: Its directory.
        config: Content of `config.json`.
        files: The safetensors files, in order.
        bytes: Their size together.
        dtypes: Dtypes that occur, sorted.
        tied: Whether the output projection is the embedding: said so by the configuration, or no `lm_head` is stored.
        tensors: What each tensor is, by name.
    """

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    bytes: int
    dtypes: tuple[str, ...]
    tied: bool
    tensors: Mapping[str, TensorInfo]


def check_checkpoint(path: str | Path, *, tokenizer: bool = True) -> CheckpointInfo:
    """Check that a directory holds a whole checkpoint, and describe it.

    Args:
        path: Directory with `config.json` and safetensors weights.
        tokenizer: Whether a tokenizer must be there too.

    Raises:
        CheckpointError: Something is missing, cut off, in a form that is not read, or config and weights disagree.
    """
    path = Path(path)
    check_links(path)
    config = _read_config(path)
    files = checkpoint_files(path)
    tensors = {name: info for file in files for name, info in read_header(file).items()}
    _check_index(path, tensors)
    try:
        _check_config(path, config, tensors)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}", hint=_AGAIN) from error
    if tokenizer and not any((path / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"no tokenizer in {path} (expected {_TOKENIZERS[0]})",
            hint="copy tokenizer.json and tokenizer_config.json from where the model came from",
        )
    return CheckpointInfo(
        path=path,
        config=config,
        files=tuple(files),
        bytes=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({info.dtype for info in tensors.values()})),
        tied=bool(config.get("tie_word_embeddings")) or "lm_head.weight" not in tensors,
        tensors=tensors,
    )


def check_links(path: Path) -> None:
    """Refuse a directory with links to files elsewhere, but for those of a hub's cache: what they name may be private.

    Raises:
        CheckpointError: It has one.
    """
    for file in path.iterdir() if path.is_dir() else ():
        if file.is_symlink() and leads_away(file, path, path.resolve().parent.parent / "blobs"):
            raise CheckpointError(
                f"{file} is a link to a place outside the checkpoint",
                hint=f"if that is meant to be, copy it with its links resolved: cp -rL {quoted(path)} COPY",
            )


def checkpoint_files(path: str | Path) -> list[Path]:
    """Return the safetensors files of a checkpoint directory, in order.

    Raises:
        CheckpointError: There are none, or one that the index names is missing.
    """
    path = Path(path)
    if (path / _INDEX).is_file():
        shards, there = (
            sorted(set(_weight_map(path).values())),
            {file.name for file in path.iterdir() if file.is_file()},
        )
        if missing := [name for name in shards if name not in there]:
            raise CheckpointError(
                f"{missing[0]} is missing from {path} ({len(missing)} of {len(shards)} files that {_INDEX} names)",
                hint="copy or download the checkpoint again",
            )
        return [path / name for name in shards]
    if (path / _SINGLE).is_file():
        return [path / _SINGLE]
    raise _no_weights(path)


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return what a safetensors file says it holds, having checked that it is as long as it says.

    Raises:
        CheckpointError: The file is cut off or is not a safetensors file.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        start = handle.read(len(_LFS_POINTER))
        if start == _LFS_POINTER:
            raise CheckpointError(
                f"{file} is a Git LFS pointer, not the weights", hint=f"git -C {quoted(file.parent)} lfs pull"
            )
        length = int.from_bytes(start[:8], "little")
        if size < 8 or 8 + length > size:
            raise _damaged(file, f"has {size:,} bytes, too few for its header")
        if length > _MAX_HEADER:
            raise _damaged(file, "is not a safetensors file")
        handle.seek(8)
        try:
            entries = json.loads(handle.read(length))
            entries.pop("__metadata__", None)
            tensors = {name: TensorInfo(info["dtype"], tuple(info["shape"]), file) for name, info in entries.items()}
            end = 8 + length + max((info["data_offsets"][1] for info in entries.values()), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError):
            raise _damaged(file, "has a header that cannot be read") from None
    if end != size:
        raise _damaged(file, f"has {size:,} bytes where its header announces {end:,}")
    try:
        with safe_open(file, "numpy"):  # checks types, sizes and that tensors follow each other
            return tensors
    except SafetensorError as error:
        raise _damaged(file, f"is damaged: {error}") from None


def _read_config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not path.is_dir():
        raise CheckpointError(f"no directory {path}", hint="give the directory that holds config.json")
    if not file.is_file():
        inside = sorted(config.parent for config in path.glob("*/config.json"))
        hint = f"did you mean {inside[0]}?" if inside else "give the directory that holds config.json"
        if (path / "manifest.json").is_file():
            hint = f"this is a built artifact; try: ligerexport run {quoted(path)}"
        raise CheckpointError(f"no config.json in {path}", hint=hint)
    config = read_json(file, CheckpointError, _AGAIN)
    if not config.get("model_type") or not isinstance(config["model_type"], str):
        raise CheckpointError(f"{file} names no model_type", hint="take config.json from where the model came from")
    return config


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / _INDEX, CheckpointError, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / _INDEX} has no weight_map", hint=_AGAIN)
    if outside := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{path / _INDEX} names a file outside its directory: {outside[0]}", hint=_AGAIN)
    return weight_map


def _check_index(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    if not (path / _INDEX).is_file():
        return
    for name, shard in _weight_map(path).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{_INDEX} places {name} in {shard}, which does not hold it",
                hint="the files come from different versions; download the checkpoint again",
            )


def _check_config(path: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Compare what `config.json` announces with the shapes that are there."""
    hint = "config.json and the weights come from different models; copy both from the same place"
    text = config.get("text_config") or config
    expected = text.get("vocab_size"), text.get("hidden_size")
    embedding = next((name for name in tensors if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(f"no embed_tokens.weight among the {len(tensors)} tensors in {path}", hint=hint)
    if None not in expected and tensors[embedding].shape != expected:
        raise CheckpointError(
            f"{embedding} is {list(tensors[embedding].shape)}, config.json says {list(expected)}", hint=hint
        )
    found = {int(match[1]) for name in tensors if (match := re.search(r"\blayers\.(\d+)\.", name))}
    layers = text.get("num_hidden_layers")
    if layers is not None and (len(found) != layers or max(found, default=-1) >= layers):
        gap = next((layer for layer in range(layers) if layer not in found), None)
        problem = f"the weights have {max(found) + 1}" if gap is None else f"layer {gap} has no weights"
        raise CheckpointError(f"config.json says {layers} layers, {problem}", hint=hint)
    _check_scores(config, tensors)
    if "lm_head.weight" not in tensors and config.get("tie_word_embeddings") is False:
        raise CheckpointError("config.json says the output is not tied, but lm_head.weight is missing", hint=hint)


def _check_scores(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> None:
    """Check that a conversion with a `learned` pool has the map of every layer that it converts."""
    liger = config.get("liger") or {}
    if not any(name == "learned" for name, _ in liger.get("slots", ())):
        return
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads")
    hint = "convert again, with --calibrate TEXT or the file of its scores: --scores FILE"
    unchanged = {*liger.get("keep_softmax", ()), *(liger.get("keep_window") or ())}
    for layer in (x for x in range(config.get("num_hidden_layers", 0)) if x not in unchanged):
        for kind, shape in (("weight", (heads, config.get("hidden_size"))), ("bias", (heads,))):
            name = f"model.layers.{layer}.self_attn.score_proj.{kind}"
            if name not in tensors:
                raise CheckpointError(f"{name} is missing, which the learned score needs", hint=hint)
            if tensors[name].shape != shape:
                raise CheckpointError(
                    f"{name} is {list(tensors[name].shape)}, config.json says {list(shape)}", hint=hint
                )


def _no_weights(path: Path) -> CheckpointError:
    pickles = sorted(
        file.name for pattern in _PICKLES for file in path.glob(pattern) if file.name != "training_args.bin"
    )
    if pickles:
        code = "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        there, here = json.dumps(str(path)), json.dumps(f"{path.name}-safetensors")
        code += f"[C.from_pretrained({there}).save_pretrained({here}) for C in (M, T)]"
        return CheckpointError(
            f"{path} has pickle weights only ({pickles[0]}); they can run code when loaded, expected safetensors",
            hint=f"if you trust them, convert them: python -c {quoted(code)}",
        )
    if (path / "adapter_model.safetensors").is_file():
        return CheckpointError(
            f"{path} is a LoRA adapter, expected a whole model",
            hint="merge it first: PeftModel.from_pretrained(base, adapter).merge_and_unload().save_pretrained(...)",
        )
    if any(path.glob("*.gguf")):
        return CheckpointError(
            f"{path} has GGUF weights only, expected safetensors",
            hint="load it with transformers (gguf_file=...) and save it with save_pretrained",
        )
    return CheckpointError(f"no weights in {path}, expected {_SINGLE} or {_INDEX}", hint="copy or download them again")


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} {problem}", hint="it is cut off or damaged; copy or download it again")
