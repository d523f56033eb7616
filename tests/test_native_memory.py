"""The C++ operator of ragged memories: its rounding, heads that many threads read, and states from elsewhere."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pytest
import torch
from test_onnx_graph import CHUNK, OUTPUT, STATE, MixerSession, compare_states, foreseen, mixer_graph, session_options
from test_ragged import SOFTMAX

from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.kernels.ragged import store
from ligerexport.model.state import MixerSpec

LARGE = replace(SOFTMAX, sinks=4, heads=("16+2048 300 512+64",))
INV_FREQ = 1 / (100 ** (torch.arange(32) / 32))


def layer(state_dtype: str, heads: str, d: int = 64, group: int = 3) -> MixerSpec:
    config = replace(LARGE, heads=(heads,), state_dtype=state_dtype)
    count = len(heads.split())
    return MixerSpec(config, q_heads=group * count, kv_heads=count, d_k=d, d_v=d, scale=d**-0.5, max_distance=1000)


@pytest.mark.parametrize("state_dtype", ["float16", "int8"])
def test_rounding_is_that_of_torch(state_dtype: str) -> None:
    """Bit for bit: numbers of all sizes, halves of a step, zeros, and numbers beyond the range of fp16."""
    spec = layer(state_dtype, "90", d=20)
    x = torch.randn(2, 1, 80, 1, 20, generator=torch.Generator().manual_seed(0)) * torch.logspace(-9, 6, 80).view(
        -1, 1, 1
    )
    x[:, :, 0] = 0
    x[:, :, 1] = torch.arange(20).view(1, 1, 1, 20) / 2 + 117.5  # the largest is 127, so a step is 1
    x[:, :, 2] = torch.arange(20).view(1, 1, 1, 20) * 2.0**-25  # halves of the smallest number of fp16
    x[:, :, 3] = torch.tensor([1.0, -1.0]).repeat(10) * 1e6
    session = MixerSession(mixer_graph(spec, "native", INV_FREQ[:8]), spec, 1)
    session.run(torch.zeros(1, 80, 3, 20), x[0], x[1], torch.tensor([0]))
    order = session.state["slot_position"][0].argsort()[-80:]
    for name, given in zip(("slot_key", "slot_value"), x[:, 0, :, 0], strict=True):
        expected = store(given, state_dtype)
        np.testing.assert_array_equal(session.state[name][0, order], expected.codes.numpy())
        if expected.scale is not None:
            np.testing.assert_array_equal(session.state[f"{name}_scale"][0, order], expected.scale.numpy())


@pytest.mark.parametrize("state_dtype", ["activation", "int8"])
def test_large_heads_are_divided_among_threads(state_dtype: str) -> None:
    """Full slots, distances beyond the largest, and the same bits with any number of threads."""
    spec, start = layer(state_dtype, *LARGE.heads), 2400
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, start + 50, heads, 64, generator=generator) for heads in (9, 3, 3))
    inputs, table = (query, key, value), rotary_table(INV_FREQ, spec.max_distance, max(BLOCK, CHUNK))

    def torch_op(part: slice, state: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        pieces = [x[:, part] for x in inputs]
        return liger_mixer(*pieces, torch.tensor([part.start]), state, spec, table, foreseen(pieces[2]))

    _, state = torch_op(slice(0, start), spec.initial_state(1, torch.float32))
    model, results = mixer_graph(spec, "native", INV_FREQ), []
    for threads in (1, 3):
        options = session_options()
        options.intra_op_num_threads = threads
        session = MixerSession(model, spec, 1)
        session.session = onnxruntime.InferenceSession(model.SerializeToString(), options)
        session.state = {name: x.numpy() for name, x in state.items()}
        parts = [slice(start, start + 1), slice(start + 1, start + 48), slice(start + 48, start + 50)]
        results.append([session.run(*(x[:, p] for x in inputs), torch.tensor([p.start])) for p in parts])
    for one, three in zip(*results, strict=True):
        assert torch.equal(one, three)
    expected, after = torch_op(slice(start, start + 50), state)
    assert (torch.cat(results[0], dim=1) - expected).abs().max() < OUTPUT
    assert int((after["slot_position"] >= 0).sum()) == sum(spec.slots_per_head)
    compare_states(after, session.state, STATE, spec)


@pytest.mark.parametrize(("moved", "start"), [(5, 40), (-1, 40), (0, 2**31 - 1)])
def test_a_state_that_no_text_leaves_is_refused(moved: int, start: int) -> None:
    """Future positions, a window that ends too early, and positions that 32 bits cannot count."""
    spec = layer("int8", "8+5 3")
    session = MixerSession(mixer_graph(spec, "native", INV_FREQ), spec, 1)
    query, key = torch.ones(1, 40, 6, 64), torch.ones(1, 40, 2, 64)
    session.run(query, key, key, torch.tensor([0]))
    session.state["slot_position"] += moved
    with pytest.raises(Exception, match="no text leaves"):
        session.run(query, key, key, torch.tensor([start]))
