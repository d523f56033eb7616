"""Prompts that ask at their end about something read before: a passage, a key in one of many formats, a turn of a chat.

A prompt is token ids in three parts: what is read before the question is known, the question, and the answer. Nothing
here runs a model, so that any other program can ask exactly the same.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ligerexport.errors import UsageError
from ligerexport.measure.evaluate.questions import Question
from ligerexport.measure.evaluate.recall import stretch
from ligerexport.text.tokenizer import Message, TextModel

LEAD = 64
"""Number of tokens of prose before a key, so that it is no sink."""


@dataclass(frozen=True)
class ReadingPrompt:
    """A question about what was read, as token ids without padding.

    Attributes:
        context: What is read before the question is known. It begins with the ids that the tokenizer puts before every
            text.
        question: The question, up to the place where the answer begins.
        answer: The right answer.
        gold: The right answer as text.
        format: Row of `FORMATS` for a key; empty for other prompts.
    """

    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    gold: str
    format: str = ""


# Passages


def reading_prompts(
    text: TextModel, rows: Sequence[Question], distance: int, count: int, seed: int = 0
) -> list[ReadingPrompt]:
    """Return questions about a paragraph that stands at a random place among paragraphs of the same file.

    The same questions are asked at every distance, about as many passages as possible.

    Args:
        text: Tokenizer of the model.
        rows: Questions; their passages are the other paragraphs too.
        distance: Number of tokens of the context, without the tokenizer's own at its beginning. The last of the other
            paragraphs is cut off to fit. At 0 the paragraph stands alone.
        count: Largest number of prompts.
        seed: Seed for everything that is random.

    Raises:
        UsageError: The passages are too short or too long for the distance.
    """
    prefix, paragraphs = text.encode(""), _Paragraphs(text, rows)
    prompts = []
    for index, row in enumerate(_chosen(rows, count, seed)):
        own = paragraphs.ids[row.passage]
        if not distance or len(own) <= distance:
            others = paragraphs.others(row, distance - len(own), random.Random(f"reading {seed} {distance} {index}"))
            context = [token for part in _mixed(own, others, f"place {seed} {distance} {index}") for token in part]
            asked = text.encode(f"Question: {row.question}\nAnswer:", special=False)
            answer = text.encode(f" {row.answer}", special=False)
            prompts.append(ReadingPrompt((*prefix, *context), tuple(asked), tuple(answer), row.answer))
    if not prompts:
        raise UsageError(f"no passage is shorter than {distance:,} tokens", hint="give shorter passages")
    return prompts


class _Paragraphs:
    """The passages of a file as token ids, each with its title, and with a blank line after it."""

    def __init__(self, text: TextModel, rows: Sequence[Question]) -> None:
        texts = {row.passage: "\n".join(filter(None, (row.title, row.passage))) + "\n\n" for row in rows}
        self.ids = dict(zip(texts, text.encode_batch(list(texts.values()), special=False), strict=True))
        self.end = text.encode("\n\n", special=False)

    def others(self, row: Question, room: int, rng: random.Random) -> list[list[int]]:
        """Return other passages of `room` tokens in all, each once; the last is cut off.

        Raises:
            UsageError: There are not enough passages.
        """
        found: list[list[int]] = []
        for passage in rng.sample(list(self.ids), len(self.ids)):
            if room <= 0:
                return found
            if passage != row.passage:
                ids = self.ids[passage]
                found.append(ids if len(ids) <= room else [*ids[: max(0, room - len(self.end))], *self.end][-room:])
                room -= len(found[-1])
        if room > 0:
            raise UsageError(
                f"the passages have {sum(map(len, self.ids.values())):,} tokens, {room:,} too few for this distance",
                hint="give more passages, or shorter distances: --length 1024",
            )
        return found


def _chosen(rows: Sequence[Question], count: int, seed: int) -> list[Question]:
    """Return at most `count` questions in random order; no passage has two before every passage has one."""
    seen: dict[str, int] = {}
    ranked = []
    for row in random.Random(f"questions {seed}").sample(list(rows), len(rows)):
        seen[row.passage] = seen.get(row.passage, 0) + 1
        ranked.append((seen[row.passage], row))
    return [row for _, row in sorted(ranked, key=lambda pair: pair[0])[:count]]


def _mixed(own: list[int], others: list[list[int]], seed: str) -> list[list[int]]:
    place = random.Random(seed).randrange(len(others) + 1)
    return [*others[:place], own, *others[place:]]


# Keys in many formats


@dataclass(frozen=True)
class Format:
    """A way to say a value and to ask for it; `{}` is the thing that the value belongs to.

    Attributes:
        said: What stands before the value.
        end: What stands after it.
        asked: What stands before the answer.
        draw: Returns a random value as it stands after `said` and after `asked`.
    """

    said: str
    end: str
    asked: str
    draw: Callable[[random.Random], str]


def _drawn(pattern: str) -> Callable[[random.Random], str]:
    """Return a function that replaces each `9` of a pattern by a digit and each `A` by a capital letter."""
    kinds = {"9": "0123456789", "A": "ABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    return lambda rng: "".join(rng.choice(kinds.get(sign, sign)) for sign in pattern)


def _of(*lists: str) -> Callable[[random.Random], str]:
    """Return a function that draws a word of each list."""
    return lambda rng: "".join(f" {rng.choice(words.split())}" for words in lists)


_WORDS = "copper lantern walrus meadow violin pepper anchor thunder saddle cotton marble falcon ribbon ginger comet"
_DAYS, _YEARS = " ".join(map(str, range(1, 29))), " ".join(map(str, range(1871, 2019)))
_MONTHS = "January February March April May June July August September October November December"
_FIRST = "Ingrid Tomas Yuki Amara Leopold Soraya Anton Beatrix Hassan Mirela Rupert Zofia Kofi Elena Viktor Odette"
_LAST = "Vasquez Lindholm Okafor Brandt Nakamura Fischer Moreau Kowalski Hughes Ferrari Novak Jansen Silva Burke Ross"
THINGS = ("mill", "harbour", "chapel", "orchard", "quarry", "lighthouse", "bakery", "stable", "tannery", "brewery",
          "cellar", "tower", "ferry", "foundry", "dairy", "kiln")  # fmt: skip

FORMATS = {
    "digits": Format("The meter in the {} reads", ".", "The meter in the {} reads", _drawn(" 9 9 9 9 9")),
    "words": Format("Tonight's watchword at the {} is", ".", "Tonight's watchword at the {} is",
                    _of(_WORDS, _WORDS, _WORDS)),
    "name": Format("The last tenant of the {} was", ", to nobody's surprise.",
                   "The last tenant of the {} was", _of(_FIRST, _LAST)),
    "date": Format("The lease on the {} ends on", ".", "Nobody will stay, because the lease on the {} ends on",
                   _of(_DAYS, _MONTHS, _YEARS)),
    "code": Format("Booking reference, {}:", "", "Booking reference, {}:", _drawn(" AA9-99AA")),
    "json": Format('{{"sensor": "{}", "serial": "', '", "active": true}', '{{"sensor": "{}", "serial": "',
                   _drawn("A99A99")),
    "table": Format("| {} |", " | 1 |", "| {} |", _drawn(" 99.99")),
    "source": Format("{}_timeout =", "  # milliseconds", "{}_timeout =", _drawn(" 9999")),
}  # fmt: skip
"""Formats of keys. None may resemble the facts that scores are fitted on, or what `recall` asks for."""


def key_prompts(
    text: TextModel, prose: Sequence[int], distance: int, count: int, seed: int = 0, *, said: bool = True
) -> list[ReadingPrompt]:
    """Return questions about a value that is said once, after `LEAD` tokens of prose and before `distance` more.

    Args:
        text: Tokenizer of the model.
        prose: Token ids of the prose.
        distance: Number of tokens of prose between the value and the question.
        count: Number of prompts, which the formats share evenly; there is at least one of each.
        seed: Seed for everything that is random.
        said: False leaves the statement out and nothing else: what a model then gets right is guessed.

    Raises:
        UsageError: The prose is too short.
    """
    prefix, prompts = text.encode(""), []
    for name, form in FORMATS.items():
        rng = random.Random(f"{name} {seed} {distance}")
        for _ in range(max(1, count // len(FORMATS))):
            thing, value = rng.choice(THINGS), form.draw(rng)
            around = stretch(rng, prose, LEAD + distance)
            before, key, after, asked = text.encode_batch(
                [f"\n{form.said.format(thing)}", value, f"{form.end}\n", form.asked.format(thing)], special=False
            )
            stated = [*before, *key, *after] if said else []
            line = text.encode("\n", special=False)
            context = (*prefix, *around[:LEAD], *stated, *around[LEAD:], *line)
            prompts.append(ReadingPrompt(context, tuple(asked), tuple(key), value.strip(), name))
    return prompts


# Chats

FIRST_TURN, FIRST_ANSWER = "Here is the first text.\n\n{}", "I have read the first text."
LAST_TURN = "Now back to the first text. {}"


def chat_prompts(
    text: TextModel, rows: Sequence[Question], distance: int, count: int, seed: int = 0
) -> list[ReadingPrompt]:
    """Return conversations whose last turn asks about the first one, which gave a passage.

    The turns in between give other passages, with a question each that is answered at once.

    Args:
        text: Tokenizer of the model.
        rows: Questions.
        distance: Smallest number of tokens of the turns in between; at 0 there are none.
        count: Largest number of prompts.
        seed: Seed for everything that is random.

    Raises:
        UsageError: There are not enough passages, or the model has no chat template or one that drops earlier turns.
    """
    prompts = []
    for index, row in enumerate(_chosen(rows, count, seed)):
        rng = random.Random(f"chat {seed} {distance} {index}")
        turns = [("user", FIRST_TURN.format(row.passage)), ("assistant", FIRST_ANSWER)]
        used, room = {row.passage}, distance
        for other in rng.sample(list(rows), len(rows)):
            if room <= 0:
                break
            if other.passage not in used:
                used.add(other.passage)
                added = [("user", f"{other.passage}\n\n{other.question}"), ("assistant", other.answer)]
                turns += added
                room -= sum(len(text.encode(content, special=False)) for _, content in added)
        if room > 0:
            raise UsageError(
                f"the passages are {room:,} tokens too few for a chat of {distance:,}",
                hint="give more passages, or shorter distances: --length 1024",
            )
        read = text.encode_rendered(text.render(_messages(turns), answer=False, marked=True))
        asked = text.encode_chat(_messages([*turns, ("user", LAST_TURN.format(row.question))]))
        if asked[: len(read)] != read:
            raise UsageError("this chat template changes earlier turns", hint="leave the part chats out")
        answer = text.encode(row.answer, special=False)
        prompts.append(ReadingPrompt(tuple(read), tuple(asked[len(read) :]), tuple(answer), row.answer))
    return prompts


def _messages(turns: Sequence[tuple[str, str]]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in turns]
