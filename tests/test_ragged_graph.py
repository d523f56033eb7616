"""The ONNX graph of memories with sizes for each KV head and slots in small types, against torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from test_onnx_graph import CHUNK, INV_FREQ, OUTPUT, STATE, MixerSession, compare_states, foreseen, mixer_graph, projections

from ligerexport.kernels.ops import liger_mixer, rotary_table
from ligerexport.model.config import LigerConfig
from ligerexport.model.state import MixerSpec
from tests.test_ragged import CASES, CONFIGS


@pytest.mark.parametrize(("name", "kind"), CASES)
@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_mixer_is_the_torch_op(lowering: str, name: str, kind: str) -> None:
    """Cut anywhere, one sequence with padding on its left, d_k != d_v, two query heads per key head."""
    config = replace(CONFIGS[name], state_dtype=kind).for_layer(0)
    spec = MixerSpec(config, q_heads=8, kv_heads=4, d_k=16, d_v=24, scale=0.25, max_distance=40)
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(2, 90, heads, 16, generator=generator) * 1.5 for heads in (8, 4))
    value = torch.randn(2, 90, 4, 24, generator=generator)
    session, position, found = MixerSession(mixer_graph(spec, lowering), spec, 2), torch.tensor([0, -9]), []
    for part in torch.arange(90).split([40, 1, 1, 7, 41]):
        found.append(session.run(query[:, part], key[:, part], value[:, part], position + part[0]))
    start, table = spec.initial_state(2, torch.float32), rotary_table(INV_FREQ, 40, CHUNK)
    expected, state = liger_mixer(query, key, value, position, start, spec, table, foreseen(value))
    real = position[:, None] + torch.arange(90) >= 0
    assert (torch.cat(found, dim=1) - expected)[real].abs().max() < OUTPUT
    compare_states(state, session.state, STATE, spec)
