"""Time to write a state to a file and to continue from the file, and its size.

    python benchmarks/snapshots.py ARTIFACT... -o benchmarks/results/snapshots.json

A write takes the state from the session and waits until the disk has the file. A read checks the file and puts the
state into the session. Artifacts take turns. Each has its time and the processor time of this process, which other
processes on the machine and the disk change less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

import ligerexport as lx


def clock() -> tuple[float, float]:
    """Return the time and the processor time in seconds."""
    return time.perf_counter(), time.process_time()


def main() -> None:
    """Measure each artifact after the same tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifacts", nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    sessions = {artifact: lx.load(artifact) for artifact in args.artifacts}
    seconds: dict[str, list[np.ndarray]] = {artifact: [] for artifact in sessions}
    ids = np.random.default_rng(0).integers(50, 40_000, args.tokens)
    for session in sessions.values():
        session.prefill(ids)
    with tempfile.TemporaryDirectory(dir=args.output.parent) as directory:
        file = Path(directory) / "state"
        sizes = {}
        for _ in range(args.rounds + 1):
            for artifact, session in sessions.items():
                clocks = [clock()]
                session.snapshot().save(file)
                clocks.append(clock())
                session.restore(lx.Snapshot.load(file))
                clocks.append(clock())
                seconds[artifact].append(np.diff(clocks, axis=0).ravel())
                sizes[artifact] = file.stat().st_size
    rows = []
    for artifact, session in sessions.items():
        row = {"artifact": Path(artifact).name, "state_bytes": session.state_bytes, "file_bytes": sizes[artifact]}
        names = ("write", "write_cpu", "read", "read_cpu")
        for name, times in zip(names, np.array(seconds[artifact][1:]).T, strict=True):  # the first is a warm-up
            low, median, high = np.quantile(times, (0.1, 0.5, 0.9))
            row[name] = {"median": float(median), "low": float(low), "high": float(high)}
        rows.append(row)
    result = {
        "command": "python " + " ".join(sys.argv),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "safetensors")},
        "tokens": args.tokens,
        "rounds": args.rounds,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
