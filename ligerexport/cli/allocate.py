"""`allocate`: give slots to the layers that gain most from them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import card, progress
from ligerexport.errors import LigerError, quoted
from ligerexport.measure.evaluate.settings import DEVICES, DTYPES
from ligerexport.versions import require


@verb(computes=True)
def allocate(
    model: Annotated[Path, typer.Argument(help="A converted checkpoint; the measurement starts from its memory.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="DATA", help="Chats or text to measure divergence on, as for recover; may be repeated."
        ),
    ],
    text: Annotated[
        list[Path],
        typer.Option(
            metavar="PATH", help="Prose to hide a key in: .txt files or directories of them; may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write, for convert --memory.")],
    slots: Annotated[
        int | None, typer.Option(help="Average number of exact slots per layer; default: that of the checkpoint.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The Transformer; default: the checkpoint's own weights.")] = None,
    length: Annotated[int, typer.Option(help="Tokens per window of the data.")] = 2048,
    windows: Annotated[int, typer.Option(help="Largest number of windows.")] = 8,
    trials: Annotated[int, typer.Option(help="Number of prompts with a key.")] = 12,
    distance: Annotated[int, typer.Option(help="Tokens of prose around a key.")] = 2048,
    device: Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")] = "float32",
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Give slots to the layers that gain most.

    The model is measured with smaller and larger memories in one layer at a time. Nothing is trained.
    """
    require("build")
    from ligerexport.train.allocate import AllocatePlan

    settings: dict[str, Any] = {
        "slots": slots, "length": length, "windows": windows, "trials": trials, "distance": distance,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    plan = AllocatePlan(model, data, text, output, against=against, force=force, progress=progress, **settings)
    options.announce("allocate", model=model, data=data, text=text, output=output, against=against, threads=threads,
                     **settings)  # fmt: skip
    if dry_run:
        options.finish_json(json, plan.describe())
        return card(f"would write {output}", [
            ("slots", f"{plan.budget:,} in {len(plan.tried)} layers"),
            ("measurements", f"{plan.measurements:,} of the model with one layer's memory replaced"),
            ("tokens to read", f"about {plan.tokens:,}"),
        ])  # fmt: skip
    found = plan.run(progress)
    options.finish_json(json, {"path": str(output), **found})
    try:
        plan.save(found)
    except LigerError:  # a full disk must not lose what was measured
        options.finish_json(not json, found)
        raise
    record = found["record"]
    base = record["measured"][0]["memories"][0]
    card("allocated", [
        ("where", str(output)),
        ("slots", f"{record['total']:,} of {record['budget']:,} in {record['layers']} layers"),
        ("before", f"{base['kl']:.3f} nats from the Transformer, {base['once']:.0%} of a key's digits recalled"),
        ("expected", f"{record['expected_cost']:+.2f} in the sum of relative changes, if layers are independent"),
    ], next_command=f"ligerexport convert {quoted(model)} --memory {quoted(output)} -o OTHER")  # fmt: skip
