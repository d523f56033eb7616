"""`list`: print the names that other verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.console import data_table
from ligerexport.errors import UsageError, close_matches
from ligerexport.exporters.targets import TARGETS
from ligerexport.model.config import PRESETS
from ligerexport.model.families import FAMILIES
from ligerexport.model.gates import GATES
from ligerexport.model.scores import SCORES

_TABLES = {
    "targets": {name: target.doc for name, target in TARGETS.items()},
    "gates": {name: gate.source for name, gate in GATES.items()},
    "families": {name: f"{f.prefix}ForCausalLM{f', {f.doc}' if f.doc else ''}" for name, f in FAMILIES.items()},
    "presets": {name: preset.doc for name, preset in PRESETS.items()},
    "scores": {name: score.doc for name, score in SCORES.items()},
}


@verb(verbose=False)
def list_(
    table: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(_TABLES)}. Default: all.")] = None,
    json: Json = False,
) -> None:
    """List targets, gates, families, presets, scores."""
    if table is not None and table not in _TABLES:
        raise UsageError(f"unknown table '{table}'", hint=close_matches(table, _TABLES))
    rows = {name: found for name, found in _TABLES.items() if table in (None, name)}
    if json:
        return options.finish_json(True, rows[table] if table else rows)
    for index, (name, found) in enumerate(rows.items()):
        if index:
            data_table()
        options.print_table(("", "") if table else (name, ""), list(found.items()))
