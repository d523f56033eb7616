"""A long text by a model whose KV heads have slots of their own sizes in 8 bits, in every lowering, beside fp64.

    python tests/trust/endurance_recall.py CHECKPOINT -o benchmarks/results/endurance.json

CHECKPOINT is of the preset `recall`, and is cut as `endurance.py` cuts it. In each lowering it steps for `--seconds`,
keeps its progress in `--work`, and writes the results so far as `recall` beside the others in the file. Run it again
for more, up to `--steps`. Keys and values are rounded to codes, so fp32 and fp64 hold different codes now and then, and
their scores of later tokens differ too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from endurance import Clock, OutOfTime, Pieces, cut, drift, read_exactly, step, summary

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.exporters.targets import TARGETS
from ligerexport.measure.bench.machine import cpu_name

PIECE = 1_000
COMPARED = 5
"""Pieces that torch in fp64 reads too."""


def run(work: Path, lowering: str, steps: int, seconds: float) -> dict[str, Any]:
    """Step in one lowering, compare the first pieces with fp64, and return the results so far."""
    checkpoint, artifact, pieces = work / "checkpoint", work / lowering, Pieces(work / f"steps-{lowering}")
    if not artifact.exists():
        lx.build(checkpoint, artifact, lowering=lowering)
    with contextlib.suppress(OutOfTime):
        step(lx.load(artifact, threads=1), pieces, steps, PIECE, 4.0, Clock(seconds))
    found = summary(pieces, PIECE, open_artifact(artifact, hashes=False).manifest)
    del found["rows"]
    truth = Pieces(work / f"exact-{lowering}")
    if not len(truth):
        first = Pieces(work / f"first-{lowering}")
        for i in range(min(COMPARED, len(pieces))):
            first.write(pieces.read(i))
        read_exactly(checkpoint, first, truth, Clock(float("inf")))
    return found | {"drift": drift(checkpoint, pieces, truth)}


def main() -> None:
    """Step in each lowering and write the results so far."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("build/endurance-recall"))
    parser.add_argument("--steps", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=80, help="time for the steps of each lowering")
    args = parser.parse_args()
    if not (args.work / "checkpoint").exists():
        cut(args.checkpoint, args.work / "checkpoint")
    done = json.loads(args.output.read_text()) if args.output.is_file() else {}
    done["recall"] = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "load": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("onnxruntime", "torch")} | {"python": platform.python_version()},
        "lowerings": {
            name: run(args.work, name, args.steps, args.seconds)
            for name in TARGETS["onnx"].lowerings
        },
    }  # fmt: skip
    args.output.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
