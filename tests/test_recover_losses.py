"""Every loss against a plain formula, for any chunk; alignment against a plain loop over layers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import load_model
from ligerexport.errors import UsageError
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.train.data import Documents
from ligerexport.train.losses import divergence, imbalance, next_token_loss, relative_error
from ligerexport.train.model import load_teacher
from ligerexport.train.packing import Batch, Rows
from ligerexport.train.phases import BALANCE, PHASES, balance
from ligerexport.train.recipes import RECIPES, Phase, Recipe, rate_at
from tests.checkpoints import MEMORY, SIZES, make_checkpoint


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_next_token_loss(chunk: int) -> None:
    hidden, head, targets = torch.randn(20, 8, requires_grad=True), nn.Linear(8, 31), torch.randint(0, 31, (20,))
    weights = torch.rand(20)
    expected = -(head(hidden).log_softmax(-1)[torch.arange(20), targets] * weights).sum()
    found = next_token_loss(hidden, head, targets, weights, chunk)
    close(found, expected)
    close(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0])


@pytest.mark.parametrize("chunk", [1, 7, 100])
def test_divergence(chunk: int) -> None:
    hidden, head = torch.randn(20, 8, requires_grad=True), nn.Linear(8, 31)
    teacher, teacher_head = torch.randn(20, 6), nn.Linear(6, 31)
    p, q = teacher_head(teacher).softmax(-1).detach(), head(hidden).softmax(-1)
    weights = torch.rand(20)
    expected = ((p * (p / q).log()).sum(-1) * weights).sum()
    found = divergence(hidden, head, teacher, teacher_head, weights, chunk)
    close(found, expected)
    close(torch.autograd.grad(found, hidden)[0], torch.autograd.grad(expected, hidden)[0])
    assert divergence(hidden, head, hidden.detach(), head, torch.ones(20)).abs() < 1e-5


def test_nothing_counted_is_zero_with_a_gradient() -> None:
    hidden = torch.randn(0, 8, requires_grad=True)
    loss = next_token_loss(hidden, nn.Linear(8, 31), torch.zeros(0, dtype=torch.long), torch.ones(0))
    loss.backward()
    assert loss == 0 and hidden.grad is not None


def test_relative_error() -> None:
    output, target = torch.randn(2, 5, 3), torch.randn(2, 5, 3)
    counted = torch.tensor([[True, True, False, False, True], [False, False, False, True, False]])
    expected = sum(
        int(keep.sum()) * ((o - t)[keep] ** 2).sum() / (t[keep] ** 2).sum()
        for o, t, keep in zip(output, target, counted, strict=True)
    )
    close(relative_error(output, target, counted), expected)
    parts = sum(relative_error(output[i : i + 1], target[i : i + 1], counted[i : i + 1]) for i in range(2))
    close(parts, expected)
    assert relative_error(output, target, torch.zeros(2, 5, dtype=torch.bool)) == 0


def test_imbalance() -> None:
    """Rows add up, padding and the rest of a row do not count, and the bounds are those of the docstring."""
    logits, weights = torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.rand(2, 5)
    real = torch.tensor([[True, True, True, False, False], [True] * 5])
    expected = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        for head in range(3):
            seen = logits[row, real[row], head]
            used = functional.one_hot(seen.argsort(dim=-1)[:, 2:], 4).sum(dim=1).double().mean(dim=0) / 2
            expected += 4 * (used * seen.softmax(dim=-1).mean(dim=0)).sum() / 3 * weights[row].sum()
    close(imbalance(logits, 2, real, weights), (expected - weights.sum()).float())
    turns = 100.0 * torch.eye(4, dtype=torch.float64)[None, :, None]
    ones = torch.ones(1, 4)
    close(imbalance(turns, 1, ones.bool(), ones), torch.tensor(0.0))
    close(imbalance(turns[:, :1].expand(-1, 4, -1, -1), 1, ones.bool(), ones), torch.tensor(12.0))


def make_batch(**phase: Any) -> Batch:
    lengths = np.array([30, 30, 17, 40])
    ids = np.random.default_rng(0).integers(0, SIZES["vocab_size"], lengths.sum())
    answers = np.random.default_rng(1).random(lengths.sum()) < 0.5
    documents = Documents(ids.astype(np.int32), answers, np.concatenate([[0], lengths.cumsum()]))
    return Rows(documents, [[0, 1], [2, 3]], 64).collate([0, 1]).count(**{"answers": False, "after": 0} | phase)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("losses") / "liger", replace(MEMORY, keep_softmax=(2,)))
    (path / "tokenizer.json").write_text("{}")
    return path


@pytest.fixture(scope="module")
def models(checkpoint: Path) -> tuple[Any, Any]:
    return load_model(checkpoint).train(), load_teacher(check_checkpoint(checkpoint), None, torch.float32)


def test_align_is_a_loop_over_layers(models: tuple[Any, Any]) -> None:
    student, teacher = models
    batch = make_batch(after=3)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        layer.self_attn.register_forward_hook(
            lambda module, args, kwargs, output: seen.append((kwargs["hidden_states"], output[0])), with_kwargs=True
        )
        for layer in teacher.model.layers
    ]
    with torch.no_grad():
        teacher(**batch.inputs())
    for hook in hooks:
        hook.remove()
    expected = torch.zeros(())
    for layer, (hidden, target) in list(zip(student.model.layers, seen, strict=True))[:2]:
        inputs = {key: value for key, value in batch.inputs().items() if key not in ("input_ids", "use_cache")}
        output = layer.self_attn(hidden, **inputs)[0]
        expected = expected + relative_error(output, target, batch.counted)
    found = PHASES["align"](student, teacher, batch)
    close(found, expected / 2)
    assert not any(layer.self_attn._forward_hooks for layer in teacher.model.layers)
    student.zero_grad()
    found.backward()
    plain = student.model.layers[0].self_attn.q_proj.weight.grad.clone()
    assert student.model.layers[2].self_attn.q_proj.weight.grad is None
    assert student.model.embed_tokens.weight.grad is None

    student.gradient_checkpointing_enable({"use_reentrant": False})
    student.zero_grad()
    PHASES["align"](student, teacher, batch).backward()
    student.gradient_checkpointing_disable()
    close(student.model.layers[0].self_attn.q_proj.weight.grad, plain)


def test_layers_that_keep_their_window_are_not_aligned(tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "liger", MEMORY, "gemma3_text")
    teacher = load_teacher(check_checkpoint(path, tokenizer=False), None, torch.float32)
    student = load_model(path).train()
    PHASES["align"](student, teacher, make_batch()).backward()
    trained = [layer.self_attn.q_proj.weight.grad is not None for layer in student.model.layers]
    assert trained == [False, True, False]


def test_follow_and_next_token_are_plain_losses_of_logits(models: tuple[Any, Any]) -> None:
    student, teacher = models
    batch = make_batch(answers=True)
    with torch.no_grad():
        mine, theirs = (model(**batch.inputs()).logits[batch.counted] for model in models)
        expected = functional.kl_div(mine.log_softmax(-1), theirs.softmax(-1), reduction="sum")
        close(PHASES["follow"](student, teacher, batch), expected)
        likelihood = functional.cross_entropy(mine, batch.targets[batch.counted], reduction="sum")
        close(PHASES["next_token"](student, None, batch), likelihood)


def test_training_balances_the_memories(tmp_path: Path) -> None:
    """By the projection of keys alone, from which the router is computed; with gradient checkpointing too."""
    config = LigerConfig(window=8, memories=4, keep_softmax=(2,))
    student = load_model(make_checkpoint(tmp_path / "liger", config, hidden_size=32)).train()
    batch, found = make_batch(), []
    weights = [layer.self_attn.k_proj.weight for layer in student.model.layers[:2]]
    for step in range(30):
        if step == 1:
            student.gradient_checkpointing_enable({"use_reentrant": False})
        PHASES["next_token"](student, None, batch)
        loss = balance(student, batch) / (BALANCE * batch.weights.sum())
        found.append(loss.item())
        for weight, gradient in zip(weights, torch.autograd.grad(loss, weights), strict=True):
            weight.data -= 0.3 * gradient
    assert found[0] > 0.05 and 0 < found[-1] < found[0] / 2


def test_answers_weigh_more(models: tuple[Any, Any]) -> None:
    student, teacher = models
    every, answers, heavy = (
        PHASES["follow"](student, teacher, make_batch(**phase)) for phase in ({}, {"answers": True}, {"weight": 4.0})
    )
    close(heavy, every + 3 * answers)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_everything_has_nothing_to_learn(tmp_path: Path, family: str) -> None:
    config = LigerConfig(window=64, attention_weight=1.0, recurrence_weight=0.0)
    path = make_checkpoint(tmp_path / "liger", config, family)
    student = load_model(path).train()
    teacher = load_teacher(check_checkpoint(path, tokenizer=False), None, torch.float32)
    batch = make_batch()
    with torch.no_grad():
        logits = teacher(**batch.inputs()).logits[batch.counted]
        likelihood = functional.cross_entropy(logits, batch.targets[batch.counted], reduction="sum")
        torch.testing.assert_close(PHASES["next_token"](student, None, batch), likelihood, rtol=1e-4, atol=0)
        assert PHASES["follow"](student, teacher, batch).abs() < 1e-3
        assert PHASES["align"](student, teacher, batch) < 1e-6


def test_the_teacher_is_the_transformer_of_the_same_weights(models: tuple[Any, Any]) -> None:
    student, teacher = models
    assert type(teacher).__name__ == "LlamaForCausalLM" and not any(p.requires_grad for p in teacher.parameters())
    for name, parameter in teacher.named_parameters():
        assert torch.equal(parameter, student.get_parameter(name))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_name_phases_and_share_all_steps(recipe: str) -> None:
    row = RECIPES[recipe]
    assert all(phase.loss in PHASES for phase in row.phases)
    names = [row.phase_at(step, 100) for step in range(100)]
    assert [names.count(phase) for phase in row.phases] == [round(100 * phase.share) for phase in row.phases]


def test_shares_are_checked() -> None:
    with pytest.raises(UsageError, match=r"sum to 0\.9"):
        Recipe((Phase("align", 0.4), Phase("follow", 0.5)), "")
    with pytest.raises(UsageError, match="weight 0"):
        Phase("follow", weight=0.0)
    with pytest.raises(UsageError, match="share 0"):
        Phase("align", 0.0)


def test_the_rate_rises_and_falls() -> None:
    assert [rate_at(step, 10, 1.0, 2, "constant") for step in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    cosine = [rate_at(step, 10, 1.0, 2, "cosine") for step in range(10)]
    assert cosine[2] == 1.0 and cosine[2:] == sorted(cosine[2:], reverse=True) and 0 < cosine[9] < 0.05
