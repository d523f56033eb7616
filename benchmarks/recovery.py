"""Convert, recover and evaluate by the ordinary commands, row after row: what each preset and recipe is worth.

    python benchmarks/recovery.py MODEL --chats chats.jsonl --calibrate prose/ --text heldout/ -o recovery.json

MODEL is the Transformer. `--chats` is what recovery reads (see `ligerexport recover`), `--calibrate` the text that
scores are fitted on, `--text` what nobody was trained on. Rows that end in `untrained` are only converted; `window` has
the same number of exact slots as the default and the same training, so it is the control for all others.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ligerexport as lx
from ligerexport.console import progress, say


@dataclass(frozen=True)
class Row:
    """One way to convert and to recover.

    Attributes:
        preset: Row of `PRESETS`.
        changes: Fields of `LigerConfig` that differ.
        recipe: Row of `RECIPES`; None leaves the conversion as it is.
        settings: Fields of `RecoverConfig` that differ.
        controls: Rows of `CONTROLS` to measure beside it.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()


WINDOW = {"window": 124}
MIXED = {"recurrence_weight": 0.1}

ROWS: dict[str, Row] = {
    "window, untrained": Row("sinks", WINDOW),
    "window, distill": Row("sinks", WINDOW, "distill"),
    "window, paper": Row("sinks", WINDOW, "paper"),
    "liger, untrained": Row("liger"),
    "liger, paper": Row("liger", {}, "paper"),
    "liger with hgrn2, paper": Row("liger", {"gate": "hgrn2"}, "paper"),
    "liger without window, paper": Row("liger", {"window": 1}, "paper"),
    "liger, distill": Row("liger", {}, "distill"),
    "memory, untrained": Row("memory"),
    "memory, distill": Row("memory", {}, "distill", controls=("random-judge",)),
    "foresight, untrained": Row("foresight"),
    "foresight, distill": Row("foresight", {}, "distill", controls=("random-judge",)),
    "foresight with recurrence, distill": Row("foresight", MIXED, "distill", controls=("no-recurrence",)),
}


def measure(name: str, row: Row, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Return the tables of a row and of its controls, and what training took."""
    fitted = {"calibrate": args.calibrate} if row.preset == "foresight" and args.calibrate else {}
    model = lx.convert(args.model, place / "converted", preset=row.preset, progress=progress, **fitted, **row.changes)
    found: dict[str, Any] = {"preset": row.preset, "changes": row.changes, "recipe": row.recipe}
    if row.recipe is not None:
        start, losses = time.perf_counter(), []
        settings = {"tokens": args.tokens, "dtype": args.dtype, **row.settings}
        model = lx.recover(
            model, args.chats, place / "recovered", recipe=row.recipe, progress=progress,
            on_step=lambda step: losses.append((step.phase, step.loss)), **settings,
        )  # fmt: skip
        found |= {"settings": settings, "seconds": time.perf_counter() - start, "losses": losses}
    report = lx.evaluate(
        model, text=args.text, parts=("nll", "recall"), controls=row.controls, length=args.length, windows=args.windows,
        trials=args.trials, batch=args.batch, progress=progress,
    )  # fmt: skip
    return found | {"tables": report.to_dict()["rows"]}


def main() -> None:
    """Run the rows and write what they gave; rows measured before are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path, nargs="+")
    parser.add_argument("--calibrate", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"rows": {}}
    result["command"] = "python " + " ".join(sys.argv)
    for name in args.only or ["teacher", *ROWS]:
        with tempfile.TemporaryDirectory() as place:
            if name == "teacher":
                report = lx.evaluate(
                    args.model, text=args.text, parts=("nll", "recall"), length=args.length, windows=args.windows,
                    trials=args.trials, batch=args.batch, progress=progress,
                )  # fmt: skip
                found = {"tables": report.to_dict()["rows"]}
            else:
                found = measure(name, ROWS[name], args, Path(place))
        result["rows"][name] = found
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        say(f"{name}: {json.dumps(found['tables'])[:400]}")


if __name__ == "__main__":
    main()
