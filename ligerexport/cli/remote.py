"""A conversation with a server of OpenAI's API, for `chat --server`; it needs only Python's own HTTP client."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ligerexport.cli.prompting import Asking
from ligerexport.errors import LigerError, UsageError
from ligerexport.serve.keys import read_keys

if TYPE_CHECKING:
    from ligerexport.run.generate import Chunk, Finish

_FINISHES: dict[str, Finish] = {"length": "length"}
"""Our names for a server's reasons to end; it does not tell a stop string from an end of the text."""


@dataclass(frozen=True)
class Server:
    """The options for a server instead of an artifact."""

    server: Annotated[str | None, typer.Option("--server", metavar="URL", help="Chat with a server instead.")] = None
    model: Annotated[str | None, typer.Option("--model", help="Its model; default: the first one.")] = None
    api_key_file: Annotated[
        Path | None, typer.Option("--api-key-file", help="File whose first key is sent to the server.")
    ] = None

    def connect(self, asking: Asking, system: str | None, max_new_tokens: int) -> RemoteConversation:
        """Return a conversation.

        Raises:
            UsageError: An option applies to artifacts only, or the server has no such model.
            LigerError: The server cannot be reached, or refuses.
        """
        if asking.prompt_cache or asking.special_content or asking.lora or asking.speculate not in ("auto", "off"):
            raise UsageError(
                "--prompt-cache, --special-content, --lora and --speculate need an artifact",
                hint="leave them out; a server's adapters are models: --model NAME:ADAPTER",
            )
        key = read_keys(self.api_key_file)[0] if self.api_key_file else None
        settings, _ = asking.sampling(Path(), False)
        fields = settings | {"seed": asking.seed, "stop": asking.stop, "max_tokens": max_new_tokens}
        return RemoteConversation(str(self.server), key, self.model, system, fields)


class RemoteConversation:
    """The turns of a chat whose model and state are on a server.

    Each turn sends the whole conversation. The server continues from the state that it kept.

    Args:
        server: Its address, with or without `/v1`.
        key: Key to show; None shows none.
        model: Name of the model; None takes the first one.
        system: A system message.
        fields: Further fields of each request.

    Raises:
        UsageError: The server has no such model.
        LigerError: The server cannot be reached, or refuses.
    """

    def __init__(
        self, server: str, key: str | None, model: str | None, system: str | None, fields: Mapping[str, Any]
    ) -> None:
        if not server.startswith(("http://", "https://")):
            raise UsageError(f"--server {server}", hint="give an address such as http://127.0.0.1:8080")
        self._base = server.rstrip("/").removesuffix("/v1") + "/v1/"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._fields = fields
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []
        with self._ask("models") as answer:
            try:
                known = {row["id"]: row for row in json.load(answer)["data"]}
            except (ValueError, KeyError, TypeError):
                raise LigerError(
                    f"{self._base}models is no list of models", hint="give a server's own address"
                ) from None
        self._model = next(iter(known), "") if model is None else model
        if self._model not in known:
            raise UsageError(f"{server} has no model '{self._model}'", hint=f"choose from {', '.join(known)}")
        self.position = 0
        self.state_bytes = int(known[self._model].get("state_bytes") or 0)

    def _ask(self, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._base + path, content, self._headers)
        try:
            return urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(1 << 16)
            try:
                message = json.loads(said)["error"]["message"]
            except (ValueError, KeyError, TypeError):
                message = error.reason
            hint = "give the key: --api-key-file FILE" if error.code == 401 else None
            raise LigerError(f"{self._base}{path}: {message}", hint=hint) from None
        except OSError as error:
            raise LigerError(
                f"cannot reach {self._base}: {getattr(error, 'reason', error)}",
                hint="start a server: ligerexport serve ARTIFACT",
            ) from None

    def say(self, text: str) -> Generator[Chunk]:
        """Stream the model's answer. Closing the stream ends the answer; the conversation can continue."""
        from ligerexport.run.generate import Chunk, Summary

        clock = time.perf_counter()
        asked = {"role": "user", "content": text}
        body = {"model": self._model, "messages": [*self._system, *self._turns, asked], "stream": True,
                "stream_options": {"include_usage": True}, **self._fields}  # fmt: skip
        said, ttft, finish, usage = "", 0.0, "stop", dict[str, Any]()
        with self._ask("chat/completions", body) as answer:
            self._turns += [asked, {"role": "assistant", "content": ""}]
            for event in _events(answer):
                if "error" in event:
                    raise LigerError(f"the server ended the answer: {event['error'].get('message')}", hint="ask again")
                choice: dict[str, Any] = next(iter(event.get("choices") or ()), {})
                finish = choice.get("finish_reason") or finish
                if piece := choice.get("delta", {}).get("content"):
                    said += piece
                    self._turns[-1]["content"] = said
                    ttft = ttft or time.perf_counter() - clock
                    yield Chunk(piece, -1, time.perf_counter() - clock)
                usage = event.get("usage") or usage
        self.position = usage.get("total_tokens", 0)
        total, ended = time.perf_counter() - clock, _FINISHES.get(finish, "eos")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        summary = Summary(usage.get("prompt_tokens", 0), usage.get("completion_tokens", 0), ttft, total - ttft,
                          self.state_bytes, ended, cached)  # fmt: skip
        yield Chunk("", -1, total, ended, summary)

    def reset(self) -> None:
        """Forget everything."""
        self._turns, self.position = [], 0

    def save(self, path: Path | str) -> NoReturn:
        """Refuse: the server keeps the state."""
        raise UsageError(
            "the server keeps the state of this conversation", hint="/save needs: ligerexport chat ARTIFACT"
        )

    load = save


def _events(answer: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a stream of server-sent events.

    Raises:
        LigerError: The connection ended within it.
    """
    try:
        for line in answer:
            if line.startswith(b"data: {"):
                yield json.loads(line[6:])
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise LigerError(f"the server ended the answer: {error or type(error).__name__}", hint="ask again") from None
