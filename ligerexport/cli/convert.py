"""`convert`: from a pretrained Transformer to a converted checkpoint."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.checkpoint.convert import SHIPPED, WINDOWS, check_score_options, choose_conversion
from ligerexport.cli import options
from ligerexport.cli.described import check_output, describe, finish
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import progress
from ligerexport.errors import UsageError, close_matches, quoted
from ligerexport.model.config import DEFAULT_PRESET, PRESETS, RECURRENCES, LigerConfig, Slots
from ligerexport.model.gates import GATES
from ligerexport.model.scores import SCORES


@verb(computes=True)
def convert(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or a built-in model such as smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}, or that of a memory or adapter."),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Windows and pools of all layers, from `allocate`.")
    ] = None,
    gate: Annotated[str | None, typer.Option(help=f"One of: {', '.join(GATES)}.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens kept exactly for ever.")] = None,
    window: Annotated[int | None, typer.Option(help="Most recent tokens kept exactly.")] = None,
    slots: Annotated[
        str | None,
        typer.Option(metavar="SCORE=COUNT,...", help=f"Tokens kept by a score: {', '.join(SCORES)}; or none."),
    ] = None,
    attention_weight: Annotated[float | None, typer.Option(help="Weight of the softmax over the slots.")] = None,
    recurrence_weight: Annotated[float | None, typer.Option(help="Weight of the recurrence; 0 leaves it out.")] = None,
    recurrence: Annotated[str | None, typer.Option(help=f"One of: {', '.join(RECURRENCES)}.")] = None,
    recurrence_distance: Annotated[
        int | None, typer.Option(help="Distance in tokens at which evicted tokens are read.")
    ] = None,
    layer_memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER,...:window=TOKENS,SCORE=COUNT,...", help="Layers with a memory of another size; repeatable."
        ),
    ] = None,
    keep_softmax: Annotated[str | None, typer.Option(metavar="LAYER,...", help="Layers left as they are.")] = None,
    max_distance: Annotated[int | None, typer.Option(help="Largest rotary distance; default: trained length.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="Fit the learned score on .txt files or directories of them; repeatable."),
    ] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="Learned scores that were fitted before.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 2,048 tokens that a fit reads.")] = WINDOWS,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help=f"Merge what `recover --adapter` wrote; {SHIPPED}: what comes with a built-in model."
        ),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Make a Transformer recurrent; takes seconds, minutes with --calibrate.

    Its attention is swapped for a gated recurrence and a bounded exact memory. No weight changes without --adapter.
    """
    changes: dict[str, Any] = {
        "gate": gate, "sinks": sinks, "window": window, "slots": parse_slots(slots),
        "attention_weight": attention_weight, "recurrence_weight": recurrence_weight,
        "recurrence": recurrence, "recurrence_distance": recurrence_distance,
        "layer_memory": parse_layer_memory(layer_memory),
        "keep_softmax": parse_layers(keep_softmax), "max_distance": max_distance,
    }  # fmt: skip
    config = choose_conversion(model, preset, memory, adapter, changes)
    texts = check_score_options(config, calibrate, scores, windows)
    if output.resolve() == Path(model).expanduser().resolve():
        raise UsageError(f"{output} is the model itself", hint="choose another place with -o")
    check_output(output, force, "config.json")
    options.announce("convert", model=model, output=output, preset=preset, threads=threads, **vars(config))
    if dry_run:
        plan = _plan_convert(model, output, config)
        return finish(json, f"would write {output}", plan | _plan_fit(model, texts, windows), None)
    from ligerexport.checkpoint.convert import convert as convert_model

    path = convert_model(model, output, preset=preset, memory=memory, calibrate=calibrate, scores=scores,
                         windows=windows, adapter=adapter, force=force, progress=progress, **changes)  # fmt: skip
    finish(json, "converted", describe(Path(path), config), f"ligerexport build {quoted(path)} --target onnx")


def _plan_convert(model: str, output: Path, config: LigerConfig) -> dict[str, Any]:
    """Return what a conversion would do, without fetching anything."""
    from ligerexport.checkpoint.loading import check_loadable
    from ligerexport.checkpoint.sources import BUILTIN_MODELS

    path = Path(model).expanduser()
    if path.is_dir():
        check_loadable(path)
        return describe(path, config) | {"path": str(output), "from": str(path)}
    if model in BUILTIN_MODELS:
        return {"path": str(output), "from": BUILTIN_MODELS[model].doc, "peak_memory_bytes": None}
    if "/" in model:
        return {"path": str(output), "from": f"{model} on the hub"}
    raise UsageError(f"no model '{model}'", hint=close_matches(model, BUILTIN_MODELS))


def _plan_fit(model: str, texts: list[Path], windows: int) -> dict[str, Any]:
    """Return what fitting a learned score would take; nothing where there is no text to fit on."""
    if not texts:
        return {}
    plan: dict[str, Any] = {"fit_text_bytes": sum(file.stat().st_size for file in texts)}
    path = Path(model).expanduser()
    if not path.is_dir():
        return plan | {"fit": f"{windows} windows, of {len(texts)} text files"}
    from ligerexport.checkpoint.calibrate import window_length
    from ligerexport.checkpoint.checkpoint import check_checkpoint

    info = check_checkpoint(path)
    length, weights = window_length(info.config), sum(math.prod(tensor.shape) for tensor in info.tensors.values())
    squares = 8 * info.config["num_hidden_layers"] * info.config["hidden_size"] ** 2
    return plan | {
        "fit": f"{windows} windows of {length:,} tokens, of {len(texts)} text files",
        "fit_tflop": round(2e-12 * weights * windows * length, 1),
        "fit_memory_bytes": 4 * weights + squares,
    }


def parse_slots(text: str | None) -> Slots | None:
    """Read `peak_use=32,novelty=32`; `none` is no slots.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    return _counts(text, f"--slots {text}", "write SCORE=COUNT,... as in --slots peak_use=32,novelty=32")


def parse_layer_memory(texts: Sequence[str] | None) -> tuple[tuple[int, int, Slots], ...] | None:
    """Read several of `7,18:window=240,peak_use=32`: layers, then their window and pools.

    Raises:
        UsageError: One has another form.
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
    """Read `8,16`; `none` is no layers.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    parts = options.parts(text)
    if not all(part.strip().isdigit() for part in parts):
        raise UsageError(f"--keep-softmax {text}", hint="write layer numbers from 0, as in --keep-softmax 8,16")
    return tuple(int(part) for part in parts)
