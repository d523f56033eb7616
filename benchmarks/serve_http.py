"""What HTTP adds to an answer: the time of a token beside `lx.generate`, and of the first token of a chat's later turn.

    python benchmarks/serve_http.py ARTIFACT -o benchmarks/results/serve_http.json

The server is a process of its own. Both sides read the same prompt and take turns. `turn` sends whole conversations, as
clients of this API do, so its time includes the template and the tokenizer.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ligerexport as lx

PROMPT = "Once upon a time"
WORDS = "The river runs through the valley, and the town beside it is older than the bridge. "


def ask(port: int, path: str, body: dict[str, Any]) -> tuple[list[float], dict[str, Any]]:
    """Stream an answer; return the seconds from the request to each piece of text, and the usage."""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    clock, times, usage = time.perf_counter(), [], {}
    body = {"model": "served", "temperature": 0, "stream": True, "stream_options": {"include_usage": True}} | body
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    response = connection.getresponse()
    assert response.status == 200, response.read()
    for line in response:
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            choice = next(iter(event["choices"]), {})
            if choice.get("text") or choice.get("delta", {}).get("content"):
                times.append(time.perf_counter() - clock)
            usage = event["usage"] or usage
    connection.close()
    return times, usage


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest value in milliseconds."""
    return {"median": statistics.median(values) * 1e3, "low": min(values) * 1e3, "high": max(values) * 1e3}


def measure_speed(port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Compare the time of a token with `lx.generate`."""
    session = lx.load(args.artifact, threads=args.threads)
    own, served = [], []
    for _ in range(args.rounds):
        summary = list(lx.generate(session, PROMPT, max_new_tokens=args.new))[-1].summary
        assert summary is not None
        own.append(summary.decode_seconds / (summary.new_tokens - 1))
        times, usage = ask(port, "/v1/completions", {"prompt": PROMPT, "max_tokens": args.new})
        assert usage["completion_tokens"] == summary.new_tokens
        served.append((times[-1] - times[0]) / (usage["completion_tokens"] - 1))
    ratio = statistics.median(a / b for a, b in zip(served, own, strict=True))
    return {"ms_per_token_generate": spread(own), "ms_per_token_served": spread(served), "ratio": ratio}


def measure_turn(port: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time to the first token of later turns of a chat."""
    said: list[dict[str, str]] = []
    tokens, times, read = 0, [], []
    for turn in range(args.turns):
        said.append({"role": "user", "content": f"{turn}. " + (WORDS * 2 if tokens > args.history else WORDS * 50)})
        found, usage = ask(port, "/v1/chat/completions", {"messages": said, "max_tokens": 8})
        said.append({"role": "assistant", "content": "I see."})
        if tokens > args.history:
            times.append(found[0])
            read.append(usage["prompt_tokens"] - usage["prompt_tokens_details"]["cached_tokens"])
        tokens = usage["prompt_tokens"]
    return {"turns": len(times), "tokens": tokens, "tokens_read": statistics.median(read), "ms": spread(times)}


def main() -> None:
    """Measure one artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--new", type=int, default=96)
    parser.add_argument("--history", type=int, default=8_000)
    parser.add_argument("--turns", type=int, default=30)
    args = parser.parse_args()
    command = [sys.executable, "-m", "ligerexport", "serve", f"served={args.artifact}", "--port", "0", "--json"]
    with subprocess.Popen([*command, "--threads", str(args.threads)], stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        port = int(json.loads(server.stdout.readline())["address"].rpartition(":")[2])
        result = {
            "command": "python " + " ".join(sys.argv),
            "machine": {"cores": os.cpu_count(), "threads": args.threads},
            "versions": {name: version(name) for name in ("onnxruntime", "fastapi", "uvicorn")},
            "rounds": args.rounds, "speed": measure_speed(port, args), "turn": measure_turn(port, args),
        }  # fmt: skip
        server.terminate()
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
