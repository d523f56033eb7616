"""JSON schemas: the time of a mask beside xgrammar's, and how many answers of a model are valid.

    python benchmarks/grammar.py ARTIFACT -o benchmarks/results/grammar.json

There are 50 schemas, which the model is not told. The server's engine writes the answers, many at a time; one that
`--max-new-tokens` cuts off counts as invalid. Both libraries then follow some of them, taking turns. xgrammar imports
torch, and is left out if it is not installed. `--count` only counts, and leaves the times of an earlier result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema_rs
import numpy as np

import ligerexport as lx
from ligerexport.measure.bench.machine import cpu_name
from ligerexport.run.generate import text_model
from ligerexport.run.grammar import STYLE, Grammar, lark
from ligerexport.serve.engine import Engine
from ligerexport.serve.request import Request, Settings

SHORT: dict[str, Any] = {"type": "string", "maxLength": 40}
FIELDS: dict[str, Any] = {
    "name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}, "email": {"type": "string", "format":
    "email", "maxLength": 40}, "born": {"type": "string", "format": "date"}, "score": {"type": "number", "minimum": 0,
    "maximum": 1}, "active": {"type": "boolean"}, "id": {"type": "string", "format": "uuid"}, "plate": {"type":
    "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}, "colour": {"enum": ["red", "green", "blue", None]}, "tags": {"type":
    "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4}, "at": {"type": "array", "prefixItems":
    [{"type": "integer", "minimum": -90, "maximum": 90}, {"type": "integer", "minimum": -180, "maximum": 180}],
    "items": False, "minItems": 2}, "note": {"anyOf": [SHORT, {"type": "null"}]}, "version": {"const": 2},
}  # fmt: skip
"""Parts of the schemas."""


def schemas() -> list[dict[str, Any]]:
    """Return 50 schemas: objects of 2 to 6 fields, lists of them, unions, and trees."""

    def record(start: int, size: int, optional: int) -> dict[str, Any]:
        names = [list(FIELDS)[(start + 3 * step) % len(FIELDS)] for step in range(size)]
        return {"type": "object", "properties": {name: FIELDS[name] for name in names},
                "required": names[optional:], "additionalProperties": False}  # fmt: skip

    found = [record(start, 2 + start % 5, start % 2) for start in range(20)]
    found += [{"type": "array", "items": record(start, 3, 0), "minItems": 1, "maxItems": 3} for start in range(10)]
    found += [{"anyOf": [record(start, 2, 0), record(start + 1, 3, 1)]} for start in range(10)]
    for start in range(10):
        node = record(start, 2, 0)
        node["properties"]["child"] = {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/leaf"}]}
        found.append(node | {"required": [*node["required"], "child"], "$defs": {"leaf": record(start + 5, 2, 0)}})
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Return mean, median, 99th percentile and largest value in milliseconds."""
    return {"mean": statistics.mean(values) * 1e3, "median": statistics.median(values) * 1e3,
            "p99": float(np.quantile(values, 0.99)) * 1e3, "high": max(values) * 1e3}  # fmt: skip


def answers(args: argparse.Namespace) -> tuple[list[list[int]], dict[str, Any]]:
    """Let the server's engine write all answers; return the ids of one to each schema, and how many are valid."""
    engine = Engine(args.artifact, max_batch=args.batch, queue=1 << 16, threads=args.threads)
    text, size = engine.text, engine.manifest.model.vocab_size
    prompt = tuple(text.encode_chat([{"role": "user", "content": "Make up an example as JSON."}]))
    gate, counts = asyncio.Semaphore(4 * args.batch), Counter[str]()

    async def write(schema: dict[str, Any], grammar: Grammar, seed: int) -> list[int]:
        settings = Settings(temperature=0.8, seed=seed)
        async with gate:
            *events, end = [item async for item in engine.submit(Request(
                prompt, settings, args.max_new_tokens, text.turn_ends, constraint=grammar.begin()))]  # fmt: skip
        ids = [event.token for event in events]
        counts["tokens"] += len(ids)
        if end.reason == "stop":
            counts["valid"] += jsonschema_rs.is_valid(schema, json.loads(text.decode(ids)))
        counts["cut off"] += end.reason == "length"
        return ids

    async def write_all() -> list[list[list[int]]]:
        found = [(schema, Grammar(text, size, text.turn_ends, str(lark(schema)))) for schema in schemas()]
        return await asyncio.gather(*(
            asyncio.gather(*(write(*pair, seed) for seed in range(args.answers))) for pair in found))  # fmt: skip

    written = asyncio.run(write_all())
    engine.close()
    return [first for first, *_ in written], {
        "schemas": len(written), "answers": len(written) * args.answers, "valid": counts["valid"],
        "cut off": counts["cut off"], "tokens": counts["tokens"],
        "command": f"python benchmarks/grammar.py ARTIFACT --answers {args.answers} -o benchmarks/results/grammar.json",
    }  # fmt: skip


def own(args: argparse.Namespace) -> Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[int], Any]]]:
    """Return what compiles a schema to the mask and the step of this package."""
    text, size = text_model(args.artifact), lx.load(args.artifact).artifact.manifest.model.vocab_size

    def compiled(schema: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        constraint = Grammar(text, size, text.turn_ends, str(lark(schema))).begin()
        return constraint.mask, constraint.accept

    compiled({})  # reads the vocabulary
    return compiled


def peer(args: argparse.Namespace) -> Callable[[dict[str, Any]], tuple[Callable[[], Any], Callable[[int], Any]]]:
    """Return the same for xgrammar, whose mask is a tensor of bits."""
    import xgrammar

    text = text_model(args.artifact)
    known = {index: name for name, index in text.vocabulary.items()}
    vocabulary = [known.get(index, "") for index in range(max(known) + 1)]
    info = xgrammar.TokenizerInfo(vocabulary, xgrammar.VocabType.BYTE_LEVEL, stop_token_ids=sorted(text.turn_ends))
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)
    bits = xgrammar.allocate_token_bitmask(1, info.vocab_size)

    def compiled(schema: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[int], Any]]:
        separators = (STYLE["item_separator"], STYLE["key_separator"])
        rules = compiler.compile_json_schema(json.dumps(schema), any_whitespace=False, separators=separators)
        matcher = xgrammar.GrammarMatcher(rules)
        return lambda: matcher.fill_next_token_bitmask(bits), matcher.accept_token

    return compiled


def times(compile_: Callable[..., Any], schema: dict[str, Any], ids: list[int]) -> tuple[float, list[float]]:
    """Return the seconds for compiling, and for each mask with the step after it, along an answer."""
    clock = time.perf_counter()
    mask, accept = compile_(schema)
    compiling, found = time.perf_counter() - clock, []
    for token in ids:
        clock = time.perf_counter()
        mask()
        accept(token)
        found.append(time.perf_counter() - clock)
    return compiling, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--answers", type=int, default=20, help="answers to each schema")
    parser.add_argument("--max-new-tokens", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--count", action="store_true")
    args = parser.parse_args()
    firsts, counts = answers(args)
    if args.count:
        print(json.dumps(counts))
        if args.output:
            known = json.loads(args.output.read_text()) if args.output.exists() else {}
            args.output.write_text(json.dumps(known | {"answers": counts}, indent=1) + "\n")
        return
    sides = {"llguidance": own(args)}
    try:
        sides["xgrammar"] = peer(args)
    except ImportError as error:
        print(f"without xgrammar: {error}")
    compiling, masks = ({side: list[float]() for side in sides} for _ in range(2))
    for schema, ids in zip(schemas(), firsts, strict=True):
        for side, compile_ in sides.items():
            first, rest = times(compile_, schema, ids)
            compiling[side].append(first)
            masks[side] += rest
    text = text_model(args.artifact)
    result = {
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads},
        "vocabulary": len(text.vocabulary), "versions": {side: version(side) for side in sides}, "answers": counts,
        "mask and step ms": {side: spread(masks[side]) for side in sides},
        "compile ms": {side: spread(compiling[side]) for side in sides},
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
