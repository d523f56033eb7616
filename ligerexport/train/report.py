"""The report of a recovery: report.json, report.md, and the loss curve as a picture where matplotlib is installed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ligerexport.train.loop import Step

TAIL = 10
"""Number of steps in the mean that is reported as first or final loss: a single batch varies too much."""


def mean_loss(steps: Sequence[Step]) -> float:
    """Return the mean loss of some steps."""
    return sum(step.loss for step in steps) / len(steps)


def phase_table(history: Sequence[Step]) -> list[dict[str, Any]]:
    """Return one row for each stretch of steps with the same phase."""
    rows = []
    for name, group in groupby(history, key=lambda step: step.phase):
        steps = list(group)
        tail = min(TAIL, max(1, len(steps) // 2))
        rows.append({
            "phase": name, "steps": len(steps), "tokens": sum(step.tokens for step in steps),
            "first_loss": mean_loss(steps[:tail]), "final_loss": mean_loss(steps[-tail:]),
            "seconds": sum(step.seconds for step in steps),
        })  # fmt: skip
    return rows


def write_report(directory: Path, record: Mapping[str, Any], history: Sequence[Step]) -> None:
    """Write the report into a directory."""
    phases = phase_table(history)
    content = {"record": dict(record), "phases": phases, "steps": [asdict(step) for step in history]}
    (directory / "report.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    (directory / "report.md").write_text(_markdown(record, phases), encoding="utf-8")
    _picture(directory / "loss.png", history)


def _markdown(record: Mapping[str, Any], phases: Sequence[Mapping[str, Any]]) -> str:
    facts = {
        "recipe": record["recipe"], "teacher": record["teacher"] or "none", "steps": record["steps"],
        "tokens": f"{record['tokens']:,}", "data": record["data"][:12], "seed": record["seed"],
        "LoRA": f"rank {record['rank']}, alpha {record['alpha']:g} on {', '.join(record['targets'])}",
        "versions": ", ".join(f"{name} {version}" for name, version in record["versions"].items()),
    }  # fmt: skip
    lines = ["# Recovery", "", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in facts.items()), ""]
    lines += ["| phase | steps | tokens | first loss | final loss | seconds |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {row['phase']} | {row['steps']} | {row['tokens']:,} | {row['first_loss']:.4f} | {row['final_loss']:.4f} "
        f"| {row['seconds']:.0f} |"
        for row in phases
    ]
    notes = [f"{count} {what}" for what, count in record["samples"].items()]
    return "\n".join([*lines, "", f"Samples: {', '.join(notes)}.", ""])


def _picture(file: Path, history: Sequence[Step]) -> None:
    """Draw the loss of each phase, if matplotlib is installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, group in groupby(history, key=lambda step: step.phase):
        steps = list(group)
        axes.plot([step.step for step in steps], [step.loss for step in steps], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    figure.savefig(file, dpi=120)
