"""A million steps of real weights against fp64, thousands of the whole model, a day of snapshots, and open gates.

    python tests/trust/endurance.py CHECKPOINT --whole ARTIFACT -o benchmarks/results/endurance.json

It works for `--seconds`, keeps its progress in `--work`, writes the results so far, and exits with 1 until all is done;
then run it again. CHECKPOINT is cut to its first layers, to the tokens that its tokenizer learned first and to the
first channels of its MLPs, so that a million steps take half an hour; its attention stays whole. The models sample the
texts themselves, the cut model at temperature 4, because below that a few tokens repeat.

Torch in fp64 reads the same tokens. A pool may choose differently between two nearly equal scores, and both models then
hold different tokens for a while, but the sum of all held and evicted tokens does not depend on that. So these sums are
compared and choices are counted; a different choice in the first layer that is no near tie is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx
from ligerexport.artifact.artifact import Manifest, open_artifact
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.exporters.exchange import held_positions
from ligerexport.measure.bench.machine import cpu_name, memory
from ligerexport.run.runtime import Session
from ligerexport.run.sampling import Sampler
from ligerexport.staging import staged_directory

LAYERS, VOCABULARY, CHANNELS = 2, 1024, 512
"""The sizes to which the checkpoint is cut."""
STEPS, PIECE = 1_000_000, 10_000
WHOLE_STEPS, WHOLE_PIECE = 20_000, 1_000
CYCLES, CYCLE_PIECE = 86_400, 7_200
GATE_TOKENS = 1_000_000
Arrays = dict[str, np.ndarray]


class OutOfTime(Exception):
    """Raised when the remaining work must wait for the next call."""


class Clock:
    """Limits the time of a call."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def check(self) -> None:
        """Raise `OutOfTime` when the time is over."""
        if time.monotonic() > self._end:
            raise OutOfTime


class Pieces:
    """Files of numbers, one for each piece of a long run, which continues after the last file."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(list(self.place.glob("*.npz")))

    def write(self, arrays: Arrays) -> None:
        """Add a piece, whole or not at all."""
        partial = self.place / "partial"
        with partial.open("wb") as file:
            np.savez(file, **arrays)
        partial.rename(self.place / f"{len(self):05d}.npz")

    def read(self, index: int) -> Arrays:
        """Return a piece; -1 is the last."""
        with np.load(self.place / f"{index % len(self):05d}.npz", allow_pickle=False) as file:
            return dict(file)


def cut(
    checkpoint: Path, target: Path, layers: int = LAYERS, vocabulary: int = VOCABULARY, channels: int = CHANNELS
) -> Path:
    """Write a smaller Llama checkpoint with the first part of each tensor."""
    from safetensors import safe_open
    from safetensors.numpy import save_file

    config = json.loads((checkpoint / "config.json").read_text())
    config |= {"num_hidden_layers": layers, "vocab_size": vocabulary, "intermediate_size": channels}
    liger = config["liger"]
    liger["layer_memory"] = [row for row in liger["layer_memory"] if row[0] < layers]
    liger |= {"heads": liger["heads"][:layers]} if "heads" in liger else {}
    rows = {"embed_tokens": vocabulary, "lm_head": vocabulary, "gate_proj": channels, "up_proj": channels}
    weights = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(str(file), framework="numpy") as stored:
            for name in stored.keys():  # noqa: SIM118  (it is no dict)
                if name.startswith("model.layers.") and int(name.split(".")[2]) >= layers:
                    continue
                weight = stored.get_tensor(name)[: rows.get(name.split(".")[-2])]
                weights[name] = np.ascontiguousarray(weight[:, :channels] if "down_proj" in name else weight)
    with staged_directory(target, marker="config.json") as place:
        save_file(weights, place / "model.safetensors", metadata={"format": "pt"})
        (place / "config.json").write_text(json.dumps(config))
    return target


def step(session: Session, pieces: Pieces, steps: int, length: int, temperature: float, clock: Clock) -> None:
    """Let a model write a text, one token per step, and keep state, logits, tokens, times and memory of each piece."""
    vocabulary = session.artifact.manifest.model.vocab_size
    logits = np.zeros(vocabulary, np.float32)  # the first token is any
    if len(pieces):
        last = pieces.read(-1)
        logits = last["logits"]
        tensors = {name: array for name, array in last.items() if name.startswith("past.")}
        session.restore(Snapshot(session.artifact.manifest.fingerprint, last["position"], tensors))
    while len(pieces) * length < steps:
        clock.check()
        sampler, tokens, ms = Sampler(temperature, seed=len(pieces)), np.zeros(length, np.int64), np.zeros(length)
        for i in range(length):
            tokens[i] = sampler(logits)
            begin = time.perf_counter()
            logits = session.step(int(tokens[i]))[0]
            ms[i] = (time.perf_counter() - begin) * 1e3
        snapshot = session.snapshot()
        times = np.percentile(ms, [50, 99])
        machine = {"ms": times, **_now()}
        state = {"position": snapshot.position, "logits": logits, **snapshot.tensors}
        pieces.write({"tokens": tokens, **machine, **state})


def read_exactly(checkpoint: Path, steps: Pieces, pieces: Pieces, clock: Clock) -> None:
    """Let torch read the written text, in another process, since torch's memory would hide that of the steps."""
    from drift import Exact, exact

    exact(Exact(checkpoint), steps, pieces, clock)


def _of_layer(piece: Arrays, layer: int) -> Arrays:
    prefix = f"past.{layer}."
    return {name.removeprefix(prefix): array for name, array in piece.items() if name.startswith(prefix)}


def count_tokens(piece: Arrays, manifest: Manifest) -> None:
    """Check that each KV head holds or has counted every token, or holds as many as it has slots.

    Raises:
        ValueError: A token was lost or counted twice.
    """
    state = {name: array for name, array in piece.items() if name.startswith("past.")}
    for layer, heads in enumerate(held_positions(manifest, Snapshot("", piece["position"], state))):
        own, expected = _of_layer(piece, layer), np.full(len(heads), piece["position"][0])
        seen = np.array([np.unique(head).size for head in heads], np.float64)
        if "recurrent_mass" in own:
            seen += own["recurrent_mass"][0, :, 0]
        elif "cell_count" in own:
            seen += own["cell_count"][0].sum(axis=1)
        else:
            expected = np.minimum(expected, manifest.slots[layer])
        if not (seen == expected).all():
            raise ValueError(f"layer {layer} has seen {seen.tolist()} of {expected.tolist()} tokens")


def summary(pieces: Pieces, length: int, manifest: Manifest) -> dict[str, Any]:
    """Return the results of a run of steps: memory, time, norms, and that no token is lost.

    Raises:
        ValueError: A number is not finite, or a token was lost or counted twice.
    """
    rows, text = [], []
    if not len(pieces):
        return {"steps": 0}
    for i in range(len(pieces)):
        piece = pieces.read(i)
        norms: dict[str, float] = {}
        count_tokens(piece, manifest)
        for name in (name for name in piece if name.startswith("past.") or name == "logits"):
            if not np.isfinite(piece[name]).all():
                raise ValueError(f"{name} is not finite after {piece['position']} tokens")
            if piece[name].dtype.kind == "f":
                kind = name.rpartition(".")[2]
                norms[kind] = max(norms.get(kind, 0.0), float(np.linalg.norm(piece[name])))
        ms = [round(float(x), 4) for x in piece["ms"]]
        rows.append({"steps": (i + 1) * length, "ms": ms[0], "ms_99": ms[1], **_then(piece), "norms": norms})
        text.append(piece["tokens"])
    tokens, counts = np.unique(np.concatenate(text), return_counts=True)
    return {"steps": len(pieces) * length, "layers": manifest.model.layers, "distinct_tokens": len(tokens),
            "most_frequent": round(float(counts.max() / counts.sum()), 4), **_memory(rows), "rows": rows}  # fmt: skip


def _now() -> Arrays:
    """Return this process and its memory: all resident memory, and the part that is not backed by a file."""
    return {name: np.array(x) for name, x in (memory() | {"process": os.getpid()}).items() if name != "peak"}


def _then(piece: Arrays) -> dict[str, int]:
    """Return the values that `_now` stored in a piece."""
    return {name: int(piece[name]) for name in ("rss", "private", "process") if name in piece}


def _memory(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how memory grew from the second piece of each process on; writing the first is warm-up too."""
    by_process: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        by_process.setdefault(row.pop("process"), []).append(row)
    found: dict[str, Any] = {"processes": len(by_process)}
    for kind in ("rss", "private"):
        warm = [
            [x[kind] for x in pieces[1:]] for pieces in by_process.values() if len(pieces) > 2 and kind in pieces[0]
        ]
        grown = sum(sizes[-1] - sizes[0] for sizes in warm)
        if warm:
            found[f"{kind}_change"] = max(abs(size / sizes[0] - 1) for sizes in warm for size in sizes)
            found[f"{kind}_bytes_a_piece"] = grown / max(1, sum(len(sizes) - 1 for sizes in warm))
    return found


def cycles(session: Session, pieces: Pieces, total: int, length: int, clock: Clock) -> None:
    """Save and load the state repeatedly, and compare the next token with that of a session that kept its state.

    Raises:
        ValueError: A bit differs.
    """
    stays = session.sibling()
    ids = np.random.default_rng(0).integers(0, session.artifact.manifest.model.vocab_size, 4096)
    with tempfile.TemporaryDirectory() as place:
        file = Path(place, "state")
        for each in (stays, session):
            each.reset()
            each.prefill(ids[:512])
        while len(pieces) * length < total:
            clock.check()
            begin = time.perf_counter()
            for i in range(length):
                snapshot = session.snapshot()
                session.reset()
                snapshot.save(file)
                session.restore(Snapshot.load(file))
                if i % 16 == 0 and not np.array_equal(session.step(ids[i % 4096]), stays.step(ids[i % 4096])):
                    raise ValueError(f"another token after {i} of {length} cycles")
            ends = session.snapshot().tensors, stays.snapshot().tensors
            if not all(np.array_equal(ends[0][name], ends[1][name]) for name in ends[1]):
                raise ValueError(f"another state after {length} cycles")
            ms = (time.perf_counter() - begin) / length * 1e3
            pieces.write({"ms": np.array(ms), **_now()})


def drift(checkpoint: Path, steps: Pieces, truth: Pieces) -> dict[str, Any]:
    """Return the distance of fp32 from fp64 after each piece, and how often the two hold different tokens."""
    from drift import Exact, compare

    mixers = Exact(checkpoint).mixers
    rows = [compare(steps.read(i), truth.read(i), mixers) for i in range(len(truth))]
    same = [sum(row["same"][layer] for row in rows) for layer in range(len(mixers))]
    points = [
        {"steps": int(steps.read(i)["position"][0]), "sums": row["sums"], "logits": row["logits"]}
        for i, row in enumerate(rows)
    ]
    return {"compared": len(rows), "same_slots": same, "rows": points}


def plot(result: dict[str, Any], file: Path) -> None:
    """Draw the drift against steps."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "endurance"
    from matplotlib import pyplot

    rows = result["drift"]["rows"]
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    steps = [row["steps"] for row in rows]
    for layer in range(len(rows[0]["sums"])):
        axis.plot(steps, [row["sums"][layer] for row in rows], label=f"sums of layer {layer}, relative")
    axis.plot(steps, [row["logits"] for row in rows], ".", markersize=3, label="logits, absolute")
    axis.set(xlabel="steps", ylabel="difference to fp64", yscale="log")
    axis.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--whole", type=Path, required=True, help="an artifact of CHECKPOINT")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--plot", type=Path, help="SVG of the drift")
    parser.add_argument("--work", type=Path, default=Path("build/endurance"))
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument(
        "--only", choices=("steps", "exact", "whole", "cycles", "gates"), help="one part, beside others"
    )
    return parser.parse_args()


def main() -> None:
    """Do the remaining work within the time, and write the results so far."""
    args = parse_arguments()
    clock, work = Clock(args.seconds), args.work
    checkpoint, artifact = work / "checkpoint", work / "artifact"
    if not checkpoint.exists():
        cut(args.checkpoint, checkpoint)
    if not artifact.exists():
        lx.build(checkpoint, artifact, lowering="native")
    steps, truth, whole, round_trips = (Pieces(work / name) for name in ("steps", "exact", "whole", "cycles"))
    open_gates = work / "gates.json"

    def load(path: Path) -> Session:
        return lx.load(path, threads=1)

    def drive() -> None:
        from open_gates import drive_all

        if not open_gates.exists():
            with tempfile.TemporaryDirectory() as place:
                found = drive_all(Path(place), GATE_TOKENS)
            open_gates.write_text(json.dumps(found))

    parts: dict[str, Callable[[], None]] = {
        "steps": lambda: step(load(artifact), steps, STEPS, PIECE, 4.0, clock),
        "whole": lambda: step(load(args.whole), whole, WHOLE_STEPS, WHOLE_PIECE, 1.0, clock),
        "cycles": lambda: cycles(load(artifact), round_trips, CYCLES, CYCLE_PIECE, clock),
        "exact": lambda: read_exactly(checkpoint, steps, truth, clock),
        "gates": drive,
    }
    late = False
    try:
        for name, part in parts.items():
            if args.only in (None, name):
                part()
    except OutOfTime:
        late = True
    rows = [round_trips.read(i) for i in range(len(round_trips))]
    trips = [_then(row) for row in rows]
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1, "load": os.getloadavg()[0]},
        "versions": {name: version(name) for name in ("onnxruntime", "torch")} | {"python": platform.python_version()},
        "cut": {"layers": LAYERS, "vocabulary": VOCABULARY, "channels_of_mlps": CHANNELS},
        "steps": summary(steps, PIECE, open_artifact(artifact, hashes=False).manifest),
        "drift": drift(checkpoint, steps, truth),
        "whole": summary(whole, WHOLE_PIECE, open_artifact(args.whole, hashes=False).manifest),
        "cycles": {"cycles": len(rows) * CYCLE_PIECE, "ms": [float(row["ms"]) for row in rows], **_memory(trips)},
        "gates": json.loads(open_gates.read_text()) if open_gates.exists() else [],
    }  # fmt: skip
    kept = json.loads(args.output.read_text()) if args.output.is_file() else {}  # of endurance_recall.py
    args.output.write_text(json.dumps(kept | result, indent=1) + "\n")
    if args.plot:
        plot(result, args.plot)
    sys.exit(f"{len(steps)} of {STEPS // PIECE} pieces stepped, {len(truth)} read in fp64: run it again" if late else 0)


if __name__ == "__main__":
    main()
