"""What a recovery leaves: a checkpoint with LoRA merged into its weights, or LoRA alone as PEFT's adapter.

Weights are merged file by file, so the memory is that of one file; what has no LoRA stays the bytes it was.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.checkpoint import CheckpointInfo
from ligerexport.console import ProgressFactory, silent
from ligerexport.convert import COMPANIONS
from ligerexport.errors import CheckpointError
from ligerexport.recover.model import RECOVERY, check_adapter, check_student
from ligerexport.staging import staged_directory

if TYPE_CHECKING:
    from torch import Tensor

ADAPTER = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
RECORD = "recovery.json"
"""In every result; tells it from other directories."""
_PEFT_PREFIX = "base_model.model."


def write_adapter(stage: Path, tensors: Mapping[str, Tensor], settings: Any, record: Mapping[str, Any]) -> None:
    """Write LoRA as PEFT reads it, and how it was made.

    Args:
        stage: Directory.
        tensors: By the names of `Trainer.tensors`.
        settings: PEFT's configuration.
        record: What config.json of a merged checkpoint would say under `liger_recovery`.
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
    """Merge an adapter that `recover` wrote into the converted checkpoint that it was trained on.

    Raises:
        CheckpointError: One of them is damaged, or the adapter was trained on another model.
        UsageError: `output` is in use.
    """
    info = check_student(checkpoint)
    with staged_directory(output, force=force, marker=RECORD) as stage:
        write_recovered(stage, info, Path(adapter), progress)
    return Path(output)


def write_recovered(stage: Path, info: CheckpointInfo, adapter: Path, progress: ProgressFactory | None = None) -> None:
    """Write a converted checkpoint with an adapter merged.

    Args:
        stage: Directory.
        info: The checkpoint that the adapter was trained on.
        adapter: What `write_adapter` wrote.
        progress: Reports the weights; silent by default.

    Raises:
        CheckpointError: The adapter is damaged, or was trained on another model.
    """
    from safetensors.torch import load_file

    try:
        record = json.loads((adapter / RECORD).read_text(encoding="utf-8"))
        settings = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors, scale = load_file(adapter / ADAPTER), settings["lora_alpha"] / settings["r"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{adapter} is no adapter of a recovery ({error})", hint="give what `recover --adapter` wrote"
        ) from None
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
        stage: Directory.
        info: The checkpoint that was trained.
        tensors: LoRA's, by the names of its modules.
        scale: Of their product.
        record: Goes into config.json under `liger_recovery`.
        progress: Reports the weights; silent by default.

    Raises:
        CheckpointError: LoRA names a weight that the checkpoint has not.
    """
    pairs = lora_pairs(tensors)
    if missing := sorted(set(pairs) - set(info.tensors)):
        raise CheckpointError(f"LoRA changes {missing[0]}, which {info.path} has not")
    _write_record(stage, record)
    config = dict(info.config) | {RECOVERY: dict(record)}
    (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    index = info.path / "model.safetensors.index.json"
    for file in [f for f in info.path.iterdir() if f.name.startswith(COMPANIONS) and f.is_file()]:
        shutil.copyfile(file, stage / file.name)
    if index.is_file():
        shutil.copyfile(index, stage / index.name)
    with (progress or silent)("merging weights", info.bytes, "bytes") as advance:
        for file in info.files:
            _merge_file(file, stage / file.name, pairs, scale)
            advance(file.stat().st_size)


def lora_pairs(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Return A `[r, in]` and B `[out, r]` by the name of the weight that they change."""
    found: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.rpartition(".lora_")
        found.setdefault(f"{module}.weight", {})[rest[0]] = tensor
    return {name: (pair["A"], pair["B"]) for name, pair in found.items()}


def _merge_file(source: Path, target: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], scale: float) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    weights = {}
    with safe_open(source, "pt") as file:
        names = list(file.keys())
        if not any(name in pairs for name in names):
            shutil.copyfile(source, target)
            return
        for name in names:
            weight = file.get_tensor(name)
            if name in pairs:
                a, b = pairs[name]
                weight = (weight.float() + scale * (b.float() @ a.float())).to(weight.dtype)
            weights[name] = weight.contiguous()
        save_file(weights, target, metadata=file.metadata() or {"format": "pt"})
    target.chmod(0o644)  # safetensors writes 0600
