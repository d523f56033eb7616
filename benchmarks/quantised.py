"""What storing weights in less than fp32 costs and saves: file size, loss on text, time per token, prompt speed.

    python benchmarks/quantised.py TEXT ARTIFACT... -o benchmarks/results/quantised.json

Times are CPU time of one thread, because other jobs may share the machine. The loss is that of the first tokens of text
files. The other artifacts are compared with the first.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


def windows(directory: Path, tokenizer: Path, count: int, length: int) -> list[np.ndarray]:
    """Return the beginnings of evenly spaced files that are long enough."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    found = [ids for file in sorted(directory.glob("*.txt")) if len(ids := encode(file.read_text()).ids) >= length]
    return [np.array(found[i][:length]) for i in np.linspace(0, len(found) - 1, count).astype(int)]


def losses(path: str, texts: list[np.ndarray]) -> list[float]:
    """Return the mean NLL of each text in nats per token."""
    import ligerexport as lx

    session, means = lx.load(path, scoring=True), []
    for ids in texts:
        session.reset()
        total, done = 0.0, 0
        for logits in session.every(ids[:-1]):
            x = logits[0].astype(np.float64)
            top = x.max(1, keepdims=True)
            following = ids[1 + done : 1 + done + len(x), None]
            scores = np.take_along_axis(x, following, 1) - top
            total += float((np.log(np.exp(x - top).sum(1, keepdims=True)) - scores).sum())
            done += len(x)
        means.append(total / done)
    return means


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def speed(path: str, ids: np.ndarray, steps: int) -> dict[str, Any]:
    """Return milliseconds per decoded token, and prompt tokens per second by tokens per call."""
    import ligerexport as lx

    prompt = {}
    for chunk in (64, 128, 256):
        if chunk <= json.loads((Path(path) / "manifest.json").read_text())["graph"]["max_chunk"]:
            session = lx.load(path, threads=1, chunk=chunk, hashes=False)
            session.prefill(ids[:chunk])
            rest = ids[chunk : chunk + 512]
            prompt[str(chunk)] = len(rest) / min(seconds(lambda: session.prefill(rest)) for _ in range(2))
    times = [seconds(lambda: session.step(11)) * 1e3 for _ in range(steps)]
    return {"ms_per_token": statistics.median(times), "prompt_tokens_per_second": prompt}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory of .txt files")
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=48)
    args = parser.parse_args()
    texts = windows(args.text, Path(args.artifacts[0]) / "tokenizer.json", args.windows, args.length)
    rows = []
    for path in args.artifacts:
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        row = {"name": Path(path).name, "weights": manifest["precision"], "block": manifest["block"]}
        row |= {"bytes": manifest["bytes"]["weights"], "files": sum(f["bytes"] for f in manifest["files"].values())}
        row |= {"nll": losses(path, texts), "quality": manifest["quality"]} | speed(path, texts[0], args.steps)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for row in rows:
        change = np.subtract(row["nll"], rows[0]["nll"])
        spread = float(change.std(ddof=1) / len(change) ** 0.5) if len(change) > 1 else None
        row |= {"nll_mean": float(np.mean(row["nll"])), "nll_change": float(change.mean()), "nll_change_error": spread}
    result = {
        "command": "python " + " ".join(sys.argv),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "tokens": args.windows * (args.length - 1),
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
