"""Level 1: linear attention with Triton kernels against a loop in fp64: outputs, states, gradients, strong gates."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ligerexport.kernels.fused import linear_attention as fused
from ligerexport.kernels.fused import recall_error as fused_recall_error
from ligerexport.kernels.linear_attention import apply_gate
from ligerexport.kernels.linear_attention import recall_error as plain_recall_error
from ligerexport.model.gates import get_gate
from tests.tolerances import FUSED_BF16, FUSED_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("query", "key", "value", "decay", "initial state")


@dataclass(frozen=True)
class Case:
    """One call. `gate` None gives the decay; `strong` puts outliers of -100 and 100 into keys and decay."""

    length: int
    gate: str | None = None
    batch: int = 1
    heads: int = 1
    group: int = 1
    d_k: int = 32
    d_v: int = 48
    strong: bool = False
    bounds: tuple[int, ...] | None = None
    initial: bool = True
    dtype: torch.dtype = torch.float32

    def inputs(self) -> tuple[list[Tensor | None], Tensor | None]:
        """Return query, key, value, decay, initial state, and the bounds of packed sequences."""

        def randn(*shape: int) -> Tensor:
            # a slice of something wider: strides that no one may assume away
            return torch.randn(*shape[:-1], shape[-1] + 8, device=DEVICE)[..., :-8]

        q = randn(self.batch, self.length, self.heads * self.group, self.d_k)
        k, v = (randn(self.batch, self.length, self.heads, d) for d in (self.d_k, self.d_v))
        g = None if self.gate else torch.nn.functional.logsigmoid(randn(*k.shape))
        if self.strong:
            k[..., 3], k[..., 5] = -100.0, 100.0
            if g is not None:
                g[..., 3] -= 100.0
                g[..., 4] -= 8.0
                g[:, self.length // 3, :, 7] = -1e4
        sequences = self.batch if self.bounds is None else len(self.bounds) - 1
        state = randn(sequences, self.heads, self.d_k, self.d_v) if self.initial else None
        bounds = None if self.bounds is None else torch.tensor(self.bounds, device=DEVICE)
        q, k, v = (x.to(self.dtype) for x in (q, k, v))
        return [q, k, v, g, state], bounds


def loop(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, bounds: Tensor | None, gate: str | None,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Run the recurrence token by token."""
    if bounds is not None:
        outputs, states = [], []
        for n, (start, end) in enumerate(pairwise(bounds.tolist())):
            piece = (None if x is None else x[:, start:end] for x in (q, k, v, g))
            output, final = loop(*piece, None if state is None else state[n : n + 1], None, gate, scale)  # type: ignore[arg-type]
            outputs.append(output)
            states.append(final)
        return torch.cat(outputs, dim=1), torch.cat(states)
    if gate is not None:
        q, k, g = apply_gate(q, k, get_gate(gate))
    assert g is not None
    if state is None:
        state = k.new_zeros(k.shape[0], k.shape[2], k.shape[3], v.shape[3])
    q = q.unflatten(2, (k.shape[2], -1)) * scale
    outputs = [v.new_zeros(q.shape[0], 0, *q.shape[2:4], v.shape[3])]
    for t in range(k.shape[1]):
        state = g[:, t, :, :, None].exp() * state + k[:, t, :, :, None] * v[:, t, :, None]
        outputs.append((q[:, t] @ state)[:, None])
    return torch.cat(outputs, dim=1).flatten(2, 3), state


class _Fused(torch.autograd.Function):
    """The kernels without dispatch, so that the interpreter runs them on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output, final, states = fused.forward(*arguments)
        ctx.arguments = arguments[:5], states, *arguments[5:]
        return output, final

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return *fused.backward(*gradients, *ctx.arguments), None, None, None


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error; infinity if any value is NaN."""
    if not found.isfinite().all():
        return float("inf")
    return ((found.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


CASES = [
    *(Case(length, gate, heads=2, d_k=40, d_v=24) for gate in (None, "gla", "hgrn2") for length in (1, 7, 65)),
    *(Case(50, gate, heads=2, d_k=40, d_v=25) for gate in ("hgrn2:0.3", "mamba2", "gated_retention")),
    Case(20, "rwkv6", strong=True),
    Case(63, initial=False),
    Case(64, "gla", batch=2, group=3),
    Case(150, batch=2, group=2),
    Case(150, "gla", group=4, d_v=32),
    Case(70, strong=True),
    Case(70, "hgrn2", strong=True, group=2),
    Case(150, "gla", bounds=(0, 3, 3, 80, 150), group=2),
    Case(100, bounds=(0, 100), initial=False, strong=True),
]
if DEVICE == "cuda":
    wide = [
        Case(length, gate, 2, 2, group, d_k, d_v, strong, dtype=dtype)
        for gate in (None, "gla", "hgrn2", "hgrn2:0.3", "mamba2", "rwkv6")
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for length, group, d_k, d_v, strong in (
            (1000, 1, 128, 128, False), (777, 4, 64, 64, False), (300, 8, 128, 64, True), (200, 3, 100, 60, True),
            (130, 2, 256, 256, False), (130, 1, 80, 200, True), (63, 7, 64, 96, False),
        )
    ]  # fmt: skip
    CASES += [*wide, Case(4096, "gla", 1, 8, 4, 128, 128, dtype=torch.bfloat16)]
    CASES += [Case(3000, None, 1, 2, 2, 64, 64, bounds=(0, 1, 1, 700, 1400, 2999, 3000), dtype=torch.bfloat16)]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_loop(case: Case) -> None:
    inputs, bounds = case.inputs()
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    found = _Fused.apply(*leaves, bounds, case.gate, 0.7)
    gradients = [torch.randn(*x.shape, 2, dtype=x.dtype, device=DEVICE)[..., 0] for x in found]  # with strides, too
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    expected = loop(*exact, bounds, case.gate, 0.7)  # type: ignore[arg-type]
    limit = FUSED_FP32 if case.dtype == torch.float32 else FUSED_BF16
    assert error(found[0].detach(), expected[0]) < limit
    assert error(found[1].detach(), expected[1]) < limit
    wanted = [x for x in leaves if x is not None]
    ours = torch.autograd.grad(found, wanted, gradients)
    truth = torch.autograd.grad(expected, [x for x in exact if x is not None], [x.double() for x in gradients])
    names = [name for name, x in zip(NAMES, leaves, strict=True) if x is not None]
    for name, mine, true in zip(names, ours, truth, strict=True):
        assert error(mine, true) < limit, name


@pytest.mark.parametrize(
    "case", [Case(70, "gla", group=2), Case(70, strong=True), Case(70, bounds=(0, 0, 70))], ids=str
)
def test_reads_nothing_that_was_not_written(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Poison memory that is allocated without values."""
    inputs, bounds = case.inputs()
    expected = fused.forward(*inputs, bounds, case.gate, 1.0)

    def poisoned(make: Any) -> Any:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            x = make(*arguments, **options)
            return x.fill_(float("nan") if x.is_floating_point() else -(2**30))

        return empty

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
    output, final, states = fused.forward(*inputs, bounds, case.gate, 1.0)
    assert torch.equal(output, expected[0]) and torch.equal(final, expected[1])
    gradients = torch.randn_like(output), torch.randn_like(final)
    found = fused.backward(*gradients, inputs, states, bounds, case.gate, 1.0)
    assert all(x.isfinite().all() for x in found if x is not None)


def test_any_cut_gives_the_same() -> None:
    case = Case(150, "gla", group=2)
    inputs, _ = case.inputs()
    expected, expected_state, _ = fused.forward(*inputs, None, case.gate, 1.0)
    outputs, state = [], inputs[4]
    for start, end in pairwise((0, 1, 2, 30, 94, 149, 150)):
        piece = (None if x is None else x[:, start:end] for x in inputs[:4])
        output, state, _ = fused.forward(*piece, state, None, case.gate, 1.0)
        outputs.append(output)
    assert error(torch.cat(outputs, dim=1), expected.double()) < FUSED_FP32
    assert error(state, expected_state.double()) < FUSED_FP32


def test_strong_gates_take_the_exact_path() -> None:
    """Without it, the pairs of a strong channel within a chunk would be lost."""
    case = Case(64, strong=True, d_k=32, d_v=32, initial=False)
    (q, k, v, g, _), _ = case.inputs()
    assert q is not None and g is not None
    q = q * (torch.arange(case.d_k, device=DEVICE) == 4)  # nothing but a channel that forgets 8 nats a token
    output, _, _ = fused.forward(q, k, v, g, None, None, None, 1.0)
    expected, _ = loop(q.double(), k.double(), v.double(), g.double(), None, None, None, 1.0)
    assert error(output, expected) < FUSED_FP32


@pytest.mark.parametrize(("batch", "length", "d_k", "d_v"), [(2, 150, 24, 40), (1, 1, 32, 16), (1, 65, 64, 64)])
def test_recall_error_equals_plain_torch(batch: int, length: int, d_k: int, d_v: int) -> None:
    if DEVICE == "cuda":
        length, d_k = 20 * length, 2 * d_k
    k, v = torch.randn(batch, length, 2, d_k, device=DEVICE) * 2, torch.randn(batch, length, 2, d_v, device=DEVICE)
    state = torch.rand(batch, 2, d_k, d_v + 1, device=DEVICE)
    position = torch.tensor([[0, 77], [-20, 77]][:batch], device=DEVICE)[:, 0]
    found, found_state = fused_recall_error.recall_error(k, v, position, state)
    real = (position[:, None] + torch.arange(length, device=DEVICE) >= 0)[:, None, :, None]
    features = torch.softmax(k.double().transpose(1, 2), dim=-1) * real
    expected, expected_state = plain_recall_error(features, v.double().transpose(1, 2), state.double())
    here = real[..., 0].expand(-1, 2, -1)
    assert error(found.transpose(1, 2)[here], expected[here]) < FUSED_FP32
    assert error(found_state, expected_state) < FUSED_FP32
