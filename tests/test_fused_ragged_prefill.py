"""Level 1: prompts over ragged slots in Triton kernels alone against plain torch: output, and state bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from test_fused_ragged_step import (
    CONFIGS,
    DEVICE,
    SOFTMAX,
    assert_same,
    error,
    make_inputs,
    make_rotary,
    make_spec,
    prefilled,
    to_device,
)

from ligerexport.kernels.fused.ragged_prefill import ragged_prefill
from ligerexport.kernels.ops import liger_mixer
from tests.tolerances import FUSED_FP32


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "float16"])
def test_prompts_equal_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences, one of which begins with padding, with slots that are full, empty and unordered."""
    monkeypatch.setattr("ligerexport.model.state._room", lambda count, least: count)  # the interpreter is slow
    spec, position = make_spec(CONFIGS[name], (3, 3), 16, 8), torch.tensor([11, -4])
    state = prefilled(spec, position - 11, 11)
    *heads, score = make_inputs(spec, 2, 15)
    expected, expected_state = liger_mixer(*heads, position, state, spec, make_rotary(spec), score)
    given = [x.to(DEVICE) for x in (*heads, score, position)]
    found, found_state = ragged_prefill(*given, to_device(state, spec), spec, make_rotary(spec).to(DEVICE))
    assert not found[1, :4].any(), "padding"
    expected[1, :4] = 0  # torch leaves there what nobody reads
    assert error(found, expected) <= FUSED_FP32
    assert found_state.keys() == expected_state.keys()
    assert_same(found_state, expected_state, spec)
    assert found_state["slot_position"].dtype == torch.int32


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_size(dtype: torch.dtype) -> None:
    """Against the kernels between which torch gathers the slots, with heads of very different sizes."""
    config = replace(
        SOFTMAX, sinks=4, heads=("16 256+384 1024+2048",), state_dtype="int8", attention_weight=1.0
    )  # fmt: skip
    spec = replace(make_spec(config, (9, 3), 64, 64), max_distance=4000)
    rotary, position = make_rotary(spec).to(DEVICE), torch.tensor([0, -9], device=DEVICE)
    expected_state = state = spec.initial_state(2, dtype, DEVICE)
    for length in (3000, 700, 65):
        *heads, score = (x.to(DEVICE) for x in make_inputs(spec, 2, length, dtype))
        heads = [x.to(dtype) for x in heads]
        expected, expected_state = liger_mixer(*heads, position, expected_state, spec, rotary, score)
        found, state = ragged_prefill(*heads, score, position, state, spec, rotary)
        assert torch.equal(found, expected), length
        assert_same(state, expected_state, spec)
        position = position + length
