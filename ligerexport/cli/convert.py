"""`convert`: turn a pretrained Transformer into a converted checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.checkpoint.convert import SHIPPED, SIZED, ConvertPlan
from ligerexport.checkpoint.describe import describe_checkpoint
from ligerexport.checkpoint.scores import WINDOWS, Fitting
from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.cli.prompting import build_command
from ligerexport.console import format_bytes, progress
from ligerexport.errors import UsageError, quoted
from ligerexport.model.config import DEFAULT_PRESET, OPEN_PRESET, PRESETS, RECURRENCES, Slots
from ligerexport.model.gates import GATES
from ligerexport.model.scores import SCORES


@verb(computes=True)
def convert(
    model: Annotated[
        str, typer.Argument(help="A directory, a GGUF file, a hub id, or a built-in model such as smollm2-135m.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help=f"One of: {', '.join(PRESETS)}. Default: that of the given memory or adapter, or {DEFAULT_PRESET}, or "
            f"{OPEN_PRESET} if options set gate, mix, or sizes."
        ),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Windows and pools of all layers, as `allocate` writes them.")
    ] = None,
    gate: Annotated[
        str | None, typer.Option(help=f"One of: {', '.join(GATES)}; two take a number: hgrn2:0.5, gsa:16.")
    ] = None,
    sinks: Annotated[int | None, typer.Option(help="Number of first tokens that are always kept.")] = None,
    window: Annotated[int | None, typer.Option(help="Number of most recent tokens that are kept.")] = None,
    slots: Annotated[
        str | None,
        typer.Option(metavar="SCORE=COUNT,...", help=f"Number of slots for each score: {', '.join(SCORES)}; or none."),
    ] = None,
    attention_weight: Annotated[
        float | None, typer.Option(help="Weight of the softmax attention over the slots.")
    ] = None,
    recurrence_weight: Annotated[float | None, typer.Option(help="Weight of the recurrence; 0 leaves it out.")] = None,
    recurrence: Annotated[str | None, typer.Option(help=f"One of: {', '.join(RECURRENCES)}.")] = None,
    recurrence_distance: Annotated[
        int | None, typer.Option(help="Rotary distance in tokens at which evicted tokens are read.")
    ] = None,
    cells: Annotated[
        int | None, typer.Option(help="Number of clusters of evicted tokens for each KV head, for --recurrence cells.")
    ] = None,
    memories: Annotated[
        int | None,
        typer.Option(help="Number of further states of the parallel recurrence, of which each token uses two."),
    ] = None,
    layer_memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER,...:window=TOKENS,SCORE=COUNT,...",
            help="Memory of some layers, if it differs; may be repeated.",
        ),
    ] = None,
    keep_softmax: Annotated[
        str | None, typer.Option(metavar="LAYER,...", help="Layers that keep their softmax attention.")
    ] = None,
    max_distance: Annotated[
        int | None, typer.Option(help="Largest rotary distance; default: the trained context length.")
    ] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="TEXT", help="Fit the learned score or cells on .txt files or directories of them; may be repeated."
        ),
    ] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="Learned scores from an earlier fit.")] = None,
    windows: Annotated[
        int, typer.Option(help=f"Number of windows of 2,048 tokens that a fit reads; not for {SIZED}.")
    ] = WINDOWS,
    state_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help=f"Size of the state of the preset {SIZED}, such as 8MB or 24MiB, shared out over KV heads. "
            "Default: 654 tokens a head; 8 MB for SmolLM2-135M.",
        ),
    ] = None,
    fit: Annotated[
        bool,
        typer.Option("--fit/--no-fit", help=f"Fit the sizes and the score of {SIZED}, or give all heads one window."),
    ] = True,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help=f"Adapter of `recover --adapter` to merge; {SHIPPED} is the one of a built-in model."
        ),
    ] = None,
    merge: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="PEFT adapter to merge into the model first: a directory or a hub id."),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Make a Transformer recurrent. A fit of its memory takes minutes, and all else seconds.

    A bounded exact memory replaces its attention, or a gated recurrence too. Without --adapter no weight changes.
    """
    hint = "write SCORE=COUNT,... as in --slots peak_use=32,novelty=32"
    pools = None if slots is None else _counts(slots, f"--slots {slots}", hint)
    changes: dict[str, Any] = {
        "gate": gate, "sinks": sinks, "window": window, "slots": pools,
        "attention_weight": attention_weight, "recurrence_weight": recurrence_weight,
        "recurrence": recurrence, "recurrence_distance": recurrence_distance, "cells": cells,
        "memories": memories, "layer_memory": parse_layer_memory(layer_memory),
        "keep_softmax": parse_layers(keep_softmax), "max_distance": max_distance,
    }  # fmt: skip
    fitting = Fitting(calibrate, scores, windows, parse_bytes(state_bytes), fit)
    given: dict[str, Any] = {"preset": preset, "memory": memory, "adapter": adapter, "merge": merge}
    plan = ConvertPlan(model, output, fitting, **given, force=force, **changes)
    chosen = ("window", "slots") if plan.sized or plan.liger.heads else ()  # for each KV head
    settings = {name: value for name, value in vars(plan.liger).items() if name not in chosen}
    options.announce("convert", model=model, output=output, preset=preset, threads=threads, **settings)
    if dry_run:
        return options.finish_made(json, f"would write {output}", plan.describe(), None)

    path = plan.run(progress)
    facts = describe_checkpoint(path, plan.liger)
    # No target has a memory with cells yet.
    following = f"ligerexport eval {quoted(path)}" if plan.liger.celled else build_command(path)
    if plan.sized:
        facts["more"] = f"keep more: --state-bytes {format_bytes(2 * facts['state_bytes']).replace(' ', '')}"
        if fit:
            facts["more"] += "; fit on your text too: --calibrate TEXT"
    options.finish_made(json, "converted", facts, following)


def parse_bytes(text: str | None) -> int | None:
    """Read `8MB`, `24MiB` or `8000000`.

    Raises:
        UsageError: The text does not have this form.
    """
    if text is None:
        return None
    number = text.strip().lower()
    name = next((unit for unit in _UNITS if number.endswith(unit)), "")
    try:
        count = float(number.removesuffix(name)) * _UNITS.get(name, 1)
    except ValueError:
        count = 0.0
    if not 1 <= count < inf:
        raise UsageError(f"--state-bytes {text}", hint="write a size such as 8MB, 24MiB or 8000000")
    return round(count)


_UNITS = {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9,
    "k": 10**3, "m": 10**6, "g": 10**9, "b": 1,
}  # fmt: skip


def parse_layer_memory(texts: Sequence[str] | None) -> tuple[tuple[int, int, Slots], ...] | None:
    """Read options like `7,18:window=240,peak_use=32`: layers, then their window and pools.

    Raises:
        UsageError: An option does not have this form.
    """
    if texts is None:
        return None
    memory = []
    for text in texts:
        given = f"--layer-memory {text}"
        hint = "write LAYER,...:window=TOKENS,SCORE=COUNT,... as in --layer-memory 7,18:window=240,recent_use=112"
        layers, _, sizes = text.partition(":")
        pools = _counts(sizes, given, hint)
        numbers = [part.strip() for part in layers.split(",")]
        if not all(number.isdigit() for number in numbers) or [n for n, _ in pools].count("window") != 1:
            raise UsageError(given, hint=hint)
        slots = tuple(pool for pool in pools if pool[0] != "window")
        memory += [(int(number), dict(pools)["window"], slots) for number in numbers]
    return tuple(memory)


def _counts(text: str, given: str, hint: str) -> Slots:
    """Read `NAME=COUNT,...`."""
    pools = []
    for part in options.parts(text):
        name, found, count = part.partition("=")
        if not found or not count.strip().isdigit():
            raise UsageError(given, hint=hint)
        pools.append((name.strip(), int(count)))
    return tuple(pools)


def parse_layers(text: str | None) -> tuple[int, ...] | None:
    """Read `8,16`; `none` means no layers.

    Raises:
        UsageError: The text does not have this form.
    """
    if text is None:
        return None
    parts = options.parts(text)
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--keep-softmax {text}", hint="write layer numbers from 0, as in --keep-softmax 8,16")
    return tuple(int(part) for part in parts)
