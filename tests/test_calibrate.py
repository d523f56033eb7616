"""The learned score: the fit against attention that transformers computes, and the text for the fit."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ligerexport.checkpoint.calibrate import FIRST, Sums, drills, fit_scores, score_names
from ligerexport.checkpoint.watch import watched
from ligerexport.errors import UsageError
from ligerexport.model.families import FAMILIES, get_family
from ligerexport.text.tokenizer import TextModel
from tests import toy
from tests.checkpoints import OF_FAMILY, SIZES

WINDOW, LENGTH = 12, 160  # longer than a block of queries


def transformer(family: str, **sizes: Any) -> Any:
    row = get_family(family)
    config = row.attribute("Config")(**SIZES | OF_FAMILY.get(family, {}) | {"max_position_embeddings": 256} | sizes)
    model = row.attribute("ForCausalLM")(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def expected(model: Any, ids: Tensor, ridge: float) -> list[tuple[Tensor, Tensor]]:
    """Return weight and bias of each layer, solved directly: all attention at once, ridge as rows of least squares."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        seen = model(ids, output_attentions=True, output_hidden_states=True)
    model.set_attn_implementation("sdpa")
    place = torch.arange(ids.shape[1])
    far = place[:, None] - place > WINDOW
    found = []
    for layer, hidden, weights in zip(model.model.layers, seen.hidden_states, seen.attentions, strict=False):
        with torch.no_grad():
            entering = getattr(layer, "input_layernorm", torch.nn.Identity())(hidden)
            x = entering[:, FIRST : LENGTH * 3 // 4].flatten(0, 1).double()
        peak = (weights * far).amax(2).unflatten(1, (2, 2)).amax(2).transpose(1, 2)  # [B, T, H_kv]
        y = (peak[:, FIRST : LENGTH * 3 // 4].flatten(0, 1) + 1e-3).log().double()
        centred = x - x.mean(0)
        extra = (ridge * centred.square().mean() * len(x)) ** 0.5 * torch.eye(x.shape[1], dtype=torch.float64)
        rows, sought = torch.cat([centred, extra]), torch.cat([y - y.mean(0), torch.zeros(len(extra), y.shape[1])])
        weight = torch.linalg.lstsq(rows, sought).solution
        found.append((weight.T.float(), (y.mean(0) - x.mean(0) @ weight).float()))
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fit_is_least_squares_on_the_attention_of_the_transformer(family: str) -> None:
    model = transformer(family, **({"sliding_window": 40} if family == "mistral" else {}))
    ids = torch.randint(0, SIZES["vocab_size"], (6, LENGTH))
    before = model(ids[:1]).logits
    fit = fit_scores(model, ids, WINDOW, batch=4, ridge=1e-2)
    for layer, (weight, bias) in enumerate(expected(model, ids, 1e-2)):
        names = score_names(layer)
        assert (fit.tensors[names[0]] - weight).abs().max() <= 1e-4 * weight.abs().max()
        assert (fit.tensors[names[1]] - bias).abs().max() <= 1e-4 * bias.abs().max()
    assert len(fit.tensors) == 2 * len(fit.explained) == 2 * SIZES["num_hidden_layers"]
    assert all(0 < share < 1 for share in fit.explained)
    assert all(tensor.dtype == torch.float32 and not tensor.requires_grad for tensor in fit.tensors.values())
    assert torch.equal(model(ids[:1]).logits, before)


def test_attention_of_another_kind_is_refused() -> None:
    model, ids = transformer("llama"), torch.zeros(1, 8, dtype=torch.long)
    with watched(model, lambda *given: given[4]), pytest.raises(TypeError, match="is_causal"):
        model.model(ids, use_cache=False, is_causal=False)


def test_a_linear_rule_is_found_and_explains_everything() -> None:
    x, weight, bias = torch.randn(500, 9).double() + 3, torch.randn(9, 2).double(), torch.randn(2).double()
    sums = Sums()
    for part in x.split(200):
        sums.add(part, part @ weight + bias)
    found, offset, explained = sums.solve(1e-12)
    assert (found.T - weight).abs().max() < 1e-5 and (offset - bias).abs().max() < 1e-5
    assert explained == pytest.approx(1)


def test_windows_without_a_past_are_refused() -> None:
    with pytest.raises(UsageError, match="windows of 16 tokens are too short") as caught:
        fit_scores(transformer("llama"), torch.zeros(1, 16, dtype=torch.long), WINDOW)
    assert caught.value.hint is not None and "--window" in caught.value.hint


@pytest.fixture
def text(tmp_path: Path) -> TextModel:
    """A tokenizer with one token per byte and BOS in front."""
    toy.tokenizer().save(str(tmp_path / "tokenizer.json"))
    return TextModel(tmp_path)


ASKED = re.compile(r" What is the phone extension of (\w+)\?| Which code opens the (\w+)\?| Where did (\w+) move\?"
                   r"| To whom does the (\w+ in \w+) belong\?| The account number of (\w+) is")  # fmt: skip


def test_every_other_window_states_facts_and_asks_for_them_later(text: TextModel) -> None:
    prose = text.encode("the sea was calm and nothing of note went on that day; " * 200, special=False)
    rows = drills(text, prose, 8, 2048)
    assert rows.shape == (8, 2048) and (rows[:, 0] == toy.BOS).all()
    assert torch.equal(rows, drills(text, prose, 8, 2048))
    assert not torch.equal(rows, drills(text, prose, 8, 2048, seed=1))
    for i, row in enumerate(rows):
        said = text.decode(row.tolist())
        questions = list(ASKED.finditer(said))
        assert "pass key" not in said
        assert len(questions) >= 2 if i % 2 else said in text.decode(prose)
        for question in questions:
            subject = next(filter(None, question.groups()))
            answer = re.compile(r"(?: is| to)? (\w+)\.").search(said, said.index(f"{subject}", question.end() - 20))
            assert answer is not None
            stated = re.search(rf"{subject}('s account number is| is| moved to| belongs to) {answer[1]}\b", said)
            assert stated is not None, (question[0], answer[1])
            assert question.start() - stated.end() >= 150


def test_too_little_to_drill_on(text: TextModel) -> None:
    with pytest.raises(UsageError, match="the text has 100 tokens, one window has 512"):
        drills(text, range(100), 1, 512)
    with pytest.raises(UsageError, match="windows of 64 tokens"):
        drills(text, range(1000), 1, 64)
