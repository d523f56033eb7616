"""What storing weights in less than fp32 costs and saves: file size, loss on text, time per token, prompt speed.

    python benchmarks/quantised.py TEXT ARTIFACT... -o benchmarks/results/quantised.json

Times are CPU time of one thread, because other jobs may share the machine; the artifacts take turns. The loss is
that of the first tokens of text files. The other artifacts are compared with the first, over all texts and for each.
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


def windows(directory: Path, tokenizer: Path, count: int, length: int) -> dict[str, np.ndarray]:
    """Return the beginnings of evenly spaced files that are long enough, by the files' names."""
    from tokenizers import Tokenizer

    encode = Tokenizer.from_file(str(tokenizer)).encode
    files = sorted(directory.glob("*.txt"))
    found = [(file.stem, ids) for file in files if len(ids := encode(file.read_text()).ids) >= length]
    chosen = (found[i] for i in np.linspace(0, len(found) - 1, count).astype(int))
    return {name: np.array(ids[:length]) for name, ids in chosen}


def losses(path: str, texts: list[np.ndarray]) -> list[np.ndarray]:
    """Return the NLL of every token but the first of each text, in nats."""
    import ligerexport as lx

    session, found = lx.load(path, scoring=True), []
    for ids in texts:
        session.reset()
        parts, done = [], 0
        for logits in session.every(ids[:-1]):
            x = logits[0].astype(np.float64)
            top = x.max(1, keepdims=True)
            following = ids[1 + done : 1 + done + len(x), None]
            scores = np.take_along_axis(x, following, 1) - top
            parts.append((np.log(np.exp(x - top).sum(1, keepdims=True)) - scores)[:, 0])
            done += len(x)
        found.append(np.concatenate(parts))
    return found


def seconds(work: Callable[[], object]) -> float:
    """Return the CPU time of this thread."""
    begin = time.thread_time()
    work()
    return time.thread_time() - begin


def prompts(path: str, ids: np.ndarray) -> dict[str, float]:
    """Return prompt tokens per second by tokens per call."""
    import ligerexport as lx

    prompt = {}
    for chunk in (64, 128, 256):
        if chunk <= json.loads((Path(path) / "manifest.json").read_text())["graph"]["max_chunk"]:
            session = lx.load(path, threads=1, chunk=chunk, hashes=False)
            session.prefill(ids[:chunk])
            rest = ids[chunk : chunk + 512]
            prompt[str(chunk)] = len(rest) / min(seconds(lambda: session.prefill(rest)) for _ in range(2))
    return prompt


def decoding(paths: list[str], ids: np.ndarray, steps: int) -> list[dict[str, Any]]:
    """Return the time of a token in milliseconds for each artifact, which take turns in blocks of 8 tokens.

    `of_first` are the quartiles of its quotient by the time of the first artifact in the same turn.
    """
    import ligerexport as lx

    sessions = [lx.load(path, threads=1, hashes=False) for path in paths]
    for session in sessions:
        session.prefill(ids)

    def block(session: lx.Session) -> float:
        return seconds(lambda: [session.step(11) for _ in range(8)]) / 8e-3

    times = np.array([[block(session) for session in sessions] for _ in range(steps // 8)])
    quotients = np.quantile(times / times[:, :1], [0.25, 0.5, 0.75], axis=0)
    return [
        {"ms_per_token": statistics.median(own), "of_first": quotients[:, i].tolist()} for i, own in enumerate(times.T)
    ]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path, help="directory of .txt files")
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=48)
    parser.add_argument("--no-prompts", action="store_true", help="do not measure prompts")
    args = parser.parse_args()
    texts = windows(args.text, Path(args.artifacts[0]) / "tokenizer.json", args.windows, args.length)
    ids = [*texts.values()]
    speeds = decoding(args.artifacts, ids[0][:512], args.steps)
    rows, nll = [], []
    for path, speed in zip(args.artifacts, speeds, strict=True):
        nll.append(losses(path, ids))
        manifest = json.loads((Path(path) / "manifest.json").read_text())
        row = {"name": Path(path).name, "weights": manifest["precision"], "block": manifest["block"]}
        row |= {"bytes": manifest["bytes"]["weights"], "files": sum(f["bytes"] for f in manifest["files"].values())}
        row |= {"nll": [float(x.mean()) for x in nll[-1]], "quality": manifest["quality"]} | speed
        row |= {} if args.no_prompts else {"prompt_tokens_per_second": prompts(path, ids[0])}
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    for row, own in zip(rows, nll, strict=True):
        by_text = {name: own[i] - nll[0][i] for i, name in enumerate(texts)}
        row["nll_change_by_text"] = {
            name: [float(x.mean()), float(x.std(ddof=1) / len(x) ** 0.5)] for name, x in by_text.items()
        }
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
