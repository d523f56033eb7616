"""`pull` and `push`: fetch an artifact from the hub, and publish one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ligerexport.artifact import hub
from ligerexport.artifact.artifact import open_artifact
from ligerexport.cli import options
from ligerexport.cli.options import Force, Json, verb
from ligerexport.cli.prompting import Artifact, first_command
from ligerexport.console import progress
from ligerexport.errors import quoted


@verb()
def pull(
    name: Annotated[str, typer.Argument(help="A repository as owner/name or owner/name@revision.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write. Default: the repository's name.")
    ] = None,
    force: Force = False,
    json: Json = False,
) -> None:
    """Fetch an artifact from the hub. Nothing is written unless every file is what its manifest says."""
    options.announce("pull", name=name, output=output)
    path = hub.pull(name, output, force=force, progress=progress)
    manifest = open_artifact(path, hashes=False, runtime=False).manifest
    facts = {
        "path": str(path),
        "from": manifest.source.model,
        "license": manifest.source.license,
        "artifact_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "state_bytes": manifest.bytes.state_per_sequence,
    }
    options.finish_made(json, "fetched and checked", facts, first_command(path, manifest.target))


@verb()
def push(
    artifact: Artifact,
    name: Annotated[str, typer.Argument(help="A repository as owner/name; it is made if there is none.")],
    private: Annotated[bool, typer.Option("--private", help="Let only its owner read a new repository.")] = False,
    json: Json = False,
) -> None:
    """Publish an artifact on the hub, with a model card made from its manifest.

    The files become one commit, which replaces what the repository held. Log in first: hf auth login.
    """
    options.announce("push", artifact=artifact, name=name, private=private)
    commit = hub.push(artifact, name, private=private, progress=progress)
    options.finish_made(json, "published", {"commit": commit}, f"ligerexport pull {quoted(name)}")
