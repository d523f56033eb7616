"""The tables of the fused kernels, for `report.py`: each function returns header and rows, from `fused.json` and
`fused_linear.json`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DATA: Any = json.loads((RESULTS / "fused.json").read_text())
LINEAR: Any = json.loads((RESULTS / "fused_linear.json").read_text())
Table = tuple[list[str], list[list[object]]]
PASSES = {"forward": "forward", "both": "forward + backward"}


def _ms(cell: dict[str, float]) -> str:
    """Return median and spread in milliseconds."""
    return f"{cell['ms']:.3f} ({cell['low']:.3f}-{cell['high']:.3f})"


def _shapes(rows: list[Any], kind: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield rows with their shapes as text, with the source of the decay if `kind` is true."""
    for row in rows:
        shape = "B{} T{} H{}/{} D{}".format(*row["shape"])
        yield shape + (", raw" if row["raw"] else ", explicit") * kind, row


def linear() -> Table:
    """Gated linear attention against flash-linear-attention."""
    lines: list[list[object]] = []
    for shape, row in _shapes([*LINEAR["forward"], *LINEAR["raw"]], kind=False):
        for what, title in PASSES.items():
            floor, mine, peer = row["floors"][what], row["ours"][what], row["fla"][what]
            least = [
                floor["bytes"] / LINEAR["rates"]["copy"] * 1e3,
                floor["operations"] / LINEAR["rates"]["product"] * 1e3,
            ]
            lines.append([
                shape, "raw projections" if row["raw"] else "explicit decay", title, _ms(mine), _ms(peer),
                f"{peer['ms'] / mine['ms']:.2f}", f"{least[0]:.3f}, {least[1]:.3f}", f"{max(least) / mine['ms']:.0%}",
            ])  # fmt: skip
    return [
        "shape", "from", "pass", "here, ms", "fla, ms", "times faster", "floors: bytes, operations, ms", "of the floor",
    ], lines  # fmt: skip


def linear_profile() -> Table:
    """Time of the kernels alone."""
    lines: list[list[object]] = []
    for shape, row in _shapes(DATA["profile"]):
        parts = sorted(row["kernels"].items(), key=lambda item: -item[1])
        lines.append([shape, f"{sum(row['kernels'].values()):.0f}", ", ".join(f"{n} {us:.0f}" for n, us in parts)])
    return ["forward + backward", "microseconds", "by kernel"], lines


def linear_memory() -> Table:
    """Peak memory of forward and backward."""
    return ["peak above the inputs, forward + backward", "here", "fla"], [
        [shape, f"{row['ours']['peak'] / 1e6:.0f} MB", f"{row['fla']['peak'] / 1e6:.0f} MB"]
        for shape, row in _shapes([*LINEAR["forward"], *LINEAR["raw"]])
    ]


def linear_softmax() -> Table:
    """The recurrence against softmax over all tokens."""
    rows = DATA["softmax"]
    names = {"recurrence": "ours", "SDPA, flash": "flash", "SDPA, cuDNN": "cudnn"}
    header = ["forward, ms", *(f"T {row['length']:,}" for row in rows)]
    return header, [[name, *(_ms(row[key]) for row in rows)] for name, key in names.items()]


def memory_kernel() -> Table:
    """Softmax over the bounded memory against softmax over all tokens."""
    return ["ms", "pass", "here", "FlexAttention, same mask", "SDPA flash, causal", "SDPA cuDNN, causal"], [
        [f"{row['preset']}, T {row['length']:,}", title,
         *(_ms(row[name][what]) for name in ("ours", "flex", "flash", "cudnn"))]
        for row in DATA["memory"] for what, title in PASSES.items()
    ]  # fmt: skip


def step() -> Table:
    """One token of one layer."""
    lines: list[list[object]] = []
    for row in DATA["step"]:
        mine, peer = row["ours"], row.get("composition")
        lines.append([
            row["preset"], row["slots"], row["batch"], f"{mine['us']:.1f} ({mine['low']:.1f}-{mine['high']:.1f})",
            f"{row['bytes'] / 1e6:.1f} MB", f"{row['bytes'] / mine['us'] * 1e6 / DATA['rates']['copy']:.0%}",
            f"{peer['us']:.1f}, {peer['us'] / mine['us']:.1f} times" if peer else "",
        ])  # fmt: skip
    header = ["preset", "slots", "batch", "microseconds", "bytes that must move", "of copy bandwidth", "composition"]
    return header, lines


def first_result() -> Table:
    """From a fresh process to the first result."""
    found = [f"{DATA[name]:.1f}" for name in ("first", "first of fla")]
    return ["fresh process, empty cache", "here", "fla"], [["seconds to the first result", *found]]
