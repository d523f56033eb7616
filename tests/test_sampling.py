"""Penalties and cut-offs as transformers and vLLM define them, and what a model's makers recommend for chat."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy
from transformers.generation import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from ligerexport.errors import ArtifactError, UsageError
from ligerexport.run.generate import Conversation, generate
from ligerexport.run.sampling import CHAT, Sampler, chat_settings, describe

VOCAB = 500


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


def penalise(penalty: float, ids: list[int], logits: np.ndarray) -> np.ndarray:
    """Return logits `[V]` after ids, as transformers changes them."""
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    return processor(torch.tensor([ids]), torch.from_numpy(logits)[None])[0].numpy()


@pytest.mark.parametrize("penalty", [0.8, 1.0, 1.3])
@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        {"temperature": 1.5, "min_p": 0.1},
        {"temperature": 2.0, "top_p": 0.7, "min_p": 0.3},
        {"temperature": 0.7, "top_k": 50, "top_p": 0.8, "min_p": 0.05},
        {"temperature": 1.0, "top_k": VOCAB + 1, "min_p": 1.0},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers_processors(penalty: float, settings: dict[str, float]) -> None:
    rng = np.random.default_rng(0)
    warpers = {"temperature": TemperatureLogitsWarper, "top_k": TopKLogitsWarper, "top_p": TopPLogitsWarper,
               "min_p": MinPLogitsWarper}  # fmt: skip
    processors = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), *(warpers[name](value) for name, value in settings.items())]
    )
    for _ in range(20):
        logits, ids = rng.normal(0, 3, VOCAB), rng.integers(0, VOCAB, 300).tolist()
        scores = processors(torch.tensor([ids]), torch.from_numpy(logits.copy())[None])
        sampler = Sampler(**settings, repetition_penalty=penalty)  # type: ignore[arg-type]
        sampler.read(ids)
        found = np.zeros(VOCAB)
        kept, weights = sampler.distribution(sampler.penalised(logits))
        found[kept] = weights
        np.testing.assert_allclose(found, scores.softmax(-1)[0].numpy(), atol=1e-12)


class Fixed(toy.Scripted):
    """A session that returns the same logits after every token."""

    def _logits(self) -> np.ndarray:
        return np.random.default_rng(0).normal(0, 1, (1, toy.VOCAB)).astype(np.float32)


def test_repetition_counts_prompt_and_answer_and_all_turns(artifact: Path) -> None:
    session = Fixed(artifact, [])
    logits, seen = session._logits()[0], [int(session._logits().argmax())]
    for chunk in generate(session, seen, repetition_penalty=4.0, max_new_tokens=12):
        assert chunk.token == penalise(4.0, seen, logits).argmax()
        seen.append(chunk.token)
    assert len(set(seen)) > 4

    chat, seen = Conversation(session, Sampler(repetition_penalty=4.0), max_new_tokens=6), []
    chat.reset()
    for text in ("one", "two"):
        before = len(session.fed)
        for chunk in chat.say(text):
            known = seen + session.fed[before:]
            assert chunk.token == penalise(4.0, known, logits).argmax()
        seen = [*known, chunk.token]
    chat.reset()
    assert next(chat.say("one")).token == penalise(4.0, session.fed, logits).argmax()


@pytest.mark.parametrize(("presence", "frequency"), [(0.4, 0.0), (0.0, 0.3), (0.3, 0.1), (-0.2, 0.0)])
def test_presence_and_frequency_count_this_answer_alone(artifact: Path, presence: float, frequency: float) -> None:
    session = Fixed(artifact, [])
    logits = session._logits()[0]
    chat = Conversation(session, Sampler(presence_penalty=presence, frequency_penalty=frequency), max_new_tokens=40)
    for text in ("one", "two"):
        counts: Counter[int] = Counter()
        for chunk in chat.say(text):
            expected = logits.copy()
            for token, count in counts.items():
                expected[token] -= presence + frequency * count
            assert chunk.token == expected.argmax()
            counts[chunk.token] += 1


def test_min_p_and_penalties_leave_logits_alone() -> None:
    logits = np.random.default_rng(0).normal(0, 1, VOCAB)
    before = logits.copy()
    sampler = Sampler(1.0, seed=0, min_p=0.1, repetition_penalty=2.0, presence_penalty=1.0, frequency_penalty=1.0)
    sampler.read(range(VOCAB))
    for _ in range(10):
        sampler(logits)
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize(
    "settings",
    [
        {"min_p": 1.1},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"repetition_penalty": float("inf")},
        {"repetition_penalty": 1e300},
        {"repetition_penalty": 1e-300},
        {"frequency_penalty": -1e38},
        {"temperature": float("inf")},
        {"temperature": float("nan")},
        {"presence_penalty": float("nan")},
        {"frequency_penalty": float("inf")},
        {"top_k": 1.5},
    ],
    ids=str,
)
def test_values_that_make_no_sense_are_named(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(UsageError, match=name) as caught:
        Sampler(**settings)
    assert caught.value.hint


@pytest.mark.parametrize("temperature", [1e-20, 1e-35, 1e-50, 1e-320])
def test_a_temperature_next_to_0_takes_the_most_likely_token(temperature: float) -> None:
    with np.errstate(all="raise", under="ignore", over="ignore"):
        assert Sampler(temperature)(np.array([1, 3, 2], np.float32)) == 1


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (None, CHAT),
        ({"eos_token_id": 2}, CHAT),
        ({"repetition_penalty": 1.1}, CHAT | {"repetition_penalty": 1.1}),
        ({"do_sample": True}, {"temperature": 1.0, "top_k": 50, "top_p": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": None},
            {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
        ),
        ({"temperature": 0.2, "top_k": 0, "max_length": 9}, {"temperature": 0.2, "top_k": 0, "top_p": 1.0}),
    ],
    ids=str,
)
def test_chat_samples_as_the_models_makers_say(tmp_path: Path, config: Any, expected: dict[str, float]) -> None:
    if config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(config))
    settings, origin = chat_settings(tmp_path)
    assert settings == expected
    Sampler(**settings)
    said = describe(settings, origin)
    assert all(f"{name}={value:g}" in said for name, value in expected.items())
    assert ("names none" in said) == (expected.items() >= CHAT.items())


@pytest.mark.parametrize("value", ["0.7", True, -1, [0.5], float("nan")], ids=str)
def test_a_generation_config_that_makes_no_sense(tmp_path: Path, value: Any) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": value}))
    with pytest.raises(ArtifactError, match=r"generation_config.json has the temperature .* at least 0"):
        chat_settings(tmp_path)
