"""The two models of a recovery: the student with LoRA, and the Transformer that it follows.

A checkpoint that was only converted is its own teacher: its weights are the Transformer's, byte for byte.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.checkpoint.adapter import RECOVERY
from ligerexport.checkpoint.checkpoint import CheckpointInfo, check_checkpoint
from ligerexport.errors import MissingDependency, UsageError, close_matches
from ligerexport.model.families import get_family
from ligerexport.train.config import RecoverConfig
from ligerexport.versions import warn_if_untried

if TYPE_CHECKING:
    import torch

_PACKED = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj") | dict.fromkeys(
    ("gate_proj", "up_proj"), "gate_up_proj"
)


def lora_targets(info: CheckpointInfo, targets: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the projections that get LoRA.

    In a family that packs query, key and value into one projection, the packed one takes the place of its parts.
    """
    if get_family(info.config["model_type"]).packed:
        targets = tuple(dict.fromkeys(_PACKED.get(target, target) for target in targets))
    return targets


def target_shapes(info: CheckpointInfo, targets: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return the weights that get LoRA and their shapes `[out, in]`.

    Raises:
        UsageError: This model has no projection with a target's name.
    """
    targets = lora_targets(info, targets)
    suffixes = {name.split(".")[-2] for name, tensor in info.tensors.items()
                if ".layers." in name and name.endswith(".weight") and len(tensor.shape) == 2}  # fmt: skip
    for target in targets:
        if target not in suffixes:
            raise UsageError(f"no projection is called '{target}'", hint=close_matches(target, suffixes))
    return {name: tensor.shape for name, tensor in info.tensors.items()
            if ".layers." in name and name.endswith(tuple(f".{target}.weight" for target in targets))}  # fmt: skip


def load_student(info: CheckpointInfo, config: RecoverConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """Load the checkpoint and put LoRA into it.

    Returns:
        The model, in which only LoRA is trainable and in fp32, and PEFT's configuration.

    Raises:
        MissingDependency: PEFT is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise MissingDependency("peft", extra="recover") from None
    warn_if_untried("peft")
    from ligerexport.checkpoint.convert import load_model

    targets = lora_targets(info, config.targets)
    settings = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(targets), lora_dropout=0.0, bias="none",  # type: ignore[arg-type]
        task_type="CAUSAL_LM",
    )  # fmt: skip
    model: Any = get_peft_model(load_model(info.path, dtype), settings).get_base_model().train()
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model, settings


def load_teacher(info: CheckpointInfo, against: str | Path | None, dtype: torch.dtype) -> Any:
    """Load the Transformer that the student follows.

    Args:
        info: The student.
        against: Directory, hub id or built-in name; None takes the student's own weights with softmax attention.
        dtype: Type of the teacher's weights.
    """
    from ligerexport.checkpoint.convert import load_transformer

    path, raw = teacher_config(info, against)
    return load_transformer(path, raw, dtype).requires_grad_(False)


def teacher_config(info: CheckpointInfo, against: str | Path | None) -> tuple[Path, dict[str, Any]]:
    """Return the teacher's directory and its configuration, checked against the student's; loads nothing."""
    if against is None:
        if RECOVERY in info.config:
            raise UsageError(
                f"{info.path} is already recovered, so its weights are no longer the Transformer's",
                hint="give the Transformer that it came from: --against MODEL",
            )
        return info.path, dict(info.config)
    from ligerexport.checkpoint.sources import resolve

    teacher = check_checkpoint(resolve(against).path, tokenizer=False)
    if "liger" in teacher.config:
        raise UsageError(f"{against} is converted", hint="--against takes the Transformer that it was made from")
    shape = {"vocab_size": "vocabulary", "hidden_size": "width", "num_hidden_layers": "number of layers"}
    for key, what in shape.items():
        mine, theirs = info.config.get(key), teacher.config.get(key)
        if mine != theirs:
            raise UsageError(
                f"{against} has another {what} than {info.path}: {theirs}, not {mine}",
                hint="--against takes the Transformer that this checkpoint was converted from",
            )
    return teacher.path, dict(teacher.config)
