"""The layers of a model in fewer kernels, for a GPU on which the kernels of a token are too small to fill it."""

from __future__ import annotations

import copy
from functools import partial

import torch
from torch import nn
from torch.nn.functional import rms_norm

from ligerexport.layers.mixer import LigerMixer


def fuse(model: nn.Module) -> None:
    """Join the projections of every mixer, and compute norms by torch's own kernel, in place.

    Results differ by the rounding of sums, and a norm in 16 bits is rounded once and not twice.
    """
    for module in list(model.modules()):
        if isinstance(module, LigerMixer):
            _join(module)
        elif _is_rms_norm(module):
            weight, eps = module.weight, module.variance_epsilon
            module.forward = partial(rms_norm, normalized_shape=weight.shape, weight=weight, eps=eps)  # type: ignore[arg-type, method-assign]


def _join(mixer: LigerMixer) -> None:
    """Replace the projections to query, key and value by one, which `LigerMixer.project` splits."""
    names = "q_proj", "k_proj", "v_proj"
    if hasattr(mixer, "qkv_proj"):
        return
    parts = [getattr(mixer, name) for name in names]
    weight = torch.cat([part.weight for part in parts]).detach()
    joint = nn.Linear(weight.shape[1], weight.shape[0], bias=parts[0].bias is not None, device="meta")
    joint.weight = nn.Parameter(weight, requires_grad=False)
    if parts[0].bias is not None:
        joint.bias = nn.Parameter(torch.cat([part.bias for part in parts]).detach(), requires_grad=False)
    for name in names:
        delattr(mixer, name)
    mixer.qkv_proj = joint


def _is_rms_norm(module: nn.Module) -> bool:
    """Return whether a module multiplies normed numbers by its weight; some families add 1 to the weight."""
    if not hasattr(module, "variance_epsilon") or [*dict(module.named_parameters())] != ["weight"]:
        return False
    plain = copy.deepcopy(module).float().cpu()
    x = torch.linspace(-2, 3, plain.weight.numel()).expand(2, -1)  # type: ignore[operator]
    expected = rms_norm(x, plain.weight.shape, plain.weight, plain.variance_epsilon)  # type: ignore[arg-type]
    return torch.allclose(plain(x), expected, rtol=1e-5, atol=1e-6)
