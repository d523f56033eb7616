"""Recall: prompts have their parts in the right places, a copying oracle answers all of them, and chance none."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from ligerexport.errors import UsageError
from ligerexport.measure.evaluate import recall as r
from ligerexport.measure.evaluate.settings import KEYS, PAIR_LENGTHS, PAIRS
from tests import toy

WORDS = [a + b + c for a in "bcdfghjklm" for b in "aeiou" for c in ("ber", "dan", "fel", "gor", "lim", "mup", "nid",
         "pav", "qus", "rew", "sot", "tuk", "vab", "wep", "zil", "cas")]  # fmt: skip


class WordTokenizer:
    """A token per letter, sign, digit or word of `WORDS`, with the space before it, as in many vocabularies."""

    def __init__(self) -> None:
        letters = [chr(code) for code in range(32, 127)]
        self.tokens = [*letters, *(f" {word}" for word in WORDS)]
        self.ids = {token: i for i, token in enumerate(self.tokens)}

    def encode(self, text: str) -> list[int]:
        return [self.ids[letter] for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.tokens[i] for i in ids)


TOKENIZER = WordTokenizer()
VOCAB = len(TOKENIZER.tokens)
PROSE_WORDS, FREE_WORDS = WORDS[:200], WORDS[200:]


@pytest.fixture(scope="module")
def prose() -> list[int]:
    rng = random.Random(0)
    return [TOKENIZER.ids[f" {rng.choice(PROSE_WORDS)}"] for _ in range(6000)]


class Oracle:
    """Predicts the token after the longest earlier copy of the last tokens, the latest copy if there are several."""

    vocab_size, batch = VOCAB, 4

    def forced(self, ids: Tensor, last: int) -> Tensor:
        logits = torch.zeros(len(ids), last, VOCAB)
        for row, line in enumerate(ids.tolist()):
            for column, end in enumerate(range(len(line) - last + 1, len(line) + 1)):
                logits[row, column, self.guess(line[:end])] = 1
        return logits

    def guess(self, line: list[int]) -> int:
        best = (0, 0, 0)
        for place in range(len(line) - 1):
            size = 0
            while size <= place and size < 40 and line[place - size] == line[len(line) - 1 - size]:
                size += 1
            best = max(best, (size, place, line[place + 1]))
        return best[2]

    def logits(self, ids: Tensor, chunk: int = 0) -> Iterator[Tensor]:
        yield self.forced(ids, ids.shape[1])

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        raise NotImplementedError


class Chance(Oracle):
    def guess(self, line: list[int]) -> int:
        return random.randrange(VOCAB)


def old_passkeys(prose: list[int], said: str, distance: int, trials: int) -> list[list[int]]:
    """Return prompts as in the tables under benchmarks/results."""
    rng = random.Random(f"{said} {distance}")
    rows = []
    for _ in range(trials):
        key = "".join(rng.choice("0123456789") for _ in range(5))
        start, depth = rng.randrange(len(prose) - distance), rng.randrange(distance - 64 if distance > 64 else 1)
        context = prose[start : start + distance]
        needle = TOKENIZER.encode(said.format(key=key))
        question = TOKENIZER.encode(r.QUESTION + " " + key)
        rows.append(context[:depth] + needle + context[depth:] + question)
    return rows


@pytest.mark.parametrize("said", [r.ONCE, r.TWICE])
@pytest.mark.parametrize("distance", [50, 128, 512])
def test_passkeys_are_those_of_earlier_results(prose: list[int], said: str, distance: int) -> None:
    prompts = list(r.passkey_prompts(TOKENIZER, prose, said, distance, 6))
    assert [list(prompt.ids) for prompt in prompts] == old_passkeys(prose, said, distance, 6)
    other = list(r.passkey_prompts(TOKENIZER, prose, said, distance, 6, seed=1))
    assert {p.ids for p in prompts}.isdisjoint(p.ids for p in other)
    for prompt in prompts:
        text = TOKENIZER.decode(prompt.ids)
        key = TOKENIZER.decode([prompt.ids[i] for i in prompt.asked])
        assert len(key) == 5 and text.endswith(f"{r.QUESTION} {key}") and said.format(key=key) in text
        bare = text.replace(said.format(key=key), "").removesuffix(f"{r.QUESTION} {key}")
        assert len(bare.split()) == distance
        after = text.rpartition("is the secret pass key." if said == r.TWICE else f"{key}.")[2]
        assert len(after.removesuffix(f"{r.QUESTION} {key}").split()) >= min(distance, r.MARGIN)


@pytest.mark.parametrize("keys", KEYS)
def test_named_keys_are_all_said_and_one_is_asked(prose: list[int], keys: int) -> None:
    for prompt in r.named_prompts(TOKENIZER, prose, keys, 200, 5):
        text = TOKENIZER.decode(prompt.ids)
        context, _, question = text.rpartition(" What is the secret")
        said = dict(part.split(" is ") for part in context.split(" The secret pass key of ")[1:])
        assert len(said) == keys
        name = question.split("?")[0].removeprefix(" pass key of ")
        assert said[name][:5] == TOKENIZER.decode([prompt.ids[i] for i in prompt.asked])
        assert len({value[:5] for value in said.values()}) == keys


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("length", PAIR_LENGTHS)
def test_pairs_are_given_once_and_asked_in_another_order(prose: list[int], pairs: int, length: int) -> None:
    words = r.word_ids(TOKENIZER, VOCAB)
    assert len(words) == len(WORDS)
    for prompt in r.pair_prompts(words, prose, pairs, length, 3):
        assert len(prompt.ids) == length + 2 * pairs and len(prompt.asked) == pairs
        given = prompt.ids[r.LEAD : r.LEAD + 2 * pairs]
        table = dict(zip(given[::2], given[1::2], strict=True))
        assert len({*given}) == 2 * pairs
        assert {*given}.isdisjoint([*prompt.ids[: r.LEAD], *prompt.ids[r.LEAD + 2 * pairs : length]])
        assert sorted(prompt.ids[i - 1] for i in prompt.asked) == sorted(table)
        assert all(table[prompt.ids[i - 1]] == prompt.ids[i] for i in prompt.asked)


def test_a_copy_repeats_the_span_at_the_distance(prose: list[int]) -> None:
    for prompt in r.copy_prompts(prose, 128, 4):
        span = prompt.ids[-r.LEAD :]
        first = len(prompt.ids) - r.LEAD - 128 - r.LEAD
        assert prompt.ids[first : first + r.LEAD] == span and first == r.LEAD
        assert prompt.asked == tuple(range(len(prompt.ids) - r.LEAD + r.CUE, len(prompt.ids)))


@pytest.fixture(scope="module")
def oracle_table(prose: list[int]) -> dict[str, dict[str, r.Estimate]]:
    words = [TOKENIZER.ids[f" {word}"] for word in WORDS]
    return r.recall(Oracle(), TOKENIZER, prose, distances=(128, 256), trials=2, words=words)


def test_an_oracle_that_copies_recalls_everything(oracle_table: dict[str, dict[str, r.Estimate]]) -> None:
    names = {"once", "twice", "copy", "copy_nll", *(f"keys_{k}" for k in KEYS), *(f"pairs_{d}" for d in PAIRS)}
    assert set(oracle_table) == names
    for name, columns in oracle_table.items():
        assert list(columns) == (["256"] if name.startswith("pairs") else ["128", "256"])
        for estimate in columns.values():
            assert estimate.count == 2
            if name != "copy_nll":
                assert (estimate.mean, estimate.stderr) == (1.0, 0.0), name


def test_chance_recalls_next_to_nothing(prose: list[int]) -> None:
    prompts = list(r.passkey_prompts(TOKENIZER, prose, r.ONCE, 128, 40))
    share, nll = r.answer_all(Chance(), prompts)
    assert share.mean < 0.05 and share.count == 40
    assert nll.mean == pytest.approx(torch.tensor(VOCAB - 1 + torch.e).log().item(), abs=0.1)


def test_a_batch_answers_as_single_prompts_do(prose: list[int]) -> None:
    prompts = [*r.copy_prompts(prose, 128, 3), *r.passkey_prompts(TOKENIZER, prose, r.ONCE, 128, 3)]
    together, one = Oracle(), Oracle()
    one.batch = 1
    assert r.answer_all(together, prompts) == r.answer_all(one, prompts)


def test_a_prefix_stays_in_front(prose: list[int]) -> None:
    seen: list[list[int]] = []

    class Spy(Oracle):
        def forced(self, ids: Tensor, last: int) -> Tensor:
            seen.extend(ids.tolist())
            return super().forced(ids, last)

    table = r.recall(Spy(), TOKENIZER, prose, distances=(64,), trials=1, prefix=(0, 1))
    assert seen and all(ids[:2] == [0, 1] for ids in seen)
    assert table["once"]["64"].mean == 1.0


def test_too_little_text_says_how_much(prose: list[int]) -> None:
    with pytest.raises(UsageError, match="100 tokens") as caught:
        list(r.passkey_prompts(TOKENIZER, prose[:100], r.ONCE, 128, 1))
    assert "--length" in str(caught.value.hint)


def test_answers_are_the_digits_alone_where_a_space_is_a_token() -> None:
    prompt = next(r.passkey_prompts(TOKENIZER, list(range(100, 300)), r.ONCE, 64, 1))
    assert all(b - a == 1 for a, b in pairwise(prompt.asked))
    assert TOKENIZER.decode([prompt.ids[i] for i in prompt.asked]).isdigit()


def test_letters_make_no_pairs() -> None:
    class Bytes:
        def decode(self, ids: Sequence[int]) -> str:
            return chr(ids[0])

        def encode(self, text: str) -> list[int]:
            return [ord(letter) for letter in text]

    assert r.word_ids(Bytes(), toy.BYTES) == []
