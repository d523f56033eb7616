"""Check that a checkpoint directory is complete, from `config.json` and the headers of its safetensors files.

A damaged or incomplete checkpoint is reported here in one line, before anything is loaded. The only weights that are
read are an output projection and an embedding, to compare them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from ligerexport.checkpoint.fitted import score_shapes
from ligerexport.checkpoint.seal import check_seal
from ligerexport.dtypes import BY_SAFETENSORS
from ligerexport.errors import CheckpointError, quoted
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES, PREFIX
from ligerexport.reading import leads_away, read_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_AGAIN = "copy or download it again"
_LFS_POINTER = b"version https://git-lfs"
_MAX_HEADER = 100_000_000  # safetensors' own limit; more is not a header
_BASE, _EMBEDDING, _HEAD = "model.", "model.embed_tokens.weight", "lm_head.weight"
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
_SLAB = 1 << 24
"""Number of elements compared at a time."""

WRAPPERS = r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
"""Parts that torch adds to the names of weights when a wrapped or compiled model is saved."""

_COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
"""Prefixes of the names of a checkpoint's other files, beside config and weights."""


class TensorInfo(NamedTuple):
    """A tensor as its file's header describes it: dtype in safetensors' spelling (`F32`, `BF16`), shape, file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class CheckpointInfo:
    """A checkpoint that passed `check_checkpoint`.

    Attributes:
        path: Directory of the checkpoint.
        config: Content of `config.json`, with `tie_word_embeddings` set to `tied`.
        files: The safetensors files, in order.
        bytes: Total size of the files.
        dtypes: Dtypes of the weights, sorted.
        tied: Whether the output projection is the embedding: no `lm_head` is stored, or it equals the embedding.
        tensors: Description of each weight, by its name in the family's model.
        renamed: Name of a weight in the files, by its name in `tensors`, where the two differ.
        quantised: Quantisation method of the weights; None for plain weights. Quantised weights keep the files' names.
        adapter: PEFT adapter in the same directory, which belongs to the model.
    """

    path: Path
    config: Mapping[str, Any]
    files: tuple[Path, ...]
    bytes: int
    dtypes: tuple[str, ...]
    tied: bool
    tensors: Mapping[str, TensorInfo]
    renamed: Mapping[str, str] = field(default_factory=dict)
    quantised: str | None = None
    adapter: Path | None = None

    @property
    def index(self) -> Path | None:
        """The file that lists the tensors of each shard; None for a single file."""
        return None if self.files[0].name == SINGLE else self.path / INDEX

    @property
    def plain(self) -> bool:
        """Whether the files have the model's own weights under the model's own names."""
        return not self.renamed and self.quantised is None and self.adapter is None


def copy_companions(source: Path, target: Path) -> None:
    """Copy a checkpoint's tokenizer and generation settings from one directory to another."""
    for file in source.iterdir():
        if file.name.startswith(_COMPANIONS) and file.is_file():
            shutil.copyfile(file, target / file.name)


def check_checkpoint(path: str | Path, *, tokenizer: bool = True) -> CheckpointInfo:
    """Check that a directory has a complete checkpoint, and describe it.

    Args:
        path: Directory with `config.json` and safetensors weights.
        tokenizer: Whether a tokenizer must be there too.

    Raises:
        CheckpointError: Something is missing, cut off, in an unsupported format or changed since the conversion, or
            config and weights disagree.
    """
    path = Path(path)
    check_links(path)
    config = checkpoint_config(path)
    files = checkpoint_files(path)
    stored = {name: info for file in files for name, info in read_header(file).items()}
    if files[0].name != SINGLE:
        _check_index(path, stored)
    try:
        quantised = _quantisation(config)
        adapter = _adapter(path)
        if "liger" in config and (quantised or adapter):
            raise CheckpointError(
                f"{path} is converted and has {f'weights of {quantised}' if quantised else f'an adapter, {adapter}'}",
                hint="quantise with build --weights; merge an adapter of recover with convert --adapter",
            )
        tensors, renamed = (stored, {}) if quantised else _check_config(path, config, stored)
        tied = _is_tied(tensors, renamed, quantised)
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise CheckpointError(f"{path / 'config.json'} is damaged: {error}", hint=_AGAIN) from error
    if tokenizer and not any((path / name).is_file() for name in _TOKENIZERS):
        raise CheckpointError(
            f"no tokenizer in {path} (expected {_TOKENIZERS[0]})",
            hint="copy tokenizer.json and tokenizer_config.json from where the model came from",
        )
    check_seal(path, files)
    return CheckpointInfo(
        path=path,
        config=config | {"tie_word_embeddings": tied},
        files=tuple(files),
        bytes=sum(file.stat().st_size for file in files),
        dtypes=tuple(sorted({info.dtype for info in tensors.values()})),
        tied=tied,
        tensors=tensors,
        renamed=renamed,
        quantised=quantised,
        adapter=adapter,
    )


def check_plain(info: CheckpointInfo) -> None:
    """Refuse a converted checkpoint whose files have other names for weights than the model: they are read by name.

    Raises:
        CheckpointError: A name differs.
    """
    for name, stored in info.renamed.items():
        raise CheckpointError(
            f"{info.path} calls {name} {stored}",
            hint="save it again under plain names: ligerexport.load_model(PATH).save_pretrained(OTHER)",
        )


def not_finite(name: str, path: Path) -> CheckpointError:
    """Return the error for a weight with a value that is NaN or infinite."""
    return CheckpointError(f"{name} in {path} has values that are not finite (NaN or infinite)", hint=_AGAIN)


def check_links(path: Path) -> None:
    """Refuse a directory with links to files outside, except a hub's cache: the linked files may be private.

    Raises:
        CheckpointError: There is such a link.
    """
    for file in path.iterdir() if path.is_dir() else ():
        if file.is_symlink() and leads_away(file, path, path.resolve().parent.parent / "blobs"):
            raise CheckpointError(
                f"{file} is a link to a place outside the checkpoint",
                hint=f"if that is intended, copy it with its links resolved: cp -rL {quoted(path)} COPY",
            )


def checkpoint_files(path: str | Path) -> list[Path]:
    """Return the safetensors files of a checkpoint directory, in order. As in transformers, a single file is preferred
    to shards.

    Raises:
        CheckpointError: There are no files, or one that the index names is missing.
    """
    path = Path(path)
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        shards, there = (
            sorted(set(_weight_map(path).values())),
            {file.name for file in path.iterdir() if file.is_file()},
        )
        if missing := [name for name in shards if name not in there]:
            raise CheckpointError(
                f"{missing[0]} is missing from {path} ({len(missing)} of {len(shards)} files that {INDEX} names)",
                hint="copy or download the checkpoint again",
            )
        return [path / name for name in shards]
    raise _other_weights(path) or CheckpointError(
        f"no weights in {path}, expected {SINGLE} or {INDEX}", hint="copy or download them again"
    )


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Return the tensors that a safetensors file's header lists, after checking the file's length.

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
        raise _damaged(file, f"has {size:,} bytes, its header announces {end:,}")
    try:
        with safe_open(file, "numpy"):  # checks types and sizes, and that tensors leave no gaps
            return tensors
    except SafetensorError as error:
        raise _damaged(file, f"is damaged: {error}") from None


def checkpoint_config(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint's config.json.

    Raises:
        CheckpointError: There is none, it is damaged, or the directory holds something else.
    """
    file = path / "config.json"
    if not path.is_dir():
        hint = f"give one with config.json; names and GGUF files are for: ligerexport convert {quoted(path)} -o liger"
        what = f"{path} is a file, expected a directory" if path.is_file() else f"no directory {path}"
        raise CheckpointError(what, hint=hint)
    if (path / "manifest.json").is_file() and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{path} is a built artifact, expected a checkpoint",
            hint=f"give the checkpoint that it was built from; to write text with it: ligerexport run {quoted(path)}",
        )
    if not file.is_file():
        artifacts = {manifest.parent for manifest in path.glob("*/manifest.json")}
        inside = sorted({config.parent for config in path.glob("*/config.json")} - artifacts)
        hint = f"did you mean {quoted(inside[0])}?" if inside else "give the directory that holds config.json"
        if other := _other_weights(path):
            raise other
        raise CheckpointError(f"no config.json in {path}", hint=hint)
    config = read_json(file, CheckpointError, _AGAIN)
    if not config.get("model_type") or not isinstance(config["model_type"], str):
        raise CheckpointError(f"{file} names no model_type", hint="take config.json from where the model came from")
    return config


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX, CheckpointError, _AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / INDEX} has no weight_map", hint=_AGAIN)
    if outside := [name for name in weight_map.values() if not isinstance(name, str) or Path(name).name != name]:
        raise CheckpointError(f"{path / INDEX} names a file outside its directory: {outside[0]}", hint=_AGAIN)
    return weight_map


def _check_index(path: Path, tensors: Mapping[str, TensorInfo]) -> None:
    for name, shard in _weight_map(path).items():
        if name not in tensors or tensors[name].file.name != shard:
            raise CheckpointError(
                f"{INDEX} places {name} in {shard}, which does not hold it",
                hint="the files come from different versions; download the checkpoint again",
            )


def _check_config(
    path: Path, config: Mapping[str, Any], stored: Mapping[str, TensorInfo]
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Compare the names and shapes that `config.json` announces with those in the files.

    Returns:
        The weights by their names in the family's model, and the names in the files where they differ. For a family
        that is not supported, transformers decides what the names mean.
    """
    hint = "config.json and the weights come from different models; copy both from the same place"
    family = FAMILIES.get(config["model_type"].removeprefix(PREFIX))
    tensors: dict[str, TensorInfo] = {}
    renamed: dict[str, str] = {}
    text = config if family else config.get("text_config") or config
    embedding = next((name for name in stored if name.endswith("embed_tokens.weight")), None)
    if embedding is None:
        raise CheckpointError(f"no embed_tokens.weight among the {len(stored)} tensors in {path}", hint=hint)
    expected = text.get("vocab_size"), text.get("hidden_size")
    if None not in expected and stored[embedding].shape != expected:
        raise CheckpointError(
            f"{embedding} is {list(stored[embedding].shape)}, config.json says {list(expected)}", hint=hint
        )
    found = {int(match[1]) for name in stored if (match := re.search(r"\blayers\.(\d+)\.", name))}
    layers = text.get("num_hidden_layers")
    if layers is not None and (len(found) != layers or max(found, default=-1) >= layers):
        gap = next((layer for layer in range(layers) if layer not in found), None)
        problem = f"the weights have {max(found) + 1}" if gap is None else f"layer {gap} has no weights"
        raise CheckpointError(f"config.json says {layers} layers, {problem}", hint=hint)
    if family is None:
        return dict(stored), {}
    shapes, skipped = family.weights(config)
    shapes = {**shapes, **_check_scores(config, stored)}
    for given, info in stored.items():
        name = _name(given, shapes)
        if name not in shapes:
            if skipped.search(name):
                continue
            raise CheckpointError(f"{path} has {given}, which the model in config.json does not have", hint=hint)
        if name in tensors:
            raise CheckpointError(f"{path} has both {given} and {renamed.get(name, name)}", hint=hint)
        if info.shape != shapes[name]:
            raise CheckpointError(f"{given} is {list(info.shape)}, config.json says {list(shapes[name])}", hint=hint)
        if info.dtype not in BY_SAFETENSORS:
            raise CheckpointError(
                f"{given} is stored as {info.dtype}, expected one of {', '.join(BY_SAFETENSORS)}",
                hint="load the model with transformers in bfloat16 and save it again",
            )
        tensors[name] = info
        if name != given:
            renamed[name] = given
    if missing := [name for name in shapes if name not in tensors and name != _HEAD]:
        raise CheckpointError(f"{missing[0]} is missing from {path}", hint=hint)
    return tensors, renamed


def _name(given: str, known: Container[str]) -> str:
    """Return a weight's name in the family's model: without wrappers and with one `model.`, as in transformers."""
    name = re.sub(WRAPPERS, "", given)
    if name.startswith(_BASE) and name.removeprefix(_BASE) in known:
        return name.removeprefix(_BASE)
    return _BASE + name if _BASE + name in known else name


def _is_tied(tensors: Mapping[str, TensorInfo], renamed: Mapping[str, str], quantised: str | None) -> bool:
    """Return whether the output projection is the embedding: transformers ties the two only if they are equal."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if quantised:  # transformers compares the two when it loads them
        return not any(name.startswith("lm_head.") for name in tensors)
    if head is None or embedding is None:
        return head is None
    import torch

    if head.shape != embedding.shape:
        return False
    rows = max(1, _SLAB // head.shape[1])
    with safe_open(head.file, "pt") as one, safe_open(embedding.file, "pt") as other:
        a, b = one.get_slice(renamed.get(_HEAD, _HEAD)), other.get_slice(renamed.get(_EMBEDDING, _EMBEDDING))
        starts = range(0, head.shape[0], rows)
        return all(torch.equal(a[i : i + rows].float(), b[i : i + rows].float()) for i in starts)


def _quantisation(config: Mapping[str, Any]) -> str | None:
    """Return the quantisation method of the weights; MLX writes it under `quantization`."""
    text = config.get("text_config") or {}
    found = config.get("quantization_config") or config.get("compression_config") or text.get("quantization_config")
    if not found:
        return "MLX" if config.get("quantization") else None
    kind = "bitsandbytes" if found.get("load_in_4bit") or found.get("load_in_8bit") else "an unnamed method"
    return str(found.get("quant_method") or kind)


def _adapter(path: Path) -> Path | None:
    """Return the PEFT adapter in the directory of the weights, which transformers applies."""
    if not (path / ADAPTER_CONFIG).is_file():
        return None
    if not (path / ADAPTER).is_file():
        raise CheckpointError(
            f"{path} has {ADAPTER_CONFIG} without {ADAPTER}", hint=f"copy {ADAPTER} too, or delete {ADAPTER_CONFIG}"
        )
    return path / ADAPTER


def _check_scores(config: Mapping[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the weights that come from a fit, after checking that no layer lacks them."""
    if not config.get("liger"):
        return {}
    shapes = score_shapes(config, LigerConfig.from_dict(config["liger"]))
    hint = "convert again, with --calibrate TEXT or the file of its scores: --scores FILE"
    for name, shape in shapes.items():
        if name not in tensors:
            raise CheckpointError(f"{name} is missing, which this conversion needs", hint=hint)
        if tensors[name].shape != shape:
            raise CheckpointError(f"{name} is {list(tensors[name].shape)}, config.json says {list(shape)}", hint=hint)
    return shapes


def _other_weights(path: Path) -> CheckpointError | None:
    """Return the error for a directory whose only weights are in another format; None if it has none."""
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
    if (path / ADAPTER).is_file():
        hint = f"merge it into its model: ligerexport convert MODEL --merge {quoted(path)} -o liger"
        if (path / "recovery.json").is_file():
            hint = f"merge it into its converted model: ligerexport convert MODEL --adapter {quoted(path)} -o DIRECTORY"
        return CheckpointError(f"{path} is a LoRA adapter, expected a whole model", hint=hint)
    if files := sorted(path.glob("*.gguf")):
        return CheckpointError(
            f"{path} has GGUF weights only, expected safetensors", hint=f"give the file itself: {quoted(files[0])}"
        )
    return None


def _damaged(file: Path, problem: str) -> CheckpointError:
    return CheckpointError(f"{file} {problem}", hint="it is cut off or damaged; copy or download it again")
