"""`demo`: two models side by side on a page."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.bench import Against, Device, Model
from ligerexport.cli.options import Json, Threads, verb
from ligerexport.console import card, progress, warn
from ligerexport.errors import MissingDependency


@verb()
def demo(
    model: Model,
    against: Against,
    results: Annotated[
        Path | None, typer.Option(help="Directory that `bench -o` wrote, to show in a tab.", show_default=False)
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve on; other machines can reach any but 127.0.0.1.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Port; default: the first free one from 7860.")] = None,
    device: Device = "auto",
    threads: Threads = None,
    browser: Annotated[bool, typer.Option("--open", help="Open a browser.")] = False,
    json: Json = False,
) -> None:
    """Show two models side by side on a page.

    Both answer one prompt while latency and memory are measured. Ctrl-C ends the demo.
    """
    try:
        from ligerexport.demo.app import LOOPBACK, launch
    except ImportError as error:
        raise MissingDependency(error.name or "gradio", extra="demo") from error
    from ligerexport.demo.host import Demo

    options.check_port(port)
    options.announce("demo", model=model, against=against, results=results, host=host, port=port, device=device)
    with progress("loading both models", None, "steps"):
        shown = Demo(model, against, results=results, threads=threads, device=device)
    try:
        _, address = launch(shown, host, port, browser=browser)
        if host not in LOOPBACK:
            warn(f"anyone who can reach {host} can use this page")
        options.finish_json(json, {"address": address})
        card("serving", [("page", address), ("stop", "Ctrl-C")])
        threading.Event().wait()
    finally:
        shown.close()
