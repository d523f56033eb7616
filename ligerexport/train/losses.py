"""The losses: pure functions of activations, summed over positions so that the parts of a batch add up.

Logits are made a chunk of positions at a time, forward and backward, so `[T, V]` never exists in whole.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ligerexport.train.estimate import LOGIT_CHUNK

Head = Callable[[Tensor], Tensor]
"""From hidden states `[t, hidden]` to logits `[t, V]`."""


def next_token_loss(hidden: Tensor, head: Head, targets: Tensor, chunk: int = LOGIT_CHUNK) -> Tensor:
    """Return the sum of the negative log likelihoods of the targets, in nats.

    Args:
        hidden: `[T, hidden]`.
        head: The output projection.
        targets: `[T]`.
        chunk: Positions at a time.
    """

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return functional.cross_entropy(head(hidden).float(), targets, reduction="sum")

    return _sum_chunks(part, chunk, hidden, targets)


def divergence(hidden: Tensor, head: Head, teacher: Tensor, teacher_head: Head, chunk: int = LOGIT_CHUNK) -> Tensor:
    """Return the sum of KL(teacher || student) over the full vocabulary, in nats, computed in fp32.

    Args:
        hidden: `[T, hidden]` of the student.
        head: Its output projection.
        teacher: `[T, hidden']` of the teacher; no gradient reaches it.
        teacher_head: The teacher's output projection.
        chunk: Positions at a time.
    """

    def part(hidden: Tensor, teacher: Tensor) -> Tensor:
        with torch.no_grad():
            expected = functional.log_softmax(teacher_head(teacher).float(), dim=-1)
        found = functional.log_softmax(head(hidden).float(), dim=-1)
        return functional.kl_div(found, expected, reduction="sum", log_target=True)

    return _sum_chunks(part, chunk, hidden, teacher)


def relative_error(output: Tensor, target: Tensor, counted: Tensor) -> Tensor:
    """Return the squared error relative to the target's square, per row, times the positions that count in the row.

    A row is never cut between processes or micro-batches, so this adds up; and within one, a token with an output near
    zero weighs no more than others.

    Args:
        output: `[R, L, hidden]`.
        target: `[R, L, hidden]`.
        counted: `[R, L]` bool.
    """
    kept = counted[..., None]
    target = target.float()
    error = (output.float() - target).square().mul(kept).sum(dim=(1, 2))
    scale = target.square().mul(kept).sum(dim=(1, 2))
    return (error / scale.clamp_min(torch.finfo(torch.float32).tiny) * counted.sum(dim=1)).sum()


def _sum_chunks(part: Callable[..., Tensor], chunk: int, *tensors: Tensor) -> Tensor:
    total = tensors[0].new_zeros((), dtype=torch.float32) + 0.0 * tensors[0].sum()  # a gradient where nothing counts
    for pieces in zip(*(x.split(chunk) for x in tensors), strict=True):
        if len(pieces[0]):
            total = total + checkpoint(part, *pieces, use_reentrant=False)
    return total
