"""Kill replicas of the Ray Serve application with SIGKILL while chats go on, and check every answer.

    python tests/trust/replicas.py ARTIFACT -o benchmarks/results/replicas.json

It starts Ray on this machine, with two replicas that share their states in a directory. Clients hold chats of several
turns, half of them streaming; a request that fails, or a stream that ends with an error, is sent again, as clients do.
Then one server without Ray gets the same requests. `different` counts answers that are not the same to the token;
`gaps` are the log probabilities by which the first other token is behind, where batches of other sizes round otherwise.
`from_state` counts the later turns for which the prompt of the turn before was not read again.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import json
import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import ray
from ray import serve

from ligerexport.measure.bench.machine import cpu_name
from ligerexport.serve.app import make_app
from ligerexport.serve.forward import Call, Head, answer
from ligerexport.serve.models import open_models
from ligerexport.serve.ray import Arguments, app

NAME = f"replicas-{os.getpid()}"
TRIES = 20
"""Number of times that a client sends a request."""
JSON = {"Content-Type": "application/json"}


@dataclass
class Turn:
    """A request, the tokens of its answer, and its usage."""

    body: dict[str, Any]
    tokens: list[str]
    usage: dict[str, Any]


def read(raw: bytes) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """Return text, log probabilities and usage of a response or of a whole stream.

    Raises:
        ValueError: It ends with an error, or too early.
    """
    if not raw.startswith(b"data: "):
        content = json.loads(raw)
        choice = content["choices"][0]
        return choice["message"]["content"], choice["logprobs"]["content"], content["usage"]
    lines = [line[6:] for line in raw.split(b"\n") if line.startswith(b"data: ")]
    if lines[-1] != b"[DONE]":
        raise ValueError("the stream was cut off")
    chunks = [json.loads(line) for line in lines[:-1]]
    if any("error" in chunk for chunk in chunks):
        raise ValueError("the stream ended with an error")
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, [x for choice in choices for x in (choice["logprobs"] or {}).get("content", ())], chunks[-1]["usage"]


def hold(port: int, chat: int, args: argparse.Namespace, done: threading.Semaphore, failed: list[int]) -> list[Turn]:
    """Hold one chat."""
    said = [{"role": "user", "content": f"{chat}. " + "The river runs to the sea. " * args.words}]
    turns = []
    for turn in range(args.turns):
        body = {"model": "m", "messages": list(said), "max_tokens": args.tokens, "temperature": 0, "logprobs": True,
                "top_logprobs": 5, "stream": chat % 2 == 0, "stream_options": {"include_usage": True}}  # fmt: skip
        for _ in range(TRIES):
            connection = http.client.HTTPConnection("127.0.0.1", port)
            with suppress(ValueError, OSError, http.client.HTTPException):
                connection.request("POST", "/v1/chat/completions", json.dumps(body), JSON)
                response = connection.getresponse()
                raw = response.read()
                if response.status == 200:
                    text, tokens, usage = read(raw)
                    break
            connection.close()
            failed.append(chat)
        else:
            raise AssertionError(f"chat {chat} got no answer")
        turns.append(Turn(body, [token["token"] for token in tokens], usage))
        said += [{"role": "assistant", "content": text}, {"role": "user", "content": f"And then? {turn}"}]
        done.release()
    return turns


def replicas() -> list[int]:
    """Return the process ids of the replicas."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if (place / "cmdline").read_bytes().startswith(f"ray::ServeReplica:{NAME}:Replica".encode()):
                found.append(int(place.name))
    return found


@contextmanager
def running(artifact: Path, states: Path, args: argparse.Namespace) -> Iterator[int]:
    """Run the application; yield its port."""
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error",
             object_store_memory=100 << 20)  # fmt: skip
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": args.port})
        made = Arguments(artifact=artifact, name="m", state_dir=str(states), replicas=2, max_batch=4)
        serve.run(app(made), name=NAME)
        yield args.port
    finally:
        serve.shutdown()
        ray.shutdown()


def alone(artifact: Path, turns: list[Turn]) -> list[float]:
    """Ask one server, one request after the other; return how far the first other token of an answer is behind."""
    models = open_models("m", artifact, {}, longest=256, deadline=None, max_batch=1, memory=1 << 28, threads=1)
    single, gaps = make_app(models), []

    async def ask(body: dict[str, Any]) -> bytes:
        raw = json.dumps(body | {"stream": False, "stream_options": None}).encode()
        headers = ((b"content-type", b"application/json"),)
        call = Call("POST", "/v1/chat/completions", b"", headers, raw, None, ())
        return b"".join([piece async for piece in answer(single, call) if not isinstance(piece, Head)])

    async def compare() -> None:
        for turn in turns:
            _, tokens, _ = read(await ask(turn.body))
            for token, found in zip(tokens, turn.tokens, strict=False):
                if token["token"] != found:
                    others = {other["token"]: other["logprob"] for other in token["top_logprobs"]}
                    gaps.append(token["logprob"] - others.get(found, float("-inf")))
                    break
            else:
                assert len(tokens) == len(turn.tokens)

    asyncio.run(compare())
    models[0].engine.close()
    return gaps


def check(artifact: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Hold chats, kill replicas meanwhile, and compare the answers."""
    done, failed, killed = threading.Semaphore(0), list[int](), 0
    clock = time.monotonic()
    with tempfile.TemporaryDirectory() as states:
        with running(artifact, Path(states), args) as port, ThreadPoolExecutor(args.chats) as pool:
            chats = [pool.submit(hold, port, chat, args, done, failed) for chat in range(args.chats)]
            every = args.chats * args.turns // (args.kills + 1)
            for _ in range(args.kills):
                for _ in range(every):
                    done.acquire()
                if found := replicas():
                    os.kill(found[0], signal.SIGKILL)
                    killed += 1
            turns = [chat.result() for chat in chats]
        files = len(list(Path(states).rglob("*.state")))
    later = [(one, two) for chat in turns for one, two in pairwise(chat)]
    cached = [two.usage["prompt_tokens_details"]["cached_tokens"] - one.usage["prompt_tokens"] for one, two in later]
    gaps = alone(artifact, [turn for chat in turns for turn in chat])
    return {
        "chats": args.chats, "turns": args.turns, "killed": killed, "answers": sum(map(len, turns)),
        "sent_again": len(failed), "later_turns": len(later),
        "from_state": sum(tokens >= -1 for tokens in cached), "different": len(gaps), "gaps": gaps, "files": files,
        "seconds": time.monotonic() - clock,
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("artifact", type=Path)
    made.add_argument("-o", "--output", type=Path, required=True)
    made.add_argument("--chats", type=int, default=8)
    made.add_argument("--turns", type=int, default=6)
    made.add_argument("--kills", type=int, default=2)
    made.add_argument("--words", type=int, default=20)
    made.add_argument("--tokens", type=int, default=24)
    made.add_argument("--port", type=int, default=18731)
    return made


def main(words: list[str] | None = None) -> None:
    """Check one artifact."""
    args = parser().parse_args(words)
    result = {
        "command": f"python tests/trust/replicas.py ARTIFACT --chats {args.chats} --turns {args.turns} "
        f"--tokens {args.tokens} --words {args.words} -o benchmarks/results/replicas.json",
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {name: version(name) for name in ("ray", "fastapi", "onnxruntime")},
        **check(args.artifact.resolve(), args),
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
