"""What a product with a weight is, with the norm before it and the gate or the sum after it, and the same in torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu")
"""Of gated units; `gelu` is the approximation by tanh."""


@dataclass(frozen=True)
class LinearSpec:
    """One product `y = f(norm(x) @ weight^T + bias) + residual`.

    Attributes:
        outputs: N, rows of the result.
        inputs: K, elements of a row of x.
        epsilon: Of the RMSNorm of x, which is fp32 then; None where x is taken as it is.
        activation: Of a gated unit, whose weight has 2 N rows: `activation(first half) * second half`; None for none.
        bias: Whether something is added before the activation.
        residual: Whether something is added in the end.
        wide: Whether y is fp32; it has the type of the weight else.
        side: Outputs of a second product of the same norm of x, whose weight, bias and result are fp32; 0 for none.
    """

    outputs: int
    inputs: int
    epsilon: float | None = None
    activation: str | None = None
    bias: bool = False
    residual: bool = False
    wide: bool = False
    side: int = 0

    def of_side(self) -> LinearSpec:
        """Return the second product."""
        return LinearSpec(self.side, self.inputs, self.epsilon, bias=True, wide=True)


def linear(
    x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: LinearSpec
) -> Tensor:
    """Compute `spec` but for its side in plain torch, in fp32 for halves.

    Args:
        x: `[M, K]`; fp32 where it is normed, of the weight's type else.
        weight: `[N, K]`, or `[2 N, K]` of a gated unit.
        norm: `[K]`, the norm's weight.
        bias: `[N]` or `[2 N]`.
        residual: `[M, N]` fp32.
        spec: What is computed.

    Returns:
        `[M, N]`.
    """
    kind = torch.float64 if weight.dtype == torch.float64 else torch.float32
    y = x.to(kind)
    if spec.epsilon is not None:
        assert norm is not None
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + spec.epsilon) * norm
    y = y @ weight.to(kind).T
    if bias is not None:
        y = y + bias
    if spec.activation is not None:
        gate, up = y.chunk(2, -1)
        y = (F.silu(gate) if spec.activation == "silu" else F.gelu(gate, approximate="tanh")) * up
    if residual is not None:
        y = y + residual
    return y if spec.wide else y.to(weight.dtype)
