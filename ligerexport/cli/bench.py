"""`bench`: time two models side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ligerexport.checkpoint.sources import check_name
from ligerexport.cli import options
from ligerexport.cli.options import Force, Json, Threads, verb
from ligerexport.console import card, data, progress, warn
from ligerexport.errors import UsageError
from ligerexport.measure.bench.report import check_output, markdown, save
from ligerexport.measure.bench.settings import DEVICES, DTYPES, READ_UP_TO, Settings

Model = Annotated[str, typer.Argument(help="An artifact, a converted checkpoint, a Transformer, or a GGUF file.")]
Against = Annotated[
    str,
    typer.Option(
        help="The other model, such as the Transformer that it was converted from; llama.cpp runs a GGUF file, and "
        "onnxruntime-genai what its builder wrote."
    ),
]
Device = Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")]
Dtype = Annotated[
    str, typer.Option(help=f"Type of torch models' weights: {', '.join(DTYPES)}; auto is {DTYPES['auto']}.")
]


@verb()
def bench(
    model: Model,
    against: Against,
    context: Annotated[
        str, typer.Option(metavar="TOKENS,...", help="Number of tokens to read before the timed ones.")
    ] = "128,1024,4096",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Number of sequences at a time.")] = "1",
    checkpoint: Annotated[
        Path | None, typer.Option(help="The artifact's converted checkpoint, to compare it with torch first.")
    ] = None,
    blocks: Annotated[int, typer.Option(help="Number of turns of each model at a context length.")] = 12,
    tokens: Annotated[int, typer.Option(help="Number of tokens per turn.")] = 8,
    read_up_to: Annotated[
        int,
        typer.Option(help="Longest context that a Transformer reads; longer KV caches are filled with random numbers."),
    ] = READ_UP_TO,
    device: Device = "auto",
    dtype: Dtype = "auto",
    threads: Threads = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="Directory for bench.json, bench.md and plots, or a file NAME.json for the figures."
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Time two models side by side: latency, memory, energy.

    Each runs in its own process, and they take turns. The table goes to stdout; --json prints JSON instead.
    """
    from ligerexport.measure.bench.bench import bench

    settings = Settings(counts(context, "--context"), counts(batch, "--batch"), blocks, tokens, threads, device, dtype,
                        read_up_to)  # fmt: skip
    for name in (model, against):
        check_name(name)
    if output is not None:
        check_output(output, force=force)
    options.announce("bench", model=model, against=against, checkpoint=checkpoint, **vars(settings))
    result = bench(
        model, against, checkpoint=None if checkpoint is None else str(checkpoint), settings=settings, progress=progress
    )
    if not json:
        data(markdown(result), end="")
    options.finish_json(json, result)
    if output is not None:  # last, so that a full disk does not lose the measurements
        save(result, output, force=force)
    for text in result["warnings"]:
        warn(text)
    first, second = result["models"]
    longest = {row["model"]: row for row in result["rows"] if row["batch"] == settings.batches[-1]}
    card("measured", [
        *((f"at {longest[name]['context']:,} tokens", f"{name}: {longest[name]['ms']:.1f} ms per token, "
           f"{longest[name]['rss'] / 1e6:.0f} MB resident") for name in (first, second)),
        *([("where", str(output))] if output else []),
    ])  # fmt: skip


def counts(text: str, option: str) -> tuple[int, ...]:
    """Read `128,1024`.

    Raises:
        UsageError: The text does not have this form.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) for part in parts):
        raise UsageError(f"{option} {text}", hint=f"write numbers of at least 1, as in {option} 128,1024")
    return tuple(dict.fromkeys(map(int, parts)))
