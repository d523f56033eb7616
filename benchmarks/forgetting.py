"""Measure how well the share of attention on forgotten tokens foresees a lost answer.

    python benchmarks/forgetting.py evicted=ARTIFACT ... --questions rows.json -o benchmarks/results/forgetting.json

Artifacts are built with `--meter`. The questions are those of `eval --parts reading`: the paragraph with the answer is
among 1,000 tokens of others. An answer is lost if its NLL is at least 0.5 nats per token higher than when the paragraph
stands alone; what small models write is seldom right word for word. The area under the ROC curve is the probability
that a lost answer has a higher share than another. It is also measured for the mean log-probability of the tokens that
the model writes, which a user has anyway. Errors are standard errors of 2,000 bootstrap samples of the questions. The
script works for `--seconds`, and continues where the file ends.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx
from ligerexport.measure.bench.machine import cpu_name
from ligerexport.measure.evaluate.questions import read_questions
from ligerexport.measure.evaluate.reading import ReadingPrompt, reading_prompts
from ligerexport.run.generate import text_model
from ligerexport.run.runtime import Session

DISTANCE, LOST, SAMPLES, WRITTEN = 1000, 0.5, 2000, 8


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """Return the logarithm of the softmax of logits `[V]`."""
    top = logits.max()
    found: np.ndarray = logits - top - np.log(np.exp(logits - top).sum())
    return found


def read(session: Session, prompt: ReadingPrompt) -> np.ndarray:
    """Read the context, then the question; return the logits after it."""
    session.reset()
    session.prefill(prompt.context)
    return session.prefill(prompt.question)[0].copy()


def loss(session: Session, logits: np.ndarray, prompt: ReadingPrompt) -> float:
    """Return the NLL of the right answer in nats per token, after `read` returned the logits."""
    found = []
    for token in prompt.answer:
        found.append(-float(log_probabilities(logits)[token]))
        logits = session.step(token)[0]
    return float(np.mean(found))


def ask(session: Session, prompt: ReadingPrompt, alone: ReadingPrompt) -> dict[str, float]:
    """Return what an answer loses, and of the tokens that the model writes the means of share and log-probability."""
    logits = first = read(session, prompt)
    before, shares, chances = session.snapshot(), list[float](), list[float]()
    for _ in range(WRITTEN):
        assert session.forgotten is not None
        shares.append(float(session.forgotten[0].mean()))
        chances.append(float(log_probabilities(logits).max()))
        logits = session.step(int(logits.argmax()))[0]
    session.restore(before)
    among = loss(session, first, prompt)
    lost = among - loss(session, read(session, alone), alone)
    means = float(np.mean(shares)), float(np.mean(chances))
    return {"lost": round(lost, 4), "forgotten": round(means[0], 6), "log_probability": round(means[1], 4)}


def area(value: np.ndarray, lost: np.ndarray) -> float:
    """Return the probability that a lost answer has a higher value than another; a tie counts half."""
    pairs = value[lost][:, None] - value[~lost]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def estimate(value: np.ndarray, lost: np.ndarray) -> dict[str, float]:
    """Return the area under the ROC curve and its standard error."""
    rng, found = np.random.default_rng(0), list[float]()
    while len(found) < SAMPLES:
        picked = rng.integers(0, len(lost), len(lost))
        if 0 < lost[picked].sum() < len(lost):
            found.append(area(value[picked], lost[picked]))
    return {"mean": area(value, lost), "stderr": float(np.std(found))}


def summary(rows: list[dict[str, float]]) -> dict[str, Any]:
    """Return the figures of a model."""
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    lost, share = columns["lost"] >= LOST, columns["forgotten"]
    found: dict[str, Any] = {"questions": len(rows), "lost": int(lost.sum())}
    if 0 < lost.sum() < len(lost):
        found["share"] = {"lost": float(share[lost].mean()), "others": float(share[~lost].mean())}
        found["area_of_share"] = estimate(share, lost)
        found["area_of_log_probability"] = estimate(-columns["log_probability"], lost)
    return found


def main() -> None:
    """Ask the questions that the file does not have yet, the models in turns."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=ARTIFACT")
    parser.add_argument("--questions", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--count", type=int, default=160)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    args = parser.parse_args()
    done = json.loads(args.output.read_text()) if args.output.is_file() else {"rows": {}}
    paths = dict(model.split("=", 1) for model in args.models)
    sessions = {name: lx.load(path, threads=1) for name, path in paths.items()}
    text, rows = text_model(Path(next(iter(paths.values())))), read_questions(args.questions, "test")
    among, alone = (reading_prompts(text, rows, distance, args.count) for distance in (DISTANCE, 0))
    pairs = {prompt.question + prompt.answer: prompt for prompt in alone}
    end = time.monotonic() + args.seconds
    for i, prompt in enumerate(among):
        for name, session in sessions.items():
            known = done["rows"].setdefault(name, [])
            if i == len(known) and time.monotonic() < end:
                known.append(ask(session, prompt, pairs[prompt.question + prompt.answer]))
        done |= {
            "command": "python " + " ".join(sys.argv),
            "machine": {"cpu": cpu_name(), "threads": 1},
            "versions": {"onnxruntime": version("onnxruntime"), "python": platform.python_version()},
            "models": {name: summary(found) for name, found in done["rows"].items()},
        }
        args.output.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
