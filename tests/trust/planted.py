"""Plant faults in artifacts while they are built, and check that verification refuses them and accepts sound ones.

    python tests/trust/planted.py -o benchmarks/results/planted.json
    python tests/trust/planted.py --sound 100 -o benchmarks/results/sound.json
    python tests/trust/planted.py --checkpoint CONVERTED --lowerings ort native -o benchmarks/results/planted_real.json

It uses tiny random models, or a converted checkpoint. A run continues where the file ends.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

sys.path.append(str(Path(__file__).parents[1]))  # the tests' tiny checkpoints

from checkpoints import FORESIGHT, MEMORY, make_checkpoint, make_transformer
from planting import AT, FAULTS, Fault, Site
from planting.edited import find, instead
from planting.understood import converted_instead

from ligerexport.artifact.artifact import Artifact, Source
from ligerexport.checkpoint.convert import convert
from ligerexport.errors import LigerError, VerificationError
from ligerexport.exporters.build import build, make_manifest
from ligerexport.exporters.onnx import session
from ligerexport.exporters.onnx.graph import LOWERINGS, weight_storage, write_graph
from ligerexport.exporters.onnx.spec import ModelSpec, read_spec
from ligerexport.exporters.onnx.weights import write_weights
from ligerexport.exporters.verify.verify import verify_artifact
from ligerexport.model.config import PRESETS, LigerConfig

CONFIGS = {
    "liger": LigerConfig(window=12),
    "memory": MEMORY,
    "foresight": FORESIGHT,
    "evicted": replace(FORESIGHT, recurrence_weight=1.0, recurrence="evicted", recurrence_distance=40),
    "recall": replace(
        FORESIGHT, slots=(("learned", 9),), heads=("12+9 5+6", "6+13 14+5", "20 4+9"), state_dtype="int8"
    ),
    "mom": replace(PRESETS["mom"].config, window=12),
}
"""The presets, with sizes that a text of 400 tokens fills many times."""

EARLY = ("source", "written", "reading", "after")
"""Ways to plant a fault before there is an artifact."""
SIZES = [10.0**-n for n in range(1, 8)]
"""Relative errors that are tried in one channel of a layer's output."""
REAL = [
    "a sink dropped", "window one too short", "scores of two pools swapped", "softmax scale", "rope base",
    "weight of the recurrence", "a missing residual", "epsilon of one norm", "one evicted token too many",
    "values of the slots in fp16", "states of two layers swapped", "prefill right and step wrong", "one sign flipped",
    "weight of the learned score", "embedding of a token that no text has",
]  # fmt: skip
"""Faults to plant in a real model of the preset `evicted`, in one lowering after the other."""


def cases() -> Iterator[tuple[str, str, str]]:
    """Yield fault, preset and lowering: every fault once, then again in the next lowering to which it applies."""
    for turn in range(len(LOWERINGS)):
        for i, (name, fault) in enumerate(FAULTS.items()):
            if turn < len(fault.lowerings):
                preset = fault.presets[(i + i // len(LOWERINGS) + turn) % len(fault.presets)]
                yield name, preset, fault.lowerings[(i + turn) % len(fault.lowerings)]


@cache
def model(place: Path, preset: str, family: str = "llama", seed: int = 0) -> ModelSpec:
    """Return a tiny random model."""
    return read_spec(make_checkpoint(place / f"{preset}-{family}-{seed}", CONFIGS[preset], family, seed=seed))


def verify(spec: ModelSpec, lowering: str, weights: str = "fp32", fault: Fault | None = None) -> str | None:
    """Build and verify, with or without a fault; return the error's message, or None if it passes."""
    storage = weight_storage(weights, lowering=lowering)
    with tempfile.TemporaryDirectory() as place:
        site = Site(spec, Path(place), lowering, storage)
        how = None if fault is None else fault.how
        with fault.plant(site) if fault and how == "code" else nullcontext():
            write_weights(spec, site.directory, storage)
            described = fault.plant(spec) if fault and how == "spec" else spec
            write_graph(described, site.directory, lowering=lowering, max_chunk=64, storage=storage)
            if fault and how == "file":
                fault.plant(site)
            manifest = make_manifest(spec, Source("planted"), "onnx", lowering, 64, {}, {}, storage=storage)
            try:
                with patch.object(session, "check_graph"):  # it does not know the operators that faults add
                    verify_artifact(spec, Artifact(site.directory, manifest), storage)
            except VerificationError as error:
                return str(error)
    return None


def convert_and_build(preset: str, fault: Fault) -> tuple[str, str | None]:
    """Convert and build a Transformer with a fault; return the last verb, and its message if it refuses."""
    config = CONFIGS[preset]
    with tempfile.TemporaryDirectory() as root:
        source = make_transformer(Path(root, "source"), fault.family, **dict(fault.sizes))
        liger = Path(root, "liger")
        context: AbstractContextManager[Any] = nullcontext()
        if fault.how == "source":
            fault.plant(source)
        elif fault.how == "written":
            context = converted_instead(fault.plant)
        elif fault.how == "reading":
            context = fault.plant(source)
        with context:
            try:
                convert(source, liger, **config.to_dict() | {"slots": config.slots})
                if fault.how == "after":
                    fault.plant(liger)
                build(liger, Path(root, "engine"))
            except LigerError as error:
                return "build" if liger.exists() else "convert", str(error).replace(root, "")
    return "build", None


def named(message: str | None) -> int | None:
    """Return the layer that a refusal names first."""
    found = re.search(r"layer (\d+) is the first that differs|\blayers\.(\d+)\.", message or "")
    return int(found[1] or found[2]) if found else None


def plant(spec: ModelSpec, name: str, preset: str, lowering: str) -> dict[str, Any]:
    """Plant one fault and return the row of the table."""
    fault = FAULTS[name]
    row: dict[str, Any] = {"fault": name, "preset": preset, "lowering": lowering, "weights": fault.weights}
    if fault.how in EARLY:
        row["verb"], message = convert_and_build(preset, fault)
    else:
        message = verify(spec, lowering, fault.weights, fault)
    return row | {"refused": message, "planted": fault.layer, "named": named(message)}


def right(row: dict[str, Any]) -> bool:
    """Return whether a fault was refused and its layer named."""
    return row["refused"] is not None and row["named"] == row["planted"]


def smallest(spec: ModelSpec, lowering: str) -> dict[str, Any]:
    """Return which relative errors of one channel of a layer's output are refused, and the layer that is named."""
    found = {}
    for size in SIZES:

        def one_channel(site: Site, size: float = size) -> None:
            with site.edited() as graph:
                instead(graph, find(graph, f"hidden.{AT}"), lambda g, x: g.op("Mul", x, g.floats(factors(spec, size))))

        message = verify(spec, lowering, fault=Fault("file", AT, one_channel))
        found[f"{size:.0e}"] = {"refused": message is not None, "named": named(message)}
    return found


def factors(spec: ModelSpec, size: float) -> list[float]:
    """Return a factor for each channel of the residual stream, which is 1 except for the first."""
    return [1 + size, *[1.0] * (spec.hidden_size - 1)]


def sound(place: Path, number: int) -> dict[str, Any]:
    """Build a sound model, a different one for each number, and return the result of verification."""
    presets, lowerings = list(CONFIGS), ["ort", "native", "portable"]
    preset, lowering = presets[number % len(presets)], lowerings[number // len(presets) % len(lowerings)]
    message = verify(model(place, preset, seed=number), lowering)
    return {"seed": number, "preset": preset, "lowering": lowering, "refused": message}


def main() -> None:
    """Plant all faults that the file does not have yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--sound", type=int, help="verify this many sound models instead")
    parser.add_argument("--checkpoint", type=Path, help="converted checkpoint of the preset evicted to plant faults in")
    parser.add_argument("--lowerings", nargs="*", default=list(LOWERINGS))
    args = parser.parse_args()
    done = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": []}
    done["command"] = "python " + " ".join(sys.argv)
    rows = done["rows"]

    def add(row: dict[str, Any]) -> None:
        rows.append(row)
        done["refused"] = sum(row["refused"] is not None for row in rows)
        if args.sound is None:
            done["right"] = sum(map(right, rows))
        print(json.dumps(row), flush=True)
        args.output.write_text(json.dumps(done, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as place:
        if args.sound is not None:
            for number in range(len(rows), args.sound):
                add(sound(Path(place), number))
            return
        known = {(row["fault"], row["lowering"]) for row in rows}
        if args.checkpoint is not None:
            spec = read_spec(args.checkpoint)
            for i, name in enumerate(REAL):
                lowering = args.lowerings[i % len(args.lowerings)]
                if (name, lowering) not in known:
                    add(plant(spec, name, "evicted", lowering))
            return
        if "smallest" not in done:
            done["smallest"] = smallest(model(Path(place), "memory"), "ort")
        for name, preset, lowering in cases():
            if lowering in args.lowerings and (name, lowering) not in known:
                add(plant(model(Path(place), preset, FAULTS[name].family), name, preset, lowering))


if __name__ == "__main__":
    main()
