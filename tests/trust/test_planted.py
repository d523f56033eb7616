"""Planted faults are refused and their layer is named: the short form of the table in `benchmarks/results`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
TABLE, REAL_TABLE = (json.loads((RESULTS / f"{name}.json").read_text())["rows"] for name in ("planted", "planted_real"))
EARLY = [row for row in TABLE if "verb" in row]
SIZED = [row for row in TABLE if row["preset"] == "recall"]
ROUTED = [row for row in TABLE if row["preset"] == "mom"]
SHORT = [row for row in TABLE if row not in EARLY][::6][:12] + SIZED[::9] + ROUTED[::4]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("planted")


@pytest.mark.parametrize("row", SHORT, ids=lambda row: "-".join([row["fault"].replace(" ", "_"), row["lowering"]]))
def test_a_fault_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, row: dict[str, str]) -> None:
    from planted import FAULTS, model, plant, right

    spec = model(place, row["preset"], FAULTS[row["fault"]].family)
    found = plant(spec, row["fault"], row["preset"], row["lowering"])
    assert right(found), found


@pytest.mark.parametrize("row", EARLY, ids=lambda row: row["fault"].replace(" ", "_"))
def test_a_fault_in_what_is_converted_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, row: Any) -> None:
    """The verb of the table refuses it: the artifact's own comparison could not find it."""
    from planted import model, plant, right

    found = plant(model(place, row["preset"]), row["fault"], row["preset"], row["lowering"])
    assert right(found) and found["verb"] == row["verb"], found


@pytest.mark.parametrize("fault", ["the session does not count", "position off by one"])
def test_a_graph_that_does_not_run_is_refused(place: Path, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """ONNX Runtime names the layer if the graph is at fault, since the call returns no state."""
    from planted import model, plant, right

    found = plant(model(place, "memory"), fault, "memory", "native")
    assert right(found) and "ONNX Runtime failed" in found["refused"], found


@pytest.mark.parametrize("number", [1, 5, 9, 14])
def test_a_sound_model_passes(place: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    from planted import sound

    assert sound(place, number)["refused"] is None


def test_the_table_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fault is there in every lowering to which it applies, and none was missed, also in a real model."""
    from planted import REAL, cases, right

    assert {(row["fault"], row["lowering"]) for row in TABLE} == {(name, lowering) for name, _, lowering in cases()}
    assert [row["fault"] for row in REAL_TABLE] == REAL
    assert all(right(row) for row in (*TABLE, *REAL_TABLE))
