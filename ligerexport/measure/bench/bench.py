"""`bench`: check parity, then time two models at every context and batch, in turns and each in its own process.

Nothing is timed before the artifact's parity with torch is known.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import is_artifact, open_artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import UsageError, VerificationError
from ligerexport.measure.bench import genai, llama, machine
from ligerexport.measure.bench.settings import Settings
from ligerexport.measure.bench.worker import WARM, Worker
from ligerexport.threads import default_threads
from ligerexport.versions import require, versions

_BUSY = 0.1
"""Largest share of the cores that other processes may use without a warning."""
_APART = 0.2
"""Largest distance of the quartiles of a ratio, relative to its median, without a warning."""
PAUSE = 0.2
"""Seconds after each block: until then the idle threads of its engine may spin, and slow the next one down."""
FIRST_SECONDS, FIRST_TIMES = 2.0, 5
"""Limits in seconds and in number of readings; the time to first token is the median of the readings within both."""


def bench(
    model: str,
    against: str,
    *,
    checkpoint: str | None = None,
    settings: Settings | None = None,
    progress: ProgressFactory | None = None,
) -> dict[str, Any]:
    """Measure two models.

    Args:
        model: An artifact, a converted checkpoint, a Transformer (directory, hub id or built-in model), a GGUF file,
            which llama.cpp runs, or a directory that onnxruntime-genai runs.
        against: Another model with the same vocabulary.
        checkpoint: The converted checkpoint of an artifact, to compare the artifact with torch first.
        settings: The sweep.

    Returns:
        Plain data for JSON: `models`, `parity`, `machine`, `rows` (one for each model, batch and context); `ratios`,
        the first model's time per token divided by the second's in the same turn; `crossover`, the context from which
        the first model is faster or smaller; `warnings`, sentences about disturbances of the measurement.

    Raises:
        MissingDependency: A model needs a package that is not installed.
    """
    settings, progress = settings or Settings(), progress or silent
    programs = {llama.PACKAGE: llama.in_llama_cpp, genai.PACKAGE: genai.in_genai}
    peers = {name: package for package, runs in programs.items() for name in (model, against) if runs(name)}
    if llama.PACKAGE in peers.values():
        llama.check_llama_cpp()
    if peers:
        settings = replace(settings, device="cpu" if settings.device == "auto" else settings.device)
    if checkpoint or not all(name in peers or is_artifact(name) for name in (model, against)):
        require("build")
    threads = settings.threads or default_threads()
    settings = replace(settings, threads=threads)
    load = os.getloadavg()[0]  # before this process computes anything
    models = dict(zip(labels(model, against), (model, against), strict=True))
    parity = {
        name: gate(path, checkpoint or _of_same_conversion(path, against), progress)
        for name, path in models.items()
        if is_artifact(path)
    }
    meter, rows, ratios, rates = machine.Energy(), list[dict[str, Any]](), list[dict[str, Any]](), {}
    for batch in settings.batches:
        for context in sorted(settings.contexts):
            with progress(f"{context:,} tokens, batch {batch}", 2 * (settings.blocks + 2), "steps") as advance:
                point, ratio = _point(models, batch, context, settings, meter, advance)
                rows += point
                ratios.append({"batch": batch, "context": context} | ratio)
    for device in {row["device"] for row in rows}:
        rates[device] = machine.bandwidth(threads, device)
    for row in rows:
        rate = rates[row["device"]]
        row["floor_ms"] = (row["weight_bytes"] + row["state_bytes"]) / rate * 1e3 if rate else None
        row["of_floor"] = row["floor_ms"] / row["ms"] if rate else None
    return {
        "command": shlex.join(["ligerexport", *sys.argv[1:]]),
        "models": list(models),
        "parity": parity,
        "machine": machine.describe(threads) | {"bytes_per_s": rates, "energy": meter.source, "load": load},
        "warnings": disturbed(rows, threads, os.cpu_count() or 1, load) + disagreeing(ratios),
        "versions": {"python": platform.python_version()}
        | versions("torch", "transformers", "onnxruntime", *peers.values()),
        "settings": vars(settings),
        "rows": rows,
        "ratios": ratios,
        "crossover": {
            str(batch): {
                key: crossover([row for row in rows if row["batch"] == batch], list(models), key)
                for key in ("ms", "rss", "state_bytes")
            }
            for batch in settings.batches
        },
    }


def labels(model: str, against: str) -> tuple[str, str]:
    """Return short and distinct names of two models."""
    short = [Path(name).expanduser().name if Path(name).expanduser().exists() else name for name in (model, against)]
    first, second = short if short[0] != short[1] else (model, against)
    return first, second if second != first else f"{second} again"


def _of_same_conversion(artifact: str, model: str) -> str | None:
    """Return the model if it is a checkpoint with the conversion of an artifact."""
    config = Path(model).expanduser() / "config.json"
    if is_artifact(model) or not config.is_file():
        return None
    manifest = open_artifact(Path(artifact).expanduser(), hashes=False).manifest
    return model if json.loads(config.read_text()).get("liger") == manifest.liger else None


def gate(artifact: str, checkpoint: str | None = None, progress: ProgressFactory = silent) -> dict[str, Any]:
    """Return the evidence that an artifact computes what torch computes; all files are hashed for this.

    Args:
        checkpoint: Checkpoint of the artifact, to compare the two now; None reads the manifest.

    Returns:
        `by`, which names the evidence, and the numbers of the comparison.

    Raises:
        VerificationError: The two differ, or were never compared.
    """
    opened = open_artifact(Path(artifact).expanduser())
    if checkpoint:
        from ligerexport.exporters.onnx.graph import storage_of
        from ligerexport.exporters.onnx.spec import read_spec
        from ligerexport.exporters.onnx.weights import weight_bytes
        from ligerexport.exporters.verify.verify import verify_artifact

        found = opened.manifest
        storage = storage_of(found)
        spec = read_spec(Path(checkpoint).expanduser())
        if (expected := weight_bytes(spec, storage)) != found.bytes.weights:
            raise VerificationError(
                f"{artifact} has {found.bytes.weights} bytes of weights, and {checkpoint} would have {expected}",
                hint="an older version may have chosen other bits for int4: build it again, or leave --checkpoint out",
            )
        checked, _ = verify_artifact(spec, opened, storage, progress=progress)
        return {"by": f"torch, compared now with {checkpoint}"} | checked
    if not opened.manifest.verification.get("passed"):
        raise VerificationError(
            f"{artifact} was never compared with the torch model",
            hint="build it without verify=False, or give its converted checkpoint: --checkpoint DIRECTORY",
        )
    return {"by": "its manifest: compared with torch when it was built, and every file has its sha256"} | (
        opened.manifest.verification
    )


@dataclass
class _Turn:
    """One model at one point, and its measurements so far."""

    worker: Worker
    tokens: list[int]
    first: list[float]
    seconds: list[list[float]] = field(default_factory=list)
    joules: list[float] = field(default_factory=list)
    last: dict[str, Any] = field(default_factory=dict)


def _point(
    models: dict[str, str], batch: int, context: int, settings: Settings, meter: machine.Energy, advance: Any
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Measure both models at one context; return the row of each, and the ratio of their times."""
    length = max(context, WARM + 1) + (settings.blocks + 1) * settings.tokens
    with ExitStack() as stack:
        turns: dict[str, _Turn] = {}
        for name, model in models.items():
            options: dict[str, Any] = {"device": settings.device, "dtype": settings.dtype}
            if llama.in_llama_cpp(model):
                options = {"length": length}
            worker = Worker(model, batch=batch, threads=settings.threads, **options)
            stack.callback(worker.close)
            turns[name] = _Turn(worker, *_first(worker, batch, context, settings.read_up_to))
            advance(1)
        sizes = {turn.worker.facts["vocab_size"] for turn in turns.values()}
        if len(sizes) > 1:
            raise UsageError(f"the vocabularies have {' and '.join(map(str, sorted(sizes)))} tokens",
                             hint="compare a model with the Transformer that it was converted from")  # fmt: skip
        begin: dict[str, Any] = {}
        for block in range(settings.blocks + 1):
            if block == 1:
                begin = _effort(turns)
            for turn in turns.values():
                before = meter.read()
                turn.last = turn.worker("decode", tokens=turn.tokens, count=settings.tokens)
                spent = meter.since(before)
                time.sleep(PAUSE)
                if block:  # the first is a warm-up
                    turn.seconds.append(turn.last["seconds"])
                    turn.joules += [] if spent is None else [spent / settings.tokens / batch]
                turn.tokens = turn.last["tokens"][-1]
                advance(1)
        end, tokens = _effort(turns), settings.blocks * settings.tokens
        others = None
        if end["all"] is not None:
            others = max(0.0, end["all"] - begin["all"] - end["ours"] + begin["ours"]) / (end["at"] - begin["at"])
        rows = [
            _row(name, turn, batch, context)
            | {"others": others, "faults": (end["faults"][name] - begin["faults"][name]) / tokens}
            for name, turn in turns.items()
        ]
        return rows, ratio_of(*(turn.seconds for turn in turns.values()))


def ratio_of(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return the quartiles `low`, `median`, `high` of the first model's time over the second's in the same turn.

    Args:
        first: Seconds of each token, by turn.
        second: The same of the other model.
    """
    ratios = sorted(statistics.median(a) / statistics.median(b) for a, b in zip(first, second, strict=True))
    return {name: quantile(ratios, share) for name, share in (("low", 0.25), ("median", 0.5), ("high", 0.75))}


def _effort(turns: dict[str, _Turn]) -> dict[str, Any]:
    """Return the time, the CPU seconds of the machine and of this measurement, and each model's page faults."""
    ours = time.process_time() + sum(turn.last["cpu_s"] for turn in turns.values())
    faults = {name: turn.last["faults"] for name, turn in turns.items()}
    return {"at": time.perf_counter(), "all": machine.cpu_seconds(), "ours": ours, "faults": faults}


def disturbed(rows: Sequence[dict[str, Any]], threads: int, cores: int, load: float) -> list[str]:
    """Return warnings about other processes on the cores and models that waited for the disk: they distort the numbers.

    Args:
        rows: Results with the cores used by other processes (`others`, None if not known) and the major page faults per
            token (`faults`).
        threads: Number of threads of a model.
        cores: Number of cores of the machine.
        load: Load average of the machine before the measurement.
    """
    found = []
    busy = max(load if row["others"] is None else row["others"] for row in rows)
    if busy + threads > cores * (1 + _BUSY):
        found.append(f"other processes kept {busy:.1f} of {cores} cores busy, and the models have {threads} threads; "
                     "end them and measure again")  # fmt: skip
    for name in dict.fromkeys(row["model"] for row in rows):
        worst = max((row for row in rows if row["model"] == name), key=lambda row: row["faults"])
        if worst["faults"] >= 1:
            times, at = worst["faults"], worst["context"]
            found.append(f"{name} waited for the disk {times:,.0f} times per token at {at:,} tokens: "
                         "the two models do not fit into memory together")  # fmt: skip
    return found


def disagreeing(ratios: Sequence[dict[str, Any]]) -> list[str]:
    """Return warnings about points at which the turns differ too much for a conclusion."""
    return [
        f"the turns disagree at {row['context']:,} tokens, batch {row['batch']}: in half of them one model took "
        f"{row['low']:.2f} to {row['high']:.2f} times the other's time; give more --blocks, or more --tokens"
        for row in ratios
        if row["high"] - row["low"] > _APART * row["median"]
    ]


def prompt(context: int, vocab_size: int) -> list[int]:
    """Return ids that every tokenizer has; the time of a token does not depend on its id."""
    return [(7 * i) % max(1, min(vocab_size, 30_000) - 50) + min(50, vocab_size - 1) for i in range(context)]


def _first(worker: Worker, batch: int, context: int, read_up_to: int) -> tuple[list[int], list[float]]:
    """Give a worker its context; return the next ids and the seconds of each reading, none if a cache was filled."""
    ids = [prompt(context, worker.facts["vocab_size"])] * batch
    worker("warm")
    if worker.facts["fills"] and context > read_up_to:
        return worker("fill", tokens=context)["tokens"], []
    seconds: list[float] = []
    while not seconds or (sum(seconds) < FIRST_SECONDS and len(seconds) < FIRST_TIMES):
        worker("restart")
        answer = worker("prefill", ids=ids)
        seconds.append(answer["seconds"])
    return answer["tokens"], seconds


def _row(name: str, turn: _Turn, batch: int, context: int) -> dict[str, Any]:
    """Return one row of the result."""
    each = sorted(1e3 * x for block in turn.seconds for x in block)
    medians = [1e3 * statistics.median(block) for block in turn.seconds]
    facts, last = turn.worker.facts, turn.last
    return {
        "model": name,
        "kind": facts["kind"], "precision": facts["precision"], "device": facts["device"],
        "batch": batch, "context": context,
        "ttft_s": statistics.median(turn.first) if turn.first else None,
        "ms": statistics.median(medians), "ms_low": min(medians), "ms_high": max(medians),
        "ms_p50": quantile(each, 0.5), "ms_p95": quantile(each, 0.95),
        "tokens_per_s": batch * len(each) * 1e3 / sum(each),
        "state_bytes": last["state_bytes"], "weight_bytes": facts["weight_bytes"],
        "rss": last["rss"], "private": last["private"], "peak": last["peak"], "device_bytes": last["device"],
        "joules": statistics.median(turn.joules) if turn.joules else None,
    }  # fmt: skip


def quantile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest of the sorted values such that at least this share of them is not larger."""
    return ordered[max(0, -int(-share * len(ordered) // 1) - 1)]


def crossover(rows: Sequence[dict[str, Any]], names: Sequence[str], key: str) -> float | None:
    """Return the context from which the first model has less of `key`, interpolated linearly between contexts.

    The result is the first context if the model has less everywhere, and None if it does not have less at the last.
    """
    ours, theirs = ({row["context"]: row[key] for row in rows if row["model"] == name} for name in names)
    contexts = sorted(ours)
    lead = [theirs[context] - ours[context] for context in contexts]
    if lead[-1] <= 0:
        return None
    last = max((i for i, value in enumerate(lead) if value <= 0), default=-1)
    if last < 0:
        return float(contexts[0])
    share = -lead[last] / (lead[last + 1] - lead[last])
    return contexts[last] + share * (contexts[last + 1] - contexts[last])
