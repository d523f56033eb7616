"""Time to the first token of a long prompt, read and restored, and the size of the cache file.

    python benchmarks/prompt_cache.py ARTIFACT... -o benchmarks/results/prompt_cache.json

Times begin when `generate` has its ids and a loaded session, and end with the first token. They include reading the
file, restoring the state, and the one token of the prompt that is always fed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ligerexport as lx
from ligerexport.measure.bench.machine import cpu_name


def measure(artifact: str, tokens: int, rounds: int, threads: int) -> dict[str, Any]:
    """Return the time of a prompt of `tokens` before and after there is a cache."""
    session = lx.load(artifact, threads=threads)
    vocab = session.artifact.manifest.model.vocab_size
    ids = [(7 * i) % (vocab - 100) + 50 for i in range(tokens)]

    def first(file: Path) -> Any:
        (chunk,) = lx.generate(session, ids, max_new_tokens=1, prompt_cache=file)
        return chunk

    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "cache"
        read = first(file)
        restored = [first(file) for _ in range(rounds + 1)][1:]  # the first is a warm-up
        size = file.stat().st_size
    assert all(chunk.token == read.token and chunk.summary.cached_tokens == tokens - 1 for chunk in restored)
    ms = [chunk.summary.ttft * 1e3 for chunk in restored]
    row = {"artifact": Path(artifact).name, "tokens": tokens, "seconds_read": read.summary.ttft}
    return row | {"ms_restored": statistics.median(ms), "ms_low": min(ms), "ms_high": max(ms), "file_bytes": size}


def main() -> None:
    """Measure each artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "safetensors")},
        "rounds": args.rounds,
        "rows": [measure(artifact, args.tokens, args.rounds, args.threads) for artifact in args.artifacts],
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
