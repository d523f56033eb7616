"""Time and memory of one decoded token by length of the context, for an artifact and the original Transformer.

    python benchmarks/decode.py ARTIFACT MODEL -o benchmarks/results/decode.json
    python benchmarks/decode.py ARTIFACT Q4.gguf --engines ligerexport llama.cpp --also "llama.cpp Q8_0=Q8.gguf" \
        "onnxruntime-genai int4=DIRECTORY" "transformers sdpa=MODEL" -o benchmarks/results/peers.json
    python benchmarks/decode.py MEMORY Q4.gguf --engines ligerexport --also "ligerexport recall, 8 MB=RECALL" \
        --clock cpu --threads 1 -o benchmarks/results/recall_decode.json

Every engine at every context has its own process. They are timed in turns, a block of tokens each, so that all see
the same machine. The Transformer's cache is filled with random keys and values of the right shape (its time does not
depend on their values, and a prompt of 32,768 tokens takes hours on two cores). The artifact, llama.cpp (package
llama-cpp-python) and onnxruntime-genai (a directory of its builder) read real tokens, one engine at a time, and the
table includes their time for that. An engine whose process fails, such as beyond its trained length, is left out.

`against_first` and `growth` divide each block by that of the first engine at the same context, and by that of the same
engine at the first context, in the same turn: their medians and quartiles. On a machine that other programs share,
`--clock cpu` with one thread counts only the time that a worker itself ran.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ligerexport.measure.bench.bench import PAUSE
from ligerexport.measure.bench.machine import cpu_name, memory

CONTEXTS = (128, 1024, 8192, 32768)
ENGINES = ("ligerexport", "transformers eager", "transformers sdpa", "llama.cpp", "onnxruntime-genai")
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
ROOM = 192
"""Tokens that peers can store beyond the context; 8,000 plus these fit a model trained on 8,192 tokens."""

CLOCK = CLOCKS[os.environ.get("DECODE_CLOCK", "wall")]


def prompt(tokens: int) -> list[int]:
    """Return ids that every engine has in its vocabulary."""
    return [(7 * i) % 30_000 + 50 for i in range(tokens)]


class Artifact:
    """An artifact that has read `context` tokens."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        import ligerexport as lx

        self.session = lx.load(path, threads=threads)
        self.session.prefill(prompt(32))  # the first call allocates
        self.session.reset()
        begin = CLOCK()
        self.session.prefill(prompt(context))
        self.read = CLOCK() - begin

    def step(self) -> None:
        """Decode one token."""
        logits = self.session.step(11)
        assert logits.shape[0] == 1


class Transformer:
    """The original model in transformers with a cache of `context` tokens."""

    def __init__(self, path: str, context: int, threads: int, attention: str) -> None:
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache

        from ligerexport.model.families import head_dim

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=attention)
        config = self.model.config
        self.cache, self.context = DynamicCache(config=config), context
        for layer in range(config.num_hidden_layers):
            shape = (1, config.num_key_value_heads, context, head_dim(config))
            self.cache.update(torch.randn(shape), torch.randn(shape), layer)
        self.token = torch.tensor([[11]])

    def step(self) -> None:
        """Decode one token; the cache grows by it."""
        self.model(self.token, past_key_values=self.cache, use_cache=True)


class Llama:
    """The original model in llama.cpp, which has read `context` tokens; its cache is fp16."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        from llama_cpp import Llama as Model

        self.model = Model(path, n_ctx=context + ROOM, n_threads=threads, n_threads_batch=threads, verbose=False)
        self.model.eval(prompt(32))
        self.model.reset()
        begin = CLOCK()
        self.model.eval(prompt(context))
        self.read = CLOCK() - begin

    def step(self) -> None:
        """Decode one token; the cache grows by it."""
        self.model.eval([11])


class GenAI:
    """The original model in onnxruntime-genai, which has read `context` tokens."""

    def __init__(self, path: str, context: int, threads: int) -> None:
        import onnxruntime_genai as og

        config = og.Config(path)
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        model = og.Model(config)
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=context + ROOM)
        warm = og.Generator(model, parameters)
        warm.append_tokens(prompt(32))
        self.generator = og.Generator(model, parameters)
        begin = CLOCK()
        self.generator.append_tokens(prompt(context))
        self.generator.get_logits()
        self.read = CLOCK() - begin

    def step(self) -> None:
        """Decode one token; the cache grows by it."""
        self.generator.append_tokens([11])
        self.generator.get_logits()


READERS = {"ligerexport": Artifact, "llama.cpp": Llama, "onnxruntime-genai": GenAI}


def work(engine: str, path: str, context: int, threads: int) -> None:
    """Answer on stdout: for each line `n` on stdin, the milliseconds of n tokens, then memory."""
    runner: Any
    kind, *rest = engine.split()
    if kind in READERS:
        runner = READERS[kind](path, context, threads)
    else:
        runner = Transformer(path, context, threads, attention=rest[0])
    runner.step()
    print(json.dumps(getattr(runner, "read", None)), flush=True)
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            begin = CLOCK()
            runner.step()
            times.append((CLOCK() - begin) * 1e3)
        print(json.dumps({"ms": times, **memory()}), flush=True)


def spawn(engine: str, path: str, context: int, threads: int) -> tuple[subprocess.Popen[str], float | None]:
    """Start a worker and wait until it is ready; return it and the seconds that it took to read the context.

    Raises:
        ChildProcessError: The process has ended.
    """
    command = [sys.executable, __file__, "--work", engine, path, str(context), str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    answer = process.stdout.readline()
    if not answer:
        raise ChildProcessError(f"{engine} at {context} ended with {process.wait()}")
    return process, json.loads(answer)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("model")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=8, help="tokens per block")
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--contexts", type=int, nargs="*", default=CONTEXTS)
    parser.add_argument("--engines", nargs="*", choices=ENGINES, default=ENGINES[:3])
    parser.add_argument(
        "--also", nargs="*", default=[], help="ENGINE=PATH; text after the engine's name distinguishes several"
    )
    args = parser.parse_args()
    if (args.rounds + 1) * args.tokens >= ROOM:
        parser.error(f"rounds and tokens make {(args.rounds + 1) * args.tokens} tokens, at most {ROOM - 1} have room")
    return args


def time_in_turns(
    workers: dict[tuple[str, int], subprocess.Popen[str]], rounds: int, tokens: int
) -> tuple[dict[tuple[str, int], list[float]], dict[tuple[str, int], dict[str, Any]]]:
    """Return the median times of each worker's blocks after a warm-up, and the last answer of each."""
    samples: dict[tuple[str, int], list[float]] = {key: [] for key in workers}
    last: dict[tuple[str, int], dict[str, Any]] = {}
    for turn in range(rounds + 1):
        for key, process in workers.items():
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(f"{tokens}\n")
            process.stdin.flush()
            last[key] = json.loads(process.stdout.readline())
            time.sleep(PAUSE)
            if turn:  # the first is a warm-up
                samples[key].append(statistics.median(last[key]["ms"]))
    return samples, last


def ratios(blocks: list[float], others: list[float] | None) -> list[float] | None:
    """Return the first quartile, median and third quartile of the blocks of two workers divided turn by turn."""
    return others and statistics.quantiles([a / b for a, b in zip(blocks, others, strict=True)], n=4)


def main() -> None:
    """Measure and write the table."""
    if sys.argv[1:2] == ["--work"]:
        engine, path, context, threads = sys.argv[2:]
        return work(engine, path, int(context), int(threads))
    args = parse_arguments()
    os.environ["DECODE_CLOCK"] = args.clock  # of the workers
    paths = {engine: args.artifact if engine == "ligerexport" else args.model for engine in args.engines}
    paths |= dict(engine.split("=", 1) for engine in args.also)
    workers, seconds = {}, {}
    for context in args.contexts:
        for engine, path in paths.items():
            try:
                workers[engine, context], seconds[engine, context] = spawn(engine, path, context, args.threads)
            except ChildProcessError as error:
                print(f"left out: {error}", file=sys.stderr, flush=True)
            else:
                print(f"ready: {engine} at {context}", file=sys.stderr, flush=True)
    samples, last = time_in_turns(workers, args.rounds, args.tokens)
    for process in workers.values():
        process.kill()
    rows = []
    for (engine, context), medians in samples.items():
        row = {"engine": engine, "context": context, "ms_per_token": statistics.median(medians)}
        row |= {"ms_low": min(medians), "ms_high": max(medians), "rss": last[engine, context]["rss"]}
        read = seconds[engine, context]
        row |= {"peak": last[engine, context]["peak"], "prefill_tokens_per_s": read and context / read}
        row["against_first"] = ratios(medians, samples.get((next(iter(paths)), context)))
        row["growth"] = ratios(medians, samples.get((engine, args.contexts[0])))
        rows.append(row)
    optional = {"llama.cpp": "llama-cpp-python", "onnxruntime-genai": "onnxruntime-genai"}
    packages = [
        "torch",
        "transformers",
        "onnxruntime",
        *{optional[x] for p in paths if (x := p.split()[0]) in optional},
    ]
    versions = {name: version(name) for name in packages}
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": args.threads},
        "versions": versions | {"python": platform.python_version()},
        "clock": args.clock,
        "blocks": args.rounds,
        "tokens_a_block": args.tokens,
        "rows": rows,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        time_ms = "{ms_per_token:8.2f} ms ({ms_low:.2f} to {ms_high:.2f})".format(**row)
        compared = " ".join(f"{name} {row[name][1]:.2f}" for name in ("against_first", "growth") if row[name])
        print(f"{row['engine']:20s} {row['context']:6d} {time_ms} {row['rss'] / 1e6:8.0f} MB {compared}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
