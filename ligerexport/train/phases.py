"""`PHASES`: functions (student, teacher, batch) -> scalar, the sum of a loss over the counted positions.

A new phase is one function here and one row in `RECIPES`. Both models are transformers' `ForCausalLM`: the student has
`LigerMixer` attention and LoRA, the teacher has its family's own attention.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ligerexport.layers.mixer import LigerMixer
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import output_head
from ligerexport.train.losses import divergence, imbalance, next_token_loss, relative_error
from ligerexport.train.packing import IGNORE, Batch

BALANCE = 10.0
"""Factor of the loss that balances memories. MoM (arXiv 2502.13685) takes 0.01, for a router with weights of its own.
Here LoRA on keys has to move the router's logits. With 0.01 the gradient of this loss is thousands of times smaller
than that of the next token's, and SmolLM2-135M's memories kept their shares.
"""
PhaseFunction = Callable[[Any, Any, Batch], Tensor]


def next_token(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Predict the next token; needs no teacher."""
    return next_token_loss(_hidden(student, batch), output_head(student), _at(batch, batch.targets), _weights(batch))


def follow(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Predict what the teacher predicts: KL(teacher || student)."""
    with torch.no_grad():
        expected = _hidden(teacher, batch)
    return divergence(_hidden(student, batch), output_head(student), expected, output_head(teacher), _weights(batch))


def align(student: Any, teacher: Any, batch: Batch) -> Tensor:
    """Give each layer's attention the teacher's input, and compare its output with the teacher's, after `o_proj`.

    The loss is the mean over converted layers of the relative squared error. Layers are independent: the teacher runs
    once, and gradients stay within a layer.
    """
    assert batch.weights is not None
    weights, losses = batch.weights, []

    def error(mixer: LigerMixer, target: Tensor, kwargs: dict[str, Any]) -> Tensor:
        return relative_error(mixer(**kwargs)[0], target, weights)

    def compare(mixer: LigerMixer, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        with torch.enable_grad():
            keep = not student.model.layers[0].gradient_checkpointing
            found = error(mixer, output[0], kwargs) if keep else checkpoint(error, mixer, output[0], kwargs,
                                                                            use_reentrant=False)  # fmt: skip
        losses.append(found)

    unchanged = LigerConfig.from_dict(student.config.liger).unchanged
    pairs = enumerate(zip(student.model.layers, teacher.model.layers, strict=True))
    hooks = [
        theirs.self_attn.register_forward_hook(partial(compare, mine.self_attn), with_kwargs=True)
        for layer, (mine, theirs) in pairs
        if layer not in unchanged
    ]
    try:
        with torch.no_grad():
            teacher.model(**batch.inputs())
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(losses).mean()


def balance(student: Any, batch: Batch) -> Tensor | float:
    """Return the loss for memories that are used unevenly, after a phase has called the student; 0 without memories."""
    mixers = [layer.self_attn for layer in student.model.layers]
    routed = [x for x in mixers if isinstance(x, LigerMixer) and x.spec.config.routed]
    if not routed:
        return 0.0
    assert batch.weights is not None
    real = batch.targets != IGNORE
    losses = []
    for mixer in routed:
        assert mixer.routing is not None
        losses.append(imbalance(mixer.routing, mixer.spec.config.active, real, batch.weights))
    return BALANCE * torch.stack(losses).mean()


def _hidden(model: Any, batch: Batch) -> Tensor:
    """Return the hidden states of the counted positions, `[T, hidden]`."""
    return _at(batch, model.model(**batch.inputs()).last_hidden_state)


def _weights(batch: Batch) -> Tensor:
    """Return how much each counted position counts, `[T]`."""
    assert batch.weights is not None
    return _at(batch, batch.weights)


def _at(batch: Batch, x: Tensor) -> Tensor:
    """Return what stands at the counted positions of `[R, L, ...]`, `[T, ...]`."""
    assert batch.places is not None
    return x.flatten(0, 1).index_select(0, batch.places)


PHASES: dict[str, PhaseFunction] = {"next_token": next_token, "follow": follow, "align": align}
