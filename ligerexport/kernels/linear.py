"""A product with a weight, the norm before it, and the gate or sum after it: its description, and plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS = ("silu", "gelu")
"""Activations of gated units; `gelu` is the approximation with tanh."""


@dataclass(frozen=True)
class LinearSpec:
    """One product `y = f(norm(x) @ weight^T + bias) + residual`.

    Attributes:
        outputs: N, number of elements in a row of the result.
        inputs: K, number of elements in a row of x.
        epsilon: Epsilon of an RMSNorm of x, which must be fp32; None if x is not normed.
        activation: Activation of a gated unit, whose weight has 2 N rows: `activation(first half) * second half`;
            None for no gated unit.
        bias: Whether a bias is added before the activation.
        residual: Whether a residual is added at the end.
        wide: Whether y is fp32; otherwise it has the weight's dtype.
        side: Number of outputs of a second product of the normed x, whose weight, bias and result are fp32; 0 for none.
        coded: Whether the weight is codes of 8 bits around 128, each row with a scale in fp32; all that has 16 bits is
            fp16 then.
        indexed: Whether there is no product, but x is the ids `[M, 1]` of the rows of the weight `[K, N]` that are y.
    """

    outputs: int
    inputs: int
    epsilon: float | None = None
    activation: str | None = None
    bias: bool = False
    residual: bool = False
    wide: bool = False
    side: int = 0
    coded: bool = False
    indexed: bool = False

    def of_side(self) -> LinearSpec:
        """Return the second product."""
        return LinearSpec(self.side, self.inputs, self.epsilon, bias=True, wide=True)


def linear(
    x: Tensor, weight: Tensor, norm: Tensor | None, bias: Tensor | None, residual: Tensor | None, spec: LinearSpec
) -> Tensor:
    """Compute `spec` without its side product in plain torch, in fp32 for 16-bit types.

    Args:
        x: `[M, K]`; fp32 if it is normed, otherwise of the weight's dtype.
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
