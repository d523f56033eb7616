"""How large the inputs of linear maps are, which says where rounding a weight costs most."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from ligerexport.console import ProgressFactory, silent
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.verify.torch_model import Reference


def mean_squares(spec: ModelSpec, ids: np.ndarray, progress: ProgressFactory = silent) -> dict[str, np.ndarray]:
    """Return the mean squares of the inputs of every linear map in the layers on a text.

    Args:
        spec: The checkpoint, which runs in fp32 with one layer in memory.
        ids: The text `[T]`.

    Returns:
        `[in]` by the names of weights.
    """
    found: dict[str, np.ndarray] = {}

    def note(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        rows = given[0].reshape(-1, given[0].shape[-1])
        found[f"{name}.weight"] = rows.square().mean(0, dtype=torch.float32).numpy()

    reference = Reference(spec)
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in reference.linear_maps()]
    with progress("reading a text", len(spec.mixers), "steps") as advance:
        reference.answers([ids], whole=(), advance=advance)
    for hook in hooks:
        hook.remove()
    return found
