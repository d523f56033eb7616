"""The tables of peers of the bounded memory, from `results/memory_peers.json`, for `report.py`.

python benchmarks/report_memory.py            draws docs/images/memory_bytes.svg
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[object]]]
NEEDS = {"prompt": "grows with the prompt", "stream": "constant, and a chunk", "exact": "constant", "ours": "constant"}
"""Memory that each kind of row needs while it reads."""
MEGABYTES = (2, 4, 8, 24)


def _rows() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((RESULTS / "memory_peers.json").read_text())["rows"]
    return found


def _fits(row: dict[str, Any], megabytes: float) -> bool:
    """Return whether a row belongs to a budget, of which a fitted memory may leave a tenth unused."""
    return (0.9 if row["kind"] == "ours" else 1) * megabytes * 1e6 <= row["nbytes"] <= megabytes * 1e6


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    plain = next(row for row in rows if row["peer"] == "Transformer" and row["bits"] == 16)
    return [column for column in plain["columns"] if not column.startswith("nll")]


def _cell(row: dict[str, Any] | None, column: str) -> str:
    found = row and row["columns"].get(column)
    if not found:
        return ""
    shown = f"{found['mean']:{'+.3f' if column.split()[0] in ('reading', 'prose') else '.2f'}}"
    return shown if found["stderr"] is None else f"{shown} ± {found['stderr']:.2f}"


def at_8_mb() -> Table:
    """All peers with 8 MB, and the Transformer's own figures."""
    rows = _rows()
    columns, plain = _columns(rows), next(row for row in rows if row["peer"] == "Transformer" and row["bits"] == 16)
    own = (plain["columns"].get(f"nll {column}", plain["columns"][column])["mean"] for column in columns)
    lines: list[list[object]] = [["Transformer", NEEDS["prompt"], "", "", *(f"{mean:.3f}" for mean in own)]]
    chosen = [row for row in rows if _fits(row, 8) and row["peer"] != "Transformer"]
    for row in sorted(chosen, key=lambda row: row["columns"][columns[0]]["mean"]):
        cells = [_cell(row, column) for column in columns]
        lines.append([row["peer"], NEEDS[row["kind"]], row["bits"], f"{row['tokens']:,}", *cells])
    return ["", "memory while it reads", "bits", "tokens a head", *columns], lines


def by_bytes(column: str = "reading 3000") -> Table:
    """One column of the peers in 8 bits, by bytes."""
    found: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in _rows():
        for megabytes in MEGABYTES:
            if row["bits"] == 8 and _fits(row, megabytes):
                found.setdefault((row["peer"], row["kind"]), {})[megabytes] = row
    lines: list[list[object]] = [
        [peer, NEEDS[kind], *(_cell(of_bytes.get(megabytes), column) for megabytes in MEGABYTES)]
        for (peer, kind), of_bytes in found.items()
    ]
    return [column, "memory while it reads", *(f"{megabytes} MB" for megabytes in MEGABYTES)], lines


def at_equal_tokens() -> Table:
    """Our memory, and the peers that keep as many tokens a head in 16 bits."""
    rows = _rows()
    columns = _columns(rows)
    lines: list[list[object]] = []
    for own in (row for row in rows if row["kind"] == "ours" and row["tokens"]):
        same = [row for row in rows if row["tokens"] == own["tokens"] and row["kind"] != "ours"]
        for row in [own, *same] if same else []:
            cells = [_cell(row, column) for column in columns]
            size = f"{row['tokens']:,}", f"{row['nbytes'] / 1e6:.1f} MB"
            lines.append([row["peer"], NEEDS[row["kind"]], *size, *cells])
    return ["", "memory while it reads", "tokens a head", "bytes", *columns], lines


def _lines(column: str) -> dict[tuple[str, str], list[tuple[float, float]]]:
    """Return megabytes and nats of ours, and of the best peer at 8 MB for each other kind of memory, in 8 bits."""
    lines: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in _rows():
        if row["nbytes"] and row["bits"] == 8 and column in row["columns"]:
            name = re.sub(r" [\d.]+ MB$", "", row["peer"])
            point = row["nbytes"] / 1e6, row["columns"][column]["mean"]
            lines.setdefault((row["kind"], name), []).append(point)
    best = {
        kind: min((line for line in lines if line[0] == kind), key=lambda line: dict(lines[line]).get(8, 1e9))
        for kind in {kind for kind, _ in lines}
    }
    return {line: sorted(points) for line, points in lines.items() if line[0] == "ours" or line in best.values()}


def plot(file: Path) -> None:
    """Draw the loss of answers and of prose above the Transformer's against bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "memory"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    panels = {"reading 3000": "answers among 3,000 tokens", "prose 8192": "prose of 8,192 tokens"}
    for axis, (column, title) in zip(axes, panels.items(), strict=True):
        for marker, ((kind, peer), points) in zip("os^vDP*X", _lines(column).items(), strict=False):
            style = {"ours": "C0-", "exact": "C1--", "stream": "C2--", "prompt": "C7:"}[kind]
            label = f"ligerexport, {peer}" if kind == "ours" else f"{peer}; memory {NEEDS[kind]}"
            axis.plot(*zip(*points, strict=True), style, marker=marker, label=label)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set(title=title, xlabel="megabytes", ylabel="nats above the Transformer", xscale="log")
        axis.set_xticks(MEGABYTES, [str(megabytes) for megabytes in MEGABYTES])
        axis.minorticks_off()
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    plot(RESULTS.parent.parent / "docs" / "images" / "memory_bytes.svg")
