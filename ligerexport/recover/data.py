"""From records to documents of tokens, each token known as part of an answer or not.

A conversation goes through the model's own chat template. How documents share a row is `packing`'s business.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np

from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import UsageError
from ligerexport.recover.records import DataError, Record

if TYPE_CHECKING:
    from ligerexport.text import TextModel


@dataclass(frozen=True)
class Documents:
    """All documents of a data set, one after the other.

    Attributes:
        ids: Tokens `[total]` int32.
        answers: Whether each token is to be learned `[total]` bool: answers of chats, everything in plain text.
        bounds: Where the documents begin and end, `[N + 1]` int64.
        counts: What happened on the way: records read, samples cut or dropped and why.
    """

    ids: np.ndarray
    answers: np.ndarray
    bounds: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, `[N]`."""
        return np.diff(self.bounds)

    @property
    def sha256(self) -> str:
        """Digest of all tokens, what is learned of them, and where documents begin."""
        digest = hashlib.sha256()
        for part in (self.ids, self.answers, self.bounds):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()


def tokenize(
    records: Sequence[Record],
    text: TextModel,
    *,
    length: int,
    vocab_size: int,
    overlong: Literal["cut", "drop"] = "cut",
    wanted: int | None = None,
    seed: int = 0,
    progress: ProgressFactory | None = None,
) -> Documents:
    """Turn records into documents of at most `length` tokens.

    Args:
        records: In any order; they are taken in an order drawn from `seed`.
        text: Tokenizer and chat template of the model.
        length: Longest document. Plain text is cut into pieces of this length.
        vocab_size: Of the model: a tokenizer that gives larger ids is another model's.
        overlong: Whether a longer conversation is cut or dropped.
        wanted: Stop after this many tokens; None takes everything.
        seed: Of the order.
        progress: Reports the work; silent by default.

    Raises:
        DataError: Nothing is left to learn from.
        UsageError: Conversations need a chat template and there is none, or the tokenizer is another model's.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    ids, answers, bounds, counts = array("i"), bytearray(), array("q", [0]), Counter[str]()
    with (progress or silent)("reading the data", wanted, "steps") as advance:
        for index in order:
            if wanted is not None and len(ids) >= wanted:
                break
            counts["records"] += 1
            for piece, learned in _pieces(records[index], text, length, overlong, counts):
                ids.extend(piece)
                answers.extend(learned)
                bounds.append(len(ids))
                advance(len(piece))
    if not ids:
        reasons = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "records")
        raise DataError(f"nothing is left to learn from in {len(records)} records ({reasons or 'all are empty'})",
                        hint="look at the data, or give a larger --length")  # fmt: skip
    tokens = np.array(ids, dtype=np.int32)
    if tokens.max() >= vocab_size:
        raise UsageError(f"the tokenizer gives id {tokens.max()}, the model knows {vocab_size}",
                         hint="put the model's own tokenizer.json beside its weights")  # fmt: skip
    return Documents(tokens, np.frombuffer(answers, dtype=bool), np.array(bounds, dtype=np.int64), dict(counts))


def _pieces(
    record: Record, text: TextModel, length: int, overlong: str, counts: Counter[str]
) -> Iterator[tuple[list[int], list[bool]]]:
    """Yield the documents of a record: several for a long text, none where nothing can be learned."""
    if not record.turns:
        ids = text.encode(record.text)
        for start in range(0, len(ids), length):
            if len(piece := ids[start : start + length]) > 1:
                yield piece, [True] * len(piece)
        return
    if not any(role == "assistant" for role, _ in record.turns):
        counts["without an answer"] += 1
        return
    segments = _segments(record, text, counts)
    if segments is None:
        return
    plain = not text.chat_template  # a template writes its own beginning of text
    ids, answers = [], []
    for part, answer in segments:
        found = text.encode(part, special=plain and not ids)
        ids += found
        answers += [answer] * len(found)
    # A tokenizer may join characters across the border of a prompt. At inference the prompt is read alone, as here.
    if text.encode("".join(part for part, _ in segments), special=plain) != ids:
        counts["read as separate turns"] += 1
    if len(ids) > length:
        counts["cut" if overlong == "cut" else "dropped as too long"] += 1
        if overlong == "drop":
            return
        ids, answers = ids[:length], answers[:length]
    if not any(answers[1:]):
        counts["with no answer within the length"] += 1
        return
    yield ids, answers


def _segments(record: Record, text: TextModel, counts: Counter[str]) -> list[tuple[str, bool]] | None:
    """Cut a rendered conversation into what is read and what is learned; None where the template refuses it."""
    if not text.chat_template:
        if not record.alone:
            raise UsageError(
                f"{record.where} is a chat, and this model has no chat template",
                hint="give plain text or prompt and response pairs, or put chat_template.jinja beside the weights",
            )
        (_, prompt), (_, answer) = record.turns
        return [(prompt + "\n\n", False), (answer, True)]
    messages = [{"role": role, "content": content} for role, content in record.turns]
    segments: list[tuple[str, bool]] = []
    done = ""
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            prompt, whole = text.render(messages[:index]), text.render(messages[: index + 1], answer=False)
        except UsageError:
            counts["refused by the chat template"] += 1
            return None
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            # as templates that drop earlier answers or their reasoning do: what comes later has another past
            counts["only up to the turn that the chat template rewrites"] += 1
            break
        segments += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
        done = whole
    return segments or None
