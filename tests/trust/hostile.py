"""Hostile input: mutated files of every kind that is read, each opened as a user would.

    python tests/trust/hostile.py -o benchmarks/results/hostile.json [--kinds manifest graph] [--share 0.1]

An input must be refused in one line with a hint, or be valid and work. Everything else is a finding: another exception,
a crash, more than 5 seconds, a gigabyte, access to an outside file, code that ran. Findings are kept in
build/hostile/findings. Inputs that are already in the output are not run again, so a long run can be continued.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RUST_BACKTRACE"] = "0"

sys.path.append(str(Path(__file__).parents[1]))  # the tests' tiny checkpoints

from hostile_inputs import KINDS, Kind
from hostile_worker import run

from ligerexport.exporters.onnx.native import library
from ligerexport.run.generate import _text_model

TOTALS, WORST = ("inputs", "refused", "valid", "findings"), ("slowest_s", "growth_mib")
PIECE = 250
"""Number of inputs after which the result is written."""
KEPT = Path(__file__).parents[2] / "build" / "hostile" / "findings"


def copy_in(bases: Path, kind: Kind, place: Path, rng: random.Random) -> None:
    """Put a fresh copy of the files that a kind mutates in place."""
    for name in os.listdir(place):
        path = place / name
        if name == "outside":
            continue
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for base, name in rng.choice(kind.bases).items():
        source = bases / base
        shutil.copytree(source, place / name) if source.is_dir() else shutil.copyfile(source, place / name)


def run_kind(name: str, bases: Path, place: Path, numbers: range, *, keep: Path | None = None) -> dict[str, Any]:
    """Run inputs of a kind; return counts and findings."""
    kind, counts, findings = KINDS[name], Counter[str](), Counter[str]()
    slowest, largest = 0.0, 0
    for module in kind.modules:
        import_module(module)
    library()  # compile the lowering native before inputs are watched
    gc.freeze()

    def lay(number: int, where: Path) -> None:
        rng = random.Random(f"{name} {number}")
        copy_in(bases, kind, where, rng)
        kind.mutate(where, rng)

    def one(number: int) -> Callable[[], None]:
        lay(number, place)
        _text_model.cache_clear()  # the same path is a different model each time
        return partial(kind.action, place)

    tried = ((number, one(number)()) for number in numbers) if kind.apart else run(numbers, one, place)
    for number, outcome in tried:
        counts[outcome.kind] += 1
        slowest, largest = max(slowest, outcome.seconds), max(largest, outcome.growth)
        if outcome.kind == "finding":
            alike = re.sub(r"\d+", "N", outcome.what.replace(str(place), ""))[:160]
            findings[alike] += 1
            if keep is not None and findings[alike] <= 2:
                kept = keep / f"{name}-{number}".replace(" ", "-")
                (kept / "outside").mkdir(parents=True, exist_ok=True)
                lay(number, kept)
                (kept / "finding.txt").write_text(outcome.what + "\n")
    row: dict[str, Any] = {"inputs": len(numbers), "refused": counts["refused"], "valid": counts["valid"]}
    row |= {"findings": counts["finding"], "slowest_s": round(slowest, 2), "growth_mib": largest >> 20}
    return row | ({"found": dict(findings.most_common())} if findings else {})


def prepare(place: Path, bases: Path, pack: Path | None = None) -> Path:
    """Make the bases in another process, and the directory for inputs, with files outside of it."""
    work = place / "work"
    if not bases.is_dir():  # torch stays out of this process, which is forked for every input
        half = bases.with_name("half")
        shutil.rmtree(half, ignore_errors=True)
        if pack is not None:
            shutil.copytree(pack, half / "pack")
        code = "import sys, pathlib, hostile_bases; hostile_bases.make_bases(pathlib.Path(sys.argv[1]))"
        here = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
        subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(half)], env=os.environ | here, check=True)
        half.rename(bases)
    shutil.rmtree(work, ignore_errors=True)
    (work / "outside").mkdir(parents=True)
    shutil.copyfile(bases / "ort" / "model.onnx.data", work / "outside" / "secret.bin")
    return work


def main() -> None:
    """Run the kinds and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--kinds", nargs="*", choices=KINDS, default=list(KINDS))
    parser.add_argument("--bases", type=Path, help="directory that keeps the valid inputs from run to run")
    parser.add_argument("--pack", type=Path, help="directory that `make_harness` in tests/trt_packs.py wrote")
    parser.add_argument("--share", type=float, default=1.0, help="share of the inputs of each kind to run")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.output.read_text())["kinds"] if args.output.is_file() else {}
    with tempfile.TemporaryDirectory() as place:
        bases = args.bases or Path(place, "bases")
        work = prepare(Path(place), bases, args.pack)
        for name in args.kinds:
            count = max(1, int(KINDS[name].count * args.share))
            for start in range(rows.get(name, {"inputs": 0})["inputs"], count, PIECE):
                row = run_kind(name, bases, work, range(start, min(start + PIECE, count)), keep=KEPT)
                rows[name] = merged(rows[name], row) if name in rows else row
                args.output.write_text(json.dumps(summary(rows), indent=1) + "\n")
            print(name, rows[name], file=sys.stderr, flush=True)
    print(json.dumps(summary(rows)))


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the combined row of two pieces of a kind."""
    row = {key: one[key] + other[key] for key in TOTALS} | {key: max(one[key], other[key]) for key in WORST}
    found = Counter(one.get("found", {})) + Counter(other.get("found", {}))
    return row | ({"found": dict(found.most_common())} if found else {})


def summary(rows: dict[str, Any]) -> dict[str, Any]:
    """Return the result: totals, and each kind."""
    totals = {key: sum(row[key] for row in rows.values()) for key in TOTALS}
    worst = {key: max(row[key] for row in rows.values()) for key in WORST}
    return {
        "command": "python tests/trust/hostile.py -o benchmarks/results/hostile.json",
        "versions": {
            name: version(name) for name in ("onnxruntime", "tokenizers", "jinja2", "safetensors", "transformers")
        },
        **totals,
        **worst,
        "kinds": rows,
    }


if __name__ == "__main__":
    main()
