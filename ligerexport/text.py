"""Text in and out of a model's directory: tokenizer, chat template, end-of-text ids, incremental detokenisation.

Only the `tokenizers` library and jinja2 are used, so running an artifact needs neither torch nor transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from ligerexport.errors import ArtifactError, UsageError

Message = Mapping[str, Any]
"""A turn of a conversation: `role` and `content`."""

_MARK = "[[the answer]]"
_HELD_BYTES = 4
"""Longest UTF-8 character; more tokens than this without a whole character are no beginning of one."""


def eos_ids(directory: Path) -> frozenset[int]:
    """Return the ids that end a text, from the generation configuration or else the model's."""
    for name in ("generation_config.json", "config.json"):
        found = _json(directory / name).get("eos_token_id")
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


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
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises Exception itself
            raise ArtifactError(f"{file} cannot be read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._directory = directory
        self._config = self._json("tokenizer_config.json")

    def _json(self, name: str) -> dict[str, Any]:
        return _json(self._directory / name)

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text, from the generation configuration or else the model's."""
        return eos_ids(self._directory)

    @cached_property
    def bos_id(self) -> int | None:
        """Id that begins a text, as tokenizer_config.json names it; None where it names none."""
        token = self._config.get("bos_token")
        name = token["content"] if isinstance(token, dict) else token
        return None if name is None else self._tokenizer.token_to_id(name)

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added ones too."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def chat_template(self) -> str | None:
        """Source of the chat template, None where the model has none."""
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            return file.read_text(encoding="utf-8")
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several by name, as older checkpoints have it
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        return found

    @cached_property
    def _template(self) -> Any:
        """The compiled chat template: compiling takes longer than rendering."""
        return _environment().from_string(self.chat_template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text; `special` adds what the tokenizer's post-processor says, such as BOS."""
        return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, with all cores at once."""
        return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
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
        from jinja2 import TemplateError

        names = {
            name: token["content"] if isinstance(token, dict) else token
            for name, token in self._config.items()
            if name.endswith("_token") and isinstance(token, (str, dict))
        }
        try:
            return self._template.render(
                messages=list(messages), tools=None, documents=None, add_generation_prompt=answer, **names
            )
        except TemplateError as error:
            raise UsageError(f"the chat template refuses this conversation: {error}") from error

    def next_turn(self, text: str) -> str:
        """Return what goes between the model's last answer and its next one when the user says `text`."""
        messages = [("user", "?"), ("assistant", _MARK), ("user", text)]
        whole = self.render([{"role": role, "content": content} for role, content in messages])
        _, found, rest = whole.rpartition(_MARK)
        if not found:
            raise UsageError("this chat template drops earlier answers", hint="use /reset before each question")
        return rest


def _environment() -> Any:
    """Return jinja's sandbox with what chat templates may expect, as transformers sets it up."""
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks answers for training; here it is transparent."""

        tags = {"generation"}  # noqa: RUF012  (as jinja declares it)

        def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


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
