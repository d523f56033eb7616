"""Turn records into documents of tokens, and mark the tokens of answers.

A conversation is rendered by the model's own chat template; any other text gets the model's end-of-text token.
`packing` puts documents into rows.
"""

from __future__ import annotations

import hashlib
import random
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np

from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import UsageError
from ligerexport.text.corpus import end_of_text
from ligerexport.text.datafiles import DataError
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.records import Record

_BLOCK = 1 << 18
"""Number of characters encoded at once, which keeps all cores busy and takes little memory."""


class _Segment(NamedTuple):
    """Part of a record that is encoded alone, as a prompt is at inference."""

    text: str
    answer: bool
    special: bool = False  # whether the tokenizer adds its own tokens, such as BOS
    rendered: bool = False  # whether the chat template wrote it


@dataclass(frozen=True)
class Documents:
    """All documents of a data set, one after the other.

    Attributes:
        ids: Token ids `[total]` int32.
        answers: Whether each token is to be learned, `[total]` bool: the answers of chats, and everything in plain text
            whose answers are not marked.
        bounds: Offsets at which the documents begin and end, `[N + 1]` int64.
        counts: Number of records read, and of samples cut or dropped, by reason.
    """

    ids: np.ndarray
    answers: np.ndarray
    bounds: np.ndarray
    counts: dict[str, int] = field(default_factory=dict)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens in each document, `[N]`."""
        return np.diff(self.bounds)

    @property
    def sha256(self) -> str:
        """Digest of all tokens, which of them are trained on, and where documents begin."""
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
        records: Records, which are read in an order drawn from `seed`.
        text: Tokenizer and chat template of the model.
        length: Largest number of tokens in a document. Plain text is cut into pieces of this length.
        vocab_size: Vocabulary size of the model; a tokenizer with larger ids belongs to another model.
        overlong: Whether a longer conversation is cut or dropped.
        wanted: Number of tokens after which to stop; None takes everything.
        seed: Seed for the order.

    Raises:
        DataError: Nothing is left to learn from.
        UsageError: Conversations need a chat template and there is none, or the tokenizer is another model's.
    """
    order = list(range(len(records)))
    random.Random(seed).shuffle(order)
    ids, answers, bounds, counts = array("i"), bytearray(), array("q", [0]), Counter[str]()
    with (progress or silent)("reading the data", wanted, "steps") as advance:
        for record, segments, remark in _encoded((records[index] for index in order), text):
            counts["records"] += 1
            if remark:
                counts[remark] += 1
            for piece, learned in _pieces(record, segments, length, overlong, counts):
                ids.extend(piece)
                answers.extend(learned)
                bounds.append(len(ids))
                advance(len(piece))
            if wanted is not None and len(ids) >= wanted:
                break  # before the next record is read, which may be faulty
    if not ids:
        reasons = ", ".join(f"{count} {what}" for what, count in counts.items() if what != "records")
        raise DataError(f"nothing is left to learn from in {len(records)} records ({reasons or 'all are empty'})",
                        hint="check the data, or give a larger --length")  # fmt: skip
    tokens = np.array(ids, dtype=np.int32)
    if tokens.max() >= vocab_size:
        raise UsageError(f"the tokenizer gives id {tokens.max()}, the model has {vocab_size} tokens",
                         hint="put the model's own tokenizer.json beside its weights")  # fmt: skip
    return Documents(tokens, np.frombuffer(answers, dtype=bool), np.array(bounds, dtype=np.int64), dict(counts))


def _encoded(records: Iterable[Record], text: TextModel) -> Iterator[tuple[Record, list[tuple[list[int], bool]], str]]:
    """Yield each record with the ids of its segments and a remark to be counted; many records are encoded at once."""
    block: list[tuple[Record, list[_Segment], str]] = []
    size = 0
    for record in records:
        try:
            segments, remark = _segments(record, text)
        except UsageError:
            yield from _encode(block, text)  # the records before this one may be enough
            raise
        block.append((record, segments, remark))
        size += sum(len(segment.text) for segment in segments)
        if size >= _BLOCK:
            yield from _encode(block, text)
            block, size = [], 0
    yield from _encode(block, text)


def _encode(
    block: Sequence[tuple[Record, list[_Segment], str]], text: TextModel
) -> Iterator[tuple[Record, list[tuple[list[int], bool]], str]]:
    every = [segment for _, segments, _ in block for segment in segments]
    plain = [part for part in every if not part.rendered]
    ids = {
        special: iter(text.encode_batch([part.text for part in plain if part.special is special], special=special))
        for special in (False, True)
    }
    chats = iter(text.encode_rendered_batch([part.text for part in every if part.rendered]))
    end = end_of_text(text)
    for record, segments, remark in block:
        found = [(next(chats if part.rendered else ids[part.special]), part.answer) for part in segments]
        if found and not _ended(found[-1][0], segments[0].rendered, text):
            found.append((end, True))
        yield record, found, remark


def _ended(ids: list[int], rendered: bool, text: TextModel) -> bool:
    """Return whether the last ids of a record already end it: most chat templates write an end."""
    return not text.turn_ends.isdisjoint(ids) if rendered else ids[-1:] == end_of_text(text)


def _pieces(
    record: Record, segments: Sequence[tuple[list[int], bool]], length: int, overlong: str, counts: Counter[str]
) -> Iterator[tuple[list[int], bytes]]:
    """Yield the documents of a record: several for a long text, none if nothing can be learned."""
    if not segments:
        return
    ids = [token for found, _ in segments for token in found]
    answers = b"".join(bytes([answer]) * len(found) for found, answer in segments)
    if not record.turns:
        for begin in range(0, len(ids), length):
            start = max(0, min(begin, len(ids) - 2))  # the first token of a piece is read, not learned
            if len(piece := ids[start : start + length]) > 1:
                yield piece, answers[start : start + length]
        return
    if len(ids) > length:
        counts["cut" if overlong == "cut" else "dropped as too long"] += 1
        if overlong == "drop":
            return
        ids, answers = ids[:length], answers[:length]
    if not any(answers[1:]):
        counts["with no answer within the length"] += 1
        return
    yield ids, answers


def _segments(record: Record, text: TextModel) -> tuple[list[_Segment], str]:
    """Split a record into segments that are read or trained on, with a remark if some are left out."""
    if not record.turns:
        return (_marked(record), "") if record.text.strip() else ([], "empty")
    roles = [role for role, _ in record.turns]
    asked = roles.index("user") if "user" in roles else len(roles)  # an answer without a question is read, not learned
    said = [role == "assistant" and bool(content.strip()) for role, content in record.turns]
    if not any(said[asked:]):
        return [], "without an answer"
    if not text.chat_template:
        if not record.alone:
            raise UsageError(
                f"{record.where} is a chat, and this model has no chat template",
                hint="give plain text or prompt and response pairs, or put chat_template.jinja beside the weights",
            )
        (_, prompt), (_, answer) = record.turns
        return [_Segment(prompt + "\n\n", answer=False, special=True), _Segment(answer, answer=True)], ""
    messages = [{"role": role, "content": content} for role, content in record.turns]
    if _left_out(messages, text):
        return [], "with a turn that the chat template leaves out"
    segments: list[_Segment] = []  # a template writes its own beginning of text
    done = ""
    for index, message in enumerate(messages):
        if index < asked or message["role"] != "assistant":
            continue
        try:
            prompt = text.render(messages[:index], marked=True)
            whole = text.render(messages[: index + 1], answer=False, marked=True)
        except UsageError:
            return [], "refused by the chat template"
        if not (prompt.startswith(done) and whole.startswith(prompt)):
            # the template drops earlier answers or their reasoning, so later turns have another context
            return segments, "only up to the turn that the chat template rewrites"
        segments += [
            _Segment(prompt[len(done) :], answer=False, rendered=True),
            _Segment(whole[len(prompt) :], answer=said[index], rendered=True),
        ]
        done = whole
    return segments, ""


def _marked(record: Record) -> list[_Segment]:
    """Split a text where its answers begin and end; without marks all of it is one answer."""
    if record.learned is None:
        return [_Segment(record.text, answer=True, special=True)]
    cuts = [0, *(at for span in record.learned for at in span), len(record.text)]
    parts = [(record.text[begin:end], i % 2 == 1) for i, (begin, end) in enumerate(pairwise(cuts)) if begin < end]
    return [_Segment(part, answer, special=i == 0) for i, (part, answer) in enumerate(parts)]


def _left_out(messages: list[dict[str, str]], text: TextModel) -> bool:
    """Return whether the template skips a system or tool message, so that answers would lack their context."""
    for index, message in enumerate(messages):
        if message["role"] in ("system", "tool") and message["content"].strip():
            others = messages[:index] + messages[index + 1 :]
            try:
                if text.render(others, answer=False) == text.render(messages, answer=False):
                    return True
            except UsageError:  # a template may refuse the shorter chat; refusals are counted elsewhere
                continue
    return False
