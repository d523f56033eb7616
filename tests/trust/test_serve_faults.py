"""A short form of `tests/trust/serve_faults.py`, and its results."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHORT = {"requests whose client left": 0.02, "kill -9 under load": 0.05}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("name", SHORT)
@pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])
def test_faults_of_clients_break_nothing(name: str, built: tuple[Path, Path]) -> None:
    from serve_faults import try_out

    row = try_out(built[1], name, SHORT[name])
    assert not row["wrong"]
    assert row.get("kills") == 1 or row["requests"] >= 20


def test_results_are_complete_and_good() -> None:
    from serve_faults import ROWS

    rows = json.loads((RESULTS / "serve_faults.json").read_text())["rows"]
    assert rows.keys() == ROWS.keys() and not any(row["wrong"] for row in rows.values())
    assert rows["malformed requests"]["requests"] >= 10_000 and rows["a long prompt"]["tokens"] >= 200_000
    assert rows["malformed requests"]["growth"] < 8 << 20 and rows["requests whose client left"]["growth"] < 8 << 20
