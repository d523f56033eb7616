"""Conversion: a Transformer's checkpoint becomes a converted one, and a converted one becomes a torch model.

Liger adds no parameters, so the weights stay the bytes they were; what changes is config.json.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.checkpoint import check_checkpoint
from ligerexport.config import DEFAULT_PRESET, LigerConfig, get_preset
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, UsageError
from ligerexport.families import PREFIX, get_family
from ligerexport.sources import resolve
from ligerexport.staging import staged_directory

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
"""What the names of files start with that belong to a checkpoint beside config and weights."""


def convert(
    model: str | Path,
    output: str | Path,
    *,
    preset: str = DEFAULT_PRESET,
    force: bool = False,
    progress: ProgressFactory | None = None,
    **changes: Any,
) -> Path:
    """Convert a checkpoint of a family in `FAMILIES`; takes seconds and no memory to speak of.

    Weights are hard links to the source's files where the file system can, copies where not.

    Args:
        model: A directory, a hub id or a built-in model.
        output: Directory to write.
        preset: Row of `PRESETS`.
        force: Whether an older converted checkpoint in `output` may be replaced.
        progress: Reports downloads and copies; silent by default.
        **changes: Fields of `LigerConfig` that differ from the preset; None leaves the preset's value.

    Returns:
        `output`.

    Raises:
        UsageError: A setting makes no sense for this model, or `output` is in use.
        SourceError: There is no such model.
        CheckpointError: It is incomplete, damaged, or of a family that is not supported.
    """
    liger = get_preset(preset, **changes)
    _check_output(Path(output))
    source = resolve(model, progress=progress)
    info = check_checkpoint(source.path)
    config = converted_config(dict(info.config), liger)
    config["liger_source"] = {"model": source.name, "revision": source.revision, "license": source.license}
    with staged_directory(output, force=force, marker="config.json") as stage:
        (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        companions = [f for f in source.path.iterdir() if f.name.startswith(COMPANIONS) and f.is_file()]
        index = source.path / "model.safetensors.index.json"
        for file in [*companions, *([index] if index.is_file() else [])]:
            shutil.copyfile(file, stage / file.name)
        with (progress or silent)("weights", info.bytes, "bytes") as advance:
            for file in info.files:
                _link(file, stage / file.name)
                advance(file.stat().st_size)
    return Path(output)


def _check_output(output: Path) -> None:
    """Refuse to replace a checkpoint that was not made by a conversion: it may be the only copy."""
    config = output / "config.json"
    if config.is_file() and '"liger"' not in config.read_text():
        raise UsageError(f"{output} holds a checkpoint that is not converted", hint="choose another place with -o")


def converted_config(config: dict[str, Any], liger: LigerConfig) -> dict[str, Any]:
    """Return the config.json of the converted checkpoint, checked against what the op supports.

    Raises:
        UsageError: A setting makes no sense for this model.
        CheckpointError: The family or its rotary embedding is not supported.
    """
    if "model_type" not in config:
        raise CheckpointError("config.json names no model_type", hint="save it with transformers' save_pretrained")
    family = get_family(config["model_type"])
    config = config | {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"Liger{family.prefix}ForCausalLM"],
        "liger": liger.to_dict(),
    }
    from ligerexport.mixer import layer_specs, model_classes

    layer_specs(model_classes(family)[0].from_dict(config))
    return config


def _link(source: Path, target: Path) -> None:
    """Put a weight file in place without copying it where that is possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a converted checkpoint as a transformers model with its attention swapped.

    Args:
        path: Directory that `convert` or `save_pretrained` wrote.
        dtype: Type of the weights; fp32 by default.

    Raises:
        CheckpointError: It is not converted, incomplete or damaged.
    """
    import torch
    from transformers import AutoModelForCausalLM

    import ligerexport.mixer  # noqa: F401  (makes the converted classes known to transformers)

    info = check_checkpoint(path, tokenizer=False)
    if "liger" not in info.config:
        raise CheckpointError(f"{path} is not converted", hint=f"ligerexport convert {path} -o liger")
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype or torch.float32)


def convert_in_memory(model: PreTrainedModel, liger: LigerConfig) -> PreTrainedModel:
    """Return a converted model that shares the weights of a loaded one, for comparing conversions.

    Args:
        model: A Transformer of a family in `FAMILIES`, or a converted model.
        liger: The conversion; what `model` was converted to does not matter.

    Raises:
        UsageError: A setting makes no sense for this model.
        CheckpointError: The family or its rotary embedding is not supported.
    """
    import torch

    from ligerexport.mixer import model_classes

    _, model_class = model_classes(get_family(model.config.model_type))
    config = model_class.config_class.from_dict(converted_config(model.config.to_dict(), liger))
    with torch.device("meta"):
        converted = model_class(config)
    converted.load_state_dict(model.state_dict(), assign=True, strict=True)
    converted.model.rotary_emb = model.model.rotary_emb
    converted.tie_weights()
    return converted.eval()
