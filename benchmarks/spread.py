"""How many slots each layer should have: each one measured with more and with fewer, then a total shared out.

    python benchmarks/spread.py MODEL --chats chats.jsonl --text prose/ -o spread.json

Measures as layers.py does, untrained, on a GPU: divergence from the Transformer on chats and recall of a key said once,
with one layer's memory replaced. What layers gain is taken to add up, so a total is shared out exactly, by dynamic
programming. `benchmarks/recovery.py` trains what comes out.
"""

from __future__ import annotations

import argparse
import json
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from layers import Measure
from recovery import rendered
from transformers import AutoModelForCausalLM

from ligerexport.config import LigerConfig, get_preset
from ligerexport.console import say
from ligerexport.convert import convert, load_model
from ligerexport.corpus import cut_windows, read_tokens, text_files
from ligerexport.sources import resolve
from ligerexport.text import TextModel

PRESET = "evicted"
TOTALS = (128, 256)
"""Slots a layer on average."""
SHAPES = ((20, 6, 10), (30, 12, 18), (124, 56, 72), (252, 112, 144), (380, 56, 72), (124, 112, 272))
"""Window, `recent_use` and `learned` slots that a layer may have instead of the preset's; sinks come on top."""

Shape = tuple[int, int, int]


def memory(shape: Shape) -> dict[str, Any]:
    """Return the fields of `LigerConfig` for a shape."""
    return {"window": shape[0], "slots": (("recent_use", shape[1]), ("learned", shape[2]))}


def preset_shape() -> Shape:
    """Return the shape that the preset gives every layer."""
    config = get_preset(PRESET)
    return config.window, dict(config.slots)["recent_use"], dict(config.slots)["learned"]


def measure_shape(shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    """Return what replacing one layer's memory by `shape` changes, layer by layer."""
    source, text = resolve(args.model).path, TextModel(resolve(args.model).path)
    ids = text.encode(rendered(source, args.chats), special=False)
    windows = torch.as_tensor(cut_windows(ids, args.length, args.windows))
    teacher: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).cuda().eval()
    measure = Measure(teacher, windows, text, read_tokens(text_files(args.text), text), args)
    del teacher
    students = []
    for name, changes in (("preset", {}), (str(sum(shape)), memory(shape))):
        place = args.output.with_suffix(f".{'-'.join(map(str, shape))}.{name}")
        model: Any = load_model(convert(args.model, place, preset=PRESET, force=True, **changes), torch.bfloat16)
        students.append(model.cuda().eval())
    student, other = students
    found: dict[str, Any] = {"shape": shape, "preset": measure(student), "layers": []}
    for layer, replaced in zip(student.model.layers, other.model.layers, strict=True):
        ours, layer.self_attn = layer.self_attn, replaced.self_attn
        found["layers"].append(measure(student))
        layer.self_attn = ours
    say(f"{shape}: {found['preset']}")
    return found


def share_out(measured: list[dict[str, Any]], budget: int, sinks: int) -> list[Shape]:
    """Return a shape for every layer whose slots are within a budget and whose gains add up to most.

    Args:
        measured: From `measure_shape`.
        budget: Slots of all layers together.
        sinks: Slots of each layer beside its shape.
    """
    layers = len(measured[0]["layers"])
    costs: list[dict[Shape, float]] = [{preset_shape(): 0.0} for _ in range(layers)]
    for row in measured:
        for layer, found in enumerate(row["layers"]):
            cost = sum(found[key] / row["preset"][key] - 1 for key in ("kl", "once_nll"))
            costs[layer][tuple(row["shape"])] = cost
    best: dict[int, tuple[float, list[Shape]]] = {0: (0.0, [])}  # by slots spent: cost, shapes so far
    for options in costs:
        reached: dict[int, tuple[float, list[Shape]]] = {}
        for spent, (cost, shapes) in best.items():
            for shape, more in options.items():
                total = spent + sum(shape) + sinks
                if total <= budget and (total not in reached or cost + more < reached[total][0]):
                    reached[total] = (cost + more, [*shapes, shape])
        best = reached
    return min(best.values(), key=lambda entry: entry[0])[1]


def as_memory(shapes: list[Shape]) -> dict[str, Any]:
    """Return the fields of `LigerConfig` that give each layer its shape: the most frequent one is everybody's."""
    common = max(set(shapes), key=shapes.count)
    single = [(i, shape) for i, shape in enumerate(shapes) if shape != common]
    config = replace(
        get_preset(PRESET),
        **memory(common),
        layer_memory=tuple((i, *memory(shape).values()) for i, shape in single),
    )
    fields = LigerConfig.to_dict(config)
    return {key: fields[key] for key in ("window", "slots", "layer_memory")}


def main() -> None:
    """Measure every shape in a process of its own, then share out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--distance", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    with ProcessPoolExecutor(len(SHAPES), mp_context=get_context("spawn")) as pool:
        measured = list(pool.map(measure_shape, SHAPES, [args] * len(SHAPES)))
    sinks, layers = get_preset(PRESET).sinks, len(measured[0]["layers"])
    chosen = {total: as_memory(share_out(measured, total * layers, sinks)) for total in TOTALS}
    result = {"command": "python " + " ".join(sys.argv), "measured": measured, "chosen": chosen}
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
