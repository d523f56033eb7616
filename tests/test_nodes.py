"""The table of nodes matches this code, and depends neither on the number of layers nor on the tokens of a call."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ligerexport.model.config import PRESETS

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize("preset", PRESETS)
def test_nodes_are_those_of_the_table(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from nodes import count

    table = json.loads((BENCHMARKS / "results" / "nodes.json").read_text())["presets"]
    assert list(table) == list(PRESETS)
    assert count(preset, layers=5, max_chunk=1) == table[preset]
