"""Grammars that an answer follows: JSON schemas, regular expressions, and grammars as Lark or llama.cpp write them.

The library llguidance says which tokens may come next. It is imported only where a grammar is used.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.errors import LigerError, MissingDependency, UsageError
from ligerexport.run.sampling import Sampler
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON on one line with Python's separators: a model with free spaces may write nothing else."""


def llguidance() -> ModuleType:
    """Return the library.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import llguidance as library
    except ImportError:
        raise MissingDependency("llguidance", extra="grammar") from None
    return library


def json_rule(schema: Any) -> str:
    """Return the right side of a Lark rule for JSON that fits a schema.

    Raises:
        UsageError: The schema is no object of JSON.
    """
    hint = 'give an object such as {"type": "object"}'
    if not isinstance(schema, Mapping):
        raise UsageError(f"a JSON schema is {schema!r:.60}", hint=hint)
    try:
        return "%json " + json.dumps({**schema, "x-guidance": STYLE})
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"a JSON schema is no JSON: {error}", hint=hint) from None


def lark(
    json_schema: Mapping[str, Any] | None = None, regex: str | None = None, grammar: str | None = None
) -> str | None:
    """Return one of three descriptions of a text as llguidance takes it; None for none of them.

    Args:
        json_schema: JSON schema.
        regex: Regular expression that the whole text fits.
        grammar: Grammar in the form of Lark or of llama.cpp (GBNF).

    Raises:
        UsageError: There is more than one, or it cannot be read.
        MissingDependency: llguidance is not installed.
    """
    given = [found for found in (json_schema, regex, grammar) if found is not None]
    if len(given) > 1:
        raise UsageError("expected one of json_schema, regex and grammar", hint="leave out the others")
    if not given:
        return None
    if json_schema is not None:
        return f"start: {json_rule(json_schema)}"
    try:
        return str(llguidance().grammar_from("grammar" if regex is None else "regex", given[0]))
    except ValueError as error:
        raise UsageError(f"the grammar cannot be used: {error}") from None


class Grammar:
    """A grammar for the tokens of one model.

    Args:
        text: The tokenizer.
        size: Number of the model's logits.
        ends: Ids that end a text.
        source: Result of `lark`, or another grammar of llguidance.

    Raises:
        UsageError: The grammar is invalid, or needs what llguidance does not support.
        MissingDependency: llguidance is not installed.
    """

    def __init__(self, text: TextModel, size: int, ends: frozenset[int], source: str) -> None:
        self._size = size
        library = llguidance()
        limits = library.LLParserLimits(verbose_errors=False)
        self._matcher: LLMatcher = library.LLMatcher(_tokens(text, size, ends), source, log_level=0, limits=limits)
        try:
            self.begin().mask()
        except LigerError as error:
            raise UsageError(error.message) from None

    def begin(self) -> Constraint:
        """Return the constraint of a new text."""
        return Constraint(self._matcher.deep_copy(), self._size)


class Constraint:
    """The tokens that may follow in one text.

    Args:
        matcher: The grammar's place in the text.
        size: Number of the model's logits.
    """

    def __init__(self, matcher: LLMatcher, size: int) -> None:
        self._matcher, self._size = matcher, size

    def mask(self) -> np.ndarray:
        """Return which tokens are allowed now, bool `[V]`, at least one.

        Raises:
            LigerError: The grammar is too large, or the vocabulary has no tokens for it.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        mask = np.unpackbits(bits, count=self._size, bitorder="little").view(bool)
        if self._matcher.is_error() or not mask.any():
            why = " ".join(self._matcher.get_error().split()) or "no token can follow"
            raise LigerError(f"the grammar cannot be used: {why}")
        return mask

    def accept(self, token: int) -> bool:
        """Record a token; return False if the text is complete with it and nothing can follow."""
        return self._matcher.consume_token(token) and not self._matcher.is_stopped()


class Constrained:
    """A sampler of tokens that a grammar allows.

    Args:
        sampler: Chooses among the tokens.
        constraint: Says which may follow.

    Attributes:
        complete: Whether the text is complete with the last token.
    """

    def __init__(self, sampler: Sampler, constraint: Constraint) -> None:
        self._sampler, self._constraint = sampler, constraint
        self.read = sampler.read
        self.complete = False

    def __call__(self, logits: np.ndarray) -> int:
        """Return the id of the next token for logits `[V]`."""
        token = self._sampler(np.where(self._constraint.mask(), logits, np.float32(-np.inf)))
        self.complete = not self._constraint.accept(token)
        return token


class _Vocabulary:
    """The tokens of a model with the attributes that llguidance reads.

    Args:
        text: The tokenizer.
        size: Number of the model's logits. One more token ends texts if the model has none for this.
        ends: Ids that end a text, and so are no part of it, even if the tokenizer takes them for text.
    """

    bos_token_id = None

    def __init__(self, text: TextModel, size: int, ends: frozenset[int]) -> None:
        plain = ends.difference(text.special_ids.values())
        known = frozenset(text.vocabulary.values()) - plain
        self.eos_token_id = size
        self.tokens = [text.token_bytes(token) if token in known else b"" for token in range(size)] + [b"<end>"]
        special = plain.union(text.special_ids.values())
        self.special_token_ids = [*sorted(token for token in special if token < size), size]
        self._text = text

    def __call__(self, text: str) -> list[int]:
        return self._text.encode(text, special=False)


@lru_cache(maxsize=4)
def _tokens(text: TextModel, size: int, ends: frozenset[int]) -> LLTokenizer:
    """Return the tokens as llguidance stores them, which takes about a second for a large vocabulary."""
    library = llguidance()
    tokens: LLTokenizer = library.LLTokenizer(
        library.TokenizerWrapper(_Vocabulary(text, size, ends)),
        eos_token=sorted(token for token in ends if token < size) or size,
    )
    return tokens
