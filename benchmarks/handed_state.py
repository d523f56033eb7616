"""A state that one machine writes, and what others make of it.

On the machine with the GPU, read a prompt, save the state, and write 128 tokens:

    python benchmarks/handed_state.py write CHECKPOINT --ids @FILE --device cuda -o DIRECTORY

Elsewhere, continue from the state with checkpoints and artifacts of the same model:

    python benchmarks/handed_state.py read DIRECTORY MODEL... -o benchmarks/results/handed_state.json

A reader is given the tokens of the writer. `same` counts the steps at which its most likely token is the writer's, and
`gap` is the largest difference of its own logits where it is not. `nll` is the mean negative log-likelihood of the
tokens, in nats, and that of the writer stands beside it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import numpy as np

import ligerexport as lx
from ligerexport.run.runtime import Session

TOKENS = 128


def nll(logits: np.ndarray, token: int) -> float:
    """Return the negative log-likelihood of a token for logits `[V]`, in nats."""
    logits = logits.astype(np.float64) - logits.max()
    return float(np.log(np.exp(logits).sum()) - logits[token])


def write(args: argparse.Namespace) -> None:
    """Save the state after the prompt and the greedy tokens after it."""
    ids = [int(x) for x in (Path(args.ids[1:]).read_text() if args.ids[0] == "@" else args.ids).split(",")]
    args.output.mkdir(parents=True, exist_ok=True)
    session = lx.load(args.model, device=args.device)
    logits = session.prefill(np.array(ids))[0]
    session.snapshot().save(args.output / "state")
    tokens, losses = [], []
    for _ in range(TOKENS):
        tokens.append(int(logits.argmax()))
        losses.append(nll(logits, tokens[-1]))
        logits = session.step(tokens[-1])[0]
    told = {"command": shlex.join(sys.argv), "prompt": len(ids), "tokens": tokens, "nll": float(np.mean(losses[1:]))}
    (args.output / "told.json").write_text(json.dumps(told | {"torch": version("torch")}))


def follow(session: Session, tokens: list[int]) -> dict[str, float]:
    """Continue a session with given tokens and compare its choices with them."""
    losses, gaps = [], []
    for token, following in pairwise(tokens):
        logits = session.step(token)[0]
        losses.append(nll(logits, following))
        gaps.append(float(logits.max() - logits[following]))
    return {"same": sum(gap == 0 for gap in gaps), "of": len(gaps), "gap": max(gaps), "nll": float(np.mean(losses))}


def read(args: argparse.Namespace) -> None:
    """Continue the state with each model."""
    told = json.loads((args.directory / "told.json").read_text())
    rows = []
    for name in args.models:
        session = lx.load(name)
        session.restore(lx.Snapshot.load(args.directory / "state"))
        rows.append({"model": Path(name).name, **follow(session, told["tokens"])})
        print(json.dumps(rows[-1]))
    bytes_of_state = (args.directory / "state").stat().st_size
    found = {"command": shlex.join(sys.argv), "writer": told, "bytes": bytes_of_state, "readers": rows}
    args.output.write_text(json.dumps(found | {"onnxruntime": version("onnxruntime")}, indent=1) + "\n")


def main() -> None:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("write")
    one.add_argument("model")
    one.add_argument("--ids", required=True, help="tokens with commas, or @FILE")
    one.add_argument("--device", default="cpu")
    one.add_argument("-o", "--output", type=Path, required=True)
    one.set_defaults(run=write)
    two = verbs.add_parser("read")
    two.add_argument("directory", type=Path)
    two.add_argument("models", nargs="+")
    two.add_argument("-o", "--output", type=Path, required=True)
    two.set_defaults(run=read)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
