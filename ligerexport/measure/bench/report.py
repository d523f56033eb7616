"""Write the result of `bench` as Markdown, and as plots with the crossover marked."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ligerexport.console import format_bytes
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.staging import check_destination, staged_directory, staged_file

RESULT = "bench.json"
MARKS = (("o", "-"), ("s", "--"))
"""Marker and line of each model, so that they differ in more than colour."""
COLUMNS = (
    "model", "batch", "context", "first token", "per token, p50", "p95", "tokens/s", "state or KV", "resident", "peak",
    "GPU", "energy per token", "of the floor",
)  # fmt: skip


def markdown(result: Mapping[str, Any]) -> str:
    """Return the table, and below it the crossovers and the machine."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS)]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in result["rows"]]
    first, second = result["models"]
    lines.append("")
    for batch, found in result["crossover"].items():
        at = "; ".join(
            f"{what} {_from(found[key], result)}"
            for key, what in (("ms", "less time per token"), ("rss", "less resident memory"),
                              ("state_bytes", "a smaller state"))
        )  # fmt: skip
        lines.append(f"{first} against {second}, batch {batch}: {at}.")
    lines += [_compared(row, result) for row in result.get("ratios", ())]  # older results have none
    machine = result["machine"]
    rates = ", ".join(
        f"{device} {rate / 1e9:.1f} GB/s" if rate else f"{device} unknown"
        for device, rate in machine["bytes_per_s"].items()
    )
    lines.append(f"{machine['cpu']}, {machine['threads']} threads; memory bandwidth {rates}, which sets the floor.")
    lines.append(f"Energy: {machine['energy'] or 'this machine has no counter that can be read'}.")
    lines += [f"Warning: {text}." for text in result.get("warnings", ())]  # older results have none
    lines += [f"Parity of {name}: {parity['by']}." for name, parity in result["parity"].items()]
    return "\n".join(lines) + "\n"


def cells(row: Mapping[str, Any]) -> list[str]:
    """Return a row's cells as text, in the order of `COLUMNS`."""
    return [
        f"{row['model']} ({row['precision']})",
        str(row["batch"]),
        f"{row['context']:,}",
        f"{row['ttft_s']:.2f} s" if row["ttft_s"] is not None else "not read",
        f"{row['ms_p50']:.1f} ms",
        f"{row['ms_p95']:.1f} ms",
        f"{row['tokens_per_s']:.1f}",
        format_bytes(row["state_bytes"]),
        format_bytes(row["rss"]),
        format_bytes(row["peak"]),
        format_bytes(row["device_bytes"]) if row["device_bytes"] is not None else "none",
        f"{row['joules']:.2g} J" if row["joules"] is not None else "unknown",
        f"{row['of_floor']:.0%}" if row["of_floor"] is not None else "unknown",
    ]


def _compared(ratio: Mapping[str, Any], result: Mapping[str, Any]) -> str:
    """Return a sentence about the times of both models at one point."""
    at = [row for row in result["rows"] if all(row[key] == ratio[key] for key in ("batch", "context"))]
    first, second = (f"{row['ms_low']:.1f} to {row['ms_high']:.1f} ms" for row in at)
    return (
        f"At {ratio['context']:,} tokens, batch {ratio['batch']}, turns took {first} and {second} per token; the ratio "
        f"is {ratio['median']:.2f}, and {ratio['low']:.2f} to {ratio['high']:.2f} in half of the turns."
    )


def _from(tokens: float | None, result: Mapping[str, Any]) -> str:
    if tokens is None:
        return "at no measured length"
    if tokens <= min(result["settings"]["contexts"]):
        return "at every measured length"
    return f"from {tokens:,.0f} tokens on"


def save(result: Mapping[str, Any], output: Path | str, *, force: bool = False) -> Path:
    """Write `bench.json`, `bench.md` and plots; the directory is written completely or not at all.

    A name that ends with `.json` is that of a file, which has the content of `bench.json`.

    Raises:
        UsageError: `output` is in use.
        MissingDependency: matplotlib is not installed.
    """
    if is_file(output):
        with staged_file(output) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        return Path(output)
    with staged_directory(output, force=force, marker=RESULT) as stage:
        (stage / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (stage / "bench.md").write_text(markdown(result), encoding="utf-8")
        for key, label, scale in (("ms", "ms per token", 1.0), ("rss", "MB resident", 1e-6)):
            _plot(result, key, label, scale, stage / ("latency" if key == "ms" else "memory"))
    return Path(output)


def is_file(output: Path | str) -> bool:
    """Return whether `save` writes one file."""
    return Path(output).suffix == ".json"


def check_output(output: Path, *, force: bool = False) -> None:
    """Fail before the work if the result cannot be written.

    Raises:
        UsageError: `output` is in use.
        MissingDependency: matplotlib is not installed, and plots were asked for.
    """
    if is_file(output):
        if output.is_dir():
            raise UsageError(f"{output} is a directory, a file was expected", hint="choose another place with -o")
        if output.exists() and not force:
            raise UsageError(f"{output} exists", hint="choose another place with -o, or add --force")
        return
    check_destination(output, force=force, marker=RESULT)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingDependency("matplotlib", extra="demo") from error


def _plot(result: Mapping[str, Any], key: str, label: str, scale: float, file: Path) -> None:
    """Draw one panel per batch: a line for each model, a bar for the range of blocks, a vertical line at crossovers."""
    from matplotlib.figure import Figure

    batches = result["settings"]["batches"]
    figure = Figure(figsize=(4.8 * len(batches), 3.4), layout="constrained")
    for axes, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        for name, (marker, line) in zip(result["models"], MARKS, strict=True):
            rows = [row for row in result["rows"] if row["model"] == name and row["batch"] == batch]
            spread = [[row["ms"] - row["ms_low"] for row in rows], [row["ms_high"] - row["ms"] for row in rows]]
            axes.errorbar(
                [row["context"] for row in rows], [row[key] * scale for row in rows],
                yerr=spread if key == "ms" else None, marker=marker, linestyle=line, capsize=2, label=name,
            )  # fmt: skip
        at = result["crossover"][str(batch)][key]
        if at is not None and at > min(result["settings"]["contexts"]):
            axes.axvline(at, color="0.5", linestyle=":")
            axes.annotate(f"crossover at {at:,.0f}", (at, 0.98), xycoords=("data", "axes fraction"), rotation=90,
                          ha="right", va="top", fontsize="small")  # fmt: skip
        axes.set_xscale("log", base=2)
        axes.set_xticks(contexts := sorted(result["settings"]["contexts"]), [f"{x:,}" for x in contexts])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens of context" + (f", batch {batch}" if len(batches) > 1 else ""))
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(fontsize="small", frameon=False)
    figure.savefig(file.with_suffix(".svg"), metadata={"Date": None})
    figure.savefig(file.with_suffix(".png"), dpi=110)
