"""Faults of clients, disks and processes against `ligerexport serve`: what goes wrong, and what is left in memory.

    python tests/trust/serve_faults.py -o benchmarks/results/serve_faults.json

The server is a process of its own with a tiny model of random weights, or with ARTIFACT. Every row counts what went
`wrong`: an answer that is not that of `lx.generate`, a status or a form of an error that OpenAI's API does not have, a
traceback in the log, a pinned state that was acknowledged and is gone. `growth` is how many bytes more the memory has
afterwards. `skipped` says that a row needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import platform
import random
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does

from serving import Process

import ligerexport as lx
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.measure.bench.machine import cpu_name
from ligerexport.run.generate import text_model

PATH = "/v1/completions"
GOOD: dict[str, Any] = {"model": "toy", "prompt": [5, 6, 7], "max_tokens": 2, "temperature": 0}
WRONG: tuple[Any, ...] = (
    -1,
    1e99,
    "x",
    None,
    [],
    {},
    [[]],
    True,
    "\ud800",
    "x" * 3000,
    1 << 70,
    [-1],
    {"a": {}},
    float("nan"),
)
"""Values that few fields take."""
FIELDS = (
    "prompt",
    "n",
    "stop",
    "logit_bias",
    "seed",
    "stream",
    "top_p",
    "max_tokens",
    "temperature",
    "logprobs",
    "model",
)
PATHS = ("/v2", "/v1/chat/completions", "/v1/states/x", "/v1/models/x", "/tokenize", "/%00", "/v1/../..")
RAW = (b"\x16\x03\x01\x02\x00\x01\x00", b"GET\r\n\r\n", b"POST /v1/completions HTTP/9.9\r\n\r\n", b"\xff\xfe\x00" * 50,
       b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: -5\r\n\r\n",
       b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 999\r\n\r\n{",
       b"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}\r\n",
       b"GET / HTTP/1.1\r\n" + b"A: " + b"b" * 70_000 + b"\r\n\r\n")  # fmt: skip
"""What is not even HTTP, or not whole."""


class Trial:
    """What a row works with.

    Args:
        artifact: The artifact.
        place: Empty directory for files.
        share: Factor of the numbers of requests.

    Attributes:
        wrong: What went wrong, and how often.
    """

    def __init__(self, artifact: Path, place: Path, share: float) -> None:
        self.artifact, self.place, self.share = artifact, place, share
        self.wrong = Counter[str]()
        self._session, self._lock = lx.load(artifact, threads=1), threading.Lock()
        self.endless = {"logit_bias": {str(token): -100 for token in text_model(artifact).eos_ids}}
        self.vocabulary = min(250, self._session.artifact.manifest.model.vocab_size)

    def count(self, whole: int) -> int:
        """Return a number of requests, of which the long form has `whole`."""
        return max(1, round(whole * self.share))

    @contextlib.contextmanager
    def server(self, *words: object) -> Iterator[Process]:
        """Serve the artifact as a process, which must end well unless it was killed."""
        server = Process(f"toy={self.artifact}", "--threads", 1, *words, log=self.place / "log")
        try:
            yield server
            if server.process.poll() is None:
                self.works(server)
                self.wrong["exit code"] += server.stop() != 0
        finally:
            server.process.kill()
            server.process.wait()
        if "Traceback" in (said := server.log.read_text()):
            self.wrong["traceback"] += 1
            print(said[-3000:], file=sys.stderr)

    def prompt(self, seed: int, tokens: int) -> list[int]:
        """Return random ids."""
        return np.random.default_rng(seed).integers(0, self.vocabulary, tokens).tolist()

    def alone(self, prompt: list[int], most: int) -> tuple[list[int], str]:
        """Return the ids and the text that `lx.generate` writes."""
        with self._lock:
            chunks = list(lx.generate(self._session, prompt, max_new_tokens=most))
        return [chunk.token for chunk in chunks], "".join(chunk.text for chunk in chunks)

    def answer(
        self, server: Process, prompt: list[int], most: int = 6, expected: tuple[list[int], str] | None = None
    ) -> tuple[list[int], int]:
        """Ask, and check the answer; return its ids, and how many of the prompt came from a state."""
        ids, text = expected or self.alone(prompt, most)
        status, body, _ = server.ask(PATH, GOOD | {"prompt": prompt, "max_tokens": most})
        if status != 200:
            self.wrong[f"status {status}"] += 1
            return ids, 0
        self.wrong["answer"] += body["choices"][0]["text"] != text
        return ids, body["usage"]["prompt_tokens_details"]["cached_tokens"]

    def works(self, server: Process) -> None:
        """Check that the server still answers, and that nothing runs any more."""
        self.answer(server, self.prompt(1, 40))
        for _ in range(100):
            if not (busy := sum(self.figure(server, name) for name in ("running", "reading", "waiting"))):
                break
            time.sleep(0.1)
        self.wrong["rows that still run"] += bool(busy)

    @staticmethod
    def figure(server: Process, name: str) -> float:
        """Return a figure of `/metrics`, summed over its labels."""
        lines = server.ask("/metrics")[1].decode().splitlines()
        names = (f"ligerexport_{name}{{", f"ligerexport_{name}_total{{")
        return sum(float(line.split()[-1]) for line in lines if line.startswith(names))


def stream(server: Process, body: dict[str, Any]) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
    """Begin a stream."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("POST", PATH, json.dumps(GOOD | {"stream": True} | body), {"Content-Type": "application/json"})
    return connection, connection.getresponse()


def malformed(trial: Trial) -> dict[str, Any]:
    """Send requests that are cut, mutated, of wrong types, to wrong paths, or no HTTP at all."""
    draw, seen = random.Random(1), Counter[str]()

    def one(server: Process, connection: http.client.HTTPConnection) -> None:
        kind = draw.choice(("cut", "bytes", "type", "field", "path", "raw"))
        seen[kind] += 1
        body, path, method = json.dumps(GOOD).encode(), PATH, "POST"
        if kind == "raw":
            with socket.create_connection(("127.0.0.1", server.port), timeout=10) as raw:
                raw.sendall(draw.choice(RAW))
                raw.shutdown(socket.SHUT_WR)
                raw.recv(1 << 16)
            return
        if kind == "cut":
            body = body[: draw.randrange(len(body))]
        elif kind == "bytes":
            at = draw.randrange(len(body))
            body = body[:at] + draw.randbytes(draw.randrange(1, 200)) + body[at:]
        elif kind == "type":
            body = json.dumps(GOOD | {draw.choice(FIELDS): draw.choice(WRONG)}).encode()
        elif kind == "field":
            body = json.dumps(GOOD | {"x" * draw.randrange(1, 500): 1}).encode()
        else:
            path, method = draw.choice(PATHS), draw.choice(("POST", "GET", "PUT", "DELETE"))
        connection.request(method, path, body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        status, content = response.status, response.read()
        seen[str(status)] += 1
        if status >= 500 or (status >= 400 and "message" not in json.loads(content)["error"]):
            trial.wrong["status or form"] += 1
            print(status, kind, method, path, body[:200], content[:300], file=sys.stderr)

    with trial.server() as server:
        connection = http.client.HTTPConnection("127.0.0.1", server.port)
        whole = trial.count(10_000)
        for number in range(whole):
            if number == whole // 5:
                before = server.memory()
            one(server, connection)
        growth = server.memory() - before
    return {"requests": whole, "seen": dict(sorted(seen.items())), "growth": growth}


def cancelled(trial: Trial) -> dict[str, Any]:
    """Leave streams before, within and after the prompt, several at a time."""

    def one(number: int) -> None:
        prompt = trial.prompt(number, 20 + number % 300)
        connection, response = stream(server, {"prompt": prompt, "max_tokens": 400} | trial.endless)
        for _ in range(number % 7):
            response.readline()
        response.close()
        connection.close()

    with trial.server("--memory", "2MB") as server:
        whole = trial.count(1_000)
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(one, range(whole // 5)))
            before = server.memory()
            list(pool.map(one, range(whole // 5, whole)))
        clock = time.monotonic()
        trial.works(server)
        seconds = time.monotonic() - clock
        stepped, growth = trial.figure(server, "stepped"), server.memory() - before
    return {"requests": whole, "steps_per_request": stepped / whole, "seconds_until_idle": seconds, "growth": growth}


def killed(trial: Trial) -> dict[str, Any]:
    """Kill the server under load and continue all chats; states that it said to have pinned are there."""
    draw, states = random.Random(2), trial.place / "states"
    chats = {number: trial.prompt(number, 60 + 7 * number) for number in range(12)}
    pinned: set[str] = set()
    rows = Counter[str]()
    words = ("--state-dir", states, "--memory", "300KB", "--max-batch", 4)

    def turn(server: Process, number: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):  # the server was killed
            ids, cached = trial.answer(server, chats[number])
            rows["turns"] += 1
            rows["cached"] += cached > 0
            chats[number] = [*chats[number], *ids, *trial.prompt(len(chats[number]), 20)]
            if rows["turns"] % 5 == 0:
                row = server.ask("/v1/states")[1]["data"][0]
                if server.ask(f"/v1/states/{row['id']}", {"pinned": True})[0] == 200:
                    pinned.add(row["id"])

    for _ in range(trial.count(20)):
        with trial.server(*words) as server:
            listed = {row["id"] for row in server.ask("/v1/states")[1]["data"] if row["pinned"]}
            trial.wrong["pinned states that are gone"] += len(pinned - listed)
            timer = threading.Timer(draw.uniform(0.05, 1.5), server.process.kill)
            timer.start()
            with ThreadPoolExecutor(4) as pool:
                while server.process.poll() is None:
                    list(pool.map(turn, [server] * 4, draw.sample(sorted(chats), 4)))
            rows["kills"] += 1
    with trial.server(*words) as server:
        for number in chats:
            turn(server, number)
    files = list(states.glob("*/*/*/*.state"))
    for file in files:
        Snapshot.load(file)
    trial.wrong["leftovers"] += len(list(states.rglob("*.partial")))
    return {**rows, "pinned": len(pinned), "files": len(files)}


def full(trial: Trial) -> dict[str, Any]:
    """Let the disk for states be full; every answer is right, and what is on the disk is whole."""
    place = trial.place / "full"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True).returncode:
        return {"skipped": "needs root"}
    try:
        with trial.server("--state-dir", place, "--memory", "100KB") as server:
            whole = trial.count(200)
            for number in range(whole):
                trial.answer(server, trial.prompt(number, 60))
            said = server.log.read_text().count("was not written")
        files = list(place.rglob("*.state"))
        for file in files:
            Snapshot.load(file)
        with trial.server("--state-dir", place):
            pass
    finally:
        subprocess.run(["umount", place], check=True)
    trial.wrong["no fault"] += not said
    return {"requests": whole, "refused_writes": said, "files": len(files)}


def slow(trial: Trial) -> dict[str, Any]:
    """Let clients read nothing while their answers are written; another one is served, and they get all in the end."""
    most, clients = 2_000, trial.count(40)

    def pace(server: Process) -> float:
        found = []
        for _ in range(7):
            connection, response = stream(server, {"max_tokens": 200} | trial.endless)
            times = [time.perf_counter() for line in response if line.startswith(b"data: {")]
            connection.close()
            found.append(1e3 * (times[-1] - times[0]) / 199)
        return float(np.median(found))

    with trial.server("--max-batch", 8, "--max-new-tokens", most) as server:
        alone, before = pace(server), server.memory()
        body = {"max_tokens": most, "stream_options": {"include_usage": True}} | trial.endless
        open_ones = [stream(server, body | {"prompt": trial.prompt(i, 30)}) for i in range(clients)]
        while trial.figure(server, "running") + trial.figure(server, "waiting"):
            time.sleep(0.2)
        beside, growth = pace(server), server.memory() - before
        for _, response in open_ones:
            last = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")][-1]
            trial.wrong["cut answers"] += last["usage"]["completion_tokens"] != most
        for connection, _ in open_ones:
            connection.close()
    return {
        "clients": clients, "tokens_each": most, "ms_per_token": alone,
        "ms_per_token_beside": beside, "growth_per_client": growth / clients,
    }  # fmt: skip


def prompt(trial: Trial) -> dict[str, Any]:
    """Send a prompt of two million tokens beside a stream."""
    tokens = trial.count(2_000_000)
    ids, gaps, end = trial.prompt(7, tokens), list[float](), threading.Event()
    peaks = []

    def watch() -> None:
        last = time.perf_counter()
        connection, response = stream(server, {"max_tokens": 1 << 30, "prompt": trial.prompt(8, 40)} | trial.endless)
        for line in response:
            if line.startswith(b"data: {"):
                now = time.perf_counter()
                gaps.append(now - last)
                last = now
                peaks.append(server.memory() if len(gaps) % 50 == 0 else 0)
            if end.is_set():
                break
        connection.close()

    with trial.server() as server:
        trial.works(server)
        expected, before = trial.alone(ids, 4), server.memory()
        watcher = threading.Thread(target=watch)
        watcher.start()
        clock = time.monotonic()
        trial.answer(server, ids, 4, expected)
        seconds = time.monotonic() - clock
        end.set()
        watcher.join()
    return {"tokens": tokens, "seconds": seconds, "bytes_per_token": (max(peaks) - before) / tokens,
            "longest_gap_ms": 1e3 * max(gaps[1:])}  # fmt: skip


ROWS: dict[str, Callable[[Trial], dict[str, Any]]] = {
    "malformed requests": malformed, "requests whose client left": cancelled, "kill -9 under load": killed,
    "a full disk": full, "clients that do not read": slow, "a long prompt": prompt,
}  # fmt: skip


def try_out(artifact: Path, name: str, share: float) -> dict[str, Any]:
    """Return a row."""
    with tempfile.TemporaryDirectory() as place:
        trial = Trial(artifact, Path(place), share)
        clock = time.monotonic()
        row = ROWS[name](trial)
    return {"share": share, "took_s": time.monotonic() - clock, **row,
            "wrong": {name: count for name, count in trial.wrong.items() if count}}  # fmt: skip


def make(place: Path) -> Path:
    """Build a tiny model of random weights."""
    import torch
    import toy
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=toy.VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(place / "source")
    toy.tokenizer().save(str(place / "source" / "tokenizer.json"))
    slots = (("peak_use", 24), ("novelty", 24))
    lx.convert(place / "source", place / "liger", preset="liger", window=64, sinks=4, slots=slots)
    return lx.build(place / "liger", place / "artifact", lowering="native")


def main() -> None:
    """Try the rows, and put them into the file of results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", nargs="?", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", choices=ROWS, nargs="+", default=list(ROWS))
    parser.add_argument("--share", type=float, default=1.0, help="of the numbers of requests")
    args = parser.parse_args()
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else {}
    with tempfile.TemporaryDirectory() as place:
        artifact = args.artifact or make(Path(place))
        for name in args.only:
            known[name] = try_out(artifact, name, args.share)
            print(json.dumps({name: known[name]}), flush=True)
            result = {
                "command": "python tests/trust/serve_faults.py -o benchmarks/results/serve_faults.json",
                "machine": {"cpu": cpu_name(), "python": platform.python_version()},
                "rows": {name: known[name] for name in ROWS if name in known},
            }
            args.output.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(any(row["wrong"] for row in known.values()))


if __name__ == "__main__":
    main()
