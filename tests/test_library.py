"""The operators of `torch.library`: schemas, shapes without data, gradients, `torch.compile` and `torch.export`."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.library.mixer_step import CHANGED, mixer_step
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.scores import SCORES
from ligerexport.model.state import MixerSpec, MixerState
from tests.tolerances import FUSED_FP32, OP_FP32

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
EVERYTHING = LigerConfig(
    window=8, sinks=2, slots=tuple((name, 2 + i) for i, name in enumerate(SCORES) if name != "learned"),
    recurrence_weight=0.3,
)  # fmt: skip
CONFIGS = {
    "liger": replace(PRESETS["liger"].config, window=8),
    "sinks": PRESETS["sinks"].config,
    "all": EVERYTHING,
    "foresight": replace(EVERYTHING, slots=(("recent_use", 3), ("learned", 4))),
    "gsa": LigerConfig(window=8, sinks=2, gate="gsa:4"),
    "mlstm": LigerConfig(window=8, sinks=2, gate="mlstm"),
    "evicted": replace(
        EVERYTHING, attention_weight=1.0, recurrence_weight=1.0, recurrence="evicted", recurrence_distance=6
    ),
}
STEPPING = [name for name, config in CONFIGS.items() if config.fuses]
OPS = torch.ops.ligerexport


def foreseen(value: Tensor) -> Tensor:
    """Return learned scores for `value` `[..., d_v]`."""
    return -value.float().norm(dim=-1)


class Layer(nn.Module):
    """A mixer without projections, d_k != d_v and H_q != H_kv."""

    def __init__(self, config: LigerConfig, device: str):
        super().__init__()
        self.spec = MixerSpec(config, 4, 2, 32, 16, 32**-0.5, 512)
        self.rotary = rotary_table(10.0 ** (-torch.arange(16, device=device) / 16), 512, BLOCK)

    def inputs(self, batch: int, length: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        shapes = ((4, 32), (2, 32), (2, 16))
        return [torch.randn(batch, length, h, d, dtype=dtype, device=self.rotary.device) for h, d in shapes]

    def state(self, batch: int) -> MixerState:
        return self.spec.initial_state(batch, torch.float32, self.rotary.device)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, position: Tensor, state: MixerState
    ) -> tuple[Tensor, MixerState]:
        return liger_mixer(q, k, v, position, state, self.spec, self.rotary, foreseen(v))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_operators_are_registered_as_they_behave(name: str, device: str) -> None:
    """`opcheck` compares schema, mutation, fake shapes and autograd registration with a run."""
    layer = Layer(CONFIGS[name], device)
    q, k, v = (x.requires_grad_() for x in layer.inputs(2, 70))
    state, position = layer.state(2), torch.tensor([0, 5], device=device)
    slots = [state[n] for n in ("slot_key", "slot_value", "slot_position", "slot_score") if n in state]
    arrival = torch.rand(2, 70, 2, device=device)
    text = layer.spec.text
    # plain torch stands in for the backward operator on the CPU, which the tracer of `opcheck` cannot look into
    some = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        OPS.memory_attention.default, (q, k, v, arrival, position, slots, layer.rotary, text), test_utils=some
    )
    arguments = (q, k, v, None, torch.randn(2, 2, 32, 16, device=device), None, "gla", 1.0)
    torch.library.opcheck(OPS.linear_attention.default, arguments, test_utils=some)
    judge = torch.rand(2, 2, 32, 17, device=device)
    torch.library.opcheck(OPS.recall_error.default, (k.detach(), v.detach(), position, judge))
    write, keys = torch.rand(2, 70, 2, 32, device=device).requires_grad_(), torch.rand(2, 2, 32, 32, device=device)
    torch.library.opcheck(OPS.row_logits.default, (q, k, write, -write.detach(), keys), test_utils=some)
    if not layer.spec.config.fuses:
        return
    one = [x[:, 0].detach() for x in (q, k, v)]
    tensors = [state[n].clone() if n in state else None for n in CHANGED]
    torch.library.opcheck(
        OPS.mixer_step.default, (*one, position, *tensors, layer.rotary, None, foreseen(one[2]), text)
    )


@pytest.mark.parametrize("used", ["output", "state", "both"])
@pytest.mark.parametrize("initial", [False, True])
def test_the_direct_call_has_the_gradients_of_plain_torch(
    used: str, initial: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing watches, the kernels are called without the registry of operators."""
    module = sys.modules[linear_attention.__module__]
    shapes = ((1, 70, 4, 16), (1, 70, 2, 16), (1, 70, 2, 24), (1, 2, 16, 24))
    inputs = [torch.randn(shape) for shape in shapes[: 3 + initial]]
    results = []
    for fused in (False, True):
        monkeypatch.setattr(module, "fused", lambda x, fused=fused: fused)
        leaves = [x.clone().requires_grad_() for x in inputs]
        state = leaves[3] if initial else None
        found = linear_attention(*leaves[:3], gate="gla", initial_state=state)
        assert ("_Direct" in type(found[0].grad_fn).__name__) == fused
        loss = sum(
            x.square().sum() for x, name in zip(found, ("output", "state"), strict=True) if used in (name, "both")
        )
        wanted = leaves if used != "state" else leaves[1:]  # the state does not depend on the query
        results.append([x.detach() for x in (*found, *torch.autograd.grad(loss, wanted))])
    for plain, direct in zip(*results, strict=True):
        assert (direct - plain).norm() <= FUSED_FP32 * plain.norm()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_equals_eager(name: str, device: str) -> None:
    torch._dynamo.reset()  # it compiles a function eight times at most, and with a GPU there are more settings
    layer = Layer(CONFIGS[name], device)
    inputs, position = layer.inputs(2, 70), torch.tensor([0, 5], device=device)
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        output, state = call(*leaves, position, layer.state(2))
        results.append([output.detach(), *state.values(), *torch.autograd.grad(output.square().sum(), leaves)])
    for compiled, eager in zip(*results, strict=True):
        assert torch.equal(compiled, eager)


@pytest.mark.parametrize("device", DEVICES)
def test_exported_graph_holds_one_operator_for_each_part(device: str) -> None:
    layer = Layer(EVERYTHING, device)
    arguments = (*layer.inputs(2, 70), torch.tensor([0, 5], device=device), layer.state(2))
    with torch.no_grad():
        program = torch.export.export(layer, arguments)
        called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert {f"ligerexport.{n}.default" for n in ("linear_attention", "memory_attention", "recall_error")} <= called
        output, state = program.module()(*arguments)
        expected, expected_state = layer(*arguments)
    assert torch.equal(output, expected)
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", STEPPING)
def test_step_in_place_equals_the_mixer(name: str, device: str) -> None:
    """Pool rows are in another order, one sequence is skipped, and one is still in its padding."""
    layer = Layer(CONFIGS[name], device)
    prompt, position = layer.inputs(4, 90), torch.tensor([0, 3, -95, 7], device=device)
    with torch.no_grad():
        _, state = layer(*prompt, position, layer.state(4))
        one = layer.inputs(4, 1)
        expected, after = layer(*one, position + 90, state)
        index = torch.tensor([2, -1, 0, 1], device=device)
        pools = {key: torch.stack([x[2], x[3], x[0], x[1]]) for key, x in state.items()}
        before = {key: x.clone() for key, x in pools.items()}
        step = [x[:, 0] for x in one]
        score = foreseen(step[2])
        found = mixer_step(*step, position + 90, pools, layer.spec, layer.rotary, index, score)
    assert (found[[0, 3]] - expected[[0, 3], 0]).abs().max() <= OP_FP32
    assert not found[[1, 2]].any()
    for key, x in pools.items():
        assert torch.equal(x[[0, 3]], before[key][[0, 3]])
    for row, sequence in ((2, 0), (1, 3)):
        positions = pools["slot_position"][row].sort(-1).values
        assert torch.equal(positions, after["slot_position"][sequence].sort(-1).values)
        for key in ("recurrent_state", "recurrent_key", "judge_state"):
            if key in pools:
                assert (pools[key][row] - after[key][sequence]).abs().max() <= OP_FP32


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_kernels_equal_plain_torch_in_fp64(name: str) -> None:
    """The whole mixer on the GPU, from a state that has evicted tokens: output, state and gradients."""
    layer = Layer(CONFIGS[name], "cuda")
    prompt, position = layer.inputs(2, 300), torch.tensor([0, -30], device="cuda")
    inputs = layer.inputs(2, 200)
    results = []
    for dtype in (torch.float64, torch.float32):
        table, layer.rotary = layer.rotary, layer.rotary.to(dtype)
        state = layer.spec.initial_state(2, dtype, "cuda")
        with torch.no_grad():
            _, state = layer(*(x.to(dtype) for x in prompt), position, state)
        leaves = [x.to(dtype).requires_grad_() for x in inputs]
        output, state = layer(*leaves, position + 300, state)
        gradients = torch.autograd.grad((output * torch.linspace(-1, 1, 16, device="cuda").to(dtype)).sum(), leaves)
        results.append([output.detach(), *gradients, *state.values()])
        layer.rotary = table
    for exact, found in zip(*results, strict=True):
        assert (found - exact).double().norm() <= FUSED_FP32 * exact.double().norm()


def test_mistakes_are_named() -> None:
    layer = Layer(CONFIGS["foresight"], "cpu")
    with pytest.raises(ValueError, match="no score was given"):
        mixer_step(
            *(x[:, 0] for x in layer.inputs(2, 1)), torch.tensor([0, 5]), layer.state(2), layer.spec, layer.rotary
        )
    strided = {name: torch.stack([x, x], dim=-1)[..., 0] for name, x in layer.state(2).items()}
    with pytest.raises(ValueError, match="slot_key has to be contiguous"):
        mixer_step(
            *(x[:, 0] for x in layer.inputs(2, 1)), torch.tensor([0, 5]), strided, layer.spec, layer.rotary,
            score=torch.zeros(2, 2),
        )  # fmt: skip
    layer = Layer(PRESETS["mom"].config, "cpu")
    with pytest.raises(ValueError, match="no fused step"):
        mixer_step(
            *(x[:, 0] for x in layer.inputs(2, 1)), torch.tensor([0, 5]), layer.state(2), layer.spec, layer.rotary
        )
    q, k, v = torch.zeros(2, 5, 4, 32), torch.zeros(2, 5, 3, 32), torch.zeros(2, 5, 3, 16)
    with pytest.raises(ValueError, match="either decay or gate"):
        linear_attention(q, k, v)
    with pytest.raises(ValueError, match="rows of 'gsa' have keys"):
        linear_attention(q[:, :, :3], k, v, gate="gsa")
    with pytest.raises(ValueError, match="not a multiple"):
        linear_attention(q, k, v, gate="gla")
    with pytest.raises(ValueError, match="do not agree"):
        linear_attention(q, k, v[:, :4], gate="gla")
    with pytest.raises(ValueError, match="does not have the shape of key"):
        linear_attention(q[:, :, :3], k, v, k[:, :, :1])
    with pytest.raises(ValueError, match="batch 1, not 2"):
        linear_attention(q[:, :, :3], k, v, gate="gla", cu_seqlens=torch.tensor([0, 5, 10]))
