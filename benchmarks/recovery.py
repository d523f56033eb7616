"""Convert, recover and evaluate with the ordinary commands, row by row, to compare presets and recipes.

    python benchmarks/recovery.py MODEL --chats chats.jsonl --calibrate prose/ --text heldout/ --heldout-chats \
        heldout.jsonl -o recovery.json

MODEL is the Transformer. Recovery trains on `--chats` (see `ligerexport recover`), and scores are fitted on
`--calibrate`. Loss and recall are measured on `--text`, and loss in windows of 2,048 tokens on `--heldout-chats`; no
row was trained on these two. With `--jobs`, rows run side by side, and the paper's gates are compared by

    python benchmarks/recovery.py smollm2-135m --chats chats.jsonl --text heldout/ --heldout-chats heldout.jsonl \
        --length 4096 --trials 8 --tokens 1000000 --jobs 9 --only gates -o benchmarks/results/gates.json

Rows that end in `untrained` are only converted; `window` has
the same number of exact slots as the default and the same training, so it is the control for all others.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ligerexport as lx
from ligerexport.checkpoint.adapter import RECORD, merge_adapter
from ligerexport.checkpoint.sources import resolve
from ligerexport.console import progress, say
from ligerexport.kernels import ops
from ligerexport.model.config import get_preset
from ligerexport.model.gates import OPEN, get_gate
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.records import read_records


@dataclass(frozen=True)
class Row:
    """One way to convert and to recover.

    Attributes:
        preset: Row of `PRESETS`.
        changes: Fields of `LigerConfig` that differ.
        recipe: Row of `RECIPES`; None leaves the conversion as it is.
        settings: Fields of `RecoverConfig` that differ.
        controls: Rows of `CONTROLS` that are measured too.
        random_gate: Whether the gate reads a fixed random projection of the key instead of the key.
    """

    preset: str
    changes: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    controls: tuple[str, ...] = ()
    random_gate: bool = False


WINDOW = {"window": 124}
DOUBLE = {"window": 124, "slots": (("recent_use", 56), ("learned", 72))}
FEW = (7, 18, 20, 23)  # the layers of SmolLM2-135M that cost most, by layers.py
HYBRID = {"keep_softmax": FEW}


def deep(window: int, use: int, learned: int, few: tuple[int, int, int]) -> dict[str, Any]:
    """Return a memory with size (window, use, learned) in most layers, and another one in the few that cost most."""
    large = (("recent_use", few[1]), ("learned", few[2]))
    return {
        "window": window, "slots": (("recent_use", use), ("learned", learned)),
        "layer_memory": tuple((layer, few[0], large) for layer in FEW),
    }  # fmt: skip


DEEP = deep(34, 14, 18, (244, 112, 144))  # 3,836 slots in 30 layers; 128 in each would be 3,840
DEEP_DOUBLE = deep(60, 28, 36, (496, 220, 304))  # 7,424; 256 in each would be 7,680
SPREAD = Path(__file__).parent / "results" / "spread.json"


def spread(slots: int) -> dict[str, Any]:
    """Return a memory with this average number of slots per layer, as an earlier version of `allocate` chose it."""
    return json.loads(SPREAD.read_text())["chosen"][str(slots)] if SPREAD.is_file() else {}


MIXED = {"recurrence_weight": 0.1}
LONG = {"length": 2048, "batch_tokens": 16384}
WIDE = {**LONG, "rank": 16, "alpha": 16.0, "targets": ("q_proj", "k_proj", "v_proj", "o_proj")}
MOST = {**WIDE, "tokens": 10_000_000}
FULL = {"rank": 576, "alpha": 576.0}  # full rank, so that every update of a projection is possible

ROWS: dict[str, Row] = {
    "window, untrained": Row("sinks", WINDOW),
    "window, distill": Row("sinks", WINDOW, "distill"),
    "window, paper": Row("sinks", WINDOW, "paper"),
    "window, blend": Row("sinks", WINDOW, "blend", WIDE),
    "Transformer, paper": Row("sinks", {"keep_softmax": tuple(range(30))}, "paper"),
    "liger, untrained": Row("liger"),
    "liger, paper": Row("liger", {}, "paper"),
    "liger with hgrn2, paper": Row("liger", {"gate": "hgrn2"}, "paper"),
    **{
        f"liger with {gate}, paper": Row("liger", {"gate": gate}, "paper")
        for gate in ("gsa", "gsa:16", "hgrn2:0.5", "mamba2", "gated_retention", "mlstm", "rwkv6")
    },
    "liger without window, paper": Row(
        "liger", {"window": 1, "attention_weight": 0.0, "recurrence_weight": 1.0}, "paper"
    ),
    "liger without recurrence, paper": Row("liger", {"attention_weight": 1.0, "recurrence_weight": 0.0}, "paper"),
    "liger with a random gate, paper": Row("liger", {}, "paper", random_gate=True),
    "liger without LoRA, paper": Row("liger", {}, "paper", FULL),
    "liger, distill": Row("liger", {}, "distill"),
    "memory, untrained": Row("memory"),
    "memory, distill": Row("memory", {}, "distill", controls=("random-judge",)),
    "foresight, untrained": Row("foresight"),
    "foresight, distill": Row("foresight", {}, "distill", controls=("random-judge",)),
    "foresight with recurrence, distill": Row("foresight", MIXED, "distill", controls=("no-recurrence",)),
    "evicted, untrained": Row("evicted", controls=("no-recurrence",)),
    "evicted, distill": Row("evicted", {}, "distill", controls=("no-recurrence",)),
    "evicted, distill, long": Row("evicted", {}, "distill", LONG, controls=("no-recurrence",)),
    "evicted, distill, long and wide": Row("evicted", {}, "distill", WIDE, controls=("no-recurrence",)),
    "window, distill, 10M": Row("sinks", WINDOW, "distill", MOST),
    "evicted, distill, 10M": Row("evicted", {}, "distill", MOST, controls=("no-recurrence",)),
    "evicted with 256 slots, untrained": Row("evicted", DOUBLE, controls=("no-recurrence",)),
    "evicted with 256 slots, distill": Row("evicted", DOUBLE, "distill", WIDE, controls=("no-recurrence",)),
    "deep, untrained": Row("evicted", DEEP, controls=("no-recurrence",)),
    "deep, distill": Row("evicted", DEEP, "distill", WIDE, controls=("no-recurrence",)),
    "deep, distill, 10M": Row("evicted", DEEP, "distill", MOST, controls=("no-recurrence",)),
    "deep with 256 slots, untrained": Row("evicted", DEEP_DOUBLE, controls=("no-recurrence",)),
    "deep with 256 slots, distill": Row("evicted", DEEP_DOUBLE, "distill", WIDE, controls=("no-recurrence",)),
    "spread, untrained": Row("evicted", spread(128), controls=("no-recurrence",)),
    "spread, distill": Row("evicted", spread(128), "distill", WIDE, controls=("no-recurrence",)),
    "spread, distill, 10M": Row("evicted", spread(128), "distill", MOST, controls=("no-recurrence",)),
    "spread, paper": Row("evicted", spread(128), "paper", controls=("no-recurrence",)),
    "spread, blend": Row("evicted", spread(128), "blend", WIDE, controls=("no-recurrence",)),
    "spread over 256 slots, untrained": Row("evicted", spread(256), controls=("no-recurrence",)),
    "spread over 256 slots, distill": Row("evicted", spread(256), "distill", WIDE, controls=("no-recurrence",)),
    "spread over 256 slots, blend": Row("evicted", spread(256), "blend", WIDE, controls=("no-recurrence",)),
    "spread over 256 slots, distill, 10M": Row("evicted", spread(256), "distill", MOST, controls=("no-recurrence",)),
    "hybrid, untrained": Row("evicted", HYBRID, controls=("no-recurrence",)),
    "hybrid, distill": Row("evicted", HYBRID, "distill", WIDE, controls=("no-recurrence",)),
}


GROUPS = {
    "gates": ("liger with rwkv6, paper", "liger with gsa, paper", "liger with gsa:16, paper",
              "liger with hgrn2:0.5, paper", "liger with mamba2, paper", "liger with gated_retention, paper",
              "liger with mlstm, paper", "liger, paper", "liger without recurrence, paper"),
}  # fmt: skip
"""Names for several rows, the slowest first."""
CHAT_LENGTH = 2048


def judge(model: str | Path, args: argparse.Namespace, controls: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the tables of a model and of its controls: loss and recall on prose, loss on chats."""
    shared: dict[str, Any] = {"controls": controls, "batch": args.batch, "progress": progress}
    found = {
        "tables": lx.evaluate(
            model, text=args.text, length=args.length, windows=args.windows, trials=args.trials,
            tasks=args.tasks, task_data=args.task_data, limit=args.limit, **shared,
        ).to_dict()["rows"]
    }  # fmt: skip
    if args.heldout_chats:
        with tempfile.TemporaryDirectory() as place:
            text = Path(place, "chats.txt")
            text.write_text(rendered(model, args.heldout_chats), encoding="utf-8")
            report = lx.evaluate(model, text=[text], parts=("nll",), length=CHAT_LENGTH, windows=10_000, **shared)
        found["chats"] = report.to_dict()["rows"]
    return found


def rendered(model: str | Path, files: list[Path]) -> str:
    """Return conversations as the model reads them, one after the other."""
    text = TextModel(resolve(model).path)
    conversations = ([{"role": role, "content": said} for role, said in x.turns] for x in read_records(files))
    return "".join(text.render(turns, answer=False) for turns in conversations)


@contextmanager
def random_gate(seed: int = 0) -> Iterator[None]:
    """Let the parallel recurrence take its decay from a random projection of the key, the paper's ablation."""
    inner = ops.linear_attention

    def attend(query: Tensor, key: Tensor, value: Tensor, *, gate: str, initial_state: Tensor) -> Any:
        width = key.shape[-1]
        projection = torch.randn(width, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
        wide = key.float()
        decay = torch.nn.functional.logsigmoid(wide @ projection.to(key.device)) / get_gate(gate).decay_divisor
        decay = decay.masked_fill(wide >= OPEN, 0.0)
        features = (x.float().softmax(dim=-1).to(value.dtype) for x in (query, key))
        return inner(*features, value, decay, initial_state=initial_state)

    ops.linear_attention = attend  # type: ignore[assignment]
    try:
        yield
    finally:
        ops.linear_attention = inner


def measure(name: str, row: Row, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Return the tables of a row and of its controls, and the cost of training."""
    with random_gate() if row.random_gate else nullcontext():
        return _measure(name, row, args, place)


def _measure(name: str, row: Row, args: argparse.Namespace, place: Path) -> dict[str, Any]:
    model, found = trained(name, row, args, place)
    return found | judge(model, args, row.controls)


def trained(name: str, row: Row, args: argparse.Namespace, place: Path) -> tuple[Path, dict[str, Any]]:
    """Return the model of a row, converted and recovered in a directory, and the cost of training."""
    fitted = {"calibrate": args.calibrate} if get_preset(row.preset).foresees and args.calibrate else {}
    model = lx.convert(args.model, place / "converted", preset=row.preset, progress=progress, **fitted, **row.changes)
    found: dict[str, Any] = {"preset": row.preset, "changes": row.changes, "recipe": row.recipe}
    if row.recipe is not None:
        settings = {"tokens": args.tokens, "dtype": args.dtype, **row.settings}
        found["settings"] = settings
        adapter = (args.adapters or place / "adapters") / re.sub(r"\W+", "-", name)
        if not (adapter / RECORD).is_file():
            adapter.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            lx.recover(
                model, args.chats, adapter, recipe=row.recipe, merge=False, force=True, progress=progress, **settings
            )
            found["seconds"] = time.perf_counter() - start
        model = merge_adapter(model, adapter, place / "recovered")
        record = json.loads((adapter / RECORD).read_text())
        found |= {key: record[key] for key in ("final_loss", "tokens", "samples")}
        torch.cuda.empty_cache()  # other rows may run beside this one
    return model, found


def run_beside(names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows as they end; each runs in a process of its own. A row that fails is left out."""
    resolve(args.model)  # into the cache, before all of them look for it there
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(args.jobs) as pool:

        def run(name: str) -> dict[str, Any]:
            output = Path(place, re.sub(r"\W+", "-", name) + ".json")
            own = ["--jobs", "1", "-o", str(output), "--only", name]
            subprocess.run([sys.executable, *sys.argv, *own], check=True, stdout=subprocess.DEVNULL)
            return json.loads(output.read_text())["rows"][name]

        running = {pool.submit(run, name): name for name in names}
        for done in as_completed(running):
            if done.exception():
                say(f"{running[done]}: {done.exception()}")
            else:
                yield running[done], done.result()


def run_here(names: list[str], args: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield rows in order."""
    for name in names:
        with tempfile.TemporaryDirectory() as place:
            yield name, judge(args.model, args) if name == "teacher" else measure(name, ROWS[name], args, Path(place))


def main() -> None:
    """Run the rows and write their results; results of earlier runs are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path, nargs="+")
    parser.add_argument("--calibrate", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout-chats", type=Path, nargs="+")
    parser.add_argument("--tasks", nargs="*", help="tasks of lm-eval; none by default")
    parser.add_argument("--task-data", type=Path, help="data sets of the tasks, for a machine without a network")
    parser.add_argument("--limit", type=int, help="questions per task; all by default")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument(
        "--adapters", type=Path, help="directory to keep trained adapters in and reuse them from; none by default"
    )
    parser.add_argument("--only", nargs="*", help=f"rows to measure, or {', '.join(GROUPS)}; all by default")
    parser.add_argument("--jobs", type=int, default=1, help="number of rows to measure at the same time")
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"rows": {}}
    result["command"] = "python " + " ".join(sys.argv)
    names = [row for name in args.only or ["teacher", *ROWS] for row in GROUPS.get(name, (name,))]
    for name, found in (run_beside if args.jobs > 1 else run_here)(names, args):
        result["rows"][name] = found
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        say(f"{name}: {json.dumps(found['tables'])[:400]}")


if __name__ == "__main__":
    main()
