"""Compare converted models with the bounded caches of other methods: same model, same prompts, same bytes.

    python benchmarks/memory_peers.py prompts MODEL --questions rows.json --text prose.txt -o prompts.json
    python benchmarks/memory_peers_kvpress.py MODEL prompts.json -o kvpress.json      (in an environment of its own)
    python benchmarks/memory_peers.py ours prompts.json recall=liger ... -o ours.json
    python benchmarks/memory_peers.py table kvpress.*.json ours.json --prompts prompts.json \
        -o benchmarks/results/memory_peers.json

The prompts are those of `eval --parts reading,keys`. `memory_peers_kvpress.py` says what the peers are and how their
bytes are counted. A converted model reads context, question and answer in one pass through its state, which is counted
whole: keys, values, scales, positions and scores.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from ligerexport.measure.evaluate.answers import f1
from ligerexport.measure.evaluate.estimate import Estimate

DISTANCES = (1000, 3000, 7000)
KEY_DISTANCES = (1024, 4096)
PROSE_LENGTH = 8192
PROSE_FROM = 2048
"""Position from which the loss of prose counts; the same as in `memory_peers_kvpress.py`."""
Rows = list[dict[str, Any]]


def prompts(args: argparse.Namespace) -> None:
    """Write token ids: questions about passages, keys with and without their statement, and prose."""
    from ligerexport.checkpoint.sources import resolve
    from ligerexport.measure.evaluate.questions import read_questions
    from ligerexport.measure.evaluate.reading import ReadingPrompt, key_prompts, reading_prompts
    from ligerexport.text.corpus import cut_windows, read_tokens
    from ligerexport.text.tokenizer import TextModel

    text = TextModel(resolve(args.model).path)
    rows, prose = read_questions(args.questions, args.half), read_tokens([args.text], text)
    parts: dict[str, list[ReadingPrompt]] = {}
    for distance, count in zip(DISTANCES, args.counts, strict=True):
        parts[f"reading {distance}"] = reading_prompts(text, rows, distance, count, args.seed)
    for distance in KEY_DISTANCES:
        parts[f"keys {distance}"] = key_prompts(text, prose, distance, args.keys, args.seed)
        parts[f"floor {distance}"] = key_prompts(text, prose, distance, args.keys, args.seed, said=False)
    found: dict[str, Rows] = {part: [vars(prompt) for prompt in equalled(made)] for part, made in parts.items()}
    windows = cut_windows(prose, PROSE_LENGTH, args.windows, text.encode(""))
    found[f"prose {PROSE_LENGTH}"] = [{"ids": ids} for ids in windows.tolist()]
    args.output.write_text(json.dumps({"model": str(args.model), "parts": found}) + "\n")


def equalled(made: list[Any]) -> list[Any]:
    """Drop tokens from the middle of the prose that leads in, so that all contexts of a part are equally long."""
    from dataclasses import replace

    from ligerexport.measure.evaluate.reading import LEAD

    least = min(len(prompt.context) for prompt in made)
    return [
        replace(prompt, context=prompt.context[: LEAD // 2] + prompt.context[LEAD // 2 + len(prompt.context) - least :])
        for prompt in made
    ]


def ours(args: argparse.Namespace) -> None:
    """Measure converted checkpoints, or a Transformer."""
    from ligerexport.measure.evaluate.answers import write
    from ligerexport.measure.evaluate.reading import ReadingPrompt
    from ligerexport.measure.opened import open_model

    parts, rows = json.loads(args.prompts.read_text())["parts"], []
    for model in args.models:
        name, _, path = model.rpartition("=")
        opened = open_model(path, scoring=True, device=args.device, dtype=args.dtype, batch=args.batch)
        for part, items in parts.items():
            if part.startswith("floor") and opened.sequence_bytes is not None:
                continue
            found = {i: [round(x, 5) for x in scored] for i, scored in enumerate(_scored(opened, items))}
            if args.write and part.startswith("reading"):
                for i, text in enumerate(write(opened, [ReadingPrompt(**item) for item in items], args.write)):
                    found[i].append(text)
            rows.append({"peer": name or path, "kind": "ours", **_size(opened), "part": part, "found": found})
            print(f"{name or path}, {part}: {Estimate.of([x[0] for x in found.values()]).mean:.3f}", flush=True)
    args.output.write_text(json.dumps({"command": "python " + " ".join(sys.argv), "rows": rows}) + "\n")


def _size(opened: Any) -> dict[str, Any]:
    """Return bytes of state, bits of its numbers and tokens for each KV head on average."""
    from ligerexport.layers.mixer import layer_specs

    if opened.sequence_bytes is None:
        return {"nbytes": 0, "bits": 32, "tokens": 0}
    heads = [head.config for spec in layer_specs(opened.model.config) if spec for head in spec.heads]
    stored = opened.model.config.liger.get("state_dtype", "activation")
    return {
        "nbytes": opened.sequence_bytes,
        "bits": {"int8": 8, "float16": 16}.get(stored, 8 * opened.model.dtype.itemsize),
        "tokens": round(sum(config.num_slots for config in heads) / len(heads)),
    }


def _scored(opened: Any, items: Rows) -> list[tuple[float, float]]:
    """Return loss and share of right tokens of each prompt."""
    import torch

    from ligerexport.measure.evaluate.answers import score
    from ligerexport.measure.evaluate.reading import ReadingPrompt

    if "ids" not in items[0]:
        return score(opened, [ReadingPrompt(**item) for item in items])
    found = []
    for item in items:
        ids = torch.tensor([item["ids"]])
        logits = torch.cat([part[0] for part in opened.logits(ids[:, :-1])])[PROSE_FROM - 1 :]
        target = ids[0, PROSE_FROM:].to(logits.device)
        right = (logits.argmax(-1) == target).double().mean().item()
        found.append((torch.nn.functional.cross_entropy(logits, target).item(), right))
    return found


def table(args: argparse.Namespace) -> None:
    """Write estimates for all rows: losses above the Transformer's on the same prompts, F1, and the recall of keys.

    `columns` has all prompts that a row answered, `common` those that every row answered.
    """
    given = [json.loads(path.read_text()) for path in args.measured]
    parts = json.loads(args.prompts.read_text())["parts"]
    measured: dict[Any, dict[str, dict[str, Any]]] = {}
    for row in (row for file in given for row in file["rows"]):
        name = tuple(row[key] for key in ("peer", "kind", "nbytes", "bits", "tokens"))
        measured.setdefault(name, {}).setdefault(row["part"], {}).update(row["found"])
    plain: dict[str, dict[str, Any]] = {}
    for name in (("Transformer", "prompt", 0, 16, 0), ("Transformer", "ours", 0, 32, 0)):
        for part, found in measured.get(name, {}).items():
            plain.setdefault(part, {}).update(found)
    asked = {
        part: set.intersection(*(set(found[part]) for found in measured.values() if part in found)) for part in plain
    }
    rows = []
    for name, found in sorted(measured.items(), key=lambda pair: pair[0][2:]):
        common = {part: {i: x for i, x in scored.items() if i in asked[part]} for part, scored in found.items()}
        row = dict(zip(("peer", "kind", "nbytes", "bits", "tokens"), name, strict=True))
        rows.append(row | {"columns": _columns(parts, found, plain), "common": _columns(parts, common, plain)})
    files = [{key: x for key, x in file.items() if key != "rows"} for file in given]
    args.output.write_text(json.dumps({"files": files, "rows": rows}, indent=1) + "\n")
    for row in rows:
        cells = [f"{column} {x['mean']:.3f} ± {x['stderr'] or 0:.3f}" for column, x in row["columns"].items()]
        print(f"{row['peer']}, {row['kind']}, {row['nbytes'] / 1e6:g} MB, {row['bits']} bits, {row['tokens']}:", *cells)


def _columns(
    parts: dict[str, Rows], found: dict[str, dict[str, Any]], plain: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return estimates by column: a part, `nll PART` and `F1 PART`."""
    columns = {}
    for part, items in parts.items():
        scored = found.get(part, {})
        if part.startswith("keys") and scored:  # the share that the Transformer cannot guess without the statement
            floor = plain[part.replace("keys", "floor")]
            pairs = [(1 - x[1], 1 - floor[i][1]) for i, x in scored.items() if i in floor]
            columns[part] = Estimate.closed(*map(list, zip(*pairs, strict=True)))
        elif scored and not part.startswith("floor"):
            columns[part] = Estimate.of([x[0] - plain[part][i][0] for i, x in scored.items()])
            columns[f"nll {part}"] = Estimate.of([x[0] for x in scored.values()])
            if all(len(x) > 2 for x in scored.values()):
                columns[f"F1 {part}"] = Estimate.of([f1(x[2], items[int(i)]["gold"]) for i, x in scored.items()])
    return {column: vars(x) for column, x in columns.items() if x is not None}


def main() -> None:
    """Run one of the steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(required=True)
    step = steps.add_parser("prompts", help="write the prompts")
    step.add_argument("model")
    step.add_argument("--questions", type=Path, required=True)
    step.add_argument("--text", type=Path, required=True)
    step.add_argument("--half", help="dev or test; all questions if it is left out")
    step.add_argument("--counts", type=int, nargs=len(DISTANCES), default=[200, 150, 60], help="questions by distance")
    step.add_argument("--keys", type=int, default=64, help="keys by distance")
    step.add_argument("--windows", type=int, default=4, help="texts of prose")
    step.add_argument("--seed", type=int, default=0)
    step.set_defaults(run=prompts)
    step = steps.add_parser("ours", help="measure converted models")
    step.add_argument("prompts", type=Path)
    step.add_argument("models", nargs="+", metavar="NAME=MODEL")
    step.add_argument("--device", default="auto")
    step.add_argument("--dtype", default="float32")
    step.add_argument("--batch", type=int, default=4)
    step.add_argument("--write", type=int, default=0, help="tokens of a written answer; 0 writes none")
    step.set_defaults(run=ours)
    step = steps.add_parser("table", help="write the results")
    step.add_argument("measured", type=Path, nargs="+")
    step.add_argument("--prompts", type=Path, required=True)
    step.set_defaults(run=table)
    for step in steps.choices.values():
        step.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
