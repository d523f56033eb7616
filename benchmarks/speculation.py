"""Guessed tokens: the speed of answers with and without them, what calls of several tokens cost, and taking them back.

    python benchmarks/speculation.py ARTIFACT -o benchmarks/results/speculation.json

Each prompt is answered with `off` and `ngram` in turns, greedily; a ratio is the time per token of one turn over that
of the other, and the median over the turns is the prompt's. Prompts that seem to gain nothing take more turns. How far
turns of `off` are from each other says what a ratio below 1 means. Calls of 1 to 16 tokens take turns too, each a draft
that is taken back as a whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from datetime import date, timedelta
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx

CALLS = (1, 2, 4, 8, 16)
UNSURE = 1.02
"""A prompt with a lower ratio takes more turns."""
LEAST = 0.98
"""A prompt that is still below this is measured anew with three times as many turns: single turns vary by a tenth."""


def prompts() -> dict[str, list[str]]:
    """Return 40 prompts of each kind, over texts of our own: answers that repeat their prompt, and open ones."""
    source = json.loads(Path(__file__).with_name("speculation_prompts.json").read_text())
    texts, count = source["texts"], len(source["texts"])
    about = {
        "summarising": texts, "editing code": source["codes"], "JSON": [weather(day) for day in range(count)],
        "retrieval": [f"{texts[i]}\n\n{texts[(i + far) % count]}" for far in (1, 3) for i in range(count)],
    }  # fmt: skip
    asked = {
        kind: [f"{task}\n\n{text}" for text, task in product(about[kind], source["tasks"][kind])] for kind in about
    }
    return asked | {"open": source["open"]}


def weather(first: int) -> str:
    """Return JSON about four places."""
    rows = [
        {
            "place": place,
            "day": f"{date(2024, 5, 1) + timedelta(day)}",
            "degrees": 14 + 7 * day % 13,
            "rain": day % 2 > 0,
        }
        for day, place in enumerate(("Lund", "Vessby", "Aurau", "Tarn"), first)
    ]
    return json.dumps(rows, indent=1)


def speed(session: lx.Session, prompt: str, way: str, tokens: int) -> tuple[float, list[int]]:
    """Return seconds per token after the first one, and the answer."""
    chunks = list(lx.generate(session, prompt, chat=True, max_new_tokens=tokens, speculate=way))
    summary = chunks[-1].summary
    assert summary is not None
    return summary.decode_seconds / max(1, summary.new_tokens - 1), [chunk.token for chunk in chunks]


def answered(session: lx.Session, kind: str, prompt: str, tokens: int, turns: int, again: int) -> dict[str, Any]:
    """Return one prompt's row, from at least `turns` turns, and up to `again` if it seems to gain nothing."""
    seconds: dict[str, list[float]] = {"off": [], "ngram": []}
    answers: dict[str, list[int]] = {}
    ratios: list[float] = []
    while len(ratios) < turns or (len(ratios) < again and statistics.median(ratios) < UNSURE):
        for way in list(seconds)[:: 1 if len(ratios) % 2 else -1]:
            found, answers[way] = speed(session, prompt, way, tokens)
            seconds[way].append(found)
        ratios.append(seconds["off"][-1] / seconds["ngram"][-1])
    off = seconds["off"]
    return {
        "kind": kind, "tokens": len(answers["ngram"]), "same": answers["off"] == answers["ngram"],
        "ms_off": statistics.median(off) * 1e3, "ms_ngram": statistics.median(seconds["ngram"]) * 1e3,
        "ratio": statistics.median(ratios), "ratios": ratios, "off_of_off": off[0] / off[1] if len(off) > 1 else None,
    }  # fmt: skip


def calls(session: lx.Session, rounds: int, context: int) -> list[dict[str, Any]]:
    """Return what a call of some tokens costs against a step, and what taking all of them back costs."""
    random = np.random.default_rng(0)
    session.reset()
    session.prefill(random.integers(0, session.artifact.manifest.model.vocab_size, context))
    whole: dict[int, list[float]] = {tokens: [] for tokens in CALLS}
    back: dict[int, list[float]] = {tokens: [] for tokens in CALLS}
    for _ in range(rounds):
        for tokens in CALLS:
            ids = random.integers(0, session.artifact.manifest.model.vocab_size, tokens)
            clock = time.perf_counter()
            session.propose(ids)
            proposed = time.perf_counter()
            session.commit(0)
            whole[tokens].append(proposed - clock)
            back[tokens].append(time.perf_counter() - proposed)
    step = statistics.median(whole[1])
    costs = ((n, statistics.median(whole[n]), statistics.median(back[n])) for n in CALLS)
    return [
        {"tokens": n, "ms": cost * 1e3, "steps": cost / step, "back_ms": undone * 1e3, "back_of_step": undone / step}
        for n, cost, undone in costs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--again", type=int, default=9, help="number of turns of prompts that seem to gain nothing")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--some", type=int, help="only this many prompts of each kind")
    args = parser.parse_args()
    session = lx.load(args.artifact)
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv), "threads": getattr(session, "threads", None),
        "model": session.artifact.manifest.source.model, "precision": session.artifact.manifest.precision,
        "versions": {name: version(name) for name in ("onnxruntime", "numpy")},
        "calls": calls(session, args.rounds, 1000), "rows": [],
    }  # fmt: skip
    for row in result["calls"]:
        print(json.dumps(row), flush=True)
    asked = prompts()
    for kind, texts in asked.items():
        for text in texts[: args.some]:
            row = answered(session, kind, text, args.tokens, args.turns, args.again)
            if row["ratio"] < LEAST:  # chance, among so many prompts? Turns of their own decide
                row = answered(session, kind, text, args.tokens, 3 * args.again, 0) | {"at_first": row["ratio"]}
            result["rows"].append(row)
            print(json.dumps(result["rows"][-1]), flush=True)
    by_kind = {kind: [row["ratio"] for row in result["rows"] if row["kind"] == kind] for kind in asked}
    result["kinds"] = {kind: {"mean": statistics.geometric_mean(x), "least": min(x)} for kind, x in by_kind.items()}
    print(json.dumps(result["kinds"]))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
