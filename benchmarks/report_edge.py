"""The tables of small devices, for `report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[object]]]


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def goals() -> Table:
    """What a small device needs, beside what was aimed at."""
    install, arm, memory = map(_result, ("install", "arm", "device_memory"))
    size, cycles, programs = install["sizes"]["aarch64"], arm["cycles for 32 codes"], memory["programs"]
    times = [install["seconds"]["run"]]
    times += [row["seconds"] for row in _result("loading")["run"] if row["artifact"] == "native-int4"]
    busy, idle = (f"{row['median']:.1f} s ({row['low']:.1f}-{row['high']:.1f})" for row in times)
    rows: list[list[object]] = [
        ["packages that run an artifact, aarch64, on disk", "at most 150 MB", _mb(size["bytes"])],
        ["a process that writes one token, without a compiler", "under 1 s",
         f"{idle}; while others compute {busy}"],
        ["cycles for 32 codes of 4 and of 8 bits, by llvm-mca", "at most 3.5 and 2.6",
         f"{cycles['4 bit, blocks of 32']:.1f} and {cycles['8 bit, blocks of 32']:.1f}"],
        ["peak memory in int4, the C++ program", "at most 180 MB", _mb(programs["cpp"]["peak"])],
        ["the same, `ligerexport run`", "at most 180 MB", _mb(programs["python"]["peak"])],
    ]  # fmt: skip
    if ratio := arm.get("native over ort"):
        found = f"{ratio['decode']:.2f} and {ratio['prompt']:.2f}"
        rows.insert(2, ["instructions of `native` over `ort`, a token and a prompt", "at most 0.8", found])
    return ["figure", "goal", "measured"], rows


def memory() -> Table:
    """Memory of each program, and the least limit under which it wrote the same text."""
    rows = []
    for name, row in _result("device_memory")["programs"].items():
        least = [limit for limit, said in row["limits"].items() if said == "the same text"][-1]
        rows.append([{"python": "`ligerexport run`", "cpp": "`liger-run` in C++"}[name], _mb(row["peak"]),
                     _mb(row["private"]), least])  # fmt: skip
    return ["program", "peak", "of it no file's pages", "ran with only"], rows


def packages() -> Table:
    """The largest packages that are installed on aarch64."""
    largest = _result("install")["sizes"]["aarch64"]["largest"]
    return ["package", "on disk"], [[name.rpartition("-")[0], _mb(size)] for name, size in largest.items()]
