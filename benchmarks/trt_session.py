"""Check a Python session on a TensorRT engine against torch, and against itself.

To write the expected results, on any machine with torch:

    python benchmarks/trt_session.py reference CHECKPOINT -o expected.npz

To compare, on the machine with TensorRT; RUNNER is `libliger_run.so`, with the plugin beside it, and LIBRARIES are
directories for the loader, separated by colons:

    python benchmarks/trt_session.py run ARTIFACT --runner RUNNER --libraries LIBRARIES --expected expected.npz

The last line is JSON, and the exit code is 0 if everything is as expected.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

PROMPT, STEPS, EVERY = 200, 512, 32
"""Tokens that are read at once, tokens that are fed one by one, and the distance of those whose logits are compared."""
ROWS, MORE = (150, 71, 9), 8
"""Initial lengths of the sequences, and the number of tokens that all then run together."""
MOST_DIVERGENCE = 0.02
"""Largest divergence between torch's fp32 and the engine in 16 bits for the next token, in nats."""
MOST_ERROR = 0.05
"""Largest error of the state, relative to the largest element of a tensor."""
LEAST_ALIKE = 0.95
"""Smallest share of slots that hold the same token: nearly equal scores may be ranked either way in 16 bits."""


def reference(given: argparse.Namespace) -> int:
    """Write torch's results for a text in fp32: logits of prompt, steps and rows, and state; errors in fp16."""
    import torch

    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.checkpoint.convert import load_model
    from ligerexport.exporters.onnx.spec import read_spec
    from ligerexport.exporters.verify.verify import prompt_ids

    spec = read_spec(check_checkpoint(given.checkpoint, tokenizer=False))
    ids = np.resize(prompt_ids(spec), PROMPT + STEPS)
    made: dict[str, np.ndarray] = {"ids": ids} | slots_per_head(spec.mixers)
    half: dict[str, dict[str, np.ndarray]] = {}
    with torch.inference_mode():
        for dtype in (torch.float16, torch.float32):
            model = load_model(given.checkpoint, dtype=dtype).eval()
            first = model(torch.from_numpy(ids[None, :PROMPT]), use_cache=True)
            read = states(first.past_key_values)
            second = model(torch.from_numpy(ids[None, PROMPT:]), past_key_values=first.past_key_values, use_cache=True)
            kept = {"read": read, "end": states(second.past_key_values)}
            half = half or kept
        made["prompt"], made["steps"] = first.logits[0, -1].numpy(), second.logits[0, EVERY - 1 :: EVERY].numpy()
        rows = [model(torch.from_numpy(sequence(ids, row)[None])).logits[0, -1].numpy() for row in range(len(ROWS))]
    for when, tensors in kept.items():
        made |= {f"{when}.{name}": x for name, x in by_head(tensors, made).items()}
        errors = compare_state(half[when], made, when)["errors"]
        made |= {f"half.{when}.{kind}": np.array(x) for kind, x in errors.items()}
    np.savez(given.output, rows=np.stack(rows), **made)
    return 0


def states(cache: Any) -> dict[str, np.ndarray]:
    """Return the state of all layers by the graph's names."""
    return {
        f"past.{i}.{name}": x.numpy().copy() for i, layer in enumerate(cache.layers) for name, x in layer.state.items()
    }


def slots_per_head(mixers: Iterable[Any]) -> dict[str, np.ndarray]:
    """Return the number of slots of each KV head of ragged layers, by `sizes.LAYER`."""
    ragged = ((i, mixer) for i, mixer in enumerate(mixers) if mixer is not None and mixer.config.ragged)
    return {f"sizes.{i}": np.array(mixer.slots_per_head) for i, mixer in ragged}


def by_head(state: dict[str, np.ndarray], sizes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a state in which each KV head of a ragged layer is a layer with equal heads, `LAYERhHEAD`.

    Args:
        state: Tensors by name; four codes of 8 bits may be one integer.
        sizes: What `slots_per_head` returned, and anything else.
    """
    made = {}
    for name, tensor in state.items():
        base, _, kind = name.rpartition(".")
        counts = sizes.get(f"sizes.{base.rpartition('.')[2]}")
        if counts is None:
            made[name] = tensor
        elif kind in ("slot_key", "slot_value", "slot_position"):
            x = tensor
            if (scale := state.get(f"{name}_scale")) is not None:
                x = wide(x.view(np.int8)) * wide(scale)[..., None]
            for h, part in enumerate(np.split(x, np.cumsum(counts)[:-1], axis=1)):
                made[f"{base}h{h}.{kind}"] = part[:, None]
    return made


def sequence(ids: np.ndarray, row: int) -> np.ndarray:
    """Return a piece of the text for one row, with the tokens that follow it."""
    return ids[40 * row : 40 * row + ROWS[row] + MORE]


def run(given: argparse.Namespace) -> int:
    """Load the artifact and compare."""
    import ligerexport as lx

    os.environ["LIGEREXPORT_TRT_RUNNER"] = str(given.runner.resolve())
    expected = dict(np.load(given.expected))
    ids = expected["ids"]
    session: Any = lx.load(given.artifact, batch=len(ROWS) + 1)
    report: dict[str, Any] = {"engine": session.engine, "state_bytes": session.state_bytes}
    report["torch"] = against_torch(session.sibling(), expected)
    report["itself"] = {
        "cut": cut(session.sibling(), ids),
        "snapshot": snapshot(session.sibling(), ids),
        "siblings": siblings(session, ids),
    }
    report["rows"] = rows(session, expected)
    fine = [report["torch"]["fine"], *(x["fine"] for x in report["itself"].values()), report["rows"]["fine"]]
    report["fine"] = all(fine)
    print(json.dumps(report))
    return 0 if report["fine"] else 1


def against_torch(session: Any, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Read the prompt and step through the rest; compare logits and state."""
    ids = expected["ids"]
    logits = [divergence(expected["prompt"], session.prefill(ids[:PROMPT])[0])]
    read = compare_state(session.snapshot().tensors, expected, "read")
    times = []
    for t in range(PROMPT, len(ids)):
        begin = time.perf_counter()
        found = session.step(int(ids[t]))[0]
        times.append(time.perf_counter() - begin)
        if (t - PROMPT) % EVERY == EVERY - 1:
            logits.append(divergence(expected["steps"][(t - PROMPT) // EVERY], found))
    end = compare_state(session.snapshot().tensors, expected, "end")
    fine = max(logits) <= MOST_DIVERGENCE and read["fine"] and end["fine"] and session.position.tolist() == [len(ids)]
    return {
        "fine": fine, "largest_divergence": max(logits), "divergence_at_the_end": logits[-1],
        "state_after_prompt": read, "state_at_the_end": end, "step_ms_in_python": 1e3 * statistics.median(times),
    }  # fmt: skip


def compare_state(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], when: str) -> dict[str, Any]:
    """Compare the tokens in slots, the slots of equal tokens, and tensors without slots."""
    alike, of, errors = 0, 0, {}
    found = by_head(found, expected)
    for name, tensor in found.items():
        wanted, base = expected[f"{when}.{name}"], name.rpartition(".")[0]
        kind = name.rpartition(".")[2]
        ours, theirs = found[f"{base}.slot_position"], expected[f"{when}.{base}.slot_position"]
        if kind == "slot_position":
            of += wanted.size
            alike += int(sum(np.isin(a, b).sum() for a, b in zip(heads(tensor), heads(wanted), strict=True)))
        elif kind in ("slot_key", "slot_value"):
            pairs = zip(heads(tensor, 1), heads(wanted, 1), heads(ours), heads(theirs), strict=True)
            errors[kind] = max(errors.get(kind, 0.0), *(of_same(*pair) for pair in pairs))
        elif kind in ("recurrent_state", "recurrent_mass"):
            errors[kind] = max(errors.get(kind, 0.0), error(wide(tensor), wanted, wanted))
    fine = alike >= LEAST_ALIKE * of and all(x <= MOST_ERROR for x in errors.values())
    half = {kind: float(expected[key]) for kind in errors if (key := f"half.{when}.{kind}") in expected}
    return {"fine": bool(fine), "slots_alike": alike / max(of, 1), "errors": errors, "torch_in_half": half}


def heads(tensor: np.ndarray, inner: int = 0) -> Iterable[np.ndarray]:
    """Return the parts of each row and head, `[N]` or, with more axes, `[N, d]`."""
    return tensor.reshape(-1, *tensor.shape[tensor.ndim - 1 - inner :])


def of_same(found: np.ndarray, wanted: np.ndarray, ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the error of slots `[N, d]` of tokens that are in both, `ours` and `theirs` `[N]`; -1 is an empty slot."""
    both = np.intersect1d(ours[ours >= 0], theirs[theirs >= 0])
    if not len(both):
        return 0.0
    a, b = (x[[np.flatnonzero(y == token)[0] for token in both]] for x, y in ((found, ours), (wanted, theirs)))
    return error(wide(a), b, wanted)


def wide(tensor: np.ndarray) -> np.ndarray:
    """Return numbers as fp64, also from bits of bfloat16."""
    if tensor.dtype == np.uint16:
        tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
    return tensor.astype(np.float64)


def error(found: np.ndarray, wanted: np.ndarray, scale: np.ndarray) -> float:
    """Return the largest difference relative to the largest element of a tensor."""
    return float(np.abs(found - wanted).max() / max(1.0, float(np.abs(scale).max())))


def cut(session: Any, ids: np.ndarray) -> dict[str, Any]:
    """Read the same text in one call, in three, and token by token."""
    logits = []
    for cuts in ((), (1, 130), range(1, PROMPT)):
        session.reset()
        for part in np.split(ids[:PROMPT], cuts):
            found = session.step(int(part[0])) if len(part) == 1 else session.prefill(part)
        logits.append(found[0].copy())
    apart = [divergence(logits[0], x) for x in logits[1:]]
    return {"fine": max(apart) <= MOST_DIVERGENCE, "divergence": apart}


def snapshot(session: Any, ids: np.ndarray) -> dict[str, Any]:
    """Restore a snapshot in the session and in a sibling, and expect the same bits."""
    session.prefill(ids[:PROMPT])
    kept = session.snapshot()
    other = session.sibling()
    made = []
    for one in (session, session, other):
        one.restore(kept)
        made.append([one.step(int(token)).copy() for token in ids[PROMPT : PROMPT + MORE]])
    fine = all(np.array_equal(a, b) for x in made[1:] for a, b in zip(made[0], x, strict=True))
    return {"fine": fine, "position": other.position.tolist()}


def siblings(session: Any, ids: np.ndarray) -> dict[str, Any]:
    """Step two sessions in turns, and each by itself, and expect the same bits."""
    texts = ids[: 3 * MORE], ids[3 * MORE : 6 * MORE]
    alone = []
    for text in texts:
        one = session.sibling()
        alone.append(np.stack([one.step(int(token))[0].copy() for token in text]))
    pair = session.sibling(), session.sibling()
    turns = [[one.step(int(token))[0].copy() for one, token in zip(pair, tokens, strict=True)]
             for tokens in zip(*texts, strict=True)]  # fmt: skip
    fine = all(np.array_equal(np.stack([x[i] for x in turns]), alone[i]) for i in range(2))
    return {"fine": fine}


def rows(session: Any, expected: dict[str, np.ndarray]) -> dict[str, Any]:
    """Run sequences of different lengths together, beside an idle row, and compare each with torch's result alone."""
    ids, one = expected["ids"], session.sibling()
    for row, length in enumerate(ROWS):
        one.reset()
        one.prefill(sequence(ids, row)[:length])
        session.restore(one.snapshot(), row)
    for t in range(MORE):
        tokens = [int(sequence(ids, row)[length + t]) for row, length in enumerate(ROWS)]
        logits = session.step([*tokens, -1]).copy()
    apart = [divergence(wanted, found) for wanted, found in zip(expected["rows"], logits, strict=False)]
    position = session.position.tolist()
    session.reset(0)
    fine = max(apart) <= MOST_DIVERGENCE and position == [*(length + MORE for length in ROWS), 0]
    fine &= session.position.tolist() == [0, *position[1:]]
    session.reset()
    padding = [0, PROMPT - 30, 5, PROMPT - 1]
    logits = session.prefill(np.stack([ids[:PROMPT]] * 4), padding=padding).copy()
    padded = []
    for row, count in enumerate(padding):
        one.reset()
        padded.append(divergence(one.prefill(ids[count:PROMPT])[0], logits[row]))
    fine &= max(padded) <= MOST_DIVERGENCE
    return {"fine": bool(fine), "divergence": apart, "divergence_of_padded": padded, "position": position}


def divergence(wanted: np.ndarray, found: np.ndarray) -> float:
    """Return the Kullback-Leibler divergence of two distributions over tokens, in nats."""
    if not np.isfinite(found).all():
        return float("inf")
    a, b = (x.astype(np.float64) - x.max() for x in (wanted, found))
    a, b = (x - np.log(np.exp(x).sum()) for x in (a, b))
    return float((np.exp(a) * (a - b)).sum())


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("reference")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("-o", "--output", type=Path, required=True)
    one.set_defaults(run=reference)
    two = verbs.add_parser("run")
    two.add_argument("artifact", type=Path)
    two.add_argument("--runner", type=Path, required=True)
    two.add_argument("--expected", type=Path, required=True)
    two.add_argument("--libraries", default="")
    two.set_defaults(run=run)
    given = parser.parse_args()
    known = os.environ.get("LD_LIBRARY_PATH", "")
    wanted = getattr(given, "libraries", "")
    if not known.startswith(wanted):  # the loader reads it when a process begins
        os.environ["LD_LIBRARY_PATH"] = f"{wanted}:{known}" if known else wanted
        os.execv(sys.executable, [sys.executable, *sys.argv])
    return int(given.run(given))


if __name__ == "__main__":
    raise SystemExit(main())
