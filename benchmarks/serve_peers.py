"""`ligerexport serve` beside llama.cpp's own server: tokens per second of many chats, and the first token of a turn.

    python benchmarks/serve_peers.py ARTIFACT --llama build/bin/llama-server --gguf MODEL.gguf \\
        -o benchmarks/results/serve_peers.json

Both servers are processes on this machine, take turns, and get the same texts. `--chats` chats have a history of about
`--tokens` tokens that the server has read. `together` sends a new turn of 40 tokens in all of them at once, and counts
the tokens of the answers until the last one is complete. `held` is the time to the first token of a further turn, asked
in one chat after the other. `evicted` is that time for chats that the server no longer holds: ours reads its states
from the disk after a restart; llama.cpp's has given their slots to other chats, once with its cache of prompts in
memory (`llama_cache`), and once without.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

WORDS = """river town bridge valley stone winter letter garden window market music paper silver morning island travel
coffee summer doctor planet"""
"""Words of one token each, with the space before it, in SmolLM2's vocabulary."""
NEW = 40
"""Number of words in a turn."""


def words(seed: int, count: int) -> str:
    """Return random words."""
    return " ".join(random.Random(seed).choices(WORDS.split(), k=count))


def ask(port: int, prompt: str, tokens: int, args: argparse.Namespace) -> tuple[list[float], int]:
    """Stream an answer of a fixed length; return the seconds to each token, and how many tokens were not read."""
    body = {"model": "m", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True},
            "logit_bias": {str(token): -100 for token in args.ends}}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", port)
    clock, times, cached = time.perf_counter(), [], 0
    connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            if any(choice.get("text") for choice in event["choices"]):
                times.append(time.perf_counter() - clock)
            details = (event.get("usage") or {}).get("prompt_tokens_details") or {}
            cached = max(cached, details.get("cached_tokens", 0), event.get("timings", {}).get("cache_n", 0))
    connection.close()
    return times, cached


@contextmanager
def server(command: list[str], args: argparse.Namespace) -> Iterator[int]:
    """Run a server; yield its port after its first answer, which takes longer than others."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while True:
            assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
            with suppress(OSError):
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            time.sleep(0.2)
        ask(port, "Hello", 1, args)
        yield port
    finally:
        process.terminate()
        process.wait()


class Chats:
    """The histories of the chats, which grow with every turn.

    Args:
        args: The options.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.texts = [words(chat, args.tokens) for chat in range(args.chats)]

    def read(self, port: int) -> None:
        """Let a server read all histories, one after the other."""
        for text in self.texts:
            ask(port, text, 1, self.args)

    def together(self, port: int) -> dict[str, float]:
        """Ask in all chats at once."""
        self.texts = [f"{text} {words(1000 + chat, NEW)}" for chat, text in enumerate(self.texts)]
        clock = time.perf_counter()
        with ThreadPoolExecutor(len(self.texts)) as pool:
            found = list(pool.map(lambda text: ask(port, text, self.args.new, self.args), self.texts))
        seconds = time.perf_counter() - clock
        first = max(times[0] for times, _ in found)
        later = sum(sum(at > first for at in times) for times, _ in found)
        return {
            "seconds": seconds, "tokens_per_second": len(found) * self.args.new / seconds,
            "tokens_per_second_after_all_began": later / (max(times[-1] for times, _ in found) - first),
            "cached": min(cached for _, cached in found),
        }  # fmt: skip

    def turns(self, port: int, count: int, seed: int) -> tuple[list[float], list[int]]:
        """Ask in one chat after the other; return the seconds to the first token, and the tokens that were not read."""
        times, cached = [], []
        for chat in range(count):
            found, kept = ask(port, f"{self.texts[chat]} {words(seed + chat, NEW)}", 1, self.args)
            times.append(found[0])
            cached.append(kept)
        return times, cached


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one start of our server, and one after it."""
    chats = Chats(args)
    command = [sys.executable, "-m", "ligerexport", "serve", f"m={args.artifact}", "--threads", str(args.threads),
               "--max-batch", str(args.chats)]  # fmt: skip
    with tempfile.TemporaryDirectory() as states:
        with server([*command, "--state-dir", states], args) as port:
            chats.read(port)
            result: dict[str, Any] = chats.together(port)
            result["held"], result["held_cached"] = chats.turns(port, args.chats, 2000)
        with server([*command, "--state-dir", states, "--memory", "0"], args) as port:
            result["evicted"], result["evicted_cached"] = chats.turns(port, args.evicted, 3000)
    return result


def measure_llama(args: argparse.Namespace) -> dict[str, Any]:
    """Measure one start of llama.cpp's server with its cache of prompts, and one without."""
    slot = args.tokens + 4 * NEW + args.new
    command = [args.llama, "-m", args.gguf, "--parallel", str(args.chats), "--ctx-size", str(args.chats * slot),
               "--threads", str(args.threads), "--threads-batch", str(args.threads), "--host", "127.0.0.1"]  # fmt: skip
    result: dict[str, Any] = {}
    for name, more in (("evicted_cache", []), ("evicted", ["--cache-ram", "0"])):
        chats = Chats(args)
        with server([*command, *more], args) as port:
            chats.read(port)
            if not result:
                result = dict(chats.together(port))
                result["held"], result["held_cached"] = chats.turns(port, args.chats, 2000)
            ask(port, words(4000, args.tokens), 1, args)  # takes the slot that was used longest ago, and so on
            result[name], result[f"{name}_cached"] = chats.turns(port, args.evicted, 3000)
    return result


def main() -> None:
    """Measure both servers in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--llama", required=True)
    parser.add_argument("--gguf", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chats", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--new", type=int, default=64)
    parser.add_argument("--evicted", type=int, default=4)
    parser.add_argument("--ends", type=int, nargs="+", default=[0, 2], help="tokens that would end an answer")
    args = parser.parse_args()
    rounds: dict[str, list[dict[str, Any]]] = {"ours": [], "llama": []}
    for _ in range(args.rounds):
        rounds["ours"].append(measure_ours(args))
        rounds["llama"].append(measure_llama(args))
        print(json.dumps({name: found[-1] for name, found in rounds.items()}), flush=True)

    def ms(name: str, row: str) -> float:
        return statistics.median(x for found in rounds[name] for x in found[row]) * 1e3

    ratios = [a["tokens_per_second"] / b["tokens_per_second"] for a, b in zip(*rounds.values(), strict=True)]
    said = subprocess.run([args.llama, "--version"], capture_output=True, text=True)
    result = {
        "command": f"python benchmarks/serve_peers.py ARTIFACT --llama llama-server --gguf {Path(args.gguf).name} "
        f"--rounds {args.rounds} --chats {args.chats} --tokens {args.tokens} --new {args.new} -o {args.output}",
        "machine": {"cores": os.cpu_count(), "threads": args.threads}, "chats": args.chats, "tokens": args.tokens,
        "versions": {name: version(name) for name in ("onnxruntime", "fastapi", "uvicorn")},
        "llama": (said.stderr + said.stdout).split("\n")[0],
        "tokens_per_second": {name: statistics.median(x["tokens_per_second"] for x in found)
                              for name, found in rounds.items()},
        "ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios),
        "ms_held": {name: ms(name, "held") for name in rounds},
        "ms_evicted": {name: ms(name, "evicted") for name in rounds} | {"llama_cache": ms("llama", "evicted_cache")},
        "rounds": rounds,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "rounds"}))


if __name__ == "__main__":
    main()
