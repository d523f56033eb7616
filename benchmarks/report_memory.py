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


def _name(row: dict[str, Any]) -> str:
    return re.sub(r" [\d.]+ MB", "", row["peer"])


def _fits(row: dict[str, Any], megabytes: float) -> bool:
    """Return whether a row belongs to a budget, of which a memory may leave a tenth unused."""
    return 0.9 * megabytes * 1e6 <= row["nbytes"] <= megabytes * 1e6


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    plain = next(row for row in rows if row["peer"] == "Transformer" and row["kind"] == "ours")
    return [column for column in plain["columns"] if not column.startswith("nll")]


def _cell(row: dict[str, Any] | None, column: str, prompts: str = "common") -> str:
    found = row and row[prompts].get(column)
    if not found:
        return ""
    shown = f"{found['mean']:{'+.3f' if column.split()[0] in ('reading', 'prose') else '.2f'}}"
    return shown if found["stderr"] is None else f"{shown} ± {found['stderr']:.2f}"


def ours() -> Table:
    """Converted models on all prompts, and the Transformer's own figures."""
    rows = [row for row in _rows() if row["kind"] == "ours"]
    columns = _columns(rows)
    lines: list[list[object]] = []
    for row in sorted(rows, key=lambda row: row["nbytes"]):
        if row["nbytes"]:
            cells = [_cell(row, column, "columns") for column in columns]
            lines.append([row["peer"], f"{row['nbytes'] / 1e6:.1f} MB", *cells])
        else:
            own = (row["columns"].get(f"nll {column}", row["columns"][column])["mean"] for column in columns)
            lines.append([row["peer"], "grows", *(f"{mean:.3f}" for mean in own)])
    return ["", "state", *columns], lines


def qwen() -> Table:
    """Reading of a model that can answer, by tokens of distance."""
    data = json.loads((RESULTS / "recall_qwen.json").read_text())
    lines: list[list[object]] = []
    trained, larger = (data[run]["rows"]["model"] for run in ("trained", "more bytes"))
    for name, row in {**data["rows"], "recall, 3M tokens": trained, "recall, 15.4 MB": larger}.items():
        for title, key, sign in (("F1", "reading_f1", ""), ("NLL above the Transformer", "reading_above", "+")):
            if found := row.get(key):
                cells = [f"{x['mean']:{sign}.2f} ± {x['stderr']:.2f}" for x in found.values()]
                lines.append([{"teacher": "Transformer", "model": "recall"}.get(name, name), title, *cells])
    return ["", "", "no distance", "among 1,000", "among 3,000"], lines


def at_8_mb() -> Table:
    """All peers with 8 MB."""
    rows = [row for row in _rows() if _fits(row, 8) and "reading 1000" in row["common"]]
    columns = [column for column in _columns(_rows()) if column != "reading 7000"]
    lines: list[list[object]] = []
    for row in sorted(rows, key=lambda row: row["common"][columns[0]]["mean"]):
        cells = [_cell(row, column) for column in columns]
        lines.append([row["peer"], NEEDS[row["kind"]], row["bits"], f"{row['tokens']:,}", *cells])
    return ["", "memory while it reads", "bits", "tokens a head", *columns], lines


def by_bytes(column: str = "reading 1000") -> Table:
    """One column of the peers in 8 bits, by bytes."""
    found: dict[tuple[str, str], dict[float, dict[str, Any]]] = {}
    for row in _rows():
        for megabytes in MEGABYTES:
            if row["bits"] == 8 and _fits(row, megabytes):
                found.setdefault((_name(row), row["kind"]), {})[megabytes] = row
    lines: list[list[object]] = [
        [peer, NEEDS[kind], *(_cell(of_bytes.get(megabytes), column) for megabytes in MEGABYTES)]
        for (peer, kind), of_bytes in found.items()
    ]
    return [column, "memory while it reads", *(f"{megabytes} MB" for megabytes in MEGABYTES)], lines


def at_equal_tokens() -> Table:
    """Our memory, and the peers that keep about as many tokens a head in 16 bits."""
    rows = [row for row in _rows() if row["tokens"] and "reading 1000" in row["common"]]
    columns = [column for column in _columns(_rows()) if not column.startswith(("prose", "reading 7000"))]
    lines: list[list[object]] = []
    for own in (row for row in rows if row["peer"] == "recall 8 MB"):
        same = [row for row in rows if abs(row["tokens"] / own["tokens"] - 1) < 0.02 and row["kind"] != "ours"]
        for row in [own, *same] if same else []:
            cells = [_cell(row, column) for column in columns]
            size = f"{row['tokens']:,}", f"{row['nbytes'] / 1e6:.1f} MB"
            lines.append([row["peer"], NEEDS[row["kind"]], *size, *cells])
    return ["", "memory while it reads", "tokens a head", "bytes", *columns], lines


DRAWN = {
    ("ours", "recall"): ("C0o-", "ligerexport, preset recall"),
    ("ours", "recall, 3M tokens"): ("C0*", "the same, trained"),
    ("ours", "equal window, 3M tokens"): ("C1*", "only a window, trained"),
    ("exact", "window with sinks"): ("C1s-", "only a window"),
    ("stream", "KeyDiff"): ("C2^-", "KeyDiff"),
    ("stream", "expected attention"): ("C3v-", "expected attention"),
    ("prompt", "KVzip"): ("C7D:", "KVzip: keeps the whole text while it reads"),
}
"""Style and label of what is drawn: ours, and of each kind of peer the best in one of the panels."""


def snapshots() -> Table:
    """Times and bytes of a state in a file."""
    rows: list[list[object]] = []
    for row in json.loads((RESULTS / "snapshots.json").read_text())["rows"]:
        times = [
            "{median:.1f} ms ({low:.1f}-{high:.1f})".format(**{key: 1e3 * x for key, x in row[name].items()})
            for name in ("write", "write_cpu", "read", "read_cpu")
        ]
        rows.append([row["artifact"], f"{row['file_bytes'] / 1e6:.2f} MB", *times])
    return ["preset", "file", "write", "of the processor", "read", "of the processor"], rows


def _points(kind: str, name: str, column: str) -> list[tuple[float, float]]:
    """Return megabytes and figures of a row in 8 bits for each budget."""
    rows = [row for row in _rows() if (row["kind"], _name(row), row["bits"]) == (kind, name, 8)]
    return sorted((row["nbytes"] / 1e6, row["common"][column]["mean"]) for row in rows if column in row["common"])


def plot(file: Path) -> None:
    """Draw answers, keys and prose against bytes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "memory"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(11, 4), layout="constrained")
    above = "extra loss, nats per token"
    panels = {
        "reading 1000": ("Answers about 1,000 tokens (lower is better)", above),
        "keys 4096": ("Keys after 4,096 tokens (higher is better)", "share that is recalled"),
        "prose 8192": ("Prose of 8,192 tokens (lower is better)", above),
    }
    for axis, (column, (title, unit)) in zip(axes, panels.items(), strict=True):
        for (kind, name), (style, label) in DRAWN.items():
            if points := _points(kind, name, column):
                axis.plot(*zip(*points, strict=True), style, label=label, markersize=10 if "*" in style else 5)
        axis.axhline(1 if column.startswith("keys") else 0, color="black", linewidth=0.8)
        axis.set(xlabel="megabytes of memory", ylabel=unit, xscale="log")
        axis.set_xticks(MEGABYTES, [str(megabytes) for megabytes in MEGABYTES])
        axis.set_title(title, fontsize=10.5)
        axis.minorticks_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    plot(RESULTS.parent.parent / "docs" / "images" / "memory_bytes.svg")
