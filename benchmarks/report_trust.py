"""The tables of docs/concepts/trust.md, for `report.py`."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[object]]]


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def promises() -> Table:
    """What was tried, and how often it went wrong."""
    faults, hostile, planted, sound = map(_result, ("faults", "hostile", "planted", "sound"))
    steps, whole, cycles = (_result("endurance")[part] for part in ("steps", "whole", "cycles"))
    gates, recall = _result("endurance")["gates"], _result("endurance")["recall"]["lowerings"]
    concurrency = _result("concurrency")
    sessions = max(row["sessions"] for row in concurrency["rows"])
    rows, real = planted["rows"], _result("planted_real")
    return ["tried", "how much", "went wrong"], [
        ["faults while files are written",
         f"{faults['total']['injected']:,}, {faults['total']['killed']:,} of them kills",
         sum(faults["wrong"].values())],
        ["hostile inputs opened", f"{hostile['inputs']:,}", f"{hostile['findings']}"],
        ["faults planted in builds", f"{len(rows)}, of {len({row['fault'] for row in rows})} kinds",
         f"{len(rows) - planted['refused']} passed, {len(rows) - planted['right']} misplaced"],
        ["the same in SmolLM2-135M", f"{len(real['rows'])}",
         f"{len(real['rows']) - real['refused']} passed, {len(real['rows']) - real['right']} misplaced"],
        ["sound builds", f"{len(sound['rows'])}", f"{sound['refused']} refused"],
        ["steps of one session", f"{steps['steps']:,}", f"memory changed by {100 * steps['rss_change']:.1f} %"],
        ["steps of the whole model in int4", f"{whole['steps']:,}",
         f"memory without mapped weights changed by {100 * whole['private_change']:.1f} %"],
        ["steps with the preset `recall`", ", ".join(f"{x['steps']:,} in `{name}`" for name, x in recall.items()),
         f"memory without mapped weights changed by {100 * max(x['private_change'] for x in recall.values()):.1f} %"],
        ["tokens through gates that stay open", f"{gates[0]['rows'][-1]['tokens']:,}",
         f"state at most {max(x['largest'] / x['bound'] for gate in gates for x in gate['rows']):.2f} of its bound"],
        ["snapshots taken and restored", f"{cycles['cycles']:,}",
         f"memory changed by {100 * cycles['rss_change']:.1f} %"],
        ["sessions at a time", f"{sessions}, in threads and in processes", "0 wrote a different text than alone"],
        ["Ctrl-C within a call", f"{sum(concurrency['interrupted'].values())}", "0 went on with a wrong state"],
        *_served(),
    ]  # fmt: skip


def _served() -> list[list[object]]:
    """What was done to the server."""
    rows = _result("serve_faults")["rows"]
    bad, left, killed = (rows[x] for x in ("malformed requests", "requests whose client left", "kill -9 under load"))
    full, slow, long = (rows[x] for x in ("a full disk", "clients that do not read", "a long prompt"))

    def grew(row: dict[str, Any]) -> str:
        return f"{sum(row['wrong'].values())}, memory grew by {row['growth'] / 1e6:.1f} MB"

    return [
        ["malformed requests to the server", f"{bad['requests']:,}", grew(bad)],
        ["requests whose client left", f"{left['requests']:,}", grew(left)],
        ["kill -9 of the server with states on the disk, under load",
         f"{killed['kills']}, {killed['turns']:,} turns of chats", sum(killed["wrong"].values())],
        ["answers while the disk for states was full", full["requests"], sum(full["wrong"].values())],
        ["clients that do not read their answers", f"{slow['clients']}, {slow['tokens_each']:,} tokens each",
         f"{sum(slow['wrong'].values())}, {slow['growth_per_client'] / 1e6:.1f} MB each"],
        ["tokens of one prompt to the server", f"{long['tokens']:,}",
         f"{sum(long['wrong'].values())}, {long['bytes_per_token']:.0f} bytes of memory a token for their ids"],
    ]  # fmt: skip


def faults() -> Table:
    """Faults by command."""
    counts: dict[str, Counter[str]] = {}
    for row in _result("faults")["rows"]:
        counts.setdefault(row["command"], Counter()).update({k: v for k, v in row.items() if isinstance(v, int)})
    shown = ("injected", "killed", "old", "new", "none", "explained")
    header = ["command", "faults", "killed", "old output whole", "new output whole", "no output", "explained"]
    return header, [[f"`{name}`", *(found[key] for key in shown)] for name, found in counts.items()]


def hostile() -> Table:
    """Hostile inputs by kind."""
    return ["what was mutated", "inputs", "refused", "valid", "findings", "slowest", "memory grew by"], [
        [name, f"{row['inputs']:,}", f"{row['refused']:,}", f"{row['valid']:,}", row["findings"],
         f"{row['slowest_s']:.1f} s", f"{row['growth_mib']} MiB"]
        for name, row in _result("hostile")["kinds"].items()
    ]  # fmt: skip


def drift() -> Table:
    """Distance of a state in fp32 from fp64."""
    found = {row["steps"]: row for row in _result("endurance")["drift"]["rows"]}
    shown = [n for n in (10_000, 100_000, 250_000, 500_000, 750_000, 1_000_000) if n in found]
    layers = range(len(found[shown[0]]["sums"]))
    return ["steps", *(f"{n:,}" for n in shown)], [
        *([f"sums of layer {i}, relative", *(f"{found[n]['sums'][i]:.1e}" for n in shown)] for i in layers),
        ["logits, absolute", *(f"{found[n]['logits']:.1e}" for n in shown)],
    ]


def concurrency() -> Table:
    """Tokens per second of sessions side by side."""
    return ["in", "threads or processes", "sessions", "tokens a second", "least to most"], [
        [row["in"], row.get("threads", row.get("processes")), row["sessions"], f"{row['tokens_per_s']:.0f}",
         f"{row['low']:.0f} to {row['high']:.0f}"]
        for row in _result("concurrency")["rows"]
    ]  # fmt: skip
