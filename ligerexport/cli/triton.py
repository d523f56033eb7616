"""`triton`: a model repository for NVIDIA's Triton Inference Server."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ligerexport.artifact.artifact import open_artifact
from ligerexport.cli import options
from ligerexport.cli.options import Force, Json, verb
from ligerexport.console import data


@verb(verbose=False)
def triton(
    artifact: Annotated[Path, typer.Argument(help="Directory that build wrote, for ONNX Runtime.")],
    output: Annotated[
        Path, typer.Argument(metavar="REPOSITORY/NAME", help="Directory to make; its last part is the model's name.")
    ],
    max_batch: Annotated[int, typer.Option(help="Largest number of sequences that are computed at once.")] = 16,
    seen: Annotated[
        str | None,
        typer.Option(
            help="The repository as the server sees it, such as /models in its container.", show_default=False
        ),
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Write an artifact as a model of NVIDIA's Triton Inference Server, which then keeps the state of each sequence."""
    from ligerexport.exporters.onnx.repository import write_repository

    place = write_repository(open_artifact(artifact), output, max_batch=max_batch, seen=seen, force=force)
    options.finish_json(json, {"model": str(place)})
    if not json:
        data(str(place))
