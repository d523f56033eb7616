"""Many sessions on one loaded model, in threads and processes, each of which must write the same text as alone.

    python tests/trust/concurrency.py ARTIFACT -o benchmarks/results/concurrency.json

Sessions wait in one queue. A thread takes the first, lets it write a token and puts it back, so that a session moves
from thread to thread and all are at different positions. Their tokens and the bits of their last states are compared
with those of the same texts written one after the other by a single session; a difference stops the run.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import platform
import signal
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx
from ligerexport.errors import LigerError
from ligerexport.measure.bench.machine import cpu_name, memory
from ligerexport.run.runtime import Session
from ligerexport.run.sampling import Sampler

SESSIONS, THREADS, PROCESSES = (1, 16, 64), (1, 2, 4, 16), (1, 2, 4)
Text = tuple[tuple[int, ...], str]
"""The tokens, and the sha256 of the state after them."""


def write(session: Session, seed: int, tokens: int) -> Iterator[Text | None]:
    """Write a different text for each seed; yield None after each token and the text at the end."""
    vocabulary, sampler = session.artifact.manifest.model.vocab_size, Sampler(temperature=1.0, seed=seed)
    session.reset()
    logits = session.prefill(np.random.default_rng(seed).integers(0, vocabulary, 3 + seed % 29))
    text = []
    for _ in range(tokens):
        text.append(sampler(logits[0]))
        logits = session.step(text[-1])
        yield None
    digest = hashlib.sha256()
    for tensor in session.snapshot().tensors.values():
        digest.update(tensor.tobytes())
    yield tuple(text), digest.hexdigest()


def alone(session: Session, seeds: range, tokens: int) -> list[Text]:
    """Return the texts, written one after the other."""
    return [text for seed in seeds for text in write(session, seed, tokens) if text is not None]


def together(model: Session, seeds: range, tokens: int, threads: int) -> tuple[list[Text], float]:
    """Return the texts, each written by a sibling of `model`, and the seconds until all were done."""
    waiting = deque((seed, write(model.sibling(), seed, tokens)) for seed in seeds)
    found: dict[int, Text] = {}
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while len(found) < len(seeds) and not errors:
                try:
                    seed, writer = waiting.popleft()
                except IndexError:  # fewer sessions than threads
                    time.sleep(1e-3)
                    continue
                text = next(writer)
                if text is None:
                    waiting.append((seed, writer))
                else:
                    found[seed] = text
        except BaseException as error:
            errors.append(error)

    pool = [threading.Thread(target=work) for _ in range(threads)]
    begin = time.perf_counter()
    for thread in pool:
        thread.start()
    for thread in pool:
        thread.join()
    seconds = time.perf_counter() - begin
    if errors:
        raise errors[0]
    return [found[seed] for seed in seeds], seconds


def _process(path: str, seeds: range, tokens: int, answers: Any) -> None:
    answers.put((seeds.start, together(lx.load(path, threads=1, hashes=False), seeds, tokens, threads=2)))


def processes(path: str, method: str, count: int, seeds: range, tokens: int) -> tuple[list[Text], float]:
    """Return the texts, written in processes that load the model themselves, and the seconds of the slowest."""
    context = multiprocessing.get_context(method)
    answers = context.SimpleQueue()
    shares = [seeds[i : i + len(seeds) // count] for i in range(0, len(seeds), len(seeds) // count)]
    started = [context.Process(target=_process, args=(path, share, tokens, answers)) for share in shares]
    for process in started:
        process.start()
    results = dict(answers.get() for _ in shares)
    for process in started:
        process.join()
    return [text for share in shares for text in results[share.start][0]], max(x for _, x in results.values())


def _step(session: Session, answers: Any) -> None:
    try:
        session.step(1)
        answers.put("went on")
    except LigerError as error:
        answers.put(error.message)


def inherited(session: Session) -> str:
    """Return what a session reports in a process that was forked after it was loaded, which must end too."""
    context = multiprocessing.get_context("fork")
    answers = context.SimpleQueue()
    child = context.Process(target=_step, args=(session, answers))
    child.start()
    child.join(300)
    if child.exitcode is None:
        child.kill()
        return "hangs"
    return answers.get() if child.exitcode == 0 else f"ended with {child.exitcode}"


def interrupt(session: Session, times: int, tokens: int) -> dict[str, int]:
    """Interrupt a session at random moments, as Ctrl-C does, and check that it continues correctly or refuses.

    Raises:
        ValueError: It continues with wrong results.
    """
    random = np.random.default_rng(0)
    ids = random.integers(0, session.artifact.manifest.model.vocab_size, tokens)
    session.reset()
    begin = time.perf_counter()
    expected = [session.step(int(token)).copy() for token in ids]
    longest, counts = time.perf_counter() - begin, {"went on": 0, "refused": 0}
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        while sum(counts.values()) < times:
            session.reset()
            try:
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, longest / 2))
                for token in ids[:-1]:
                    session.step(int(token))
                signal.setitimer(signal.ITIMER_REAL, 0)
                continue
            except KeyboardInterrupt:
                pass
            seen = int(session.position[0])
            try:
                logits = session.step(int(ids[seen]))
            except LigerError:
                counts["refused"] += 1
                continue
            if not np.array_equal(logits, expected[seen]):
                raise ValueError(f"interrupted after {seen} tokens, it goes on with other logits")
            counts["went on"] += 1
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    return counts


def main() -> None:
    """Measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of each text")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    everyone = range(max(SESSIONS))
    model = lx.load(args.artifact, threads=1)
    expected = alone(model, everyone, args.tokens)
    loaded = memory()["rss"]
    crowd = [model.sibling() for _ in everyone]
    for session in crowd:
        session.step(0)
    siblings = (memory()["rss"] - loaded) / len(crowd)
    del crowd
    table = []

    def add(kind: str, sessions: int, runs: list[tuple[list[Text], float]], **more: int) -> None:
        if any(texts != expected[:sessions] for texts, _ in runs):
            raise SystemExit(f"{kind}, {more}: a text of {sessions} sessions differs from the one written alone")
        rates = [sessions * args.tokens / seconds for _, seconds in runs]
        row = {"in": kind, **more, "sessions": sessions, "tokens_per_s": round(statistics.median(rates), 1)}
        row |= {"low": round(min(rates), 1), "high": round(max(rates), 1)}
        print(json.dumps(row), file=sys.stderr, flush=True)
        table.append(row)

    for sessions in SESSIONS:
        for threads in THREADS:
            runs = [together(model, everyone[:sessions], args.tokens, threads) for _ in range(args.rounds)]
            add("threads", sessions, runs, threads=threads)
    for method in ("spawn", "fork"):
        for count in PROCESSES:
            runs = [processes(args.artifact, method, count, everyone, args.tokens)]
            add(f"processes by {method}", len(everyone), runs, processes=count, threads=2)
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "load": os.getloadavg()[0]},
        "versions": {"python": platform.python_version(), "onnxruntime": version("onnxruntime")},
        "tokens_a_text": args.tokens, "threads_of_an_operator": 1, "bytes_a_session": round(siblings),
        "forked_after_loading": inherited(model), "interrupted": interrupt(model, 200, 8), "rows": table,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
