"""The engine of the server: stalls while a long prompt is read, the first token of a later turn, and bytes of chats.

    python benchmarks/serve.py ARTIFACT -o benchmarks/results/serve.json

`stall` streams some answers while another client sends a long prompt, and takes the times between tokens. `turn` asks a
chat with a long history again, with its state in memory, on the disk, and after a restart; the time ends with the first
token, and `ms_restore` and `ms_call` are what a session takes of it, in turns with the engine. `chats` opens many chats
of passages of text that share long beginnings, looks which of their states the memory still has, asks some of them
again, and compares some answers with those of a session that read the same text; `gaps` are how much the logits of two
tokens differ where the answers part. `speed` compares one client with `lx.generate`, and many clients with one.
`--only` measures some parts, and leaves the others of an earlier result as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import ligerexport as lx
from ligerexport.run.generate import text_model
from ligerexport.serve.engine import Engine
from ligerexport.serve.request import Finish, Request
from ligerexport.serve.store import digest

GIB = 1 << 30
SHARING = 50
"""Chats with the same beginning, such as a long system message."""
OWN = 20, 200
"""Smallest and largest number of tokens of a chat's own."""
WRITTEN = 20
"""Tokens of an answer."""
PAUSE = 0.3
"""Seconds between two turns: by then the state of the first one is on the disk."""


@dataclass
class Answer:
    """Tokens, the time of each in seconds since the request, and the end."""

    tokens: list[int]
    times: list[float]
    finish: Finish


async def ask(engine: Engine, prompt: list[int], tokens: int, until: asyncio.Event | None = None) -> Answer:
    """Return the answer to a prompt, which is cancelled when `until` is set."""
    clock = time.perf_counter()
    ticket = engine.submit(Request(tuple(prompt), max_tokens=tokens))
    answer, times = [], []
    async for item in ticket:
        if isinstance(item, Finish):
            return Answer(answer, times, item)
        answer.append(item.token)
        times.append(time.perf_counter() - clock)
        if until is not None and until.is_set():
            ticket.cancel()
    raise AssertionError("a ticket ends with a Finish")


def text(seed: int, tokens: int, vocabulary: int) -> list[int]:
    """Return random ids."""
    return np.random.default_rng(seed).integers(50, vocabulary - 50, tokens).tolist()


def spread(values: list[float], unit: float = 1e3) -> dict[str, float]:
    """Return median, smallest and largest value, in milliseconds."""
    return {"median": statistics.median(values) * unit, "low": min(values) * unit, "high": max(values) * unit}


def measure_stall(open_engine: Callable[..., Engine], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Stream answers, and measure the times between tokens before and while a long prompt is read."""
    engine = open_engine()

    async def run() -> tuple[list[Answer], Answer, float]:
        end = asyncio.Event()
        streams = [asyncio.create_task(ask(engine, text(i, 40, vocabulary), 1 << 20, end)) for i in range(args.streams)]
        await asyncio.sleep(3)
        clock = time.perf_counter()
        long = await ask(engine, text(99, args.long, vocabulary), 1)
        seconds = time.perf_counter() - clock
        end.set()
        return [await stream for stream in streams], long, seconds

    streams, _, seconds = asyncio.run(run())
    engine.close()
    before: list[float] = []
    during: list[float] = []
    for stream in streams:
        gaps = np.diff(stream.times)
        begins = stream.times[-1] - seconds
        for gap, at in zip(gaps.tolist(), stream.times[1:], strict=True):
            (during if at > begins else before if at > 1 else []).append(gap)
    return {
        "streams": args.streams, "tokens": args.long, "seconds": seconds,
        "gap_ms_before": spread(before), "gap_ms": spread(during) | {"p99": float(np.quantile(during, 0.99)) * 1e3},
    }  # fmt: skip


def measure_turn(open_engine: Callable[..., Engine], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Measure the time to the first token of a turn of 40 tokens after a long history, and what a session takes."""
    history, result = text(1, args.history, vocabulary), {"history": args.history, "new": 40}
    session = lx.load(args.artifact, threads=args.threads)
    session.prefill(history)
    before, parts = session.snapshot(), {"ms_restore": list[float](), "ms_call": list[float]()}
    with tempfile.TemporaryDirectory() as directory:
        for seed, (place, memory) in enumerate((("memory", 4 * GIB), ("disk", 0), ("restart", 4 * GIB)), 1):
            engine = open_engine(memory=memory, state_dir=Path(directory))
            if place == "memory":
                asyncio.run(ask(engine, history, 0))
            times = []
            for i in range(args.rounds if place != "restart" else 1):
                time.sleep(PAUSE)
                prompt = history + text(1000 * seed + i, 40, vocabulary)
                answer = asyncio.run(ask(engine, prompt, 1))
                assert answer.finish.cached_tokens == len(history), answer.finish
                times.append(answer.times[0])
                time.sleep(PAUSE)
                begin = time.perf_counter()
                session.restore(before)
                restored = time.perf_counter()
                session.prefill(prompt[-40:])
                parts["ms_restore"].append(restored - begin)
                parts["ms_call"].append(time.perf_counter() - restored)
            asyncio.run(engine.drain(60))
            engine.close()
            result[f"ms_{place}"] = spread(times)
    return result | {name: spread(times) for name, times in parts.items()}


def passages(artifact: str) -> Callable[[int], list[int]]:
    """Return a function that reads on in the passages of the texts that ship: so many ids, the same in each run."""
    found = "".join(file.read_text() for file in sorted(Path(lx.__file__).parent.glob("data/calibration/*.txt")))
    encode, parts, random = text_model(Path(artifact)).encode, found.split("\n\n"), np.random.default_rng(7)

    def read(tokens: int) -> list[int]:
        ids: list[int] = []
        while len(ids) < tokens:
            ids += encode(parts[random.integers(len(parts))] + "\n\n")
        return ids[:tokens]

    return read


def measure_chats(open_engine: Callable[..., Engine], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Open many chats and ask each tenth again; see which states are left, and compare some answers."""
    clock, read, random = time.perf_counter(), passages(args.artifact), np.random.default_rng(8)
    engine = open_engine(memory=args.memory, stall=9)  # nobody waits for a token
    begin = args.tokens - OWN[1]
    begins = [read(begin) for _ in range(0, args.chats, SHARING)]
    prompts = [begins[i // SHARING] + read(int(random.integers(*OWN))) for i in range(args.chats)]

    async def run(prompts: list[list[int]]) -> list[Answer]:
        gate = asyncio.Semaphore(64)

        async def one(prompt: list[int]) -> Answer:
            async with gate:
                return await ask(engine, prompt, WRITTEN)

        return await asyncio.gather(*map(one, prompts))

    answers = asyncio.run(run(prompts))
    seconds, stats, states = time.perf_counter() - clock, engine.stats(), engine.states()
    kept = {info.id for info in states}
    last = [digest(np.array(p + a.tokens[:-1])) for p, a in zip(prompts, answers, strict=True)]
    again = [p + a.tokens + [50] for p, a in zip(prompts, answers, strict=True)][:: max(1, args.chats // 100)]
    found = sum(a.finish.cached_tokens == len(p) - 2 for p, a in zip(again, asyncio.run(run(again)), strict=True))
    engine.close()
    checked = range(0, args.chats, max(1, args.chats // args.checked))
    gaps = differ(lx.load(args.artifact, threads=args.threads), begin, [(prompts[i], answers[i]) for i in checked])
    return {
        "chats": args.chats, "tokens": args.tokens, "tokens_of_beginning": begin, "sharing": SHARING,
        "seconds": seconds, "state_bytes": max(info.bytes for info in states), "states": len(states),
        "memory": args.memory, "bytes": stats["states_memory_bytes"],
        "bytes_of_whole_states": sum(info.bytes for info in states),
        "chats_with_their_last_state": sum(state in kept for state in last),
        "asked_again": len(again), "from_last_state": found,
        "compared": len(checked), "same": len(checked) - len(gaps), "gaps": gaps,
    }  # fmt: skip


def differ(session: lx.Session, begin: int, chats: list[tuple[list[int], Answer]]) -> list[float]:
    """Return by how much two logits differ where an answer parts from that of a session, for each that does."""
    gaps, seen, before = [], list[int](), session.snapshot()
    for prompt, answer in chats:
        if prompt[:begin] != seen:
            seen = prompt[:begin]
            session.reset()
            session.prefill(seen)
            before = session.snapshot()
        session.restore(before)
        alone = [x.token for x in lx.generate(session, prompt[begin:], max_new_tokens=WRITTEN, fresh=False)]
        pairs = zip(alone, answer.tokens, strict=False)  # a session ends with the text, and the engine does not
        if part := next((pair for pair in enumerate(pairs) if pair[1][0] != pair[1][1]), None):
            at, (own, other) = part
            session.restore(before)
            logits = session.prefill(prompt[begin:] + alone[:at])[0]
            gaps.append(float(logits[own] - logits[other]))
    return gaps


def measure_speed(open_engine: Callable[..., Engine], vocabulary: int, args: argparse.Namespace) -> dict[str, Any]:
    """Compare tokens per second of one client with `lx.generate`, and of many clients with one."""
    engine, session, prompt = open_engine(), lx.load(args.artifact, threads=args.threads), text(3, 64, vocabulary)
    own, one = [], []
    for i in range(args.rounds):
        summary = list(lx.generate(session, [*prompt, 50 + i], max_new_tokens=96))[-1].summary
        assert summary is not None and summary.tokens_per_second is not None
        own.append((summary.new_tokens - 1) / summary.tokens_per_second / (summary.new_tokens - 1))
        answer = asyncio.run(ask(engine, [*prompt, 50 + i], 96))
        one.append((answer.times[-1] - answer.times[0]) / (len(answer.times) - 1))

    async def many() -> float:
        clock = time.perf_counter()
        found = await asyncio.gather(*(ask(engine, [*prompt, 50, 50 + i], 96) for i in range(args.batch)))
        return sum(len(answer.tokens) for answer in found) / (time.perf_counter() - clock)

    together = asyncio.run(many())
    engine.close()
    ratio = statistics.median(a / b for a, b in zip(one, own, strict=True))
    return {
        "ms_per_token_generate": spread(own), "ms_per_token_engine": spread(one), "ratio": ratio,
        "clients": args.batch, "tokens_per_second_together": together,
    }  # fmt: skip


MEASURES = {"stall": measure_stall, "turn": measure_turn, "chats": measure_chats, "speed": measure_speed}


def main() -> None:
    """Measure one artifact."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", choices=MEASURES, nargs="+", default=list(MEASURES))
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--streams", type=int, default=4)
    parser.add_argument("--long", type=int, default=32_000)
    parser.add_argument("--history", type=int, default=8_000)
    parser.add_argument("--chats", type=int, default=1_000)
    parser.add_argument("--tokens", type=int, default=4_000)
    parser.add_argument("--memory", type=int, default=2_500_000_000)
    parser.add_argument("--checked", type=int, default=50)
    args = parser.parse_args()

    def open_engine(**settings: Any) -> Engine:
        return Engine(args.artifact, **({"max_batch": args.batch, "threads": args.threads, "queue": 4096} | settings))

    vocabulary = lx.load(args.artifact).artifact.manifest.model.vocab_size
    result = json.loads(args.output.read_text()) if args.output.exists() else {}
    result |= {
        "command": f"python benchmarks/serve.py ARTIFACT -o {args.output}, in parts with --only",
        "machine": {"cores": os.cpu_count(), "threads": args.threads},
        "versions": {name: version(name) for name in ("onnxruntime", "numpy", "safetensors")},
        "rounds": args.rounds,
    }
    for name in args.only:
        result[name] = MEASURES[name](open_engine, vocabulary, args)
        print(json.dumps({name: result[name]}), flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
