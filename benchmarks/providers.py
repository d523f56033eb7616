"""Time of one decoded token and of reading a prompt, for artifacts on the CPU and on CUDA, in turns.

    python benchmarks/providers.py ARTIFACT [ARTIFACT ...] -o benchmarks/results/providers.json

It reports nothing if a device's logits differ from the CPU's by more than rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

import ligerexport as lx
from ligerexport.measure.bench.machine import cpu_name
from ligerexport.run.runtime import Session

TOLERANCE = {"float32": 1e-3, "float16": 1e-3, "int8": 0.5, "int4": 0.5}
"""Largest difference of a logit from the CPU's; a CPU rounds activations before products with integers."""


def prompt(tokens: int) -> np.ndarray:
    """Return ids that every model has in its vocabulary."""
    return (7 * np.arange(tokens)) % 30_000 + 50


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--devices", nargs="+", default=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--context", type=int, default=1024, help="tokens of the prompt")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=16, help="tokens per block")
    args = parser.parse_args()
    rows = []
    for path in args.artifacts:
        sessions = {device: lx.load(path, threads=args.threads, device=device) for device in args.devices}
        check(path, sessions)
        for device, (read, steps) in measure(sessions, args.context, args.rounds, args.tokens).items():
            manifest = sessions[device].artifact.manifest
            rows.append({
                "artifact": f"{manifest.lowering}, {manifest.precision}", "device": device, "context": args.context,
                "ms_per_token": statistics.median(steps), "ms_low": min(steps), "ms_high": max(steps),
                "prefill_tokens_per_s": args.context / statistics.median(read),
                "prefill_low": args.context / max(read), "prefill_high": args.context / min(read),
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads, "gpu": _gpu()},
        "versions": _versions() | {"python": platform.python_version()},
        "blocks": args.rounds,
        "tokens_a_block": args.tokens,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def check(path: str, sessions: dict[str, Session]) -> None:
    """Exit if logits after a prompt and 16 tokens differ from the first device's."""
    answers = []
    for session in sessions.values():
        logits = [session.prefill(prompt(200)).copy(), *(session.step(int(i)).copy() for i in prompt(16))]
        answers.append(np.concatenate(logits))
        session.reset()
    allowed = TOLERANCE[next(iter(sessions.values())).artifact.manifest.precision]
    for device, answer in zip(sessions, answers, strict=True):
        if not (error := np.abs(answer - answers[0]).max()) <= allowed:
            sys.exit(f"{path}: logits on {device} are off by {error:.1e}; nothing was measured")


def measure(
    sessions: dict[str, Session], context: int, rounds: int, tokens: int
) -> dict[str, tuple[list[float], list[float]]]:
    """Return seconds of the prompt and milliseconds per token for each device; devices take turns in every round."""
    found: dict[str, tuple[list[float], list[float]]] = {device: ([], []) for device in sessions}
    for turn in range(rounds + 1):
        for device, session in sessions.items():
            session.reset()
            begin = time.perf_counter()
            session.prefill(prompt(context))
            read = time.perf_counter() - begin
            steps = []
            for _ in range(tokens):
                begin = time.perf_counter()
                session.step(11)
                steps.append((time.perf_counter() - begin) * 1e3)
            if turn:  # the first is a warm-up
                found[device][0].append(read)
                found[device][1].append(statistics.median(steps))
    return found


def _versions() -> dict[str, str]:
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _gpu() -> str | None:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


if __name__ == "__main__":
    main()
