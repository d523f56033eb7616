"""The recurrence of a keyed gate (gated slot attention): rows of a state that have keys, like slots of a small memory.

A row replaces what it forgets by the new token: it is a running mean of values, and its key is a running mean of keys,
over the tokens that its channel of the gate admits. A query reads the rows by softmax, as it would read tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.library.row_logits import row_logits
from ligerexport.kernels.linear_attention import DECAYS
from ligerexport.model.gates import Gate


def keyed_recurrence(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, keys: Tensor, state: Tensor, gate: Gate
) -> tuple[Tensor, Tensor, Tensor]:
    """Run K_t = exp(g_t) K_{t-1} + (1 - exp(g_t)) k_t^T, V_t likewise, o_t = softmax(K_t q_t) V_t.

    Differentiable in query, key and value. On CUDA the logits are plain torch; V_t is the fused linear attention.

    Args:
        query: `[B, T, H_q, d_k]` as projected.
        key: `[B, T, H_kv, d_k]` as projected. The gate of each of the M rows is computed from the mean of d_k / M
            neighbouring channels of it.
        value: `[B, T, H_kv, d_v]`.
        padding: `[B, T, 1, 1]`, tokens that change nothing.
        keys: K before the first token, `[B, H_kv, M, d_k]`.
        state: V before the first token, `[B, H_kv, M, d_v]`.
        gate: The row of `GATES`.

    Returns:
        Output `[B, T, H_q, d_v]`, K and V after the last token; all in at least fp32.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast(query.device.type, enabled=False):  # sums over thousands of tokens need more than bf16
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        pooled = key.unflatten(-1, (keys.shape[2], -1)).mean(-1)
        decay = DECAYS[gate.decay](pooled, gate.decay_divisor).masked_fill(padding, 0.0)
        write = -torch.expm1(decay)  # 1 - exp(g) would lose what a nearly open gate admits
        logits, keys = row_logits(query, key, write, decay, keys)
        output, state = linear_attention(logits.softmax(dim=-1), write, value, decay, initial_state=state)
    return output, keys, state
