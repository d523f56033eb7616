"""A sample of `tests/trust/faults.py`: after any fault an output is the old or the new one, and the next run works."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnx")

HERE = Path(__file__).parent
RESULTS = HERE.parents[1] / "benchmarks" / "results"
KILLED = "killed at each change of a file"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="faults are made with Linux's means")
@pytest.mark.skipif(shutil.which(os.environ.get("CC", "cc")) is None, reason="no C compiler")
@pytest.mark.parametrize(
    ("commands", "more"),
    [("run,convert", []), pytest.param("build,recover", ["--faults", KILLED], marks=pytest.mark.slow)],
)
def test_faults_break_nothing(commands: str, more: list[str], tmp_path: Path) -> None:
    line = [sys.executable, HERE / "faults.py", "--short", "--commands", commands, "-o", tmp_path / "out", *more]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "TMPDIR": str(tmp_path)}
    done = subprocess.run(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out").read_text())
    check(result)
    assert all(row["injected"] == row["tries"] for row in result["rows"])


def check(result: dict[str, Any]) -> None:
    """Check that no try went wrong, and that every try is counted."""
    assert not any(result["wrong"].values())
    for row in result["rows"]:
        assert row["injected"] == sum(row.get(left, 0) for left in ("none", "old", "new")) > 0
        assert row["fault"] != KILLED or row["killed"] == row["injected"]


def test_a_short_run_keeps_the_rows_of_a_long_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faults import add, read

    row = {"command": "run", "fault": KILLED, "over": "nothing", "none": 4, "killed": 4}
    rows = [row | {"form": "long", "tries": 9, "injected": 4}, row | {"form": "short", "tries": 4, "injected": 4}]
    for one in rows:
        result = add(tmp_path / "out", one, True)
    assert read(tmp_path / "out") == rows and result["total"]["injected"] == 8


def test_results_are_complete_and_good(monkeypatch: pytest.MonkeyPatch) -> None:
    from faults import COMMANDS, KINDS

    result = json.loads((RESULTS / "faults.json").read_text())
    check(result)
    assert not result["skipped"] and {row["fault"] for row in result["rows"]} == set(KINDS)
    assert {row["command"] for row in result["rows"] if row["fault"] == KILLED} <= set(COMMANDS)
    assert sum(row.get("killed", 0) for row in result["rows"]) >= 200
