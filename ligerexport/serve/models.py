"""Open an artifact for the server: its engine, its sampling settings, and what `/v1/models` says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import UsageError
from ligerexport.run.sampling import chat_settings
from ligerexport.serve.answers import Served
from ligerexport.serve.engine import Engine


def open_models(
    name: str, artifact: Path, adapters: Mapping[str, Path], *, longest: int, deadline: float | None, **settings: Any
) -> list[Served]:
    """Load an artifact. Each adapter is a model of its own, `NAME:ADAPTER`, on the same engine.

    Args:
        name: Its name in requests.
        artifact: Directory that `build` wrote.
        adapters: Directories of PEFT adapters by their names.
        longest: See `Served`.
        deadline: See `Served`.
        settings: Arguments of `Engine`.

    Raises:
        UsageError: The artifact has no tokenizer.
    """
    manifest = open_artifact(artifact, hashes=False, data=False).manifest
    if not (artifact / "tokenizer.json").is_file():
        raise UsageError(f"{artifact} has no tokenizer.json", hint="put the model's own there and build again")
    facts = {"state_bytes": manifest.bytes.state_per_sequence, "state_bytes_per_token": manifest.growth,
             "kv_bytes_per_token": manifest.bytes.kv_per_token, "source": manifest.source.model,
             "target": manifest.target, "weights": manifest.precision}  # fmt: skip
    said, _ = chat_settings(artifact)
    base = Served(name, Engine(artifact, adapters=adapters, **settings), said, longest, deadline, facts)
    named = {f"{name}:{adapter}": adapter for adapter in adapters}
    return [base, *(replace(base, name=x, adapter=named[x], facts=facts | {"parent": name}) for x in named)]
