"""The results of a recovery: a checkpoint with LoRA merged into its weights, or LoRA as a PEFT adapter.

Weights are merged file by file, so that one file is in memory at a time. Weights without LoRA keep their bytes.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from ligerexport.checkpoint.checkpoint import (
    ADAPTER,
    ADAPTER_CONFIG,
    CheckpointInfo,
    check_checkpoint,
    check_links,
    check_plain,
    copy_companions,
)
from ligerexport.checkpoint.seal import write_seal
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, UsageError, quoted
from ligerexport.model.config import LigerConfig
from ligerexport.reading import read_json
from ligerexport.staging import staged_directory

if TYPE_CHECKING:
    from torch import Tensor

RECORD = "recovery.json"
"""File in every result, by which a result is recognised."""
RECOVERY = "liger_recovery"
"""Key in a recovered checkpoint's config.json for the record of how it was made."""
_WROTE = "give a directory that `recover --adapter` wrote"
_PEFT_PREFIX = "base_model.model."


def check_student(path: str | Path) -> CheckpointInfo:
    """Check the checkpoint to recover.

    Raises:
        CheckpointError: The checkpoint is incomplete or damaged.
        UsageError: The checkpoint is not converted.
    """
    info = check_checkpoint(path)
    if "liger" not in info.config:
        raise UsageError(f"{path} is not converted yet", hint=f"ligerexport convert {quoted(path)} -o liger")
    check_plain(info)
    return info


def model_id(info: CheckpointInfo) -> str:
    """Return a digest of the model that an adapter fits: its conversion, shapes and some of its weights.

    It ignores what differs between versions that write the same model: other keys of config.json, conversion settings
    at their defaults, and dtypes.
    """
    default = LigerConfig().to_dict()
    facts = {
        "model_type": info.config["model_type"],
        "liger": {
            k: v for k, v in LigerConfig.from_dict(info.config["liger"]).to_dict().items() if v != default.get(k)
        },
        "scores": (info.config.get("liger_scores") or {}).get("sha256"),
        "layers": {name: list(tensor.shape) for name, tensor in info.tensors.items() if ".layers." in name},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    for name in sorted(name for name in info.tensors if name.endswith((".norm.weight", ".embed_tokens.weight"))):
        with safe_open(info.tensors[name].file, "pt") as file:
            digest.update(file.get_slice(name)[slice(None) if ".norm." in name else slice(1)].float().numpy().tobytes())
    return digest.hexdigest()[:16]


def read_record(adapter: Path) -> dict[str, Any]:
    """Return the record of how an adapter was made; its key `liger` holds the conversion that the adapter fits.

    Raises:
        CheckpointError: The directory is not an adapter from `recover`.
    """
    check_links(adapter)
    try:
        record = read_json(adapter / RECORD, CheckpointError, _WROTE)
        if not (early := "model" in record and "liger" not in record):
            record |= {"liger": LigerConfig.from_dict(record["liger"]).to_dict()}
    except (ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        raise _no_adapter(adapter, error) from None
    if early:
        raise CheckpointError(
            f"{adapter} comes from an earlier version and does not name the conversion that it fits",
            hint="train it again: ligerexport recover LIGER --data chats.jsonl --adapter -o DIRECTORY",
        )
    return record


def _no_adapter(adapter: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{adapter} is not an adapter from `recover` ({error})", hint=_WROTE)


def check_adapter(record: dict[str, Any], info: CheckpointInfo) -> None:
    """Refuse an adapter that was trained on another model.

    Raises:
        CheckpointError: The record names another model, or none.
    """
    found, expected = record.get("model"), model_id(info)
    if found != expected:
        raise CheckpointError(
            f"this adapter was trained on another model ({found}) than {info.path} ({expected})",
            hint="give the converted checkpoint that it was trained on",
        )


def write_adapter(stage: Path, tensors: Mapping[str, Tensor], settings: Any, record: Mapping[str, Any]) -> None:
    """Write LoRA as a PEFT adapter, with a record of how it was made.

    Args:
        stage: Directory to write to.
        tensors: LoRA's tensors under the names of `Trainer.tensors`.
        settings: Configuration of PEFT.
        record: Value of `liger_recovery` in the config.json of a merged checkpoint.
    """
    from safetensors.torch import save_file

    renamed = {_PEFT_PREFIX + name.replace(".default.", "."): x for name, x in tensors.items()}
    save_file(renamed, stage / ADAPTER, metadata={"format": "pt"})
    settings.save_pretrained(stage)
    _write_record(stage, record)


def _write_record(stage: Path, record: Mapping[str, Any]) -> None:
    (stage / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def merge_adapter(
    checkpoint: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    force: bool = False,
    progress: ProgressFactory | None = None,
) -> Path:
    """Merge an adapter that `recover` wrote into the converted checkpoint that it was trained on."""
    info = check_student(checkpoint)
    with staged_directory(output, force=force, marker=RECORD) as stage:
        write_recovered(stage, info, Path(adapter), progress)
    return Path(output)


def write_recovered(stage: Path, info: CheckpointInfo, adapter: Path, progress: ProgressFactory | None = None) -> None:
    """Write a converted checkpoint with an adapter merged.

    Args:
        stage: Directory to write to; the checkpoint's own directory is changed in place.
        info: The checkpoint that the adapter was trained on.
        adapter: Directory that `write_adapter` wrote.

    Raises:
        CheckpointError: The adapter is damaged, or was trained on another model.
    """
    from safetensors.torch import load_file

    record = read_record(adapter)
    try:
        settings = read_json(adapter / ADAPTER_CONFIG, CheckpointError, _WROTE)
        tensors, scale = load_file(adapter / ADAPTER), settings["lora_alpha"] / settings["r"]
    except (OSError, ValueError, KeyError, TypeError, ArithmeticError, SafetensorError, CheckpointError) as error:
        raise _no_adapter(adapter, error) from None
    check_adapter(record, info)
    write_merged(stage, info, {name.removeprefix(_PEFT_PREFIX): x for name, x in tensors.items()}, scale, record,
                 progress)  # fmt: skip


def write_merged(
    stage: Path,
    info: CheckpointInfo,
    tensors: Mapping[str, Tensor],
    scale: float,
    record: Mapping[str, Any],
    progress: ProgressFactory | None = None,
) -> None:
    """Write a checkpoint with LoRA merged, in the dtype of its weights.

    Args:
        stage: Directory to write to; the checkpoint's own directory is changed in place.
        info: The checkpoint that was trained.
        tensors: LoRA's tensors by the names of its modules.
        scale: Factor that multiplies the product of A and B.
        record: Value of `liger_recovery` in config.json.

    Raises:
        CheckpointError: LoRA names a weight that the checkpoint does not have, or has other shapes.
    """
    pairs = lora_pairs(tensors)
    for name, (a, b) in sorted(pairs.items()):
        if name not in info.tensors:
            raise CheckpointError(f"LoRA changes {name}, which {info.path} does not have", hint=_WROTE)
        shapes = (*b.shape[:1], *a.shape[1:]), info.tensors[name].shape
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or shapes[0] != shapes[1]:
            raise CheckpointError(f"LoRA for {name} has shapes {list(a.shape)} and {list(b.shape)}", hint=_WROTE)
    _write_record(stage, record)
    config = dict(info.config) | {RECOVERY: dict(record)}
    (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if stage != info.path:
        copy_companions(info.path, stage)
        if info.index is not None:
            shutil.copyfile(info.index, stage / info.index.name)
    with (progress or silent)("merging weights", info.bytes, "bytes") as advance:
        for file in info.files:
            _merge_file(file, stage / file.name, pairs, scale)
            advance(file.stat().st_size)
    write_seal(stage, [stage / file.name for file in info.files])


def lora_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A `[r, in]` and B `[out, r]` by the name of the weight that they change.

    Raises:
        CheckpointError: A or B is missing.
    """
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.rpartition(".lora_")
        found.setdefault(f"{module}.weight", {})[rest[:1]] = tensor
    if single := [name for name, pair in found.items() if set(pair) != {"A", "B"}]:
        raise CheckpointError(f"LoRA for {single[0]} lacks one of its two matrices", hint=_WROTE)
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _product(b: Tensor, a: Tensor) -> Tensor:
    """Return B A, summed in the order of the ranks.

    A matrix product has other last bits on other processors. With these sums a model that is converted on two machines
    has the same weights, so that states of one fit the other.
    """
    made = b.new_zeros(len(b), a.shape[1])
    for rows, part in zip(made.split(64), b.split(64), strict=True):  # as many as a processor's cache holds
        for rank, row in enumerate(a):
            rows += part[:, rank : rank + 1] * row
    return made


def _merge_file(source: Path, target: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
    from safetensors.torch import save_file

    weights = {}
    with safe_open(source, "pt") as file:
        names = list(file.keys())
        if not any(name in pairs for name in names):
            if source != target:
                shutil.copyfile(source, target)
            return
        for name in names:
            weight = file.get_tensor(name)
            if name in pairs:
                a, b = pairs[name]
                weight = (weight.float() + scale * _product(b.float(), a.float())).to(weight.dtype)
            weights[name] = weight.contiguous()
        made = target.with_name(f"{target.name}.merged")  # the target may be a link to one of the user's files
        save_file(weights, made, metadata=file.metadata() or {"format": "pt"})
    made.chmod(0o644)  # safetensors writes 0600
    made.replace(target)
