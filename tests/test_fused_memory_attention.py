"""Level 1: memory attention with Triton kernels against plain torch in fp64: outputs, slots, gradients, any cut."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ligerexport.kernels.fused import attend as attend_module
from ligerexport.kernels.fused import attend_backward as backward_module
from ligerexport.kernels.fused import candidates as candidates_module
from ligerexport.kernels.fused import slots as slots_module
from ligerexport.kernels.fused.memory_attention import Attended, backward, forward
from ligerexport.kernels.fused.slot_scores import complete_scores
from ligerexport.kernels.library.memory_attention import find_lost
from ligerexport.kernels.memory_attention import memory_attention as plain_memory_attention
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.scores import SCORES, get_score
from ligerexport.model.state import MixerSpec, MixerState
from tests.tolerances import FUSED_BF16, FUSED_FP32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16  # the interpreter cannot multiply bf16
SMALL = LigerConfig(window=8, sinks=2)
EVERY_SCORE = replace(SMALL, slots=tuple((name, 2 + i) for i, name in enumerate(SCORES) if name != "learned"))
CONFIGS = {
    "liger": PRESETS["liger"].config,
    "sinks": PRESETS["sinks"].config,
    "memory": PRESETS["memory"].config,
    "every score": EVERY_SCORE,
    "foresight": replace(SMALL, slots=(("recent_use", 3), ("learned", 4), ("peak_use", 2))),
    "window of one": replace(SMALL, window=1, sinks=0, slots=(("novelty", 3),)),
    "wide window": replace(SMALL, window=70, slots=(("use", 3),)),
    **{name: replace(SMALL, slots=((name, 5),)) for name in SCORES},
}


class _Attend(torch.autograd.Function):
    """The fused kernels without dispatch, so that the interpreter runs them on CPU tensors."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor, Attended]:
        q, k, v, arrival, *rest, death = arguments
        attended = forward(q, k, v, arrival, *rest, death)
        ctx.arguments = (q, k, v, *rest), attended
        return attended.output, attended.lse, attended

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        arguments, attended = ctx.arguments
        return *backward(gradients[0], *arguments, attended, gradients[1]), *[None] * 6


def memory_attention(*arguments: Any, death: Tensor | None = None) -> tuple[Tensor, MixerState]:
    """Return a differentiable output, and slots."""
    output, _, attended = _Attend.apply(*arguments, death)
    return output, attended.present


def column(position: tuple[int, ...]) -> Tensor:
    """Return positions as a column of a wider tensor."""
    return torch.tensor(position, device=DEVICE)[:, None].expand(-1, 2).add(torch.tensor([0, 77], device=DEVICE))[:, 0]


@dataclass(frozen=True)
class Case:
    """A layer, a number of tokens, and the positions of the sequences."""

    config: str
    length: int
    position: tuple[int, ...] = (0,)
    group: int = 2
    kv_heads: int = 1
    d_k: int = 32
    d_v: int = 24
    turning: int = 12
    cap: int = 40

    def spec(self) -> MixerSpec:
        config = CONFIGS[self.config]
        cap = max(self.cap, config.window)
        return MixerSpec(config, self.group * self.kv_heads, self.kv_heads, self.d_k, self.d_v, self.d_k**-0.5, cap)

    def inputs(self, dtype: torch.dtype = torch.float32, scale: float = 1.5) -> tuple[list[Tensor], Tensor, Tensor]:
        """Return query, key and value with a standard deviation, learned scores, and positions."""
        spec, batch = self.spec(), len(self.position)
        shapes = ((spec.q_heads, self.d_k), (self.kv_heads, self.d_k), (self.kv_heads, self.d_v))
        # a slice of something wider: strides that no one may assume away
        whole = [torch.randn(batch, self.length, heads, d + 8, device=DEVICE) * scale for heads, d in shapes]
        arrival = torch.rand(batch, self.length, self.kv_heads, device=DEVICE) * (-3 if spec.config.foresees else 1)
        return [x.to(dtype)[..., :-8] for x in whole], arrival, column(self.position)

    def start(self, dtype: torch.dtype = torch.float32) -> MixerState:
        """Return the initial state of the sequences."""
        return self.spec().initial_state(len(self.position), dtype, DEVICE)

    def table(self, dtype: torch.dtype = torch.float32) -> Tensor:
        inv_freq = 10.0 ** (-torch.arange(self.turning, device=DEVICE) / self.turning)
        return rotary_table(inv_freq, self.spec().max_distance, BLOCK, dtype)


CASES = [
    Case("sinks", 7, (0, 3), group=3),
    Case("every score", 1),
    Case("every score", 132, (3,), group=3),
    Case("every score", 130, cap=4000, turning=16),
    Case("memory", 132, cap=4000),
    Case("foresight", 132, (3,)),
    Case("liger", 65, kv_heads=2, group=1, d_v=40),
    Case("window of one", 63),
    Case("wide window", 140, group=1),
    Case("sinks", 64, (300,)),
    *(Case(name, 65, group=1) for name in SCORES),
]
if DEVICE == "cuda":
    CASES += [Case(name, 70, (0, 5), 2, 2, 32, 16, 16, 512) for name in ("liger", "sinks", "every score")]
    CASES += [
        Case(name, length, (0, 900), group, 2, d, d, d // 2, cap)
        for name in CONFIGS
        for length, group, d, cap in ((63, 4, 64, 100), (700, 4, 128, 8192), (1000, 3, 96, 300), (200, 8, 256, 100))
    ]


def plain(
    inputs: list[Tensor], arrival: Tensor, position: Tensor, state: MixerState, spec: MixerSpec, table: Tensor
) -> tuple[Tensor, MixerState, Tensor, Tensor]:
    """Chain plain torch over blocks: output, slots, base-2 normalisers `[B, H_q, T]`, positions of the evicted."""
    outputs, normalisers, evicted = [], [], []
    for start in range(0, inputs[0].shape[1], BLOCK):
        q, k, v = (x[:, start : start + BLOCK] for x in inputs)
        q = q.unflatten(2, (spec.kv_heads, -1)).permute(0, 2, 3, 1, 4)
        fresh = arrival[:, start : start + BLOCK].transpose(1, 2)
        output, state, normaliser, lost = plain_memory_attention(
            q, k.transpose(1, 2), v.transpose(1, 2), fresh, position + start, state, spec, table
        )
        outputs.append(output.permute(0, 3, 1, 2, 4).flatten(2, 3))
        normalisers.append(normaliser.flatten(1, 2) / math.log(2))
        evicted.append(lost)
    return torch.cat(outputs, dim=1), state, torch.cat(normalisers, dim=2), torch.cat(evicted, dim=2)


def real(position: Tensor, length: int) -> Tensor:
    """Return 1 for tokens and 0 for padding, `[B, T, 1, 1]`."""
    return (position[:, None] + torch.arange(length, device=DEVICE) >= 0)[..., None, None].double()


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error."""
    assert found.isfinite().all()
    return ((found.double() - expected).norm() / expected.norm()).item()


def assert_states_equal(found: MixerState, expected: MixerState, tolerance: float = FUSED_FP32) -> None:
    """Compare the meaning of states, with exact slots; empty slots may have any content."""
    filled = expected["slot_position"] >= 0
    assert torch.equal(found["slot_position"], expected["slot_position"])
    for name in ("slot_key", "slot_value"):
        assert torch.equal(found[name][filled].double(), expected[name][filled].double()), name
    if "slot_score" in expected:
        full = filled[:, :, None].expand_as(expected["slot_score"])
        assert (found["slot_score"] - expected["slot_score"])[full].abs().max() <= tolerance * max(
            1.0, expected["slot_score"][full].abs().max().item()
        )


@pytest.fixture(autouse=True)
def _small_blocks_of_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make short sequences on the CPU leave the window in several blocks."""
    if DEVICE == "cpu":
        monkeypatch.setattr(slots_module, "EVENTS", 64)


def compare(case: Case) -> None:
    """Compare output, normalisers, slots, the evicted and gradients in fp32 with plain torch in fp64."""
    spec = case.spec()
    inputs, arrival, position = case.inputs()
    exact = [x.double().requires_grad_() for x in inputs]
    leaves = [x.requires_grad_() for x in inputs]
    start, table = case.start(torch.float64), case.table(torch.float64)
    expected, expected_state, expected_log, expected_lost = plain(exact, arrival.double(), position, start, spec, table)
    found, log, attended = _Attend.apply(*leaves, arrival, position, case.start(), spec, case.table(), None)
    mask = real(position, case.length)
    assert error(found * mask, expected * mask) <= FUSED_FP32
    there = mask[:, None, :, 0, 0] > 0
    assert error(torch.where(there, log, 0.0), torch.where(there, expected_log, 0.0)) <= FUSED_FP32
    assert_states_equal(attended.present, expected_state)
    lost = find_lost(attended.death, position, start["slot_position"]).transpose(1, 2)
    index = spec.config.num_slots + expected_lost - position[:, None, None]  # no slot was filled at the start
    assert torch.equal(lost, index.where(expected_lost >= 0, -1))
    weight, other = torch.randn_like(expected) * mask, torch.randn_like(expected_log)
    wanted = torch.autograd.grad(
        (expected * weight).sum() + (expected_log * other)[there.expand_as(other)].sum(), exact
    )
    gradients = torch.autograd.grad((found * weight).sum() + (log * other)[there.expand_as(other)].sum(), leaves)
    for gradient, true in zip(gradients, wanted, strict=True):
        assert gradient.dtype == torch.float32
        assert error(gradient, true) <= FUSED_FP32 or true.norm() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_plain_torch(case: Case) -> None:
    compare(case)


def test_padding_on_the_left() -> None:
    compare(Case("every score", 110, (-70, -3)))


def test_nothing_is_read_before_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (candidates_module, slots_module, attend_module, backward_module):
        monkeypatch.setattr(module, "torch", _Poisoning())
    monkeypatch.setattr(Tensor, "new_empty", lambda x, *size, **options: _poison(x.new_zeros(*size, **options)))
    compare(Case("every score", 330, (-3,), group=1))


class _Poisoning:
    """The torch module with poisoned values in empty tensors."""

    def __getattr__(self, name: str) -> object:
        if name not in ("empty", "empty_like"):
            return getattr(torch, name)
        return lambda *size, **options: _poison(getattr(torch, name)(*size, **options))


def _poison(x: Tensor) -> Tensor:
    return x.fill_(float("nan") if x.is_floating_point() else 2**31 - 5)


def test_cut_anywhere_and_slots_in_any_order() -> None:
    case = Case("every score", 100, (0,), 1) if DEVICE == "cpu" else Case("every score", 150, (0, 30))
    spec, table = case.spec(), case.table()
    inputs, arrival, position = case.inputs()
    expected, expected_state = memory_attention(*inputs, arrival, position, case.start(), spec, table)
    state, outputs = case.start(), []
    for start, end in pairwise([0, 1, 70, 100] if DEVICE == "cpu" else [0, 1, 2, 30, 31, 94, 149, 150]):
        piece = [x[:, start:end] for x in (*inputs, arrival)]
        output, state = memory_attention(*piece, position + start, state, spec, table)
        outputs.append(output)
        order = torch.randperm(spec.config.num_slots, device=DEVICE)
        shuffled = {
            name: x[..., order] if name in ("slot_position", "slot_score") else x[:, :, order]
            for name, x in state.items()
        }
        last, state = state, shuffled
    assert error(torch.cat(outputs, dim=1), expected.double()) <= FUSED_FP32
    assert_states_equal(last, expected_state)


def test_half_precision_with_the_same_memory() -> None:
    """Rounded scores may keep other tokens, so both sides get the decisions of one memory."""
    sizes = [("every score", 140, 2, 32, 24, 12, 40)]
    if DEVICE == "cuda":
        wide, far = (700, 4, 128, 128, 64, 8192), (700, 4, 64, 64, 32, 300)
        sizes = [(name, *size) for name in ("every score", "memory", "sinks") for size in (wide, far)]
    for name, length, group, d_k, d_v, turning, cap in sizes:
        case = Case(name, length, (50,), group, 1, d_k, d_v, turning, cap)
        spec = case.spec()
        # Of unit variance: rounding the turned queries and keys errs in proportion to the logits, and at 1.5 this alone
        # takes the gradients to the tolerance.
        inputs, arrival, position = case.inputs(HALF, scale=1.0)
        exact = [x.double().requires_grad_() for x in inputs]
        wide = [x.float() for x in inputs]
        found = candidates_module.gather_candidates(*wide, arrival, position, case.start(), spec, case.table())
        complete_scores(found)
        death = slots_module.deaths(found)
        start, table = case.start(torch.float64), case.table(torch.float64)
        expected, *_ = plain(exact, arrival.double(), position, start, spec, table)
        leaves = [x.requires_grad_() for x in inputs]
        output, _ = memory_attention(*leaves, arrival, position, case.start(HALF), spec, case.table(), death=death)
        assert output.dtype == HALF
        assert error(output, expected) <= FUSED_BF16
        weight = torch.randn_like(output)
        gradients = torch.autograd.grad((output * weight).sum(), leaves)
        wanted = torch.autograd.grad((expected * weight.double()).sum(), exact)
        for gradient, true in zip(gradients, wanted, strict=True):
            assert gradient.dtype == HALF
            assert error(gradient, true) <= FUSED_BF16


@pytest.mark.parametrize(
    "pools",
    [
        (("novelty", 1),),
        (("recent_use", 7), ("peak_use", 5), ("novelty", 30)),
        (("use", 140), ("novelty", 3)),
    ],
)
def test_deaths_equal_a_loop_over_the_tokens(
    pools: tuple[tuple[str, int], ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores with many ties, so that age decides; the largest pool is merged by segments."""
    monkeypatch.setattr(slots_module, "LONG", 256)
    monkeypatch.setattr(slots_module, "SEGMENT", 2)
    config, length, heads = LigerConfig(window=5, sinks=3, slots=pools), 300 if DEVICE == "cpu" else 3000, 1
    spec = MixerSpec(config, heads, heads, 32, 32, 1.0, 64)
    inputs = [torch.zeros(1, length, heads, 32, device=DEVICE) for _ in range(3)]
    state = spec.initial_state(1, torch.float32, DEVICE)
    zero, table = torch.zeros(1, dtype=torch.int64, device=DEVICE), rotary_table(torch.ones(16, device=DEVICE), 64, 64)
    found = candidates_module.gather_candidates(
        *inputs, torch.zeros(1, length, heads, device=DEVICE), zero, state, spec, table
    )
    found.score.copy_(torch.randint(0, 40, found.score.shape, device=DEVICE) / 8.0)
    death = slots_module.deaths(found)[0, 0, config.num_slots :].tolist()
    scores = found.score[0, 0, :, config.num_slots :].cpu()
    ranks = []
    for i, (name, _) in enumerate(pools):
        horizon = get_score(name).horizon
        rank = scores[i]
        if horizon is not None:
            rank = rank.clamp_min(1e-30).log() + torch.arange(length) / horizon
        ranks.append(rank.tolist())
    held: list[list[int]] = [[] for _ in pools]
    for now in range(length):
        moving: int | None = now - config.window
        if now < config.window + config.sinks:
            continue
        for i, (_, size) in enumerate(pools):
            if moving is None:
                break
            held[i] = sorted([*held[i], moving], key=lambda t, i=i: (-ranks[i][t], t))
            moving = held[i].pop() if len(held[i]) > size else None
        if moving is not None:
            assert death[moving] == now
    assert all(death[t] >= length for pool in held for t in pool)


@pytest.mark.skipif(DEVICE == "cpu", reason="one thread is deterministic")
def test_runs_are_bitwise_equal() -> None:
    case = Case("memory", 1000, (0,), 4, 2, 64, 64, 32, 300)
    results = []
    inputs, arrival, position = case.inputs(HALF)
    for _ in range(2):
        leaves = [x.detach().requires_grad_() for x in inputs]
        output, _ = memory_attention(*leaves, arrival, position, case.start(HALF), case.spec(), case.table())
        results.append([output, *torch.autograd.grad(output.float().square().sum(), leaves)])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)
