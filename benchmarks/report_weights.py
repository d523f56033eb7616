"""The tables of smaller weights, for `report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[object]]]


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mb(row: dict[str, Any]) -> str:
    return f"{row['bytes'] / 1e6:.0f} MB"


def _change(cell: dict[str, float] | None) -> str:
    return f"{cell['nll_change']:+.3f} ± {cell['nll_change_error']:.3f}" if cell else ""


def _texts(row: dict[str, Any], texts: list[str]) -> list[str]:
    """Return the change of the NLL and the divergence on each text."""
    found = [row["texts"].get(text) for text in texts]
    return [cell for x in found for cell in (_change(x), f"{x['kl']:.3f}" if x else "")]


def _tried(rows: list[dict[str, Any]], name: str, texts: list[str]) -> Table:
    header = [name, "file", *(f"{text}: {what}" for text in texts for what in ("NLL", "KL"))]
    return header, [[row[name], _mb(row), *_texts(row, texts)] for row in rows]


def cost() -> Table:
    """What each precision costs, on texts that no choice was made on."""
    rows: list[list[object]] = [
        [f"`{row['name']}`", _mb(row), _change(row), f"{row['ms_per_token']:.1f} ms"]
        for row in _result("quantised")["rows"]
    ]
    return ["`--weights`", "size of the weights", "NLL above fp32, nats per token", "a token, on one core"], rows


def quantised() -> Table:
    """Sizes, losses and times by precision, with an early form of int4."""
    rows: list[list[object]] = []
    for row in _result("quantised_all")["rows"]:
        prompt = row["prompt_tokens_per_second"]
        rows.append(
            [row["name"], _mb(row), f"{row['nll_mean']:.3f}", _change(row), f"{row['ms_per_token']:.1f} ms",
             *(f"{prompt[chunk]:.0f}" for chunk in ("64", "128"))]
        )  # fmt: skip
    head = ["weights", "bytes", "nats per token", "against fp32", "time per token"]
    return [*head, "prompt tokens/s, 64 per call", "128 per call"], rows


def places() -> Table:
    """Which matrices have 8 bits."""
    return _tried(_result("int4_importance")["rows"], "rule", ["2015", "2026"])


def roundings() -> Table:
    """Ways to choose scales, zero points and codes."""
    data = _result("int4_rounding")["rows"]
    header, rows = _tried(data, "rounding", ["2015", "code"])
    rows = [[name, f"{row['tokens_read']:,}", *rest] for row, (name, *rest) in zip(data, rows, strict=True)]
    return ["rounding", "tokens read", *header[1:]], rows


def unseen() -> Table:
    """The last choice on texts that nothing was chosen on."""
    return _tried(_result("int4_rounding")["unseen"]["rows"], "rounding", ["chat", "message", "code"])


def qwen() -> Table:
    """Layers whose `gate_proj` and `up_proj` have 8 bits, in a model of 0.5 billion parameters."""
    return _tried(_result("int4_qwen")["rows"], "rule", ["built-in", "2015", "2026"])


def build_8b() -> Table:
    """Build time and memory of a large shape."""
    rows: list[list[object]] = [
        [f"{row['lowering']}, {row['precision']}", f"{row['parameters'] / 1e9:.1f} billion",
         f"{row['weights'] / 1e9:.2f} GB", f"{row['seconds'] / 60:.0f} min", f"{row['cpu_seconds'] / 60:.0f} min",
         f"{row['anonymous'] / 1e9:.2f} GB", f"{row['peak'] / 1e9:.2f} GB"]
        for row in _result("build_8b")["rows"]
    ]  # fmt: skip
    head = ["", "parameters", "weights as stored", "build and verify", "processor time"]
    return [*head, "memory without files", "resident"], rows
