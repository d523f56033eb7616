"""`demo`: a model beside another on a page."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.console import card, progress, warn
from ligerexport.errors import MissingDependency
from ligerexport.measure.bench.settings import DEVICES, DTYPES

Model = Annotated[str, typer.Argument(help="An artifact, a converted checkpoint, or a Transformer.")]
Against = Annotated[str, typer.Option(help="Another one, such as the Transformer it was converted from.")]
Threads = Annotated[int | None, typer.Option("--threads", help="Default: physical cores.")]
Device = Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")]
Dtype = Annotated[str, typer.Option(help=f"Of torch models' weights: {', '.join(DTYPES)}; auto is {DTYPES['auto']}.")]


@verb()
def demo(
    model: Model,
    against: Against,
    results: Annotated[
        Path | None, typer.Option(help="What `bench -o` wrote; shown in a tab.", show_default=False)
    ] = None,
    host: Annotated[str, typer.Option(help="Others than 127.0.0.1 let other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860 on.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    json: Json = False,
) -> None:
    """Show a model beside another on a page.

    Both answer one prompt, with latency and memory measured while the text comes. Ctrl-C ends it.
    """
    try:
        from ligerexport.demo.app import LOOPBACK, launch
    except ImportError as error:
        raise MissingDependency(error.name or "gradio", extra="demo") from error
    from ligerexport.demo.host import Demo

    options.announce("demo", model=model, against=against, results=results, host=host, port=port, device=device)
    with progress("loading both models", None, "steps"):
        shown = Demo(model, against, results=results, threads=threads, device=device)
    try:
        _, address = launch(shown, host, port, browser=browser)
        if host not in LOOPBACK:
            warn(f"everybody who reaches {host} can use this page")
        options.finish_json(json, {"address": address})
        card("serving", [("page", address), ("stop", "Ctrl-C")])
        threading.Event().wait()
    finally:
        shown.close()
