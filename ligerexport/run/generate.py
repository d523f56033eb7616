"""Generate text with a `Session`: stop strings, streaming, conversations."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import UsageError
from ligerexport.reading import give_back_memory
from ligerexport.run.grammar import Constrained, Grammar, lark
from ligerexport.run.prompt_cache import PromptCache
from ligerexport.run.runtime import Session, Snapshot
from ligerexport.run.sampling import Sampler
from ligerexport.run.speculation import Guessing, settled
from ligerexport.text.tokenizer import Detokenizer, Message, TextModel, eos_ids

Finish = Literal["eos", "stop", "length"]


@dataclass(frozen=True)
class Summary:
    """The cost of a generation.

    Attributes:
        prompt_tokens: Number of tokens in the prompt.
        new_tokens: Number of sampled tokens, an end-of-text token included.
        ttft: Seconds from the call to the first token.
        decode_seconds: Seconds for all later tokens, without the time of the stream's reader.
        state_bytes: Bytes of the session's state at the end.
        finish: Reason for the end: an end-of-text id or that of a grammar, a stop string, or `max_new_tokens`.
        cached_tokens: Number of `prompt_tokens` that came from a prompt cache.
        forgotten: Mean of the chunks' `forgotten`.
    """

    prompt_tokens: int
    new_tokens: int
    ttft: float
    decode_seconds: float
    state_bytes: int
    finish: Finish
    cached_tokens: int = 0
    forgotten: float | None = None

    @property
    def tokens_per_second(self) -> float | None:
        """Speed of decoding after the first token; None if there was only one."""
        return (self.new_tokens - 1) / self.decode_seconds if self.new_tokens > 1 else None


@dataclass(frozen=True)
class Chunk:
    """One sampled token.

    Attributes:
        text: The text that the token completes. It is empty for part of a character or of a stop string.
        token: The token's id.
        seconds: Time in seconds, which is the TTFT for the first token.
        finish: Reason for the end, on the last chunk.
        summary: The summary, on the last chunk.
        forgotten: Smallest share of the attention from which the token was predicted that fell on forgotten tokens, as
            the mean of all layers; None if it is unknown or was not asked for.
    """

    text: str
    token: int
    seconds: float
    finish: Finish | None = None
    summary: Summary | None = None
    forgotten: float | None = None


class StopStrings:
    """Cuts a stream of text before the first stop string, even if that arrives in pieces.

    Args:
        stops: The stop strings.
        special: Special tokens with their ids. A stop string that begins with such a token stops at its id.

    Raises:
        UsageError: A stop string has text before a special token.
    """

    def __init__(self, stops: Sequence[str], special: Mapping[str, int] | None = None) -> None:
        self._stops = [stop for stop in stops if stop]
        self._held = ""
        self.ids = frozenset(
            index for token, index in (special or {}).items() if any(stop.startswith(token) for stop in self._stops)
        )
        for stop in self._stops:
            inside = tuple(token for token in special or () if token in stop)
            if inside and not stop.startswith(inside):
                raise UsageError(
                    f"the stop string {stop!r:.60} has text before the special token {inside[0]}",
                    hint="give text, or a stop string that begins with the special token",
                )

    def push(self, text: str) -> tuple[str, bool]:
        """Return the text that cannot be part of a stop string, and whether one was found."""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            out, self._held = self._held[: min(found)], ""
            return out, True
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        out, self._held = self._held[:cut], self._held[cut:]
        return out, False

    def flush(self) -> str:
        """Return the text that was held back, which is no stop string."""
        out, self._held = self._held, ""
        return out


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def generate(
    session: Session,
    prompt: str | Sequence[int] | None = None,
    *,
    messages: Sequence[Message] | None = None,
    chat: bool = False,
    special_content: bool = False,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    seed: int | None = None,
    stop: Sequence[str] = (),
    json_schema: Mapping[str, Any] | None = None,
    regex: str | None = None,
    grammar: str | None = None,
    fresh: bool = True,
    prompt_cache: PromptCache | Path | str | None = None,
    report_forgetting: bool = False,
    speculate: str | Session = "auto",
    progress: ProgressFactory = silent,
) -> Generator[Chunk]:
    """Continue a prompt, one token after the other.

    When the stream ends or is closed, the session has seen the prompt and every token but the last one.

    Args:
        session: A session of one sequence.
        prompt: Text, or ids that are used unchanged.
        messages: A conversation, instead of a prompt.
        chat: Whether to render the prompt as a question with the chat template.
        special_content: Whether special tokens in the content of messages act as such, not as text.
        max_new_tokens: Largest number of tokens to sample.
        temperature: See `Sampler`; 0 takes the most likely token.
        top_k: See `Sampler`.
        top_p: See `Sampler`.
        min_p: See `Sampler`.
        repetition_penalty: See `Sampler`; it ignores tokens of earlier calls.
        presence_penalty: See `Sampler`.
        frequency_penalty: See `Sampler`.
        seed: See `Sampler`.
        stop: Text or special token that ends the generation and is not part of it, or several.
        json_schema: JSON schema that the text fits, on one line. `max_new_tokens` may cut it off before its end.
        regex: Regular expression that the whole text fits, instead of a schema.
        grammar: Grammar that the text follows, in the form of Lark or of llama.cpp (GBNF), instead of a schema.
        fresh: Whether to reset the session first; if not, the prompt continues the session's text.
        prompt_cache: File that keeps the state after the beginning of the prompt for later calls.
        report_forgetting: Whether chunks have `forgotten`, which is None if `session.forgotten` is.
        speculate: `ngram` guesses tokens from earlier places of the text, to write several in one call of the engine
            where that is faster; a session of a smaller model with the same tokenizer lets this model guess; `off` does
            not guess, and `auto` is `ngram` with the lowering `native` if tokens are sampled without a seed. It has no
            effect with `report_forgetting`, or if `session.drafts` is not true.
        progress: Reports the prefill of long prompts.

    Returns:
        A generator of chunks, the last with a summary; closing it ends the text there.

    Raises:
        UsageError: There is no prompt or more than one, it has no tokens, a value makes no sense, there is no chat
            template, a stop string has text before a special token, or a schema or grammar cannot be used.
        ArtifactError: The prompt is text, or the answer has a grammar, but the model has no tokenizer.
        MissingDependency: A schema or a grammar needs the `grammar` extra.
        LigerError: `prompt_cache` is a file of another kind, or cannot be written.
    """
    if (prompt is None) == (messages is None):
        raise UsageError("expected either a prompt or messages")
    sampler = Sampler(
        temperature, top_k, top_p, seed, min_p=min_p, repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty, frequency_penalty=frequency_penalty,
    )  # fmt: skip
    text = None
    if messages is not None or isinstance(prompt, str):
        text = text_model(session.artifact.directory)
    if isinstance(prompt, str):
        check_text(prompt)
    if messages is None and chat:
        if not isinstance(prompt, str):
            raise UsageError("chat needs a prompt of text, not ids")
        messages = [{"role": "user", "content": prompt}]
    if text is not None and messages is not None:
        for message in messages:
            check_text(str(message.get("content")), f"a message of the role {message.get('role')}")
        ids = text.encode_chat(messages, special_content=special_content)
    elif text is not None:
        special = fresh or not session.position.any()
        ids = text.encode(str(prompt), special=special)
    else:
        ids = [int(token) for token in prompt or ()]
        if (session.artifact.directory / "tokenizer.json").is_file():
            text = text_model(session.artifact.directory)
    _check(session, ids, max_new_tokens)
    guessing = Guessing(session, "off" if report_forgetting else speculate, sampler)
    if fresh:
        session.reset()
    elif prompt_cache is not None:
        raise UsageError("prompt_cache with fresh=False", hint="a cache is for the beginning of a text; leave one out")
    if prompt_cache is not None:
        _check_no_adapter(session)
    cache = PromptCache(prompt_cache) if isinstance(prompt_cache, str | Path) else prompt_cache
    stops = StopStrings(_stops(stop), text.special_ids if text else None)
    ends = eos_ids(session.artifact.directory) if text is None else text.eos_ids if messages is None else text.turn_ends
    choose: Sampler | Constrained = sampler
    if (source := lark(json_schema, regex, grammar)) is not None:
        text = text or text_model(session.artifact.directory)
        rules = Grammar(text, session.artifact.manifest.model.vocab_size, ends, source)
        choose = Constrained(sampler, rules.begin())
    meter = session if report_forgetting else None
    ahead = guessing.on(ids)
    return settled(ahead, _stream(ahead, ids, text, choose, max_new_tokens, ends, stops, cache, progress, meter))


def _check(session: Session, ids: Sequence[int], max_new_tokens: int) -> None:
    if session.batch != 1:
        raise UsageError(f"this session runs {session.batch} sequences", hint="load the artifact with batch=1")
    if not ids:
        raise UsageError("the prompt has no tokens", hint="give at least one token of text")
    if max_new_tokens < 1:
        raise UsageError(f"max_new_tokens {max_new_tokens}", hint="give at least 1")


def _check_no_adapter(session: Session) -> None:
    if any(getattr(session, "adapters", ())):
        raise UsageError(
            "prompt_cache with an adapter", hint="its states are those of the model without one; leave it out"
        )


def _stops(stop: Sequence[str]) -> list[str]:
    """Return the stop strings as a list, even if there is only one."""
    stops = [stop] if isinstance(stop, str) else list(stop)
    for text in stops:
        check_text(text, "a stop string")
    return stops


def check_text(text: str, what: str = "the prompt") -> None:
    """Refuse unpaired surrogates, by which Python represents bytes that are not UTF-8.

    Raises:
        UsageError: The text has an unpaired surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = ord(text[error.start])
        encoding = "utf-16" if text[:2] in ("\udcff\udcfe", "\udcfe\udcff") else "latin1"
        found = f"the byte 0x{half - 0xDC00:02x}" if 0xDC80 <= half <= 0xDCFF else f"half a character, U+{half:04X},"
        raise UsageError(
            f"{what} is not UTF-8: {found} comes after {error.start} characters",
            hint=f"convert it first, for instance with: iconv -f {encoding} -t utf-8",
        ) from None


def text_model(directory: Path) -> TextModel:
    """Return the tokenizer and chat template of a directory, which are read again only if they change."""
    file = directory / "tokenizer.json"
    return _text_model(directory.resolve(), file.stat().st_mtime_ns if file.is_file() else 0)


@lru_cache(maxsize=4)
def _text_model(directory: Path, changed: int) -> TextModel:
    model = TextModel(directory)
    give_back_memory()
    return model


_PREFILL = 16
"""Number of engine calls between two reports of progress."""


def _stream(
    session: Session,
    ids: Sequence[int],
    text: TextModel | None,
    sampler: Sampler | Constrained,
    max_new_tokens: int,
    ends: Set[int],
    stops: StopStrings,
    cache: PromptCache | None,
    progress: ProgressFactory,
    meter: Session | None = None,
) -> Generator[Chunk]:
    clock = time.perf_counter()
    sampler.read(ids)
    prompt = np.asarray(ids, np.int64)
    start = cached = cache.restore(session, prompt) if cache else 0
    with progress("reading the prompt", len(prompt) - start, "steps") as advance:
        while start < len(prompt):
            end = start + session.chunk * _PREFILL
            if cache and start < cache.keep:
                end = min(end, cache.keep)
            logits = session.prefill(part := prompt[start:end])
            advance(len(part))
            start += len(part)
            if cache and start == cache.keep:
                cache.save(session, prompt[:start])
    detokenizer = Detokenizer(text, ids) if text else None
    ttft = decode = 0.0
    shares = list[float]()
    for count in range(1, max_new_tokens + 1):
        token, out = sampler(logits[0]), ""
        finish: Finish | None = None
        if token in ends:
            finish = "eos"
        elif token in stops.ids:
            finish = "stop"
        else:
            out, stopped = stops.push(detokenizer.push(token) if detokenizer else "")
            complete = isinstance(sampler, Constrained) and sampler.complete
            finish = "stop" if stopped else "eos" if complete else "length" if count == max_new_tokens else None
        if finish in ("eos", "length") or token in stops.ids:
            rest, stopped = stops.push(detokenizer.flush() if detokenizer else "")
            out += rest + stops.flush()
        seconds = time.perf_counter() - clock
        ttft, decode = (seconds, 0.0) if count == 1 else (ttft, decode + seconds)
        share = None if meter is None or meter.forgotten is None else float(meter.forgotten[0].mean())
        shares += [] if share is None else [share]
        mean = sum(shares) / len(shares) if shares else None
        summary = Summary(len(ids), count, ttft, decode, session.state_bytes, finish, cached, mean) if finish else None
        yield Chunk(out, token, seconds, finish, summary, share)
        if finish:
            return
        clock = time.perf_counter()
        logits = session.step(token)


class Conversation:
    """The turns of a chat on one session. The session's state is the only memory, so a turn prefills only its own text.

    Args:
        session: A session of one sequence; earlier text stays in its state.
        sampler: Sampler for all turns; its repetition penalty counts their ids; None decodes greedily.
        system: A system message, which the first turn includes.
        max_new_tokens: Largest number of tokens in an answer.
        stop: Text or special token that ends an answer, or several.
        prompt_cache: See `generate`; it applies to the first turn.
        special_content: See `generate`.
        speculate: See `generate`; earlier turns are looked up too.

    Raises:
        ArtifactError: The model has no tokenizer.
        UsageError: The model has no chat template, or a stop string has text before a special token.
    """

    def __init__(
        self,
        session: Session,
        sampler: Sampler | None = None,
        *,
        system: str | None = None,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        prompt_cache: PromptCache | None = None,
        special_content: bool = False,
        speculate: str | Session = "auto",
    ) -> None:
        if prompt_cache is not None:
            _check_no_adapter(session)
        self.session, self._sampler = session, sampler or Sampler()
        self._guessing = Guessing(session, speculate, self._sampler)
        self._text = text_model(session.artifact.directory)
        self._text.next_turn("?")
        StopStrings(stop, self._text.special_ids)
        self._special_content = special_content
        check_text(system or "", "the system message")
        self._system = [{"role": "system", "content": system}] if system else []
        self._max_new_tokens, self._stop, self._cache = max_new_tokens, _stops(stop), prompt_cache
        self._unseen: list[int] = []  # sampled and shown, but not yet fed to the session

    @property
    def position(self) -> int:
        """Number of tokens seen."""
        return int(self.session.position[0])

    @property
    def state_bytes(self) -> int:
        """Bytes of the state."""
        return self.session.state_bytes

    def say(self, text: str) -> Generator[Chunk]:
        """Stream the model's answer. Closing the stream ends the answer; the conversation can continue."""
        check_text(text)
        cache = None
        if self.session.position.any():
            ids = self._unseen + self._text.encode_next(text, special_content=self._special_content)
        else:
            turns = [*self._system, {"role": "user", "content": text}]
            ids, cache = self._text.encode_chat(turns, special_content=self._special_content), self._cache
        _check(self.session, ids, self._max_new_tokens)
        ends, stops = self._text.turn_ends, StopStrings(self._stop, self._text.special_ids)
        self._unseen = []
        ahead, limit = self._guessing.on(ids), self._max_new_tokens
        chunks = _stream(ahead, ids, self._text, self._sampler, limit, ends, stops, cache, silent)
        for chunk in settled(ahead, chunks):
            ended = chunk.token in ends | stops.ids  # the next turn includes the end of the answer
            self._unseen = [] if ended else [chunk.token]
            yield chunk

    def reset(self) -> None:
        """Forget everything."""
        self.session.reset()
        self._guessing.forget()
        self._sampler.forget()
        self._unseen = []

    def save(self, path: Path | str) -> None:
        """Write the conversation's state to a file."""
        if self._unseen:
            self.session.prefill(self._unseen)
            self._unseen = []
        self.session.snapshot().save(path)

    def load(self, path: Path | str) -> None:
        """Continue a saved conversation, whose tokens the repetition penalty and guesses do not know."""
        self.session.restore(Snapshot.load(path))
        self._guessing.forget()
        self._sampler.forget()
        self._unseen = []
