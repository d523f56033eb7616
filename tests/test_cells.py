"""Cells of evicted tokens: the loop, cuts, padding, gradients, exactness, the fit, and a whole conversion."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from ligerexport.checkpoint.cells import cluster
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import convert, convert_in_memory, load_model, load_transformer
from ligerexport.checkpoint.fitted import is_fitted
from ligerexport.errors import CheckpointError, UsageError
from ligerexport.exporters.build import build
from ligerexport.kernels.cells import choose_cells
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import LigerConfig
from ligerexport.model.state import CELLS, MixerSpec, MixerState, fade
from tests import toy
from tests.checkpoints import make_transformer
from tests.tolerances import OP_FP64

CELLED = LigerConfig(
    window=8, sinks=2, slots=(("recent_use", 3), ("peak_use", 2)), attention_weight=1.0, recurrence_weight=0.7,
    recurrence="cells", recurrence_distance=6, cells=3,
)  # fmt: skip
WINDOW = replace(CELLED, sinks=0, slots=(), recurrence_weight=1.0)
FREQUENCY = 10.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
CONFIGS = {
    "pools": CELLED,
    "novelty": replace(CELLED, slots=(("novelty", 4),), cells=1),
    "ragged": replace(CELLED, slots=(("learned", 5),), heads=("8+5 3",)),
    "int8": replace(CELLED, heads=("8+3+2 4+1+1",), state_dtype="int8"),
}


def make(config: LigerConfig, length: int, batch: int = 2) -> tuple[MixerSpec, list[Tensor], MixerState, list[Tensor]]:
    """Return a layer, inputs `[B, T, H, d]` and positions, an empty state, and rotary table, scores and router."""
    torch.manual_seed(length)
    spec = MixerSpec(config.for_layer(0), q_heads=4, kv_heads=2, d_k=8, d_v=12, scale=8**-0.5, max_distance=40)
    inputs = [torch.randn(batch, length, heads, d, dtype=torch.float64) * 2 for heads, d in ((4, 8), (2, 8), (2, 12))]
    table = rotary_table(FREQUENCY, 40, BLOCK, torch.float64)
    more = [table, torch.randn(batch, length, 2), torch.randn(2, config.cells, 9)]
    return spec, [*inputs, torch.tensor([0, 3])[:batch]], spec.initial_state(batch, torch.float64), more


def assert_same(found: MixerState, expected: MixerState, spec: MixerSpec) -> None:
    """Compare cells, and the names, types and shapes of all tensors with those that are declared."""
    declared = spec.initial_state(len(found["cell_count"]), torch.float64)
    for state in (found, expected):
        assert {name: (x.dtype, x.shape) for name, x in state.items()} == {
            name: (x.dtype, x.shape) for name, x in declared.items()
        }
    for name in CELLS:
        assert expected[name].abs().max() > 0
        assert torch.allclose(found[name], expected[name], rtol=OP_FP64, atol=OP_FP64), name
    assert torch.equal(found["slot_position"].sort(dim=-1).values, expected["slot_position"].sort(dim=-1).values)


@pytest.mark.parametrize("name", CONFIGS)
def test_blocks_equal_the_loop(name: str) -> None:
    spec, inputs, state, more = make(CONFIGS[name], 70)
    expected, expected_state = liger_mixer_reference(*inputs, state, spec, *more)
    found, found_state = liger_mixer(*inputs, state, spec, *more)
    assert (found - expected).abs().max() <= OP_FP64
    assert_same(found_state, expected_state, spec)
    held, lost = (found_state["slot_position"] >= 0).flatten(1), found_state["cell_count"].flatten(1)
    assert (held.sum(dim=1) + lost.sum(dim=1)).tolist() == [2 * 70] * 2


@pytest.mark.parametrize("config", [WINDOW, replace(WINDOW, recurrence="evicted", cells=8)], ids=lambda c: c.recurrence)
def test_a_layer_without_rotary_embedding_equals_the_loop(config: LigerConfig) -> None:
    spec, inputs, state, (_, score, router) = make(config, 30)
    still = rotary_table(FREQUENCY * 0, 40, BLOCK, torch.float64)
    expected, _ = liger_mixer_reference(*inputs, state, spec, still, score, router)
    found, _ = liger_mixer(*inputs, state, spec, still, score, router)
    assert (found - expected).abs().max() <= OP_FP64


@pytest.mark.parametrize("name", CONFIGS)
def test_any_cut_and_padding_give_the_same(name: str) -> None:
    spec, (*tensors, position), start, (table, score, router) = make(CONFIGS[name], 150)
    expected, expected_state = liger_mixer(*tensors, position, start, spec, table, score, router)
    state, outputs = start, []
    for first, last in pairwise([0, 1, 2, 30, 31, 94, 149, 150]):
        pieces = [x[:, first:last] for x in tensors]
        output, state = liger_mixer(*pieces, position + first, state, spec, table, score[:, first:last], router)
        outputs.append(output)
    assert (torch.cat(outputs, dim=1) - expected).abs().max() <= OP_FP64
    assert_same(state, expected_state, spec)
    *padded, score = (torch.cat([x[:, :70] * 3, x], dim=1) for x in (*tensors, score))
    found, state = liger_mixer(*padded, torch.tensor([-70, -70]), start, spec, table, score, router)
    alone, alone_state = liger_mixer(*tensors, torch.tensor([0, 0]), start, spec, table, score[:, 70:], router)
    assert (found[:, 70:] - alone).abs().max() <= OP_FP64
    assert_same(state, alone_state, spec)


@pytest.mark.parametrize("name", ["novelty", "int8"])
def test_gradients_equal_those_of_the_loop(name: str) -> None:
    spec, inputs, state, more = make(CONFIGS[name], 66)
    gradients = []
    for mixer in (liger_mixer, liger_mixer_reference):
        leaves = [x.clone().requires_grad_() for x in inputs[:3]]
        output, present = mixer(*leaves, inputs[3], state, spec, *more)
        assert not any(present[name].requires_grad for name in CELLS)
        output.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    for found, expected in zip(*gradients, strict=True):
        assert found.abs().max() > 0 and (found - expected).abs().max() <= 1e3 * OP_FP64


def test_a_cell_for_each_token_is_the_softmax() -> None:
    length, window = 30, 8
    spec, (q, k, v, position), _, (table, *_) = make(replace(WINDOW, cells=length), length, batch=1)
    k = torch.nn.functional.normalize(k, dim=-1) * 4  # so that no other key has a larger product with a key
    router = torch.nn.functional.pad(k[0].transpose(0, 1), (0, 1))
    found, state = liger_mixer(q, k, v, position, spec.initial_state(1, torch.float64), spec, table, None, router)
    assert state["cell_count"].unique().tolist() == [0, 1]

    slow = torch.pi / 2 >= FREQUENCY * 6
    assert slow.any() and not slow.all()
    there = torch.cat([slow, slow, torch.tensor([True, True])])

    def turned(x: Tensor, angle: Tensor) -> Tensor:
        a, b = x[..., :3], x[..., 3:6]
        return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), x[..., 6:]], dim=-1)

    expected = torch.empty_like(found)
    for t in range(length):
        for h in range(4):
            query, key = q[0, t, h], k[0, : t + 1, h // 2]
            distance = t - torch.arange(t + 1)
            exact = (turned(key, -distance[:, None] * FREQUENCY) * query).sum(dim=-1)
            far = (turned(key, -6 * FREQUENCY) * there * query).sum(dim=-1)
            logits = torch.where(distance < window, exact, far) * spec.scale
            expected[0, t, h] = logits.softmax(dim=-1) @ v[0, : t + 1, h // 2]
    assert (found - expected).abs().max() <= OP_FP64


def test_the_order_of_evicted_tokens_does_not_matter() -> None:
    spec, (q, k, v, position), state, more = make(WINDOW, 40)
    order = torch.cat([torch.randperm(20), torch.arange(20, 40)])
    assert order[:20].tolist() != list(range(20))
    expected, expected_state = liger_mixer(q, k, v, position, state, spec, *more)
    found, found_state = liger_mixer(q, k[:, order], v[:, order], position, state, spec, *more)
    assert (found[:, 27:] - expected[:, 27:]).abs().max() <= OP_FP64
    assert (found[:, 26] - expected[:, 26]).abs().max() > 1e-3  # one of them is still in the window
    assert_same(found_state, expected_state, spec)


def test_halved_sums_are_read_the_same() -> None:
    spec, (*tensors, position), empty, more = make(CELLED, 40)
    louder = replace(spec, config=replace(spec.config, recurrence_weight=0.7 * 2**9))
    _, state = liger_mixer(*tensors, position, empty, spec, *more)
    cells = {name: state[name] for name in CELLS}
    token = [x[:, -1:] for x in tensors]
    expected, _ = liger_mixer(*token, position, empty | cells, spec, *more)
    assert (expected - liger_mixer(*token, position, empty, spec, *more)[0]).abs().max() > 0.1
    faded = fade(empty | cells, 9)
    assert 0 < faded["cell_count"].max() < 1
    found, _ = liger_mixer(*token, position, faded, louder, *more)
    assert (found - expected).abs().max() <= OP_FP64


def test_the_fit_finds_planted_clusters_in_what_queries_see() -> None:
    generator = torch.Generator().manual_seed(0)
    planted = torch.randint(4, (2, 400), generator=generator)
    seen = torch.randn(2, 4, 3, generator=generator, dtype=torch.float64) * 4
    noise = torch.randn(2, 400, 8, generator=generator, dtype=torch.float64)
    keys = torch.cat([seen[torch.arange(2)[:, None], planted] + noise[..., :3] * 0.1, noise[..., 3:] * 50], dim=-1)
    queries = torch.randn(2, 900, 8, generator=generator, dtype=torch.float64)
    queries[..., 3:] = 0  # these channels turn fast
    weight, bias = cluster(keys, queries.mT @ queries, 4)
    assert weight.dtype == bias.dtype == torch.float32 and weight[..., 3:].abs().max() < 1e-3 * weight.abs().max()
    found = choose_cells(keys[None], torch.cat([weight, bias[..., None]], dim=-1))[0].argmax(dim=-1)
    for head in range(2):
        pairs = set(zip(planted[head].tolist(), found[head].tolist(), strict=True))
        assert len(pairs) == 4 == len({cell for _, cell in pairs})


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_conversion_fits_cells_and_is_no_graph_yet(tmp_path: Path, family: str) -> None:
    teacher = make_transformer(tmp_path / "teacher", family, vocab_size=toy.VOCAB, max_position_embeddings=512)
    toy.tokenizer().save(str(teacher / "tokenizer.json"))
    text = tmp_path / "a.txt"
    text.write_text("".join(f"on day {i} the sea was calm and {i * i} gulls came by. " for i in range(200)))
    liger = convert(
        teacher, tmp_path / "liger", preset="evicted", window=12, slots=(("recent_use", 4), ("learned", 4)),
        recurrence="cells", cells=3, calibrate=[text], windows=2,
    )  # fmt: skip
    info = check_checkpoint(liger)
    fitted = {name: tensor for name, tensor in info.tensors.items() if is_fitted(name)}
    layers = 1 if family == "gemma3_text" else 3  # the others keep their own window
    assert len(fitted) == 4 * layers and {tensor.dtype for tensor in fitted.values()} == {"F32"}
    model = load_model(liger, torch.bfloat16)
    mixer = next(layer.self_attn for layer in model.model.layers if layer.self_attn.spec.config.celled)
    assert mixer.cell_proj["weight"].dtype == torch.float32 and mixer.cell_proj["weight"].std() > 0

    model, ids = load_model(liger, torch.float64), torch.randint(toy.VOCAB, (1, 90))
    with torch.no_grad():
        expected, cache = model(ids, use_cache=False).logits, LigerCache(model.config)
        parts = [model(piece, cache=cache, use_cache=True).logits for piece in ids.split([60, *[1] * 30], dim=1)]
        assert (torch.cat(parts, dim=1) - expected).abs().max() <= 1e-4  # norms compute in fp32
        bounds = torch.tensor([0, 40, 90])
        packed = model(ids, use_cache=False, position_ids=torch.arange(90)[None], cu_seq_lens_q=bounds,
                       cu_seq_lens_k=bounds, max_length_q=50, max_length_k=50).logits  # fmt: skip
        assert (packed[:, 40:] - model(ids[:, 40:], use_cache=False).logits).abs().max() <= 1e-4
    counts = torch.stack([layer.state["cell_count"] for layer in cache.layers if "cell_count" in layer.state])
    assert (counts.sum(dim=-1) == 90 - 24).all() and (counts > 0).sum(dim=-1).max() > 1
    with pytest.raises(CheckpointError, match="cells, which no target supports yet"):
        build(liger, tmp_path / "engine")

    plain = convert(liger, tmp_path / "plain", preset="sinks")  # leaves out what was fitted
    assert not any(is_fitted(name) for name in check_checkpoint(plain).tensors)
    with pytest.raises(UsageError, match="cells with the preset recall"):
        convert(plain, tmp_path / "other", preset="recall", recurrence="cells", recurrence_weight=1.0)
    with pytest.raises(UsageError, match="router of cells of plain has to be fitted first"):
        convert(plain, tmp_path / "other", preset="sinks", recurrence="cells", recurrence_weight=1.0)
    softmax = load_transformer(teacher, check_checkpoint(teacher).config, torch.float32)
    with pytest.raises(UsageError, match=r"needs model\.layers\.\d\.self_attn\.cell_proj"):
        convert_in_memory(softmax, replace(WINDOW, keep_window=mixer.spec.config.keep_window))


def test_only_conversions_with_cells_write_their_number() -> None:
    assert "cells" not in LigerConfig().to_dict() and LigerConfig.from_dict(CELLED.to_dict()) == CELLED
    assert not CELLED.fuses and not replace(CELLED, recurrence_weight=0.0).celled


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"cells": 0}, "0 cells"),
        ({"cells": 2.0}, "cells 2.0"),
        ({"recurrence": "evicted"}, "3 cells, but the recurrence is 'evicted'"),
        ({"attention_weight": 0.5}, "attention weight 0.5"),
        ({"gate": "hgrn2"}, "gate 'hgrn2'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes: dict[str, object], named: str) -> None:
    with pytest.raises(UsageError, match=named):
        replace(CELLED, **changes)  # type: ignore[arg-type]
