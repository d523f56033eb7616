"""Measure recall from context: the share of an answer's tokens that a model gets right, on seeded prompts in prose.

A prompt states one key once or twice, or several named keys once; or it has pairs of words; or it repeats a span of
the prose. The prose never repeats to fill a distance, because in repeated filler anything different is easy to keep.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from ligerexport.errors import UsageError
from ligerexport.measure.evaluate.estimate import Estimate, Table
from ligerexport.measure.evaluate.settings import KEYS, PAIR_LENGTHS, PAIRS
from ligerexport.measure.opened import Opened
from ligerexport.text.tokenizer import TextModel

ONCE = " The secret pass key is {key}."
TWICE = " The secret pass key is {key}. Remember it: {key} is the secret pass key."
QUESTION = " What is the secret pass key? The secret pass key is"

NAMED = " The secret pass key of {name} is {key}."
NAMED_QUESTION = " What is the secret pass key of {name}? The secret pass key of {name} is"
NAMES = (
    "Alice", "Brian", "Clara", "David", "Emily", "Frank", "Grace", "Henry", "Irene", "James", "Laura", "Martin",
    "Nancy", "Oscar", "Peter", "Sarah",
)  # fmt: skip

LEAD = 64
"""Number of tokens of prose before the first item to recall, so that it is no sink, and of the repeated span."""
CUE = 8
"""Number of tokens of a copy that are given before the rest is asked for."""
MARGIN = 64
"""Smallest number of tokens between a key and its question, if the distance allows it."""
FEWEST_WORDS = 512
"""Smallest number of words in a vocabulary from which associations can be drawn."""


class Tokenizer(Protocol):
    """Turns text into ids without special tokens, and back."""

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return text."""
        ...


class PlainTokenizer:
    """The tokenizer of a model, without special tokens in the middle of a prompt."""

    def __init__(self, text: TextModel) -> None:
        self._text = text

    def encode(self, text: str) -> list[int]:
        """Return ids."""
        return self._text.encode(text, special=False)

    def decode(self, ids: Sequence[int]) -> str:
        """Return text."""
        return self._text.decode(ids)


@dataclass(frozen=True)
class Prompt:
    """Token ids, and the indices of those that a model must predict from all earlier ones."""

    ids: tuple[int, ...]
    asked: tuple[int, ...]

    def after(self, prefix: Sequence[int]) -> Prompt:
        """Return the prompt with ids before it."""
        return Prompt((*prefix, *self.ids), tuple(len(prefix) + i for i in self.asked))


def random_key(rng: random.Random) -> str:
    """Return five digits."""
    return "".join(rng.choice("0123456789") for _ in range(5))


def passkey_prompts(
    tokenizer: Tokenizer, prose: Sequence[int], said: str, distance: int, trials: int, *, seed: int = 0
) -> Iterator[Prompt]:
    """Yield prompts about a key that is stated at a random depth of `distance` tokens of prose.

    Args:
        tokenizer: Tokenizer of the model.
        prose: Token ids of the prose.
        said: Form of the statement: `ONCE` or `TWICE`.
        distance: Number of tokens of prose around the key.
        trials: Number of prompts.
        seed: Seed for keys, prose and depth.
    """
    rng = _generator(seed, f"{said} {distance}")
    for _ in range(trials):
        key = random_key(rng)
        context, depth = stretch(rng, prose, distance), _depth(rng, distance)
        needle = tokenizer.encode(said.format(key=key))
        yield _asked(tokenizer, [*context[:depth], *needle, *context[depth:]], QUESTION, key)


def named_prompts(
    tokenizer: Tokenizer, prose: Sequence[int], keys: int, distance: int, trials: int, *, seed: int = 0
) -> Iterator[Prompt]:
    """Yield prompts about one of several named keys, each stated once at its own random depth."""
    rng = _generator(seed, f"{NAMED} {keys} {distance}")
    for _ in range(trials):
        names = rng.sample(NAMES, keys)
        values = [random_key(rng) for _ in names]
        context = list(stretch(rng, prose, distance))
        depths = sorted((_depth(rng, distance) for _ in names), reverse=True)
        for name, key, depth in zip(names, values, depths, strict=True):  # from the end, so that depths stay valid
            context[depth:depth] = tokenizer.encode(NAMED.format(name=name, key=key))
        asked = rng.randrange(keys)
        yield _asked(tokenizer, context, NAMED_QUESTION.format(name=names[asked]), values[asked])


def pair_prompts(
    words: Sequence[int], prose: Sequence[int], pairs: int, length: int, trials: int, *, seed: int = 0
) -> Iterator[Prompt]:
    """Yield prompts of multi-query associative recall (Zoology, arXiv 2312.04927) with words of a real vocabulary.

    A prompt is prose with `pairs` pairs of words near its beginning, `length` tokens in all, followed by the same pairs
    in another order. The second word of each is asked for. No word of a pair occurs in the prose.
    """
    rng = _generator(seed, f"pairs {pairs} {length}")
    for _ in range(trials):
        context = stretch(rng, prose, length - 2 * pairs)
        drawn = rng.sample(_without(words, set(context)), 2 * pairs)
        given = list(zip(drawn[::2], drawn[1::2], strict=True))
        questions = rng.sample(given, pairs)
        ids = [*context[:LEAD], *(i for pair in given for i in pair), *context[LEAD:]]
        ids += [i for pair in questions for i in pair]
        yield Prompt(tuple(ids), tuple(range(length + 1, length + 2 * pairs, 2)))


def copy_prompts(prose: Sequence[int], distance: int, trials: int, *, seed: int = 0) -> Iterator[Prompt]:
    """Yield prose that ends with a repeated span of `LEAD` tokens, `distance` tokens after the span's first end."""
    rng = _generator(seed, f"copy {distance}")
    for _ in range(trials):
        context = stretch(rng, prose, 2 * LEAD + distance)
        ids = (*context, *context[LEAD : 2 * LEAD])
        yield Prompt(ids, tuple(range(len(ids) - LEAD + CUE, len(ids))))


def word_ids(tokenizer: Tokenizer, vocab_size: int) -> list[int]:
    """Return the ids of words of three or more lower-case letters, with the space before them if tokens include it."""
    texts = [tokenizer.decode([i]) for i in range(vocab_size)]
    spaced = [i for i, text in enumerate(texts) if re.fullmatch(r" [a-z]{3,}", text)]
    if len(spaced) >= FEWEST_WORDS:
        return spaced
    return [i for i, text in enumerate(texts) if re.fullmatch(r"[a-z]{3,}", text)]


def answer_all(
    scorer: Opened, prompts: Iterable[Prompt], advance: Callable[[float], None] = lambda amount: None
) -> tuple[Estimate, Estimate]:
    """Return the share of asked tokens that are the model's first choice, and their NLL in nats per token.

    Standard errors are over prompts. The right answer is fed, so a wrong token does not affect the next.
    """
    prompts = list(prompts)
    groups: dict[tuple[int, tuple[int, ...]], list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault((len(prompt.ids), prompt.asked), []).append(index)
    shares, losses = [0.0] * len(prompts), [0.0] * len(prompts)
    for (length, asked), members in groups.items():
        first = asked[0]
        columns = torch.tensor(asked) - first
        for start in range(0, len(members), scorer.batch):
            rows = members[start : start + scorer.batch]
            ids = torch.tensor([prompts[index].ids for index in rows])
            logits = scorer.forced(ids[:, :-1], last=length - first)
            logits, target = logits[:, columns.to(logits.device)], ids[:, list(asked)].to(logits.device)
            hits = (logits.argmax(dim=-1) == target).double().mean(dim=1).tolist()
            nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")
            for index, hit, loss in zip(rows, hits, nll.double().mean(dim=1).tolist(), strict=True):
                shares[index], losses[index] = hit, loss
            advance(ids.numel())
    return Estimate.of(shares), Estimate.of(losses)


def recall(
    scorer: Opened,
    tokenizer: Tokenizer,
    prose: Sequence[int],
    *,
    distances: Sequence[int],
    trials: int,
    seed: int = 0,
    prefix: Sequence[int] = (),
    words: Sequence[int] = (),
    advance: Callable[[float], None] = lambda amount: None,
) -> Table:
    """Measure recall of keys, associations and copies.

    Args:
        tokenizer: The model's tokenizer.
        prose: Token ids of the prose.
        distances: Distances of keys and copies; prompts with associations have the largest.
        trials: Number of prompts per measurement.
        seed: Seed for everything that is random.
        prefix: Ids that begin every prompt.
        words: Ids from `word_ids`; associations are left out if they are too few.
        advance: Called with the number of tokens read.

    Returns:
        Shares of right tokens `once`, `twice`, `keys_K`, `pairs_D` and `copy`, and `copy_nll` in nats per token;
        columns are distances.
    """

    def ask(prompts: Iterable[Prompt]) -> tuple[Estimate, Estimate]:
        return answer_all(scorer, (prompt.after(prefix) for prompt in prompts), advance)

    table: Table = {}
    for name, said in (("once", ONCE), ("twice", TWICE)):
        table[name] = {str(d): ask(passkey_prompts(tokenizer, prose, said, d, trials, seed=seed))[0] for d in distances}
    for keys in KEYS:
        table[f"keys_{keys}"] = {
            str(d): ask(named_prompts(tokenizer, prose, keys, d, trials, seed=seed))[0] for d in distances
        }
    lengths = [length for length in PAIR_LENGTHS if length <= max(distances)]
    if len(words) >= FEWEST_WORDS and lengths:
        for pairs in PAIRS:
            table[f"pairs_{pairs}"] = {
                str(n): ask(pair_prompts(words, prose, pairs, n, trials, seed=seed))[0] for n in lengths
            }
    copies = {str(d): ask(copy_prompts(prose, d, trials, seed=seed)) for d in distances}
    table["copy"] = {distance: share for distance, (share, _) in copies.items()}
    table["copy_nll"] = {distance: nll for distance, (_, nll) in copies.items()}
    return table


def _generator(seed: int, what: str) -> random.Random:
    return random.Random(what if seed == 0 else f"{seed} {what}")


def stretch(rng: random.Random, prose: Sequence[int], length: int) -> Sequence[int]:
    """Return `length` tokens of prose from a random place.

    Raises:
        UsageError: The prose is too short.
    """
    if len(prose) <= length:
        raise UsageError(
            f"the text has {len(prose):,} tokens, recall over {length:,} tokens needs more",
            hint="give more text, or shorter distances: --length 1024",
        )
    start = rng.randrange(len(prose) - length)
    return prose[start : start + length]


def _depth(rng: random.Random, distance: int) -> int:
    return rng.randrange(distance - MARGIN if distance > MARGIN else 1)


def _without(words: Sequence[int], used: set[int]) -> list[int]:
    return [word for word in words if word not in used]


def _asked(tokenizer: Tokenizer, context: list[int], question: str, key: str) -> Prompt:
    """Return a prompt that ends with question and key, and asks for the tokens of the key's digits."""
    whole, bare = tokenizer.encode(f"{question} {key}"), tokenizer.encode(question)
    same = next((i for i, (a, b) in enumerate(zip(whole, bare, strict=False)) if a != b), len(bare))
    while not tokenizer.decode(whole[same : same + 1]).strip():  # some vocabularies have a token for the space alone
        same += 1
    start = len(context)
    return Prompt((*context, *whole), tuple(range(start + same, start + len(whole))))
