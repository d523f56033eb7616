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

from ligerexport.kernels import ragged
from ligerexport.kernels.fused import slots
from ligerexport.kernels.library import ragged_prefill as library
from ligerexport.kernels.ops import liger_mixer
from tests.tolerances import FUSED_BF16, FUSED_FP32

CASES = CONFIGS | {"windows": replace(SOFTMAX, slots=(), heads=("3 20 1",), sinks=0, state_dtype="int8")}


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("float16", "no scores")])
def test_prompts_equal_plain_torch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two sequences, one of which begins with padding, with slots that are full, empty and unordered."""
    monkeypatch.setattr("ligerexport.model.state._room", lambda count, least: count)  # the interpreter is slow
    for constant, size in (("EVENTS", 16), ("LONG", 16), ("SEGMENT", 2)):  # several segments in a short call
        monkeypatch.setattr(slots, constant, size)
    spec, position = make_spec(CASES[name], (3, 3), 16, 8), torch.tensor([11, -4])
    state = prefilled(spec, position - 11, 11)
    *heads, score = make_inputs(spec, 2, 15)
    score = score if spec.config.foresees else None
    expected, expected_state = liger_mixer(*heads, position, state, spec, make_rotary(spec), score)
    monkeypatch.setattr(library, "fused", lambda x: True)
    query, key, value = (x.to(DEVICE) for x in heads)
    rest = position.to(DEVICE), to_device(state, spec), spec, make_rotary(spec).to(DEVICE)
    assert library.serves(query, key, value, spec)
    assert not library.serves(query, key.clone().requires_grad_(), value, spec), "the kernels have no gradient"
    found, found_state = liger_mixer(query, key, value, *rest, None if score is None else score.to(DEVICE))
    assert not found[1, :4].any(), "padding"
    expected[1, :4] = 0  # torch leaves there what nobody reads
    assert error(found, expected) <= FUSED_FP32
    assert found_state.keys() == expected_state.keys()
    assert_same(found_state, expected_state, spec)
    made = library._ragged_prefill(
        *(x.to("meta") for x in (query, key, value, rest[0])), [x.to("meta") for x in found_state.values()],
        rest[3].to("meta"), None, spec.text,
    )  # fmt: skip
    for x, fake in zip((found, *found_state.values()), made, strict=True):
        assert x.shape == fake.shape and x.dtype == fake.dtype


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_full_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the kernels in fp32 between which torch gathers the slots, with heads of very different sizes.

    The first call is longer than the largest rotary distance.
    """
    config = replace(
        SOFTMAX, sinks=4, heads=("16 256+384 1024+2048",), state_dtype="int8", attention_weight=1.0
    )  # fmt: skip
    spec = replace(make_spec(config, (9, 3), 64, 64), max_distance=2500)
    rotary, position = make_rotary(spec).to(DEVICE), torch.tensor([0, -9], device=DEVICE)
    expected_state = state = spec.initial_state(2, dtype, DEVICE)
    for length in (3000, 700, 65):
        *heads, score = (x.to(DEVICE) for x in make_inputs(spec, 2, length, dtype))
        found, state = liger_mixer(*(x.to(dtype) for x in heads), position, state, spec, rotary, score)
        with monkeypatch.context() as patch:
            patch.setattr(ragged, "serves", lambda *args: False)
            expected, expected_state = liger_mixer(*heads, position, expected_state, spec, rotary, score)
        if dtype == torch.float32:
            assert torch.equal(found, expected), length
        assert error(found, expected.cpu()) <= FUSED_BF16, length
        assert_same(state, expected_state, spec)
        position = position + length
