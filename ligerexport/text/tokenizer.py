"""Encode and decode text with the files of a model: tokenizer, chat template, end-of-text ids, detokenisation.

Only the `tokenizers` library is used, and jinja2 by `render.py`: an artifact runs without torch and transformers.
"""

from __future__ import annotations

import json
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.errors import ArtifactError, UsageError
from ligerexport.text.marks import encode_marked, is_marked, mark
from ligerexport.text.render import Renderer
from ligerexport.text.tokens import HINT, complete, read_config

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

Message = Mapping[str, Any]
"""A turn of a conversation: `role` and `content`."""

_GROWTH = 64
"""Largest number of characters that a tokenizer may make of one."""
_SHORT = 1 << 14
"""Largest number of characters that are encoded while other threads wait; the library lets them run in batches only."""
_CLEANED = ((" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"),
            (" 's", "'s"), (" 've", "'ve"), (" 're", "'re"))  # fmt: skip
"""Replacements of `clean_up_tokenization_spaces`, in this order."""
_LONGEST = 4
"""Number of bytes of the longest character."""
_CONTEXT = 8
"""Number of earlier tokens on which a text may depend: more than the bytes of a character."""
_PRINTABLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(sorted(set(range(256)) - set(_PRINTABLE)))
}
"""Byte of each character in the tokens of a byte-level vocabulary, as GPT-2 defined it."""
_UNCLEAN = re.compile(r" [ ']*(?:n ?'? ?|[vr])?\Z")
"""End of a text that may be the beginning of a replaced part."""


def eos_ids(directory: Path) -> frozenset[int]:
    """Return the ids that end a text, as generation_config.json and config.json name them.

    Raises:
        ArtifactError: The ids are not numbers.
    """
    ids: list[int] = []
    for name in ("generation_config.json", "config.json"):
        found = read_config(directory / name).get("eos_token_id")
        found = found if isinstance(found, list) else [] if found is None else [found]
        if not all(type(x) is int for x in found):
            raise ArtifactError(f"{directory / name} has the eos_token_id {found!r:.60}", hint=HINT)
        ids += found
    return frozenset(ids)


class TextModel:
    """Turns text into ids and back for one model.

    Args:
        directory: Directory with `tokenizer.json` and, if the model has them, `tokenizer_config.json`,
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
            self._special = complete(self._tokenizer, directory)
        self._directory = directory
        self._config = read_config(directory / "tokenizer_config.json")

    def write_tokenizer(self, file: Path) -> None:
        """Write a tokenizer.json that includes the settings of the files beside it, for programs that read no other.

        If those add nothing, it is an exact copy.
        """
        from tokenizers import Tokenizer

        own = self._directory / "tokenizer.json"
        if Tokenizer.from_file(str(own)).to_str() == self._tokenizer.to_str():
            shutil.copyfile(own, file)
        else:
            self._tokenizer.save(str(file))

    @cached_property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a text, from the configurations and the tokenizer's `eos_token`."""
        return eos_ids(self._directory) | self._ids("eos_token")

    @cached_property
    def turn_ends(self) -> frozenset[int]:
        """Ids that end an answer: those that end a text, and the special token that the template puts after answers."""
        try:
            after = self.next_turn("?").lstrip()
        except UsageError:
            return self.eos_ids
        found = max((token for token in self.controls if after.startswith(token)), key=len, default=None)
        return self.eos_ids | self._id_of(found)

    @cached_property
    def eos_id(self) -> int | None:
        """Id to put after a complete text, from the configurations or, if they have none, from the tokenizer.

        If there are several, the smallest id ends a text, and the others end turns of a chat.
        """
        return min(eos_ids(self._directory) or self._ids("eos_token"), default=None)

    @cached_property
    def bos_id(self) -> int | None:
        """Id that begins a text; None if no file names one."""
        return next(iter(self._ids("bos_token")), None)

    def _ids(self, name: str) -> frozenset[int]:
        return self._id_of(self._special.get(name))

    def _id_of(self, token: str | None) -> frozenset[int]:
        found = None if token is None else self._tokenizer.token_to_id(token)
        return frozenset() if found is None else frozenset({found})

    @cached_property
    def vocabulary(self) -> dict[str, int]:
        """Every token with its id, added tokens included."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @cached_property
    def chat_template(self) -> str | None:
        """Source of the chat template; None if the model has none."""
        file = self._directory / "chat_template.jinja"
        if file.is_file():
            try:
                return file.read_text(encoding="utf-8")
            except ValueError as error:
                raise ArtifactError(f"{file} is not text: {error}", hint=HINT) from error
        found = self._config.get("chat_template")
        if isinstance(found, list):  # several named templates, as in older checkpoints
            named = [entry for entry in found if isinstance(entry, dict)]
            found = next((entry.get("template") for entry in named if entry.get("name") == "default"), None)
        return found if isinstance(found, str) else None

    @cached_property
    def _template(self) -> Renderer:
        return Renderer(self.chat_template or "")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of a text; `special` adds the ids of the tokenizer's post-processor, such as BOS."""
        if len(text) > _SHORT:
            return self.encode_batch([text], special=special)[0]
        with _answering(self._directory / "tokenizer.json"):
            return self._tokenizer.encode(text, add_special_tokens=special).ids

    def encode_batch(self, texts: Sequence[str], *, special: bool = True) -> list[list[int]]:
        """Return the ids of each text, as `encode` does, on all cores."""
        with _answering(self._directory / "tokenizer.json"):
            return [found.ids for found in self._tokenizer.encode_batch_fast(texts, add_special_tokens=special)]

    def decode(self, ids: Sequence[int], *, final: bool = True) -> str:
        """Return the text of ids without special tokens; `final=False` omits an end that later ids may change."""
        with _answering(self._directory / "tokenizer.json"):
            text = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        if not final:
            text = text.removesuffix("\ufffd")  # the beginning of a character, whose other bytes may follow
        if self._cleans_up:
            text = text if final else _UNCLEAN.sub("", text)
            for spaced, clean in _CLEANED:
                text = text.replace(spaced, clean)
        return text

    @cached_property
    def _cleans_up(self) -> bool:
        """Whether decoding removes spaces that English does not have; transformers does not do so for BPE."""
        wanted = self._config.get("clean_up_tokenization_spaces", False)
        return bool(wanted) and type(self._tokenizer.model).__name__ != "BPE"

    @cached_property
    def byte_ids(self) -> frozenset[int]:
        """Ids of byte tokens, if the decoder joins bytes; an invalid byte invalidates its neighbours."""
        if "ByteFallback" not in self._decoder:
            return frozenset()
        return frozenset().union(*(self._id_of(f"<0x{byte:02X}>") for byte in range(256)))

    @cached_property
    def special_ids(self) -> dict[str, int]:
        """Special tokens, which are not text, with their ids."""
        return {token.content: index for index, token in self._added.items() if token.special}

    @cached_property
    def _added(self) -> dict[int, AddedToken]:
        found = self._tokenizer.get_added_tokens_decoder()
        return {index: token for index, token in found.items() if token.content}

    @cached_property
    def controls(self) -> frozenset[str]:
        """The special tokens, and the added tokens in the chat template that are not whitespace."""
        template = self.chat_template or ""
        contents = {token.content for token in self._added.values()}
        written = {content for content in contents if content in template and not content.isspace()}
        return frozenset(written | self.special_ids.keys())

    def has_text(self, token: int) -> bool:
        """Return whether an id has text: its token is not special."""
        return token not in self._silent and self._tokenizer.id_to_token(token) is not None

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes of UTF-8 that a token stands for; a special token stands for its name."""
        name = self._tokenizer.id_to_token(token) or ""
        if token in self.byte_ids:
            return bytes([int(name[3:5], 16)])
        if token not in self._added and "ByteLevel" in self._decoder:
            return bytes(_BYTES[character] for character in name)
        return name.replace("▁", " ").encode()

    @cached_property
    def _decoder(self) -> str:
        return str(self._tokenizer.decoder)

    @cached_property
    def _silent(self) -> frozenset[int]:
        return frozenset(self.special_ids.values())

    def render(
        self, messages: Sequence[Message], *, answer: bool = True, marked: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:  # fmt: skip
        """Return a conversation rendered by the chat template, as transformers' `apply_chat_template` does.

        Args:
            messages: The turns.
            answer: Whether to end with the header of the model's next turn.
            marked: Whether the special tokens in the content of messages are marked as text, for `encode_rendered`.
            tools: Functions that the model may call, each with OpenAI's fields.

        Raises:
            UsageError: There is no template, or it refuses these messages.
        """
        if not self.chat_template:
            raise UsageError("this model has no chat template", hint="use `ligerexport run` without --chat")
        turns = [{key: value for key, value in message.items() if value is not None} for message in messages]
        if marked:  # tokens that the model writes in answers, such as <think>, are not marked
            turns = [
                mark(turn, self.special_ids if turn.get("role") == "assistant" else self.controls) for turn in turns
            ]
            tools = mark(tools, self.controls)
        try:
            own = {"messages": turns, "tools": tools, "documents": None, "add_generation_prompt": answer}
            return self._template(**(self._special | own))
        except ValueError as error:
            raise UsageError(
                f"the chat template refuses this conversation: {error}", hint="use `ligerexport run` without --chat"
            ) from error

    def next_turn(self, text: str, *, marked: bool = False) -> str:
        """Return the text between the model's last answer and its next one if the user says `text`."""
        last = secrets.token_hex(16)  # a string that no user types
        messages = [("user", "?"), ("assistant", last), ("user", text)]
        whole = self.render([{"role": role, "content": content} for role, content in messages], marked=marked)
        _, found, rest = whole.rpartition(last)
        if not found:
            raise UsageError("this chat template drops earlier answers", hint="use /reset before each question")
        return rest

    def encode_rendered(self, text: str) -> list[int]:
        """Return the ids of `render(marked=True)`'s output, in which special tokens in messages are text."""
        return encode_marked(text, self.controls, partial(self.encode, special=False), self._encode_plainly)

    def encode_rendered_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, as `encode_rendered` does; texts without marks use all cores."""
        unmarked = iter(self.encode_batch([text for text in texts if not is_marked(text)], special=False))
        return [self.encode_rendered(text) if is_marked(text) else next(unmarked) for text in texts]

    def encode_chat(
        self, messages: Sequence[Message], *, special_content: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:  # fmt: skip
        """Return the ids of a conversation up to the model's next answer.

        Args:
            messages: The turns.
            special_content: Whether special tokens in the content of messages act as such, not as text.
            tools: See `render`.
        """
        if special_content:
            return self.encode(self.render(messages, tools=tools), special=False)
        return self.encode_rendered(self.render(messages, marked=True, tools=tools))

    def encode_next(self, text: str, *, special_content: bool = False) -> list[int]:
        """Return the ids of `next_turn`; see `encode_chat`."""
        if special_content:
            return self.encode(self.next_turn(text), special=False)
        return self.encode_rendered(self.next_turn(text, marked=True))

    def _encode_plainly(self, text: str) -> list[int]:
        """Return the ids of a text without looking for added tokens in it."""
        normalizer, splitter, model = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer, self._tokenizer.model
        with _answering(self._directory / "tokenizer.json"):
            whole = normalizer.normalize_str(text) if normalizer else text
            parts = [part for part, _ in splitter.pre_tokenize_str(whole)] if splitter else [whole]
            ids = [token.id for part in parts for token in model.tokenize(part)]
        if len(text) > 1 and not self._silent.isdisjoint(ids):  # the vocabulary has special tokens as pieces of text
            return [token for character in text for token in self._encode_plainly(character)]
        return ids


@contextmanager
def _answering(file: Path) -> Iterator[None]:
    """Turn every exception of the tokenizer library, panics included, into an `ArtifactError`."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, ArtifactError):
        raise
    except BaseException as error:
        raise ArtifactError(f"{file} cannot be read or does not work: {error}", hint=HINT) from error


def _check_growth(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer whose chained replacements make a text much longer.

    Raises:
        ValueError: The replacements exceed the limit.
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
    """Turns ids into text one at a time; the pieces together are the text of all ids.

    A character whose bytes are spread over tokens is returned with the last of them. The text of consecutive byte
    tokens depends on all of them, so it is returned with the next token of another kind.

    Args:
        model: The tokenizer.
        context: Ids before the first one. Their text is not returned, except a character that they leave incomplete.
    """

    def __init__(self, model: TextModel, context: Sequence[int] = ()) -> None:
        self._model = model
        self._ids: list[int] = []  # the ids that later text depends on
        self._out = 0  # number of characters of their text that were returned
        known = [token for token in context if model.has_text(token)]
        start = max(0, len(known) - _CONTEXT)
        while start and (known[start] in model.byte_ids or not model.decode(known[start : start + 1])):
            start -= 1
        for token in known[start:]:
            self.push(token)
        if self._ids and self._ids[-1] in model.byte_ids:  # complete characters are context only
            texts = [model.decode(self._ids[: len(self._ids) - cut]) for cut in range(_LONGEST)]
            self._out = len(next((text for text in texts if not text.endswith("\ufffd")), texts[0]))

    def push(self, token: int) -> str:
        """Return the text that this token completes."""
        if not self._model.has_text(token):
            return ""
        self._ids.append(token)
        if token in self._model.byte_ids:
            return ""
        text = self._model.decode(self._ids, final=False)
        new, self._out = text[self._out :], max(self._out, len(text))
        if new:  # the text that is not returned yet begins in this token
            held = self._model.decode(self._ids)[len(text) :]
            for size in (1, 2):  # the first token of a text may lose its leading space
                short = self._model.decode(self._ids[-size:])
                if short and short.endswith(held):
                    self._ids, self._out = self._ids[-size:], len(short) - len(held)
                    break
        return new

    def flush(self) -> str:
        """Return the text that was held back, such as an incomplete character."""
        new = self._model.decode(self._ids)[self._out :]
        self._out += len(new)
        return new
