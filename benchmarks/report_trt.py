"""Tables of the engines of TensorRT, as header and rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[str]]]
BIG = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
"""Weights of the 8B shape."""


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def verified() -> Table:
    """Engines with the plugin against torch."""
    data = _result("trt")["smollm2"]
    rows = []
    for name in ("batch 1", "batch 16"):
        x = data[name]
        state = max(x["state_error"][kind] for kind in ("slot_key", "slot_value"))
        rows.append([
            name, f"{x['tokens_alike']} of {x['of']}", f"{x['divergence']['mean']:.1e}",
            f"{x['torch_in_half']['divergence']['mean']:.1e}", f"{x['state_error']['slots_alike']:.2%}", f"{state:.3f}",
        ])  # fmt: skip
    header = [
        "SmolLM2-135M on TensorRT 8.5.3.1", "greedy tokens as torch in fp32",
        f"nats from torch's fp32, mean of {data['batch 1']['steps']} steps", "torch in fp16 from its own fp32",
        "slots with the same token", "keys and values off by",
    ]  # fmt: skip
    return header, rows


def products() -> Table:
    """Products of one row and of 16, alone."""
    data = _result("trt")["tiles"]
    rows = []
    for name in ("qkv", "o", "gate_up", "down", "head"):
        one, few = (data[f"8b {m} {name}"][0]["us"] for m in (1, 16))
        small = data[f"smollm2 1 {name}"][0]["us"]
        outputs, inputs = BIG[name]
        rate = 2 * outputs * inputs / one / 1e6
        rows.append(
            [name, f"{outputs:,} x {inputs:,}", f"{one:.1f} µs, {rate:.2f} TB/s", f"{few:.1f} µs", f"{small:.1f} µs"]
        )
    return ["8B shape", "weight", "1 row", "16 rows", "1 row of SmolLM2-135M"], rows


def speed() -> Table:
    """Engines with the plugin: steps, prompts, builds."""
    data, transformer = _result("trt"), _result("transformer_gpu")
    small, large = data["smollm2"], data["8b"]
    floor = large["weight_bytes_read"] / transformer["bandwidth"]["copy"] * 1e3
    share = large["profile_ms"]["mixers"] / sum(large["profile_ms"].values())
    rows = [
        ["SmolLM2-135M, a step of 1 sequence", f"{small['batch 1']['step']['median_ms']:.2f} ms"],
        ["SmolLM2-135M, a step of 16", f"{small['batch 16']['step']['median_ms']:.2f} ms"],
        ["SmolLM2-135M, engine built in", f"{small['batch 1']['build_seconds']:.0f} s"],
        ["8B shape, a step of 1 sequence", f"{large['step']['median_ms']:.2f} ms"],
        ["of that the time to read its weights once", f"{floor:.2f} ms, {floor / large['step']['median_ms']:.0%}"],
        ["8B shape, the mixers' share of a step, by layers", f"{share:.0%}"],
        ["8B shape, 8,192 tokens of prompt in calls of 1,024", f"{large['prefill']['median_ms']:.0f} ms"],
        ["8B shape, engine built in, with at most", f"{large['build_seconds']:.0f} s, "
         f"{large['peak_host_bytes'] / 1e9:.0f} GB of RAM"],
        ["8B shape, on the device, whatever the length", f"{large['device_bytes'] / 1e9:.1f} GB"],
    ]  # fmt: skip
    for row in transformer["rows"]:
        if row["batch"] == 1 and row["what"] == "step" and "cudnn" in row:
            cell = f"{row['cudnn']['median_ms']:.2f} ms, {row['device_bytes'] / 1e9:.1f} GB"
            rows.append([f"a Transformer's step of that shape after {row['context']:,} tokens", cell])
        if row["what"] == "prefill" and row["context"] == 8192:
            rows.append(["a Transformer's prompt of 8,192 tokens", f"{row['cudnn']['median_ms']:.0f} ms"])
    return ["one H100, fp16", ""], rows
