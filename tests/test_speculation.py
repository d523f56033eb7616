"""Guessed tokens: the texts are those of single steps, samples keep their distribution, and slow calls are not made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import toy
from checkpoints import make_checkpoint
from test_drafts import RAGGED

import ligerexport as lx
from ligerexport.errors import UsageError
from ligerexport.run.draft import DraftModel
from ligerexport.run.generate import Conversation
from ligerexport.run.sampling import Sampler
from ligerexport.run.speculation import LENGTHS, Guesses, Guessing, Places, Source, Speculation

NEVER_SO_FAR = 4.75
"""Standard deviations of a chi-square that one right sampler in a million exceeds."""


class Echo:
    """A session of 4 tokens whose logits depend on the last two, and which counts its calls and the time of each."""

    batch, drafts = 1, True

    def __init__(self, cost: Callable[[int], float] = lambda tokens: 1 + 0.1 * tokens) -> None:
        self.seen: list[int] = [0, 0]
        self.calls: list[int] = []
        self.cost, self.now = cost, 0.0
        self._drafted = 0

    @property
    def position(self) -> list[int]:
        return [len(self.seen)]

    def logits(self, seen: list[int]) -> np.ndarray:
        found = np.arange(4) * 0.1
        found[(seen[-1] + seen[-2] + 1) % 4] += 2
        return found.astype(np.float32)

    def step(self, token: int) -> np.ndarray:
        return self.propose([token])[:, 0] if not self.commit(1) else np.empty(0)

    def propose(self, ids: list[int]) -> np.ndarray:
        self.calls.append(len(ids))
        self.now += self.cost(len(ids))
        self._drafted = len(ids)
        self.seen += ids
        start = len(self.seen) - len(ids) + 1
        return np.stack([self.logits(self.seen[start + i - 2 : start + i]) for i in range(len(ids))])[None]

    def commit(self, kept: int) -> None:
        if self._drafted:
            del self.seen[len(self.seen) - self._drafted + kept :]
        self._drafted = 0


def write(
    session: Any, sampler: Sampler, count: int, guesses: Guesses | None = None, source: Source | None = None
) -> tuple[list[int], Speculation]:
    """Return tokens and the session that guessed them."""
    source = source or Places()
    ahead = Speculation(session, source, guesses or Guesses(source.PRIOR), lambda: session.now)
    found, logits = [], session.logits(session.seen)
    for _ in range(count):
        found.append(sampler(logits))
        logits = ahead.step(found[-1])[0]
    ahead.settle()
    return found, ahead


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_a_seed_writes_the_text_of_single_steps(penalty: float) -> None:
    """Also if guesses are often wrong; each choice is made once, from the logits that steps have."""
    plain, session = Echo(), Echo()
    one, other = (Sampler(0.8, seed=3, repetition_penalty=penalty) for _ in range(2))
    expected, logits = [], plain.logits(plain.seen)
    for _ in range(400):
        expected.append(one(logits))
        logits = plain.step(expected[-1])[0]
    found, ahead = write(session, other, 400)
    assert found == expected and session.seen == plain.seen
    assert ahead.calls < 0.7 * ahead.steps and max(session.calls) > 3


def test_samples_keep_their_distribution() -> None:
    session = Echo()
    text, ahead = write(session, Sampler(1.0, seed=5), 4000)
    assert ahead.calls < 0.8 * ahead.steps
    check_distribution(session, text)


def check_distribution(session: Echo, text: list[int]) -> None:
    """Check by chi-square the last of three tokens, over all pairs before it, against the model's own probabilities."""
    counts = Counter(zip(text, text[1:], text[2:], strict=False))
    chi, freedom = 0.0, 0
    for pair in product(range(4), repeat=2):
        weights = np.exp(session.logits(list(pair)).astype(np.float64))
        row = np.array([counts[*pair, token] for token in range(4)])
        expected = row.sum() * weights / weights.sum()
        chi, freedom = chi + ((row - expected) ** 2 / expected).sum(), freedom + 3
    assert chi < freedom + NEVER_SO_FAR * (2 * freedom) ** 0.5


@pytest.mark.parametrize("cost", [1.0, 0.3, 0.02])
def test_calls_are_as_long_as_they_pay(cost: float) -> None:
    """Where each more token costs a step, guessing soon ends; where it costs nothing, calls become long."""
    session = Echo(lambda tokens: 1 + cost * (tokens - 1))
    write(session, Sampler(), 2000)
    later = session.calls[len(session.calls) // 2 :]
    assert set(session.calls) <= {1 + length for length in LENGTHS}
    if cost == 1:
        assert sum(tokens > 1 for tokens in session.calls) < 20 and session.now < 2010
    else:
        assert session.now < 2000 / (2.2 if cost == 0.3 else 8) and min(later) > 3


@pytest.mark.parametrize("cost", [1.0, 0.2])
def test_wrong_guesses_cost_little(cost: float) -> None:
    """Each place looks as if it had occurred before, and goes on in another way; earlier answers were easy to guess."""
    session, guesses = Echo(lambda tokens: 1 + cost * (tokens - 1)), Guesses()
    write(session, Sampler(), 300, guesses)
    for count in (10, 40, 1000):
        places, start = Places(), session.now
        ahead = Speculation(session, places, guesses, lambda: session.now)  # type: ignore[arg-type]
        for number in range(count):
            ahead.step(next(token for token in (number % 3, 3) if places.guess(1) != [token]))
        ahead.settle()
        assert session.now - start < 0.4 + 1.02 * count


def test_a_stream_that_was_left_takes_back_no_draft_of_another() -> None:
    """Also if that one ends at the same position."""
    session, guesses, places = Echo(), Guesses(), Places()
    old = Speculation(session, places, guesses, lambda: session.now)  # type: ignore[arg-type]
    logits = session.logits(session.seen)
    while not old._drafted:
        token, known, seen = int(logits.argmax()), deepcopy((places, guesses)), session.seen[:]
        logits = old.step(token)[0]
    session.seen = [*seen]
    new = Speculation(session, *known, lambda: session.now)  # type: ignore[arg-type]
    new.step(token)
    drafted = session.seen[:]
    assert old._end == new._end == len(drafted)
    old.settle()
    assert session.seen == drafted
    new.settle()
    assert session.seen == [*seen, token]


def test_the_longest_match_is_continued() -> None:
    places = Places()
    places.read([1, 2, 3, 4, 5, 9, 2, 3, 7, 1, 2, 3])
    assert places.length == 3 and places.guess(2) == [4, 5]
    places.read([4])
    assert places.length == 4 and places.guess(11) == [5, 9, 2, 3, 7, 1, 2, 3, 4, 5, 9]
    places.read([8])
    assert places.guess(3) == []
    places.read([2, 3])
    assert places.length == 2 and places.guess(1) == [4]


def test_a_text_without_end_takes_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only its later part is looked up."""
    monkeypatch.setattr("ligerexport.run.speculation.LONGEST", 40)
    places = Places()
    for start in range(0, 1000, 10):
        places.read(range(start, start + 10))
        assert places.ids == [*range(max(0, start + 10 - len(places.ids)), start + 10)] and len(places.ids) <= 40
        assert len(places._seen) <= 3 * 40
    places.read([990, 991])
    assert places.guess(3) == [992, 993, 994]
    places.read([100, 101])
    assert places.guess(3) == []


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("speculation") / "liger", RAGGED)
    return lx.build(path, lowering="native", verify=False)


def test_greedy_texts_are_the_same(artifact: Path) -> None:
    """And the session has seen every token but the last one, also if a stream is closed in the middle."""
    session = lx.load(artifact)
    prompt = [*range(20, 40)] * 3
    texts = [
        [chunk.token for chunk in lx.generate(session, prompt, max_new_tokens=60, speculate=way)]
        for way in ("off", "ngram")
    ]
    assert texts[0] == texts[1] and session.position == len(prompt) + len(texts[0]) - 1
    stream = lx.generate(session, prompt, max_new_tokens=60, speculate="ngram")
    written = [next(stream).token for _ in range(20)]
    stream.close()
    assert written == texts[0][:20] and session.position == len(prompt) + 19
    assert session.step(written[-1])[0].argmax() == texts[0][20]
    stream = lx.generate(session, prompt, max_new_tokens=60, speculate="ngram")
    assert [next(stream).token for _ in range(30)] == texts[0][:30]
    session.reset()
    stream.close()
    assert session.position == 0
    with pytest.raises(UsageError, match="speculate 'ngrams'"):
        lx.generate(session, prompt, speculate="ngrams")


def test_a_session_without_drafts_steps(tmp_path: Path) -> None:
    session = lx.load(toy.build(tmp_path / "toy"))
    text = [chunk.text for chunk in lx.generate(session, "ab ab ab", max_new_tokens=9, speculate="ngram")]
    assert text == [chunk.text for chunk in lx.generate(session, "ab ab ab", max_new_tokens=9)]
    talks = [Conversation(session, max_new_tokens=5, speculate=way) for way in ("off", "ngram")]
    answers = []
    for talk in talks:
        talk.reset()
        answers.append([[chunk.token for chunk in talk.say(line)] for line in ("one", "one")])
    assert answers[0] == answers[1]


class Says:
    """A session that guesses: it answers each token with the next number, and counts what it reads."""

    def __init__(self) -> None:
        self.artifact, self.seen, self.read = SimpleNamespace(manifest=MODEL), list[int](), 0

    def sibling(self) -> Says:
        return self

    def prefill(self, ids: list[int]) -> np.ndarray:
        self.seen, self.read = [*self.seen, *ids], self.read + len(ids)
        return np.eye(4, dtype=np.float32)[None, (self.seen[-1] + self.seen[-2 if len(self.seen) > 1 else -1] + 1) % 4]

    def step(self, token: int) -> np.ndarray:
        return self.prefill([token])

    def snapshot(self) -> list[int]:
        return [*self.seen]

    def restore(self, seen: list[int]) -> None:
        self.seen = [*seen]


MODEL = SimpleNamespace(model=SimpleNamespace(vocab_size=4))


def test_a_model_guesses_after_the_text_alone() -> None:
    """Its state has seen exactly the text before each guess, however many guesses were right and whatever came then."""
    random, session, text = np.random.default_rng(0), Says(), [1, 2]
    model = DraftModel(session, 4)  # type: ignore[arg-type]
    model.read(text)
    for _ in range(300):
        count = int(random.integers(1, 6))
        found = model.guess(count)
        assert session.seen[: len(text)] == text and session.seen[len(text) :] == found[:-1]
        expected = [*text]
        for _ in range(count):
            expected.append((expected[-1] + expected[-2] + 1) % 4)
        assert found == expected[len(text) :]
        taken = [*found[: random.integers(0, count + 1)], *random.integers(0, 4, random.integers(1, 4)).tolist()]
        for place, token in enumerate(taken):
            assert model.next == (found[place] if taken[:place] == found[:place] and place < count else None)
            model.read([token])
        text += taken
    assert session.read < 1.5 * len(text) + 900


def test_samples_keep_their_distribution_when_a_model_guesses() -> None:
    session, model = Echo(), DraftModel(Says(), 4)  # type: ignore[arg-type]
    model.read([0, 0])
    text, ahead = write(session, Sampler(1.0, seed=7), 4000, source=model)
    assert ahead.calls < 0.8 * ahead.steps
    check_distribution(session, text)


def test_another_artifact_guesses(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is that of steps, with any model that guesses; one with other tokens is refused."""
    monkeypatch.setattr(Guesses, "choose", lambda self, *_: 3 if self._steps else 0)
    session, prompt = lx.load(artifact), [*range(20, 40)]
    expected = [chunk.token for chunk in lx.generate(session, prompt, max_new_tokens=40)]
    small = lx.build(
        make_checkpoint(tmp_path / "liger", replace(RAGGED, heads=("3 4",) * 3)), lowering="ort", verify=False
    )
    for draft in (session, lx.load(small)):
        guessed = lx.generate(session, prompt, max_new_tokens=40, speculate=draft)
        assert [chunk.token for chunk in guessed] == expected
    with pytest.raises(UsageError, match=r"the tokenizer of .* is another one"):
        lx.generate(session, prompt, speculate=lx.load(toy.build(tmp_path / "toy")))


def test_guesses_are_made_by_default_where_no_text_can_be_had_twice(artifact: Path, tmp_path: Path) -> None:
    """And where they are taken back without a copy of the state."""
    native, other = lx.load(artifact), lx.load(toy.build(tmp_path / "toy"))
    for session, sampler, guesses in (
        (native, Sampler(0.8), True), (native, Sampler(0.8, seed=1), False), (native, Sampler(), False),
        (other, Sampler(0.8), False),
    ):  # fmt: skip
        assert isinstance(Guessing(session, "auto", sampler).on([5, 6]), Speculation) == guesses
