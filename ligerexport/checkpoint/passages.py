"""The text on which `recall` is fitted: passages, joined to contexts that the Transformer reads and repeats."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from ligerexport.errors import UsageError
from ligerexport.text.tokenizer import TextModel

CALIBRATION = Path(__file__).parents[1] / "data" / "calibration"
"""Directory of the text that ships with the package."""
REQUEST = "Repeat the text above.\n\n"
NO_FIT = "convert without a fit: the same window for all heads with --no-fit, or other slots with --preset memory"
"""The hint where a fit is impossible."""
SHORTEST = 32
"""Smallest number of tokens in a context that is worth repeating."""
_LONGEST = 4000
"""Number of characters in the longest passage; a longer one is cut into several."""


class Reading(NamedTuple):
    """What the Transformer reads.

    Attributes:
        ids: Token ids.
        context: Number of tokens of the context, with those that begin every text of this model.
        first: First token whose loss counts: the first of the repetition or, without one, the second of the context.
    """

    ids: list[int]
    context: int
    first: int


def builtin_texts() -> list[str]:
    """Return the passages that ship with the package."""
    return passages(file.read_text(encoding="utf-8") for file in sorted(CALIBRATION.glob("*.txt")))


def passages(texts: Iterable[str]) -> list[str]:
    """Return what stands between the blank lines of texts, without questions about it."""
    parts = (part.strip() for text in texts for part in text.split("\n\n"))
    wanted = (part for part in parts if part and not part.startswith("Question: "))
    return [part[start : start + _LONGEST] for part in wanted for start in range(0, len(part), _LONGEST)]


class Reader:
    """Draws what the Transformer reads from collections of passages, from each in turn.

    Args:
        text: The tokenizer.
        collections: Passages, none of them empty.
        longest: Number of tokens in the longest text that the model was trained on.
        seed: Seed for the choice of passages.

    Raises:
        UsageError: The model's texts are too short to hold a context and its repetition.
    """

    def __init__(self, text: TextModel, collections: Sequence[Sequence[str]], longest: int, seed: int) -> None:
        self._text, self._collections, self._rng, self._drawn = text, collections, random.Random(seed), 0
        self._prefix, self._request = text.encode(""), text.encode(REQUEST, special=False)
        self._room = longest - len(self._prefix)
        if (self._room - len(self._request)) // 2 < SHORTEST:
            raise UsageError(
                f"the model was trained on texts of {longest} tokens, too few to read a text and repeat it",
                hint=NO_FIT,
            )

    def read(self, tokens: int, *, repeat: bool) -> Reading:
        """Return a context of so many tokens, or as many as the model can read, with its repetition if wanted."""
        context = self._draw(min(tokens, (self._room - len(self._request)) // 2 if repeat else self._room))
        start = [*self._prefix, *context]
        if not repeat:
            return Reading(start, len(start), 1)
        return Reading([*start, *self._request, *context], len(start), len(start) + len(self._request))

    def _draw(self, tokens: int) -> list[int]:
        collection = self._collections[self._drawn % len(self._collections)]
        self._drawn += 1
        context: list[int] = []
        while len(context) < tokens:
            ids = self._text.encode(self._rng.choice(collection) + "\n\n", special=False)
            if not ids:
                raise UsageError("the model's tokenizer makes no tokens of a text", hint=NO_FIT)
            context += ids
        return context[:tokens]
