"""Guessed tokens in the server: requests that share a batch are answered as without guesses, and so are later turns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import make_checkpoint
from test_drafts import RAGGED
from test_serve_engine import answers, ask

import ligerexport as lx
from ligerexport.errors import UsageError
from ligerexport.run.speculation import Guesses
from ligerexport.serve.engine import Engine
from ligerexport.serve.request import Event, Finish, Request, Settings

VOCABULARY = 131


class Turns:
    """A constraint that allows odd and even tokens in turns, and at last none."""

    def __init__(self, count: int) -> None:
        self.left = count

    def mask(self) -> np.ndarray:
        return np.arange(VOCABULARY) % 2 == self.left % 2

    def accept(self, token: int) -> bool:
        self.left -= 1
        return self.left > 0


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("serve_drafts") / "liger", RAGGED)
    return lx.build(path, lowering="native", verify=False)


def requests() -> list[Request]:
    """Return requests of all kinds, whose prompts repeat themselves, but for the last one."""
    prompts = [[*range(first, first + 9)] * 4 for first in (20, 40, 60)] + [[*range(3, 33)]]
    drawn = Settings(temperature=0.3, seed=5, repetition_penalty=1.1, frequency_penalty=0.2)
    return [
        ask(prompts[0], max_tokens=60), ask(prompts[1], max_tokens=41, logprobs=2), ask(prompts[3], max_tokens=30),
        ask(prompts[2], max_tokens=50, settings=drawn), ask(prompts[2], constraint=Turns(33), max_tokens=60),
        ask(prompts[0], prompt_logprobs=True, logprobs=0, max_tokens=17), ask(prompts[1], logit_bias={7: 3.0}),
    ]  # fmt: skip


def same(one: tuple[list[Event], Finish], other: tuple[list[Event], Finish]) -> None:
    """Compare two answers; log-probabilities differ by rounding."""
    assert one[1] == other[1]
    assert [(x.token, x.prompt, [i for i, _ in x.top]) for x in one[0]] == [
        (x.token, x.prompt, [i for i, _ in x.top]) for x in other[0]
    ]
    found, expected = ([x.logprob or 0.0 for x in answer[0]] for answer in (one, other))
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_answers_are_those_of_steps(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Together in one batch and as turns that continue the kept states, which hold no token that was taken back."""

    def always(self: Guesses, lengths: Sequence[int], *_: Any) -> int:
        return 3 if self._steps and any(lengths) else 0

    monkeypatch.setattr(Guesses, "choose", always)
    engines = [Engine(artifact, max_batch=4, threads=1, speculate=way) for way in ("off", "ngram")]
    try:
        plain, guessed = ([*answers(engine, *requests())] for engine in engines)
        for one, other in zip(plain, guessed, strict=True):
            same(one, other)
        first = requests()[0]
        stop = plain[0][0][40].token
        turn = [*first.prompt, *(event.token for event in plain[0][0]), 5, 6, 7]
        for request in (ask(turn, max_tokens=20), ask(list(first.prompt), stop_tokens=frozenset({stop}))):
            (one,), (other,) = (answers(engine, request) for engine in engines)
            same(one, other)
            assert other[1].cached_tokens > 0
        steps, fewer = (engine.stats()["steps"] for engine in engines)
        assert fewer < 0.9 * steps
        assert engines[0].stats()["stepped"] == engines[1].stats()["stepped"]
    finally:
        for engine in engines:
            engine.close()
    with pytest.raises(UsageError, match="speculate 'ngrams'"):
        Engine(artifact, speculate="ngrams")
