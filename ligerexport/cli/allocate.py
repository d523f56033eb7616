"""`allocate`: slots go to the layers that gain by them."""

from __future__ import annotations

import json as library
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import card, progress
from ligerexport.errors import quoted
from ligerexport.measure.evaluate.settings import DEVICES, DTYPES


@verb(computes=True)
def allocate(
    model: Annotated[Path, typer.Argument(help="A converted checkpoint; its memory is where measuring starts.")],
    data: Annotated[
        list[str],
        typer.Option("--data", help="Chats or text, as for recover: divergence is measured on it; repeatable."),
    ],
    text: Annotated[
        list[Path], typer.Option(help="Prose in which a key is said once: .txt files, directories of them; repeatable.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="JSON file to write, for convert --memory.")],
    slots: Annotated[
        int | None, typer.Option(help="Exact slots of a layer, on average; default: as many as the checkpoint has.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="The Transformer; default: the checkpoint's own weights.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window of the data.")] = 2048,
    windows: Annotated[int, typer.Option(help="Most windows.")] = 8,
    trials: Annotated[int, typer.Option(help="Prompts with a key.")] = 12,
    distance: Annotated[int, typer.Option(help="Tokens of prose around a key.")] = 2048,
    device: Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Share slots out among layers by what each gains.

    Measures the model with smaller and larger memories in one layer at a time; trains nothing.
    """
    from ligerexport.train.allocate import allocate as run
    from ligerexport.train.allocate import check_output, make_config, make_plan

    settings: dict[str, Any] = {
        "slots": slots, "length": length, "windows": windows, "trials": trials, "distance": distance,
        "device": device, "dtype": dtype,
    }  # fmt: skip
    config = make_config(settings)
    check_output(output, force)
    options.announce("allocate", model=model, data=data, text=text, output=output, against=against,
                    threads=threads, **settings)  # fmt: skip
    if dry_run:
        plan = make_plan(model, data, text, config, against, progress)
        facts = {"path": str(output), "layers": len(plan.tried), "budget": plan.budget,
                 "measurements": plan.measurements, "tokens": plan.tokens}  # fmt: skip
        options.finish_json(json, facts)
        return card(f"would write {output}", [
            ("slots", f"{plan.budget:,} in {len(plan.tried)} layers"),
            ("measurements", f"{plan.measurements:,} of the model with one layer's memory replaced"),
            ("tokens to read", f"about {plan.tokens:,}"),
        ])  # fmt: skip
    run(model, data, text, output, against=against, force=force, progress=progress, **settings)
    found = library.loads(output.read_text(encoding="utf-8"))
    options.finish_json(json, {"path": str(output), **found})
    record = found["record"]
    base = record["measured"][0]["memories"][0]
    card("shared out", [
        ("where", str(output)),
        ("slots", f"{record['total']:,} of {record['budget']:,} in {record['layers']} layers"),
        ("before", f"{base['kl']:.3f} nats from the Transformer, {base['once']:.0%} of a key's digits"),
        ("expected", f"{record['expected_cost']:+.2f} in the sum of relative changes, were layers independent"),
    ], next_command=f"ligerexport convert {quoted(model)} --memory {quoted(output)} -o OTHER")  # fmt: skip
