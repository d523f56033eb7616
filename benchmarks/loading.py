"""Time from a command to its first token, from a warm disk: loading, the first token, and the cost of prepacking.

    python benchmarks/loading.py ARTIFACT... -o benchmarks/results/loading.json

Each round is a fresh process; settings alternate. Loading begins before ONNX Runtime is imported and ends with a
session. The first token is timed from there, including its tokenizer. `ligerexport run ARTIFACT PROMPT -n 1` is timed
from the start of its process to the end. Quantised weights are always prepacked.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ligerexport.measure.bench.machine import cpu_name

PROMPT = "Once upon a time"


def worker(artifact: str, prepack: bool) -> dict[str, float]:
    """Return the times of one process in seconds, and its resident memory."""
    import ligerexport as lx

    begin = time.perf_counter()
    session = lx.load(artifact, prepack=prepack)
    loaded = time.perf_counter()
    next(lx.generate(session, PROMPT, max_new_tokens=1))
    first = time.perf_counter()
    session.reset()
    ids = np.arange(512) % (session.artifact.manifest.model.vocab_size - 100) + 50
    read = time.perf_counter()
    session.prefill(ids)
    steps = [time.perf_counter()]
    for token in range(40):
        session.step(token + 100)
        steps.append(time.perf_counter())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "load": loaded - begin, "first_token": first - loaded, "token": float(np.median(np.diff(steps))),
        "prompt_tokens_per_second": len(ids) / (steps[0] - read), "rss": pages * os.sysconf("SC_PAGE_SIZE"),
    }  # fmt: skip


def command(artifact: str) -> float:
    """Return the seconds of `ligerexport run`, from the start of its process to the first token."""
    begin = time.perf_counter()
    words = [sys.executable, "-m", "ligerexport", "run", artifact, PROMPT, "-n", "1", "-q"]
    subprocess.run(words, check=True, capture_output=True)
    return time.perf_counter() - begin


def main() -> None:
    """Measure each artifact with and without prepacked weights, or, as a worker, one process of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--worker", choices=["prepack", "mapped"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(worker(args.artifacts[0], args.worker == "prepack")))
        return
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for artifact in args.artifacts:
        quantised = json.loads((Path(artifact) / "manifest.json").read_text())["block"]
        found |= {(artifact, weights): [] for weights in ("prepack", "mapped")[: 1 if quantised else 2]}
    commands: dict[str, list[float]] = {artifact: [] for artifact in args.artifacts}
    for _ in range(args.rounds + 1):
        for turn, rows in found.items():
            process = [sys.executable, __file__, turn[0], "--worker", turn[1]]
            rows.append(json.loads(subprocess.run(process, check=True, stdout=subprocess.PIPE).stdout))
        for artifact, seconds in commands.items():
            seconds.append(command(artifact))
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "tokenizers")},
        "rounds": args.rounds,
        "rows": [
            {"artifact": Path(artifact).name, "weights": weights} | spread(rows[1:])  # the first warms the disk
            for (artifact, weights), rows in found.items()
        ],
        "run": [
            {"artifact": Path(artifact).name} | spread([{"seconds": x} for x in seconds[1:]])
            for artifact, seconds in commands.items()
        ],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if args.output:
        args.output.write_text(text + "\n")


def spread(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return median, minimum and maximum of each figure."""
    return {
        key: dict(zip(("median", "low", "high"), (statistics.median(x), min(x), max(x)), strict=True))
        for key in rows[0]
        if (x := [row[key] for row in rows])
    }


if __name__ == "__main__":
    main()
