"""Memories with sizes for each KV head and slots in small types: the loop, cuts, padding, gradients, bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ligerexport.checkpoint.convert import convert, load_model
from ligerexport.errors import UsageError
from ligerexport.kernels import ragged
from ligerexport.kernels.library import memory_attention as library
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.kernels.ragged import store
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.layers.mixer import LigerCache, LigerLayer
from ligerexport.model import state as model_state
from ligerexport.model.config import STATE_DTYPES, LigerConfig
from ligerexport.model.state import MixerSpec, MixerState
from tests.checkpoints import make_checkpoint, make_transformer
from tests.tolerances import FUSED_BF16, FUSED_FP32, OP_FP64

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SOFTMAX = LigerConfig(window=8, sinks=2, slots=(("learned", 5),), attention_weight=1.0, recurrence_weight=0.0)
TWO_POOLS = (("recent_use", 3), ("novelty", 2))
CONFIGS = {
    "four sizes": replace(SOFTMAX, heads=("3 8+5 1+12 20",)),
    "two of a size, apart": replace(SOFTMAX, heads=("8+5 3 8+5 3",), sinks=0),
    "equal heads": replace(SOFTMAX, heads=("8+5 8+5 8+5 8+5",)),
    "no slots": replace(SOFTMAX, heads=("3 4 5 4",)),
    "two pools": replace(SOFTMAX, slots=TWO_POOLS, heads=("8+3+2 4+1+1 4+1+1 6+1+9",)),
    "with a recurrence": replace(
        SOFTMAX, heads=("8+5 3 8+5 3",), gate="hgrn2", attention_weight=0.7, recurrence_weight=0.3
    ),
    "evicted": replace(
        SOFTMAX, heads=("8+5 3 6+5 3",), recurrence="evicted", recurrence_weight=0.9, recurrence_distance=6
    ),
    "equal heads, no words": SOFTMAX,
}
CASES = [(name, kind) for name in CONFIGS for kind in STATE_DTYPES if CONFIGS[name].heads or kind != "activation"]


def make(name: str, state_dtype: str, length: int) -> tuple[MixerSpec, list[Tensor], MixerState, Tensor, Tensor]:
    """Return a layer of four KV heads, inputs `[B, T, H, d]` and positions, state, rotary table and scores."""
    torch.manual_seed(len(name) + length)
    config = replace(CONFIGS[name], state_dtype=state_dtype).for_layer(0)
    spec = MixerSpec(config, q_heads=8, kv_heads=4, d_k=8, d_v=12, scale=8**-0.5, max_distance=40)
    inputs = [torch.randn(2, length, heads, d, dtype=torch.float64) * 2 for heads, d in ((8, 8), (4, 8), (4, 12))]
    table = rotary_table(10.0 ** (-torch.arange(3) / 3), 40, BLOCK, torch.float64)
    score = -inputs[2].norm(dim=-1)
    return spec, [*inputs, torch.tensor([0, 3])], spec.initial_state(2, torch.float64), table, score


def meaning(state: MixerState, spec: MixerSpec) -> MixerState:
    """Return a state in fp64 with zeros in empty slots, which may hold anything."""
    full = state["slot_position"] >= 0
    heads = zip(full.split(spec.slots_per_head, dim=1), spec.heads, strict=True)
    scored = torch.cat([full[:, :0], *(part for part, head in heads if head.config.slots)], dim=1)
    masks = {"slot_score": scored[:, None], "slot_key": full[..., None], "slot_value": full[..., None]}
    slots = [name for name in state if name.startswith("slot_")]
    return {name: x.double() * masks.get(name, full) if name in slots else x for name, x in state.items()}


def assert_same(found: MixerState, expected: MixerState, spec: MixerSpec) -> None:
    """Compare the meaning of two states, and their names, types and shapes with those that are declared."""
    assert list(found) == list(expected) == [tensor.name for tensor in spec.state()]
    for name, x in spec.initial_state(2, torch.float64).items():
        assert found[name].dtype == expected[name].dtype == x.dtype and found[name].shape == x.shape, name
    for name, x in meaning(found, spec).items():
        assert torch.allclose(x, meaning(expected, spec)[name], rtol=OP_FP64, atol=OP_FP64), name


@pytest.mark.parametrize(("name", "state_dtype"), CASES)
def test_groups_of_heads_equal_the_loop(name: str, state_dtype: str) -> None:
    spec, inputs, state, table, score = make(
        name, state_dtype, 66 if (name, state_dtype) == ("four sizes", "int8") else 26
    )
    expected, expected_state = liger_mixer_reference(*inputs, state, spec, table, score)
    found, found_state = liger_mixer(*inputs, state, spec, table, score)
    assert (found - expected).abs().max() <= OP_FP64
    assert_same(found_state, expected_state, spec)


@pytest.mark.parametrize(("name", "state_dtype"), CASES)
def test_any_cut_and_padding_give_the_same(name: str, state_dtype: str) -> None:
    spec, (q, k, v, position), state, table, score = make(name, state_dtype, 150)
    expected, expected_state = liger_mixer(q, k, v, position, state, spec, table, score)
    start, outputs = state, []
    for first, last in pairwise([0, 1, 2, 30, 31, 94, 149, 150]):
        pieces = [x[:, first:last] for x in (q, k, v)]
        output, state = liger_mixer(*pieces, position + first, state, spec, table, score[:, first:last])
        outputs.append(output)
    assert (torch.cat(outputs, dim=1) - expected).abs().max() <= OP_FP64
    assert_same(state, expected_state, spec)
    padded = [torch.cat([x[:, :70] * 3, x], dim=1) for x in (q, k, v, score)]
    found, state = liger_mixer(*padded[:3], torch.tensor([-70, -70]), start, spec, table, padded[3])
    alone, alone_state = liger_mixer(q, k, v, torch.tensor([0, 0]), start, spec, table, score)
    assert (found[:, 70:] - alone).abs().max() <= OP_FP64
    assert_same(state, alone_state, spec)


@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_gradients_equal_those_of_the_loop(state_dtype: str) -> None:
    spec, inputs, state, table, score = make("four sizes", state_dtype, 24)
    gradients = []
    for mixer in (liger_mixer, liger_mixer_reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs[:3]]
        output, _ = mixer(*leaves, inputs[3], state, spec, table, score)
        output.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for found, expected in zip(*gradients, strict=True):
        assert found.abs().max() > 0 and (found - expected).abs().max() <= 100 * OP_FP64


def fused_against_plain(
    spec: MixerSpec, length: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch
) -> dict[str, float]:
    """Return relative root mean square errors of the Triton kernels against plain torch in fp64."""
    torch.manual_seed(0)
    widths = ((spec.q_heads, spec.d_k), (spec.kv_heads, spec.d_k), (spec.kv_heads, spec.d_v))
    inputs = [torch.randn(2, length, heads, d, device=device).to(dtype) for heads, d in widths]
    position = torch.tensor([0, -3], device=device)
    score = torch.randn(2, length, spec.kv_heads, device=device)
    upward = torch.randn(2, length, spec.q_heads, spec.d_v, device=device)
    cells = spec.kv_heads, spec.config.cells, spec.d_k + 1
    router = torch.randn(cells, device=device) if spec.config.celled else None
    inv_freq = 10000.0 ** (-torch.arange(spec.d_k // 2, device=device) / (spec.d_k // 2))
    results = []
    for kernels, kind in ((True, dtype), (False, torch.float64)):
        for module in (library, ragged):
            monkeypatch.setattr(module, "fused", lambda x, kernels=kernels: kernels)
        table = rotary_table(
            inv_freq, spec.max_distance, BLOCK, torch.float64 if kind == torch.float64 else torch.float32
        )
        leaves = [x.to(kind).detach().requires_grad_() for x in inputs]
        state, outputs = spec.initial_state(2, kind, device), []
        for first, last in pairwise([0, length - length // 3, length - 1, length]):
            pieces = [x[:, first:last] for x in leaves]
            output, state = liger_mixer(*pieces, position + first, state, spec, table, score[:, first:last], router)
            outputs.append(output)
        mixed = torch.cat(outputs, dim=1)[:, 3:]  # padding may be anything
        (mixed * upward[:, 3:]).sum().backward()
        results.append({"output": mixed.detach(), **dict(zip("qkv", (x.grad for x in leaves), strict=True))})
        results[-1] |= {"positions": state["slot_position"]}
    found, expected = results
    assert torch.equal(found.pop("positions"), expected.pop("positions"))
    return {name: ((found[name].double() - x).norm() / x.norm()).item() for name, x in expected.items()}


@pytest.mark.parametrize("changes", [{"state_dtype": "int8"}, {"recurrence": "cells", "recurrence_weight": 1.0}])
def test_fused_kernels_equal_plain_torch(changes: dict[str, object], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    config = replace(SOFTMAX, heads=("8+5 20+12 30",), **changes)  # type: ignore[arg-type]
    spec = MixerSpec(config, q_heads=6, kv_heads=3, d_k=32, d_v=32, scale=32**-0.5, max_distance=100)
    monkeypatch.setattr(model_state, "_room", lambda count, least: 2 * count)  # a short text shall fill it
    errors = fused_against_plain(spec, 100, torch.float32, DEVICE, monkeypatch)
    assert max(errors.values()) <= FUSED_FP32, errors


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_kernels_at_full_size(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(SOFTMAX, sinks=4, heads=("16 256+384 1024+2048",), state_dtype="int8")
    spec = MixerSpec(config, q_heads=9, kv_heads=3, d_k=64, d_v=64, scale=0.125, max_distance=8192)
    errors = fused_against_plain(spec, 4500, dtype, "cuda", monkeypatch)
    assert max(errors.values()) <= (FUSED_FP32 if dtype == torch.float32 else FUSED_BF16), errors


def test_equal_sizes_in_words_equal_one_size() -> None:
    spec, inputs, state, table, score = make("equal heads", "activation", 70)
    plain = replace(spec, config=SOFTMAX)
    found, after = liger_mixer(*inputs, state, spec, table, score)
    expected, expected_after = liger_mixer(*inputs, plain.initial_state(2, torch.float64), plain, table, score)
    assert torch.equal(found, expected)
    assert torch.equal(after["slot_key"], expected_after["slot_key"].flatten(1, 2))
    assert torch.equal(after["slot_score"], expected_after["slot_score"].transpose(1, 2).flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_eight_bits_err_by_half_a_step_and_keep_their_codes(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = (torch.randn(64, 16) * torch.logspace(-4, 4, 64)[:, None]).to(dtype)
    x[0] = 0
    stored = store(x, "int8")
    assert stored.codes.dtype == torch.int8 and stored.scale is not None and stored.scale.dtype == torch.float16
    step = stored.scale.float()[:, None]
    assert ((stored.read(torch.float32) - x.float()).abs() <= 0.53 * step).all()
    again = store(stored.read(torch.float32), "int8")
    assert torch.equal(again.codes, stored.codes) and torch.equal(again.scale, stored.scale)


def test_sixteen_bits_hold_every_number_as_a_finite_one() -> None:
    stored = store(torch.tensor([1.0, -1e6, 1e6], dtype=torch.bfloat16), "float16")
    assert stored.read(torch.float32).tolist() == [1.0, -65504.0, 65504.0]


def test_the_state_has_no_padding() -> None:
    config = replace(SOFTMAX, heads=("3 8+5 1+12 20",), state_dtype="int8")
    spec = MixerSpec(config, q_heads=8, kv_heads=4, d_k=64, d_v=64, scale=0.125, max_distance=40)
    assert spec.slots_per_head == (5, 15, 15, 22)
    assert sum(tensor.nbytes() for tensor in spec.state()) == (5 + 15 + 15 + 22) * (64 + 64 + 2 + 2 + 4) + (15 + 15) * 4


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"heads": ("8+5 x",)}, "'x'"),
        ({"heads": ("0",)}, "'0'"),
        ({"heads": ("8+5+3",)}, "1 pools"),
        ({"heads": "8+5"}, "heads '8\\+5'"),
        ({"heads": ("8",), "layer_memory": ((0, 8, (("learned", 5),)),)}, "both heads and layer_memory"),
        ({"slots": (("novelty", 2),), "heads": ("8+5 8",)}, "novelty|without slots"),
        ({"state_dtype": "int4"}, "int4"),
    ],
)
def test_sizes_that_make_no_sense_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        replace(SOFTMAX, **changes)  # type: ignore[arg-type]


def test_a_layer_with_other_heads_is_refused() -> None:
    with pytest.raises(UsageError, match="sizes for 2 KV heads"):
        MixerSpec(replace(SOFTMAX, heads=("8 8",)), q_heads=3, kv_heads=3, d_k=8, d_v=8, scale=1.0, max_distance=40)


def test_only_ragged_conversions_write_new_settings() -> None:
    assert not {"heads", "state_dtype"} & SOFTMAX.to_dict().keys()
    ragged = replace(SOFTMAX, heads=("8+5 3", "", "4 4"), state_dtype="int8", keep_softmax=(1,))
    assert LigerConfig.from_dict(ragged.to_dict()) == ragged
    assert ragged.for_layer(2).heads == ("4 4",) and ragged.for_layer(0).heads == ("8+5 3",)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_a_model_steps_as_it_reads_and_is_no_graph_yet(tmp_path: Path, family: str) -> None:
    kept = ("", "6+9 20", "") if family == "gemma3_text" else ("6+9 20", "", "3 12+8")
    liger = replace(
        SOFTMAX, heads=kept, state_dtype="int8", keep_softmax=() if family == "gemma3_text" else (1,), keep_window=None
    )
    path = make_checkpoint(tmp_path / "model", liger, family)
    model = load_model(path, torch.float64)
    ids = torch.randint(131, (2, 60), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        cache = LigerCache(model.config)
        parts = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([33, *[1] * 27], dim=1)]
    assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-4  # norms compute in fp32
    with torch.autocast("cpu", torch.bfloat16):
        assert model.float()(ids).logits.isfinite().all()
    layer = next(layer for layer in cache.layers if isinstance(layer, LigerLayer) and "slot_key_scale" in layer.state)
    assert layer.state["slot_key"].dtype == torch.int8


def test_a_conversion_with_sizes_computes_what_the_transformer_computes(tmp_path: Path) -> None:
    sizes = ("6+9 20", "20 20", "3 12+8")
    weights = load_file(make_checkpoint(tmp_path / "first", replace(SOFTMAX, heads=sizes)) / "model.safetensors")
    scores = tmp_path / "scores.safetensors"
    save_file({name: x for name, x in weights.items() if "score_proj" in name}, scores)
    settings = {"heads": sizes, "state_dtype": "int8", "slots": (("learned", 5),)}
    liger = convert(
        make_transformer(tmp_path / "source"), tmp_path / "liger", preset="foresight", scores=scores, **settings
    )
    assert json.loads((liger / "config.json").read_text())["liger"]["state_dtype"] == "int8"
    assert [tensor.name for tensor in load_model(liger).model.layers[1].self_attn.spec.state()][-1] == "slot_position"
