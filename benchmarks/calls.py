"""Time of a call of a few tokens, for several libraries of the lowering `native`, in turns.

    python benchmarks/calls.py ARTIFACT --library old=OLD.so new=NEW.so -o benchmarks/results/calls.json

`ligerexport native -o DIRECTORY` writes a library. Each library at each context has its own process. A turn asks
every process for one call of every length, from the same state; the length 1 is a step. `against_first` divides a time
by that of the first library for the same call in the same turn, and `steps` by that of the same library's step in the
same turn: quartiles of all turns. On a machine that other programs share, `--clock cpu` with one thread counts only the
time that a process itself ran.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from decode import CLOCK, CLOCKS, prompt, ratios

from ligerexport.exporters.onnx.native import VARIABLE
from ligerexport.measure.bench.machine import cpu_name


def work(path: str, context: int, threads: int) -> None:
    """Answer on stdout: for each line `n` on stdin, the milliseconds of a call of n tokens after the context."""
    import ligerexport as lx

    session = lx.load(path, threads=threads)
    session.prefill(prompt(64))  # the first call allocates
    session.reset()
    if context:
        session.prefill(prompt(context))
    before = session.snapshot()
    print("ready", flush=True)
    for line in sys.stdin:
        ids = prompt(int(line))
        session.restore(before)
        begin = CLOCK()
        session.step(ids[0]) if len(ids) == 1 else session.prefill(ids)
        print((CLOCK() - begin) * 1e3, flush=True)


class Worker:
    """A process for a library and a context."""

    def __init__(self, library: str, path: str, context: int, threads: int) -> None:
        command = [sys.executable, __file__, "--work", path, str(context), str(threads)]
        self.process = subprocess.Popen(
            command, env=os.environ | {VARIABLE: library}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._answer()

    def time(self, tokens: int) -> float:
        """Return the milliseconds of a call."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{tokens}\n")
        self.process.stdin.flush()
        return float(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise ChildProcessError(f"a worker ended with {self.process.wait()}")
        return line


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--library", nargs="+", required=True, help="NAME=FILE")
    parser.add_argument("--contexts", type=int, nargs="+", default=[0, 2000])
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8, 16, 40, 64])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("-o", "--output", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    """Measure and write the table."""
    if sys.argv[1:2] == ["--work"]:
        return work(sys.argv[2], *map(int, sys.argv[3:]))
    args = parse_arguments()
    os.environ["DECODE_CLOCK"] = args.clock  # of the workers
    libraries = dict(pair.split("=", 1) for pair in args.library)
    workers = {
        (name, context): Worker(file, args.artifact, context, args.threads)
        for name, file in libraries.items()
        for context in args.contexts
    }
    times: dict[tuple[str, int, int], list[float]] = {}
    for turn in range(args.rounds + 1):
        for tokens in args.tokens:
            for (name, context), worker in workers.items():
                spent = worker.time(tokens)
                if turn:  # the first is a warm-up
                    times.setdefault((name, context, tokens), []).append(spent)
    for worker in workers.values():
        worker.process.kill()
    rows: list[dict[str, Any]] = [
        {
            "library": name, "context": context, "tokens": tokens,
            "ms": statistics.median(own), "ms_low": min(own), "ms_high": max(own),
            "against_first": ratios(own, times[next(iter(libraries)), context, tokens]),
            "steps": ratios(own, times.get((name, context, 1))),
        }
        for (name, context, tokens), own in times.items()
    ]  # fmt: skip
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads},
        "clock": args.clock,
        "rounds": args.rounds,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        time_ms = "{ms:.2f} ms ({ms_low:.2f} to {ms_high:.2f})".format(**row)
        print(row["library"], row["context"], row["tokens"], time_ms, f"{row['against_first'][1]:.2f}")


if __name__ == "__main__":
    main()
