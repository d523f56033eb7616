"""The losses: pure functions of activations, summed over positions so that the parts of a batch add up.

Logits are computed for one chunk of positions at a time, forward and backward, so `[T, V]` never exists as a whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ligerexport.kernels.memories import choose
from ligerexport.train.estimate import LOGIT_CHUNK

Head = Callable[[Tensor], Tensor]
"""Function from hidden states `[t, hidden]` to logits `[t, V]`."""


def next_token_loss(hidden: Tensor, head: Head, targets: Tensor, weights: Tensor, chunk: int = LOGIT_CHUNK) -> Tensor:
    """Return the weighted sum of the negative log likelihoods of the targets, in nats.

    Args:
        hidden: Hidden states `[T, hidden]`.
        head: The output projection.
        targets: Token ids `[T]`.
        weights: Weight of each position `[T]`.
        chunk: Number of positions at a time.
    """

    def part(hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        return (functional.cross_entropy(head(hidden).float(), targets, reduction="none") * weights).sum()

    return _sum_chunks(part, chunk, hidden, targets, weights)


def divergence(
    hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head, weights: Tensor, chunk: int = LOGIT_CHUNK
) -> Tensor:
    """Return the weighted sum of KL(teacher || student) over the full vocabulary, in nats, computed in fp32.

    Args:
        hidden: The student's hidden states `[T, hidden]`.
        head: The student's output projection.
        teacher: The teacher's hidden states `[T, hidden']`, which get no gradient.
        teacher_head: The teacher's output projection.
        weights: Weight of each position `[T]`.
        chunk: Number of positions at a time.
    """

    def part(hidden: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
        with torch.no_grad():
            expected = functional.log_softmax(teacher_head(teacher).float(), dim=-1)
        found = functional.log_softmax(head(hidden).float(), dim=-1)
        return (functional.kl_div(found, expected, reduction="none", log_target=True).sum(-1) * weights).sum()

    return _sum_chunks(part, chunk, hidden, teacher, weights)


def relative_error(output: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over rows of the weighted relative squared error times the sum of the row's weights.

    A row is never split between processes or micro-batches, so the sums add up. The error is relative to the whole row,
    so a token with an output near zero weighs no more than others.

    Args:
        output: Output `[R, L, hidden]`.
        target: Expected output `[R, L, hidden]`.
        weights: How much each position counts, `[R, L]`.
    """
    kept = weights[..., None]
    target = target.float()
    error = (output.float() - target).square().mul(kept).sum(dim=(1, 2))
    scale = target.square().mul(kept).sum(dim=(1, 2))
    return (error / scale.clamp_min(torch.finfo(torch.float32).tiny) * weights.sum(dim=1)).sum()


def imbalance(logits: Tensor, active: int, real: Tensor, weights: Tensor) -> Tensor:
    """Return the sum over rows of how unevenly a router uses the memories, times the sum of the row's weights.

    For one head it is M times the sum over memories of the share of all choices and the mean probability (Switch
    Transformers, arXiv 2101.03961, equation 4), minus 1: 0 if all are used alike, at most M / active - 1. A row is
    never split between processes or micro-batches, so the sums add up.

    Args:
        logits: Logits of the memories `[R, L, H_kv, M]`.
        active: Number of memories that a token uses.
        real: Which positions hold tokens, `[R, L]` bool.
        weights: How much each position counts in the loss, `[R, L]`.
    """
    shares = (real / real.sum(dim=1, keepdim=True).clamp_min(1))[..., None, None]
    chosen, _ = choose(logits, active)
    used = (chosen[..., :-1] * shares).sum(dim=1) / active  # [R, H_kv, M]
    probable = (logits.softmax(dim=-1) * shares).sum(dim=1)
    uneven = logits.shape[-1] * (used * probable).sum(dim=-1).mean(dim=-1) - 1
    return (uneven * weights.sum(dim=1)).sum().float()


def _sum_chunks(part: Callable[..., Tensor], chunk: int, *tensors: Tensor) -> Tensor:
    total = tensors[0].new_zeros((), dtype=torch.float32) + 0.0 * tensors[0].sum()  # zero gradient if nothing counts
    for pieces in zip(*(x.split(chunk) for x in tensors), strict=True):
        if len(pieces[0]):
            total = total + checkpoint(part, *pieces, use_reentrant=False)
    return total
