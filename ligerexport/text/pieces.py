"""A chat template as a few pieces of text, for programs that run an artifact and have no jinja.

Most templates only put text before and after what is said. The pieces are taken from the template's own output and
compared with it; a template that does more has none.
"""

from __future__ import annotations

import secrets
from itertools import product
from typing import Any

from ligerexport.errors import UsageError
from ligerexport.text.tokenizer import TextModel

PIECES = "chat.json"
"""File of the artifact with what `chat_pieces` returns."""
_SAID = ("Hi", " \n Two  lines\n {{ 1 }}\t", "\\n'é🙂\"<b>")
"""What may be said, but for an empty text: the pieces have to give what the template gives for each of them."""


def chat_pieces(model: TextModel) -> dict[str, Any] | None:
    """Return the pieces of a model's chat template, or None if it has none or does more than to put them together.

    Returns:
        `first`, the texts before and after a question that begins a conversation; `system`, those before, between and
        after a system message and such a question, or None if the template does more with one; `next`, those between
        the model's last answer and the next question, and after it; `trims`, whether white space around a message is
        removed; `special`, the tokens that a message may not contain; `ends`, the ids that end an answer.
    """
    template = model.chat_template
    if not template or "strftime_now" in template:  # the date of the build would stay for ever
        return None
    try:
        first, system, following = _between(model, ["user"]), _between(model, ["system", "user"]), _after_answer(model)
        for trims in (False, True) if first and following else ():
            pieces: dict[str, Any] = {"first": first, "next": following, "trims": trims}
            if _fit(model, pieces):
                pieces["system"] = system if system and _fits_system(model, system, trims) else None
                return pieces | {"special": sorted(model.controls), "ends": sorted(model.turn_ends)}
    except UsageError:  # it refuses a conversation
        pass
    return None


def _between(model: TextModel, roles: list[str]) -> list[str] | None:
    """Return the texts before, between and after the messages of a conversation; None if they are refused or lost."""
    said = [secrets.token_hex(16) for _ in roles]  # strings that no template has
    found: list[str] = []
    try:
        rest = model.render([{"role": role, "content": content} for role, content in zip(roles, said, strict=True)])
    except UsageError:
        return None
    for content in said:
        before, separator, rest = rest.partition(content)
        if not separator:
            return None
        found.append(before)
    return [*found, rest]


def _after_answer(model: TextModel) -> list[str] | None:
    said = secrets.token_hex(16)
    before, found, after = model.next_turn(said).partition(said)
    return [before, after] if found else None


def join(pieces: list[str], *said: str, trims: bool) -> str:
    """Return the text of messages between their pieces."""
    contents = [text.strip() if trims else text for text in said]
    return pieces[0] + "".join(content + piece for content, piece in zip(contents, pieces[1:], strict=True))


def _fit(model: TextModel, pieces: dict[str, Any]) -> bool:
    """Return whether the pieces give what the template gives, in later turns too."""
    trims = pieces["trims"]
    for question in _SAID:
        turns = [{"role": "user", "content": question}]
        if model.render(turns) != join(pieces["first"], question, trims=trims):
            return False
        for _ in range(3):
            last = secrets.token_hex(16)
            turns += [{"role": "assistant", "content": last}, {"role": "user", "content": question}]
            if model.render(turns).rpartition(last)[2] != join(pieces["next"], question, trims=trims):
                return False
    return True


def _fits_system(model: TextModel, pieces: list[str], trims: bool) -> bool:
    for said, question in product(_SAID, _SAID):
        turns = [{"role": "system", "content": said}, {"role": "user", "content": question}]
        if model.render(turns) != join(pieces, said, question, trims=trims):
            return False
    return True
