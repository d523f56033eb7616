"""Text in and out of a model's directory: tokenizer, chat template, end-of-text ids, incremental detokenisation.

Only the `tokenizers` library is used, and jinja2 by `render.py`: an artifact runs without torch and transformers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.errors import ArtifactError, UsageError
from ligerexport.reading import read_json
from ligerexport.render import Renderer

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Message = Mapping[str, Any]
"""A turn of a conversation: `role` and `content`."""

_MARK = "[[the answer]]"
_GROWTH = 64
"""Characters that a tokenizer may make of one."""
_HELD_BYTES = 4
"""Longest UTF-8 character; more tokens than this without a whole character are no beginning of one."""


_HINT = "copy the model's own files there again"


def eos_ids(directory: Path) -> frozenset[int]:
    """Return the ids that end a text, from the generation configuration or else the model's.

    Raises:
        ArtifactError: They are no numbers.
    """
    for name in ("generation_config.json", "config.json"):
        found = _json(directory / name).get("eos_token_id")
        if found is not None:
            ids = found if isinstance(found, list) else [found]
            if not all(type(x) is int for x in ids):
                raise ArtifactError(f"{directory / name} has the eos_token_id {found!r:.60}", hint=_HINT)
            return frozenset(ids)
    return frozenset()


def _json(file: Path) -> dict[str, Any]:
    return read_json(file, ArtifactError, _HINT) if file.is_file() else {}


class TextModel:
    """Everything that turns text into ids and back for one model.

    Args:
        directory: With `tokenizer.json` and, where the model has them, `tokenizer_config.json`,
            `chat_template.jinja`, `generation_config.json` and `config.json`.

    Raises:
        ArtifactError: There is no `tokenizer.json`, or it cannot be read.
    """

    def __init__(self, directory: Path) -> None:
        from tokenizers import Tokenizer

        file = directory / "tokenizer.json"
        if not file.is_file():
            raise ArtifactError(
                f"{directory} has no tokenizer.json",
                hint="put the model's tokenizer.json beside its weights and build again; token ids work without it",
            )
        with _answering(file):
            self._tokenizer = Tokenizer.from_file(str(file))
            self._tokenizer.no_truncation()
            self._tokenizer.no_padding()
            _check_growth(self._tokenizer)
        self._directory = directory
        self._config = _json(directory / "tokenizer_config.json")

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text, from the generation configuration or else the model's."""
        return eos_ids(self._directory)

    @cached_property
    def bos_id(self) -> int | None:
        """Id that begins a text, as tokenizer_config.json names it; None where it names none."""
        name = self._special.get("bos_token")
        return None if name is None else self._tokenizer.token_to_id(name)

    @property
    def _special(self) -> dict[str, str]:
        """What tokenizer_config.json calls `bos_token` and the like."""
        found = {
            name: token.get("content") if isinstance(token, dict) else token
            for name, token in self._config.items()
            if name.endswith("_token")
        }
        return {name: token for name, token in found.items() if isinstance(token, str)}

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def chat_template(self) -> str | None:
        """Source of the chat template, None where the model has none."""
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except ValueError as error:
                raise ArtifactError(f"{file} is no text: {error}", hint=_HINT) from error
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several by name, as older checkpoints have it
            named = [entry for entry in found if isinstance(entry, dict)]
            found = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        return found if isinstance(found, str) else None

    @cached_property
    def _template(self) -> Renderer:
        return Renderer(self.chat_template or "")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text; `special` adds what the tokenizer's post-processor says, such as BOS."""
        with _answering(self._directory / "tokenizer.json"):
            return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, with all cores at once."""
        with _answering(self._directory / "tokenizer.json"):
            return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        with _answering(self._directory / "tokenizer.json"):
            return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def render(self, messages: Sequence[Message], *, answer: bool = True) -> str:
        """Return a conversation as the model was trained to read it, as transformers' `apply_chat_template` does.

        Args:
            messages: The turns.
            answer: Whether to end with the header of the model's next turn.

        Raises:
            UsageError: There is no template, or it refuses these messages.
        """
        if not self.chat_template:
            raise UsageError("this model has no chat template", hint="use `ligerexport run` without --chat")
        try:
            return self._template(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=answer, **self._special
            )
        except ValueError as error:
            raise UsageError(
                f"the chat template refuses this conversation: {error}", hint="use `ligerexport run` without --chat"
            ) from error

    def next_turn(self, text: str) -> str:
        """Return what goes between the model's last answer and its next one when the user says `text`."""
        messages = [("user", "?"), ("assistant", _MARK), ("user", text)]
        whole = self.render([{"role": role, "content": content} for role, content in messages])
        _, found, rest = whole.rpartition(_MARK)
        if not found:
            raise UsageError("this chat template drops earlier answers", hint="use /reset before each question")
        return rest


@contextmanager
def _answering(file: Path) -> Iterator[None]:
    """Let a tokenizer's library fail with an `ArtifactError`; it raises Exception itself, and panics are none."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ArtifactError):
        raise
    except BaseException as error:
        raise ArtifactError(f"{file} cannot be read or does not work: {error}", hint=_HINT) from error


def _check_growth(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose replacements make more and more of a text, each of what the last one made.

    Raises:
        ValueError: It does.
    """
    for part in (tokenizer.normalizer, tokenizer.decoder):
        growth, left = 1, [json.loads(part.__getstate__())] if part is not None else []
        while left:
            step = left.pop()
            left += step.get("normalizers") or step.get("decoders") or []
            growth *= max(1, len(step.get("content") or "") if step["type"] == "Replace" else 1)
        if growth > _GROWTH:
            raise ValueError(f"its replacements make {growth} characters of one")


class Detokenizer:
    """Turn ids into text one at a time; a character whose bytes are spread over tokens comes with its last token.

    Args:
        model: The tokenizer.
        context: Ids before the first one; its end decides about leading spaces.
    """

    def __init__(self, model: TextModel, context: Sequence[int] = ()) -> None:
        self._model = model
        self._ids = list(context[-4:])
        self._done = len(self._ids)  # ids before this one are printed
        self._start = 0  # where decoding starts: some ids before `_done`

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        self._ids.append(token)
        text = self._new()
        if text.endswith("\ufffd") and len(self._ids) - self._done < _HELD_BYTES:
            return ""
        self._ids = self._ids[self._start :]
        self._start, self._done = self._done - self._start, len(self._ids)
        return text

    def flush(self) -> str:
        """Return what is left of a character that never ended."""
        text, self._done = self._new(), len(self._ids)
        return text

    def _new(self) -> str:
        printed = self._model.decode(self._ids[self._start : self._done])
        return self._model.decode(self._ids[self._start :])[len(printed) :]
