"""Run a model in its own process, so that its memory is its own: `Worker` sends JSON lines to `serve` there.

A worker has named sessions, which share only the weights. Times are measured in the worker's process.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from ligerexport.errors import LigerError
from ligerexport.measure.bench.genai import GenAI, in_genai
from ligerexport.measure.bench.llama import LlamaCpp
from ligerexport.measure.bench.machine import device_memory, effort, memory
from ligerexport.measure.opened import Timed, open_model

FACTS = (
    "kind", "precision", "device", "runtime", "grows", "fills", "room", "vocab_size", "trained_length", "weight_bytes",
)  # fmt: skip
WARM = 32
"""Tokens of a warm-up, which allocates and is not timed."""


class Worker:
    """Starts the process of a model and communicates with it.

    Args:
        model: See `open_model`.
        **options: See `open_model`, or `LlamaCpp` if `length` is among them.

    Attributes:
        facts: `FACTS` of `Timed`, and the memory of the process.

    Raises:
        LigerError: The model cannot be opened.
    """

    def __init__(self, model: str, **options: Any) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed by `close`)
        root = str(Path(__file__).parents[3])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "ligerexport.measure.bench.worker", json.dumps({"model": model, **options})],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment,
        )  # fmt: skip
        self.model = model
        self.facts: dict[str, Any] = self._answer()

    def __call__(self, do: str, session: str = "", **arguments: Any) -> dict[str, Any]:
        """Call a method of `_Server`; return its answer and the memory of the process after the call.

        Raises:
            LigerError: The call failed, or the process ended.
        """
        assert self._process.stdin is not None
        with suppress(BrokenPipeError, ValueError):  # `_answer` reports why
            self._process.stdin.write(json.dumps({"do": do, "session": session, **arguments}) + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._log.seek(0)
            last = self._log.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise LigerError(f"the process of {self.model} ended with {code}: {last or 'no message'}",
                             hint="there may be too little memory; try a shorter context")  # fmt: skip
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            error = LigerError(answer["error"], hint=answer["hint"])
            error.exit_code = answer["exit_code"]
            raise error
        return answer

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout, self._log):
            with suppress(BrokenPipeError):
                pipe.close()  # type: ignore[union-attr]


class _Server:
    """The side of the model's process: its methods are the requests of `Worker`."""

    def __init__(self, model: Timed) -> None:
        self._model = model
        self._sessions: dict[str, Timed] = {"": model}

    def prefill(self, session: str, ids: list[list[int]]) -> dict[str, Any]:
        """Read ids `[B, T]`; the first use of a name starts its session."""
        model = self._session(session)
        start = time.perf_counter()
        tokens = model.advance(ids)
        return {"tokens": tokens, "seconds": time.perf_counter() - start}

    def warm(self, session: str) -> dict[str, Any]:
        """Read and decode a little, which allocates, and reset the session."""
        self.restart(session)  # so that the model itself, which stays, gets no memory of a sequence
        model = self._sessions[session]
        tokens = model.advance([[1] * WARM] * model.batch)
        model.advance([[token] for token in tokens])
        return self.restart(session)

    def fill(self, session: str, tokens: int) -> dict[str, Any]:
        """Fill a cache without reading."""
        return {"tokens": self._session(session).fill(tokens)}

    def decode(self, session: str, tokens: list[int], count: int = 1) -> dict[str, Any]:
        """Decode `count` tokens greedily after ids `[B]`; return the ids `[count, B]` and the seconds of each."""
        model, written, seconds = self._session(session), [], []
        for _ in range(count):
            start = time.perf_counter()
            tokens = model.advance([[token] for token in tokens])
            seconds.append(time.perf_counter() - start)
            written.append(tokens)
        return {"tokens": written, "seconds": seconds}

    def held(self, session: str) -> dict[str, Any]:
        """Say which positions a session holds."""
        return {"held": self._session(session).held()}

    def close(self, session: str) -> dict[str, Any]:
        """Forget a session."""
        self._sessions.pop(session, None)
        return {}

    def restart(self, session: str) -> dict[str, Any]:
        """Reset a session."""
        batch = self._sessions.pop(session, self._model).batch
        self._sessions[session] = self._model.sibling(batch)
        return {}

    def _session(self, name: str) -> Timed:
        if name not in self._sessions:
            self._sessions[name] = self._model.sibling()
        return self._sessions[name]

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Handle one request."""
        done = getattr(self, request.pop("do"))(**request)
        model = self._sessions.get(request["session"])
        state, forgotten = (model.state_bytes, model.forgotten()) if model else (0, None)
        facts = {"state_bytes": state, "forgotten": forgotten, "device": device_memory()}
        return done | facts | memory() | effort()


def serve(options: dict[str, Any], requests: IO[str], answers: IO[str]) -> None:
    """Open a model and answer until the requests end."""

    def say(answer: dict[str, Any]) -> None:
        answers.write(json.dumps(answer) + "\n")
        answers.flush()

    try:
        model: Timed
        if "length" in options:
            model = LlamaCpp(Path(options.pop("model")).expanduser(), **options)
        elif in_genai(options["model"]):
            model = GenAI(Path(options["model"]).expanduser(), options.get("batch", 1), options.get("threads"))
        else:
            model = open_model(**options)
        say({name: getattr(model, name) for name in FACTS} | {"memory": memory()})
        server = _Server(model)
        for line in requests:
            try:
                say(server.answer(json.loads(line)))
            except (LigerError, RuntimeError, MemoryError) as error:  # torch raises RuntimeError when memory runs out
                say(_explain(error))
    except LigerError as error:
        say(_explain(error))


def _explain(error: BaseException) -> dict[str, Any]:
    first = str(error).partition("\n")[0] or type(error).__name__
    code = getattr(error, "exit_code", LigerError.exit_code)
    return {"error": first, "hint": getattr(error, "hint", None), "exit_code": code}


if __name__ == "__main__":
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries is not an answer
    serve(json.loads(sys.argv[1]), sys.stdin, pipe)
