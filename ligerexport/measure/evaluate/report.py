"""The result of an evaluation as JSON, as Markdown tables, and as plots if matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ligerexport.console import format_bytes
from ligerexport.measure.evaluate.estimate import Estimate, Table
from ligerexport.measure.evaluate.settings import KEY_DISTANCES
from ligerexport.staging import staged_directory

REPORT = "report.json"

TITLES = {
    "nll": "Held-out negative log likelihood, nats per token, by position",
    "top1": "Share of positions with the teacher's first choice, by position",
    "kl": "KL(teacher || model), nats per token, by position",
    "once": "Key said once: share of its digits recalled, by tokens of prose around it",
    "twice": "Key said twice: share of its digits recalled, by tokens of prose around it",
    "keys_4": "One of 4 named keys, each said once",
    "keys_8": "One of 8 named keys, each said once",
    "pairs_4": "4 associated pairs of words: share recalled, by tokens before the questions",
    "pairs_8": "8 associated pairs of words",
    "pairs_16": "16 associated pairs of words",
    "pairs_32": "32 associated pairs of words",
    "copy": "Second occurrence of a span: share of tokens that are the first choice, by tokens in between",
    "copy_nll": "Second occurrence of a span: nats per token, by tokens in between",
    "reading_nll": "Question about a paragraph: NLL of the answer, nats per token, by tokens among which it stands",
    "reading_above": "The same above the teacher",
    "reading_closed": "The same: share of the gap between an equal window (0) and the teacher (1) that is closed",
    "reading_exact": "Written answers to these questions: exact match",
    "reading_f1": "Written answers to these questions: F1 of words",
    "formats": "Key said once in one of many formats: share recalled beyond guessing, by tokens of prose after it",
    **{f"formats_{d}": f"Share of the key's tokens recalled after {d:,} tokens, by format" for d in KEY_DISTANCES},
    **{f"formats_floor_{d}": f"The same after {d:,} tokens if the key was never said" for d in KEY_DISTANCES},
    "chats_nll": "Last turn about the first: NLL of the answer, nats per token, by tokens of turns in between",
    "chats_above": "The same above the teacher",
    "chats_closed": "The same: share of the gap between an equal window (0) and the teacher (1) that is closed",
    "tasks": "Tasks",
}
"""Title of each measurement, in the order of the tables."""


@dataclass(frozen=True)
class Report:
    """The measurements.

    Attributes:
        settings: The resolved settings.
        rows: For each model (`teacher`, `model`, controls) its estimates by measurement and column.
        state_bytes: Bytes of one sequence's state by model; None if it grows with the text.
        environment: Versions, machine, tokens of text, seconds.
    """

    settings: dict[str, Any]
    rows: dict[str, Table]
    state_bytes: dict[str, int | None] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Report:
        """Return the report from the data of `to_dict`."""
        rows = {
            name: {key: {column: Estimate(**value) for column, value in columns.items()}
                   for key, columns in table.items()}
            for name, table in data["rows"].items()
        }  # fmt: skip
        return cls(data["settings"], rows, data["state_bytes"], data["environment"])

    def markdown(self) -> str:
        """Return a table per measurement: a row per model, a column per bin or distance, standard errors in ().

        Each row has the size of one sequence's state.
        """
        parts = ["# Evaluation", ""]
        parts += [f"- {name}: {_plain(value)}" for name, value in self.settings.items() if value not in (None, [], ())]
        parts += [f"- {name}: {_plain(value)}" for name, value in self.environment.items()]
        parts += [f"- state of {name}: {bytes_:,} bytes" for name, bytes_ in self.state_bytes.items() if bytes_]
        for key, title in TITLES.items():
            rows = {name: table[key] for name, table in self.rows.items() if table.get(key)}
            if rows:
                parts += ["", f"## {title}", "", *self._table(rows)]
        return "\n".join(parts) + "\n"

    def _table(self, rows: Mapping[str, Mapping[str, Estimate]]) -> list[str]:
        columns = list(dict.fromkeys(column for row in rows.values() for column in row))
        counts = sorted({value.count for row in rows.values() for value in row.values()})
        lines = [f"| | state | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for name, row in rows.items():
            size = self.state_bytes.get(name)
            cells = [name, "grows" if size is None else format_bytes(size), *(_cell(row.get(c)) for c in columns)]
            lines.append(f"| {' | '.join(cells)} |")
        return [*lines, "", f"n = {', '.join(map(str, counts))}; standard errors in brackets."]

    def save(self, output: Path | str, *, force: bool = False) -> Path:
        """Write `report.json`, `report.md` and, with matplotlib, plots; the directory is written atomically.

        Raises:
            UsageError: `output` is in use.
        """
        with staged_directory(output, force=force, marker=REPORT) as stage:
            (stage / REPORT).write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
            (stage / "report.md").write_text(self.markdown(), encoding="utf-8")
            _plot(self, stage)
        return Path(output)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _cell(value: Estimate | None) -> str:
    if value is None:
        return ""
    return f"{value.mean:.3f}" + ("" if value.stderr is None else f" ({value.stderr:.3f})")


def _plot(report: Report, directory: Path) -> None:
    """Draw loss by position and recall by distance, if matplotlib is installed."""
    try:
        from matplotlib.backends.backend_svg import FigureCanvasSVG
        from matplotlib.figure import Figure
    except ImportError:
        return
    for file, keys, label in (
        ("nll", ("nll",), "nats per token"),
        ("recall", ("once", "twice", "keys_4", "keys_8", "copy"), "share recalled"),
    ):
        present = [key for key in keys if any(key in table for table in report.rows.values())]
        if not present:
            continue
        figure = Figure(figsize=(4.5 * len(present), 3.5), layout="constrained")
        FigureCanvasSVG(figure)
        for axes, key in zip(figure.subplots(1, len(present), squeeze=False)[0], present, strict=True):
            for name, table in report.rows.items():
                points = {column: value for column, value in table.get(key, {}).items() if column != "mean"}
                axes.errorbar(
                    list(points), [value.mean for value in points.values()],
                    yerr=[value.stderr or 0 for value in points.values()], label=name, marker="o", capsize=2,
                )  # fmt: skip
            axes.set_title(key.replace("_", " "))
            axes.set_ylabel(label)
            axes.tick_params(axis="x", rotation=45)
            if file == "recall":
                axes.set_ylim(-0.05, 1.05)
        figure.axes[0].legend(fontsize="small")
        figure.savefig(directory / f"{file}.svg")
        figure.savefig(directory / f"{file}.png", dpi=150)
