"""`torch.ops.ligerexport.row_logits`: products of queries with the keys of a state's rows, always in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ligerexport.kernels.linear_attention import row_logits as plain_row_logits


@torch.library.custom_op("ligerexport::row_logits", mutates_args=())
def row_logits(query: Tensor, key: Tensor, write: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Run S_t = exp(g_t) S_{t-1} + w_t k_t^T, o_t = S_t q_t; all tensors of one dtype, fp32 or fp64.

    Args:
        query: `[B, T, H_q, d_k]`; H_q is a multiple of H_kv, and the heads of a group share one state.
        key: `[B, T, H_kv, d_k]`.
        write: `[B, T, H_kv, M]`, the share of the token's key that each of M rows takes.
        decay: `[B, T, H_kv, M]`, g in nats per token, at most 0.
        state: `[B, H_kv, M, d_k]`.

    Returns:
        Logits `[B, T, H_q, M]` and the final state. Both are differentiable; the backward pass computes
        everything again, so that no layer keeps tensors of size (tokens) x (tokens per chunk) x (rows).
    """
    return _plain(query, key, write, decay, state)


def _plain(query: Tensor, key: Tensor, write: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    q = query.unflatten(2, (key.shape[2], -1)).permute(0, 2, 3, 1, 4)
    k, w, g = (x.transpose(1, 2) for x in (key, write, decay))
    logits, state = plain_row_logits(q, k, w, g, state)
    return logits.permute(0, 3, 1, 2, 4).flatten(2, 3).contiguous(), state


@row_logits.register_fake
def _(query: Tensor, key: Tensor, write: Tensor, decay: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], write.shape[3]), torch.empty_like(state)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, d_logits: Tensor, d_final: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        again = _plain(*leaves)
    return torch.autograd.grad(again, leaves, (d_logits, d_final))


row_logits.register_autograd(_differentiate, setup_context=_save)
