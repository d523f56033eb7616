"""Guessed tokens: the speed of answers with and without them, what calls of several tokens cost, and taking them back.

    python benchmarks/speculation.py ARTIFACT -o benchmarks/results/speculation.json

Each prompt is answered with `off` and `ngram` in turns, greedily; a ratio is the time per token of one
turn over that of the other, and the median over the turns is the prompt's. Calls of 1 to 16 tokens take turns too, each
a draft that is taken back as a whole.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx

PROMPTS: dict[str, list[str]] = json.loads(Path(__file__).with_name("speculation_prompts.json").read_text())
"""Prompts by kind, over texts of our own: answers that repeat their prompt, and open ones that do not."""
CALLS = (1, 2, 4, 8, 16)


def speed(session: lx.Session, prompt: str, way: str, tokens: int) -> tuple[float, list[int]]:
    """Return seconds per token after the first one, and the answer."""
    chunks = list(lx.generate(session, prompt, chat=True, max_new_tokens=tokens, speculate=way))
    summary = chunks[-1].summary
    assert summary is not None
    return summary.decode_seconds / max(1, summary.new_tokens - 1), [chunk.token for chunk in chunks]


def answered(session: lx.Session, kind: str, prompt: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return one prompt's row."""
    seconds: dict[str, list[float]] = {"off": [], "ngram": []}
    answers: dict[str, list[int]] = {}
    for turn in range(args.turns):
        for way in list(seconds)[:: 1 if turn % 2 else -1]:
            found, answers[way] = speed(session, prompt, way, args.tokens)
            seconds[way].append(found)
    ratios = [one / other for one, other in zip(*seconds.values(), strict=True)]
    return {
        "kind": kind, "tokens": len(answers["ngram"]), "same": answers["off"] == answers["ngram"],
        "ms_off": statistics.median(seconds["off"]) * 1e3, "ms_ngram": statistics.median(seconds["ngram"]) * 1e3,
        "ratio": statistics.median(ratios), "ratios": ratios,
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
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=128)
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
    for kind, texts in PROMPTS.items():
        for text in texts[: args.some]:
            result["rows"].append(answered(session, kind, text, args))
            print(json.dumps(result["rows"][-1]), flush=True)
    by_kind = {kind: [row["ratio"] for row in result["rows"] if row["kind"] == kind] for kind in PROMPTS}
    result["kinds"] = {kind: {"mean": statistics.geometric_mean(x), "least": min(x)} for kind, x in by_kind.items()}
    print(json.dumps(result["kinds"]))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
