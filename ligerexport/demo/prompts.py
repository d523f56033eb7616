"""The questions to both models: presets, and real text before the question.

`filler.txt` has Theodore Roosevelt's annual messages to Congress of 1905 and, in part, 1906. They are in the public
domain, as works of the government of the United States and because of their age.
"""

from __future__ import annotations

import random
import secrets
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ligerexport.errors import UsageError
from ligerexport.text.tokenizer import TextModel

MOST = 32_768
"""Largest number of filler tokens."""
NEEDLE = " The secret pass key is {key}."
QUESTION = " What is the secret pass key? The secret pass key is {key}"


@dataclass(frozen=True)
class Preset:
    """A kind of question.

    Attributes:
        name: Name on the page.
        prompt: Text in the prompt field; empty if the page writes the question itself.
        context: Number of filler tokens before the question.
        tokens: Largest number of tokens to write.
    """

    name: str
    prompt: str
    context: int
    tokens: int


CHAT = Preset("Short question", "Explain in a few sentences why the sky is blue.", 0, 128)
SUMMARISE = Preset("Summarise", "Summarise the text above in three sentences.", 2048, 128)
PASSKEY = Preset("Find a pass key", "", 1024, 8)
PRESETS = {preset.name: preset for preset in (SUMMARISE, PASSKEY, CHAT)}
FIRST = SUMMARISE
"""The preset that the page opens with: a text that is long enough for a constant memory to matter."""


@cache
def filler() -> str:
    """Return the filler text."""
    return (Path(__file__).parent / "filler.txt").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Question:
    """Ids for both models, and the key that the answer must contain, if there is one."""

    ids: tuple[int, ...]
    key: str | None = None


def ask(
    text: TextModel, preset: str, prompt: str, context: int, depth: float = 0.5, seed: int | None = None
) -> Question:
    """Put a question after real text.

    Args:
        preset: Row of `PRESETS`.
        prompt: The user's prompt; the preset with the pass key has its own.
        context: Number of filler tokens.
        depth: Position of the pass key in the filler, from 0 (beginning) to 1 (end).

    Raises:
        UsageError: There is no prompt, or no text that it could summarise.
    """
    if preset == PASSKEY.name:
        key = "".join(random.choices("0123456789", k=5))
        words = filler_ids(text, context)
        at = round(max(0.0, min(1.0, depth)) * len(words))
        needle = text.encode(NEEDLE.format(key=key), special=False)
        question = text.encode(QUESTION.format(key=key), special=False)
        answer = max(i for i in range(len(question)) if text.decode(question[i:]).strip() == key)
        start = text.encode("")  # ids that begin every text, such as BOS
        return Question((*start, *words[:at], *needle, *words[at:], *question[:answer]), key)
    if not prompt.strip():
        raise UsageError("there is no question", hint="type one, or choose an example")
    words = filler_ids(text, context)
    if not words and prompt.strip() == SUMMARISE.prompt:
        raise UsageError("there is no text above the question", hint="choose a longer text, or another question")
    here = secrets.token_hex(16) if words else ""  # a string that no user types
    content = f"{here}\n\n{prompt.strip()}" if words else prompt.strip()
    if not text.chat_template:
        return Question((*text.encode(""), *words, *text.encode(content.removeprefix(here), special=False)))
    rendered = text.render([{"role": "user", "content": content}], marked=True)
    before, found, after = rendered.partition(here) if here else (rendered, "", "")
    if not found:
        return Question(tuple(text.encode_rendered(before)))
    return Question((*text.encode_rendered(before), *words, *text.encode_rendered(after)))


def filler_ids(text: TextModel, count: int) -> list[int]:
    """Return the first tokens of the filler text."""
    return _encoded(text)[:count] if count else []


@cache
def _encoded(text: TextModel) -> list[int]:
    return text.encode(filler(), special=False)
