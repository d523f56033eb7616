"""The fit of `recall`: its score and costs against dense attention, planted heads, and how bytes are shared out."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from ligerexport.checkpoint.calibrate import FIRST, score_names
from ligerexport.checkpoint.costs import Seen, _layer_costs, text_costs, weigh
from ligerexport.checkpoint.passages import REQUEST, Reader, passages
from ligerexport.checkpoint.recall import Effort, fit_memory
from ligerexport.checkpoint.shares import OPTIONS, head_bytes, share_out, usual_bytes, words
from ligerexport.checkpoint.watch import watched
from ligerexport.errors import UsageError
from ligerexport.model.families import FAMILIES
from ligerexport.text.tokenizer import TextModel
from tests import toy
from tests.test_calibrate import transformer

SINKS, LENGTH = 4, 200


@pytest.fixture
def text(tmp_path: Path) -> TextModel:
    """A tokenizer with one token per byte and BOS in front."""
    toy.tokenizer().save(str(tmp_path / "tokenizer.json"))
    return TextModel(tmp_path)


PASSAGES = [f"{i} gulls came by, and {i * i} went." for i in range(90)]


def reader(text: TextModel, longest: int = 256) -> Reader:
    return Reader(text, [PASSAGES], longest, seed=3)


def dense(model: Any, ids: Tensor, first: int) -> dict[int, tuple[Tensor, ...]]:
    """Return for each layer its input, weights of attention `[H_q, T, T]`, values, output and the output's gradient."""
    found: dict[int, tuple[Tensor, ...]] = {}

    def attend(layer: int, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, sliding: int | None) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        place = torch.arange(q.shape[2])
        distance = place[:, None] - place
        unseen = (distance < 0) | (distance >= (sliding or len(place)))
        weights = (q @ k.mT).masked_fill(unseen, -torch.inf).softmax(-1)
        output = (weights @ v).transpose(1, 2)
        found[layer] = (hidden[0], weights[0], v[0], output)
        return output

    embedded = model.get_input_embeddings()(ids[None]).requires_grad_(True)
    with watched(model, attend):
        logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
    loss = functional.cross_entropy(logits, ids[1:], reduction="none")[first - 1 :].sum()
    gradients = torch.autograd.grad(loss, [layer[3] for layer in found.values()])
    return {
        layer: (*(x.detach() for x in parts), gradient[0])
        for (layer, parts), gradient in zip(found.items(), gradients, strict=True)
    }


def visible(score: Tensor, window: int, slots: int) -> Tensor:
    """Return which columns each row sees: sinks, window, and the best of those that have left the window."""
    seen, scores = torch.zeros(len(score), len(score), dtype=torch.bool), score.tolist()
    for row in range(len(score)):
        left = range(SINKS, max(SINKS, row - window + 1))
        best = sorted(left, key=lambda column: -scores[column])[:slots]
        seen[row, [*range(min(SINKS, row + 1)), *range(max(0, row - window + 1), row + 1), *best]] = True
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_costs_are_those_of_dense_attention(family: str) -> None:
    model = transformer(family).requires_grad_(False)
    ids, first = torch.randint(0, model.config.vocab_size, (LENGTH,)), 70
    kv_heads, layers = model.config.num_key_value_heads, range(model.config.num_hidden_layers)
    maps = {layer: (torch.randn(kv_heads, model.config.hidden_size), torch.randn(kv_heads)) for layer in layers}
    costs = text_costs(model, ids, first, maps, SINKS)
    assert costs.keys() == set(layers)
    for layer, (entering, weights, value, output, gradient) in dense(model, ids, first).items():
        scores = functional.linear(entering, *maps[layer])
        for head, option in itertools.product(range(kv_heads), (0, 1, 8, 14)):
            left = weights * visible(scores[:, head], *OPTIONS[option])
            bounded = ((left / left.sum(-1, keepdim=True)) @ value).transpose(0, 1)
            change = (gradient * (bounded - output[0])).unflatten(1, (kv_heads, -1))[:, head].sum((1, 2))
            expected = change.double().square().sum().item()
            assert costs[layer][head, option].item() == pytest.approx(
                expected, rel=1e-3, abs=1e-6 * costs[layer].max().item()
            )


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "phi3"])
def test_the_score_is_fitted_to_what_a_repetition_attends_to(family: str, text: TextModel) -> None:
    model = transformer(family, vocab_size=toy.VOCAB)
    effort = Effort(repeated=3, tokens=100, prose=1, prose_tokens=180, asked=1, asked_tokens=80)
    found = fit_memory(model, reader(text), (0, 2), sinks=SINKS, effort=effort)
    again = fit_memory(model, reader(text), (0, 2), sinks=SINKS, effort=effort)
    source = reader(text)
    readings = [source.read(100, repeat=True) for _ in range(3)]
    assert found.costs == again.costs and found.costs.keys() == {0, 2}
    assert found.fit.tensors.keys() == {name for layer in (0, 2) for name in score_names(layer)}
    for layer in (0, 2):
        rows: list[tuple[Tensor, Tensor]] = []
        for reading in readings:
            entering, weights, *_ = dense(model, torch.tensor(reading.ids), 1)[layer]
            peak = weights[:, reading.first :, : reading.context].amax(1).unflatten(0, (2, 2)).amax(1)
            rows.append((entering[FIRST : reading.context], (peak[:, FIRST:] + 1e-3).log().T))
        x, y = (torch.cat(parts).double() for parts in zip(*rows, strict=True))
        names = score_names(layer)
        error = functional.linear(x, *(found.fit.tensors[name].double() for name in names)) - y
        assert (error.mean(0).abs() < 1e-4).all()
        centred = x - x.mean(0)
        ridge = 1e-4 * centred.square().mean() * found.fit.tensors[names[0]].double().T
        assert (centred.T @ error / len(x) + ridge).abs().max() < 1e-5 * y.abs().max()  # the normal equations
        assert all(torch.equal(found.fit.tensors[name], again.fit.tensors[name]) for name in names)


def test_each_head_gets_the_memory_that_it_uses() -> None:
    length, width = 900, 32
    torch.manual_seed(0)
    marked = torch.arange(20, length, 30)  # one head reads these wherever they are, the other the last few tokens
    key = 0.1 * torch.randn(2, length, width)
    key[0, marked, 0] = 9.0
    turns = torch.arange(length) * 0.05
    key[1, :, 0], key[1, :, 1] = 30 * turns.cos(), 30 * turns.sin()
    query = torch.zeros(2, length, width)
    query[0, :, 0] = 1.0
    query[1] = key[1]
    entering = torch.zeros(length, 1)
    entering[marked] = 1.0
    value, gradient = torch.randn(2, length, width), torch.randn(length, 2, width)
    seen = Seen(entering, query, key, value, None, torch.empty(0))
    cost = weigh([(1.0, {0: _layer_costs(seen, gradient, (torch.ones(2, 1), torch.zeros(2)), SINKS)})])[0]
    nbytes = [head_bytes(SINKS, *option, 2 * width) for option in OPTIONS]
    copying, looking_back = (OPTIONS[option] for option in share_out(cost.tolist(), nbytes, nbytes[1] + nbytes[7]))
    assert copying == (16, 64) and looking_back == (16, 0)


def costs_at(cost: list[list[float]], nbytes: list[int], total: int) -> float:
    chosen = share_out(cost, nbytes, total)
    assert sum(nbytes[option] for option in chosen) <= total
    return sum(row[option] for row, option in zip(cost, chosen, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_more_bytes_never_cost_more(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    nbytes = [head_bytes(SINKS, *option, 128) for option in OPTIONS]
    cost = torch.rand(5, len(OPTIONS), generator=generator).square().tolist()
    totals = range(5 * min(nbytes), 3 * max(nbytes), 7919)
    found = [costs_at(cost, nbytes, total) for total in totals]
    assert found == sorted(found, reverse=True) and found[0] > found[-1]
    assert found[-1] == pytest.approx(sum(map(min, cost)))  # enough for the best of every head


def test_shares_are_optimal_where_gains_shrink() -> None:
    cost = [[8.0, 4.0, 2.0, 1.0], [3.0, 2.0, 1.5, 1.4], [9.0, 2.0, 1.9, 1.8]]
    nbytes = [10, 20, 30, 40]
    for total in range(30, 121, 10):
        fitting = [
            sum(row[i] for row, i in zip(cost, each, strict=True))
            for each in itertools.product(range(4), repeat=3)
            if sum(nbytes[i] for i in each) <= total
        ]
        assert costs_at(cost, nbytes, total) == min(fitting)
    with pytest.raises(UsageError, match="29 bytes of state, but the smallest memory of 3 KV heads takes 30") as caught:
        share_out(cost, nbytes, 29)
    assert caught.value.hint == "--state-bytes 30"


def test_sizes_in_words_and_bytes() -> None:
    assert words([(16, 0), (256, 64)]) == "16 256+64"
    assert head_bytes(4, 16, 0, 128) == 20 * (64 + 64 + 2 + 2 + 4)
    assert head_bytes(4, 16, 64, 128) == 84 * (64 + 64 + 2 + 2 + 4 + 4)
    assert usual_bytes(90, 128) == 8_000_000


def test_what_is_read(text: TextModel) -> None:
    assert passages(["one\n\n\ntwo\n\nQuestion: who?\nAnswer: me", "x" * 9000]) == [
        "one", "two", "x" * 4000, "x" * 4000, "x" * 1000,
    ]  # fmt: skip
    source = Reader(text, [["from the package"], ["of the user"]], 256, seed=0)
    reading = source.read(1000, repeat=True)
    said, again = text.decode(reading.ids[: reading.context]), text.decode(reading.ids[reading.first :])
    assert len(reading.ids) in (255, 256) and reading.ids[0] == toy.BOS
    assert said == again and said.startswith("from the package\n\nfrom") and REQUEST in text.decode(reading.ids)
    prose = source.read(50, repeat=False)
    assert len(prose.ids) == prose.context == 51 and prose.first == 1
    assert text.decode(prose.ids).startswith("of the user\n\n")
    with pytest.raises(UsageError, match="texts of 64 tokens, too few") as caught:
        reader(text, 64)
    assert caught.value.hint is not None and "--no-fit" in caught.value.hint
