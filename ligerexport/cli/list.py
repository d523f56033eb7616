"""`list`: print the names that other verbs take."""

from __future__ import annotations

from typing import Annotated

import typer

from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.console import data_table
from ligerexport.errors import UsageError, close_matches


def _targets() -> dict[str, str]:
    from ligerexport.exporters.targets import TARGETS

    return {name: target.doc for name, target in TARGETS.items()}


def _gates() -> dict[str, str]:
    from ligerexport.model.gates import GATES

    return {name: gate.source for name, gate in GATES.items()}


def _families() -> dict[str, str]:
    from ligerexport.model.families import FAMILIES

    return {name: f"{f.prefix}ForCausalLM{f', {f.doc}' if f.doc else ''}" for name, f in FAMILIES.items()}


def _presets() -> dict[str, str]:
    from ligerexport.model.config import PRESETS

    return {name: preset.doc for name, preset in PRESETS.items()}


def _scores() -> dict[str, str]:
    from ligerexport.model.scores import SCORES

    return {name: score.doc for name, score in SCORES.items()}


_TABLES = {"targets": _targets, "gates": _gates, "families": _families, "presets": _presets, "scores": _scores}


@verb(verbose=False)
def list_(
    table: Annotated[str | None, typer.Argument(help=f"One of: {', '.join(_TABLES)}. Default: all.")] = None,
    json: Json = False,
) -> None:
    """List targets, gates, families, presets, scores."""
    if table is not None and table not in _TABLES:
        raise UsageError(f"unknown table '{table}'", hint=close_matches(table, _TABLES))
    rows = {name: make() for name, make in _TABLES.items() if table in (None, name)}
    if json:
        return options.finish_json(True, rows[table] if table else rows)
    for index, (name, found) in enumerate(rows.items()):
        if index:
            data_table()
        options.print_table(("", "") if table else (name, ""), list(found.items()))
