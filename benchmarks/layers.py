"""The cost of converting each layer: softmax is restored in one layer at a time, then greedily in several.

    python benchmarks/layers.py MODEL --chats chats.jsonl --text prose/ -o layers.json

Measures divergence from the Transformer on chats, and recall of a key said once in prose, untrained, in bf16 on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from recovery import rendered
from transformers import AutoModelForCausalLM

from ligerexport.checkpoint.convert import convert, load_model
from ligerexport.checkpoint.sources import resolve
from ligerexport.console import progress, say
from ligerexport.model.config import get_preset
from ligerexport.text.corpus import cut_windows, read_tokens, text_files
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.allocate import Measure


def main() -> None:
    """Measure every layer alone, then choose the best few one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--preset", default="evicted")
    parser.add_argument("--chats", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--distance", type=int, default=2048)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--choose", type=int, default=4)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    source = resolve(args.model).path
    device, text = "cuda" if torch.cuda.is_available() else "cpu", TextModel(source)
    teacher: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device).eval()
    place = args.output.with_suffix(".converted")
    student: Any = load_model(convert(args.model, place, preset=args.preset, force=True), torch.bfloat16)
    student = student.to(device).eval()
    ids = text.encode(rendered(source, args.chats), special=False)
    windows = torch.as_tensor(cut_windows(ids, args.length, args.windows))
    prose = read_tokens(text_files(args.text), text)
    measure = Measure(teacher, windows, text, prose, distance=args.distance, trials=args.trials)
    ours = [layer.self_attn for layer in student.model.layers]
    theirs = [layer.self_attn for layer in teacher.model.layers]

    def restored(layers: list[int]) -> dict[str, float]:
        for i, layer in enumerate(student.model.layers):
            layer.self_attn = theirs[i] if i in layers else ours[i]
        return measure(student)

    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "slots": get_preset(args.preset).num_slots}
    result |= {"teacher": measure(teacher), "converted": restored([]), "layers": [], "chosen": []}
    base = result["converted"]

    def cost(found: dict[str, float]) -> float:
        return found["kl"] / base["kl"] + found["once_nll"] / base["once_nll"]

    with progress("layers", len(ours), "steps") as advance:
        for layer in range(len(ours)):
            result["layers"].append(restored([layer]))
            advance(1)
    likely = sorted(range(len(ours)), key=lambda layer: cost(result["layers"][layer]))[: 2 * args.choose]
    chosen: list[int] = []
    for _ in range(args.choose):
        tried = {layer: restored([*chosen, layer]) for layer in likely if layer not in chosen}
        best = min(tried, key=lambda layer: cost(tried[layer]))
        chosen.append(best)
        result["chosen"].append({"layers": list(chosen)} | tried[best])
        say(f"{chosen}: {tried[best]}")
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
