"""What differs between the states of a chat's successive turns, and what files of such differences would save and cost.

    python benchmarks/serve_deltas.py ARTIFACT -o benchmarks/results/serve_deltas.json

A chat is read in turns of passages that ship, and its state is kept after each turn. `shares` are the parts of a state
that differ from that of some turns before: whole rows, which are the vector of a slot or one number beside it, and
pages of the file. `chains` are files of which the first one is whole and each other one has the rows that differ from
the state before it: the bytes written for a turn beside those of whole files, and the time to restore the last state
beside that of a whole file, in turns. Both times include the hash of the whole state.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from serve import passages

import ligerexport as lx
from ligerexport.artifact.snapshot import digest

PAGE = 4096
APART = "ids", "position"
"""Tensors of a file that are no part of the state."""
KINDS = {"I8": np.int8, "F16": np.float16, "I32": np.int32, "F32": np.float32, "I64": np.int64, "U8": np.uint8}


class Opened:
    """A file of safetensors in memory: its tensors, and for each type the rows of all tensors of the state together.

    The format puts the tensors of one type beside each other, so that these are views too.
    """

    def __init__(self, path: Path) -> None:
        content = np.fromfile(path, np.uint8)
        size = 8 + int(content[:8].view("<u8")[0])
        header = json.loads(content[8:size].tobytes())
        self.note: dict[str, str] = header.pop("__metadata__", {})
        self.tensors: dict[str, np.ndarray] = {}
        spans: dict[str, list[tuple[int, int, int]]] = {}
        for name, found in header.items():
            begin, end = (size + at for at in found["data_offsets"])
            tensor = self.tensors[name] = content[begin:end].view(KINDS[found["dtype"]]).reshape(found["shape"])
            if name not in APART:
                width = tensor.itemsize * (tensor.shape[-1] if found["dtype"] == "I8" else 1)
                spans.setdefault(f"{found['dtype']}.{width}", []).append((begin, end, width))
        self.rows: dict[str, np.ndarray] = {}
        for kind, found in spans.items():
            begin, end = min(found)[0], max(found)[1]
            assert end - begin == sum(b - a for a, b, _ in found), "the tensors of a type are not beside each other"
            self.rows[kind] = content[begin:end].view(f"V{found[0][2]}")


def units(rows: np.ndarray) -> np.ndarray:
    """Return rows `[R]` as integers `[R, n]`, which compare faster."""
    unit = min(rows.itemsize, 8)
    return rows.view(f"u{unit}").reshape(len(rows), -1)


def differ(state: Opened, base: Opened) -> dict[str, np.ndarray]:
    """Return for each type which rows `[R]` differ."""
    return {kind: (units(rows) != units(base.rows[kind])).any(-1) for kind, rows in state.rows.items()}


def write(path: Path, state: Opened, base: Opened) -> None:
    """Write a state as the rows that differ from another one."""
    tensors = {name: state.tensors[name] for name in APART}
    for kind, changed in differ(state, base).items():
        tensors[f"bits.{kind}"] = np.packbits(changed)
        tensors[f"rows.{kind}"] = state.rows[kind][changed].view(np.uint8)
    save_file(tensors, path, metadata={"sha256": digest(state.tensors)})


def restore(whole: Path, changes: list[Path]) -> None:
    """Restore the last state of a chain of files, and check its hash."""
    state = Opened(whole)
    for path in changes:
        found = Opened(path)
        for kind, rows in state.rows.items():
            changed = np.unpackbits(found.tensors[f"bits.{kind}"], count=len(rows)).view(bool)
            rows[np.flatnonzero(changed)] = found.tensors[f"rows.{kind}"].view(rows.dtype)
        state.tensors |= {name: found.tensors[name] for name in APART}
        state.note = found.note
    assert digest(state.tensors) == state.note["sha256"], "another state was restored"


def read_chat(args: argparse.Namespace, place: Path) -> tuple[list[Path], list[int]]:
    """Return the files of the states after each turn, and the tokens of each turn."""
    read, random = passages(args.artifact), np.random.default_rng(7)
    session, ids, files, turns = lx.load(args.artifact, threads=args.threads), list[int](), [], []
    while len(ids) < args.tokens:
        turn = read(int(random.integers(args.turn[0], args.turn[1] + 1)))
        session.prefill(turn)
        ids += turn
        if len(ids) >= args.history:
            files.append(place / f"{len(files)}.state")
            replace(session.snapshot(), ids=np.array(ids)).save(files[-1])
            turns.append(len(turn))
    return files, turns


def spread(values: list[float]) -> dict[str, float]:
    """Return median, smallest and largest value."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def shares(states: list[Opened], lag: int) -> dict[str, Any]:
    """Return the parts of a state that differ from that of some turns before."""
    rows, pages = [], []
    for state, base in zip(states[lag:], states[:-lag], strict=True):
        whole = changed = touched = 0
        for kind, marks in differ(state, base).items():
            size = state.rows[kind].itemsize
            whole += size * len(marks)
            changed += size * int(marks.sum())
            touched += PAGE * int(np.logical_or.reduceat(marks, range(0, len(marks), PAGE // size)).sum())
        rows.append(changed / whole)
        pages.append(min(1.0, touched / whole))
    return {"turns_before": lag, "rows": spread(rows), "pages": spread(pages)}


def timed(run: Callable[[], object]) -> float:
    """Return the milliseconds of a call."""
    clock = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - clock)


def main() -> None:
    """Measure one artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tokens", type=int, default=8_000, help="of the whole chat")
    parser.add_argument("--history", type=int, default=2_000, help="tokens before the first state")
    parser.add_argument("--turn", type=int, nargs=2, default=(40, 200), help="fewest and most tokens of a turn")
    parser.add_argument("--longest", type=int, default=10, help="files of a chain")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        files, turns = read_chat(args, Path(directory))
        states = [Opened(file) for file in files]
        changes = [file.with_suffix(".delta") for file in files]
        for path, state, base in zip(changes[1:], states[1:], states, strict=False):
            write(path, state, base)
        whole, delta = (statistics.mean(file.stat().st_size for file in x) for x in (files[1:], changes[1:]))
        lengths = range(2, args.longest + 1)
        times: dict[int, list[float]] = {n: [] for n in (1, *lengths)}
        for _ in range(args.rounds):
            times[1].append(timed(lambda: lx.Snapshot.load(files[-1])))
            for n in lengths:
                times[n].append(timed(lambda n=n: restore(files[-n], changes[len(files) - n + 1 :])))  # type: ignore[misc]
    ratios = {n: [a / b for a, b in zip(times[n], times[1], strict=True)] for n in lengths}
    result = {
        "command": "python benchmarks/serve_deltas.py ARTIFACT -o benchmarks/results/serve_deltas.json",
        "machine": {"cores": os.cpu_count(), "threads": args.threads},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "safetensors")},
        "turns": len(turns), "tokens_of_a_turn": spread([float(x) for x in turns]), "rounds": args.rounds,
        "bytes_whole": whole, "bytes_of_differences": delta, "ms_whole": spread(times[1]),
        "shares": [shares(states, lag) for lag in (1, 2, 4, 8)],
        "chains": [{"files": n, "times_fewer_bytes": n * whole / (whole + (n - 1) * delta),
                    "restore_ratio": spread(ratios[n])} for n in lengths],
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
