"""`native`: compile the operator library of the lowering native, for this machine or for another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Force, Json, verb
from ligerexport.console import data
from ligerexport.errors import look_up
from ligerexport.exporters.onnx.native import compile_levels, library
from ligerexport.exporters.onnx.native.cpus import levels


@verb(verbose=False)
def native(
    target: Annotated[
        str | None,
        typer.Option(help="Compile for this type of machine: aarch64 or x86_64; default: for this processor."),
    ] = None,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory for the libraries of --target.")] = Path(
        "operator"
    ),
    force: Force = False,
    json: Json = False,
) -> None:
    """Print the path of the operator library of the lowering native; compile it first if needed.

    With --target, compile one library for each level of such processors. Where LIGEREXPORT_NATIVE_LIBRARY names their
    directory, the fastest that the processor can run is loaded, and no compiler is needed.
    """
    if target is None:
        paths = [library()]
    else:
        look_up("type of machine", target, levels())
        paths = compile_levels(target, output, force=force)
    if json:
        return options.finish_json(True, {"libraries": [str(path) for path in paths]})
    for path in paths:
        data(str(path))
