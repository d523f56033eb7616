"""The tables of small devices, of the server on one, and of guessed tokens, for `report.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[object]]]


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def _mb(count: float) -> str:
    return f"{count / 1e6:.0f} MB"


def goals() -> Table:
    """What a small device needs, beside what was aimed at."""
    install, arm, memory = map(_result, ("install", "arm", "device_memory"))
    size, cycles, programs = install["sizes"]["aarch64"], arm["cycles for 32 codes"], memory["programs"]
    least, held = install["least"]["aarch64"]["bytes"], sum(memory[name] for name in ("libraries", "weights", "state"))
    run = install["seconds"]["run"]
    rows: list[list[object]] = [
        ["packages that run an artifact, aarch64, on disk", "at most 150 MB",
         f"{_mb(size['bytes'])}, of which onnxruntime and tokenizers with what they ask for {_mb(least)}"],
        ["a process that writes one token, without a compiler", "under 1 s",
         f"{run['median']:.2f} s ({run['low']:.2f}-{run['high']:.2f})"],
        ["cycles for 32 codes of 4 and of 8 bits in blocks of 32 and 64, by llvm-mca", "at most 3.5 and 2.6",
         f"{cycles['4 bit, blocks of 32']:.1f} and {cycles['8 bit, blocks of 64']:.1f}"],
        ["peak memory in int4, the C++ program", "at most 180 MB", _mb(programs["cpp"]["peak"])],
        ["the same, `ligerexport run`", "at most 180 MB",
         f"{_mb(programs['python']['peak'])}, of which both libraries, weights and state {_mb(held)}"],
    ]  # fmt: skip
    if ratio := arm.get("native over ort"):
        found = f"{ratio['decode']:.2f} and {ratio['prompt']:.2f}"
        rows.insert(2, ["instructions of `native` over `ort`, a token and a prompt", "at most 0.8", found])
    return ["figure", "goal", "measured"], rows


def memory() -> Table:
    """Memory of each program, and the least limit under which it wrote the same text."""
    rows: list[list[object]] = []
    programs = {"python": "`ligerexport run`", "cpp": "`liger-run` in C++"}
    for model, result in (("SmolLM2-135M", "device_memory"), ("Qwen2.5-Coder-1.5B", "device_memory_1_5b")):
        for name, row in _result(result)["programs"].items():
            least = [limit for limit, said in row["limits"].items() if said == "the same text"][-1]
            limit = _mb(int(least.split()[0]) << 20)
            rows.append([model, programs[name], _mb(row["peak"]), _mb(row["private"]), limit])
    return ["model", "program", "peak", "cannot be dropped", "ran with only"], rows


def packages() -> Table:
    """The largest packages that are installed on aarch64."""
    largest = _result("install")["sizes"]["aarch64"]["largest"]
    return ["package", "on disk"], [[name.rpartition("-")[0], _mb(size)] for name, size in largest.items()]


def serve() -> Table:
    """What the server's engine takes."""
    data = _result("serve")
    turn, speed, stall = data["turn"], data["speed"], data["stall"]
    first = " / ".join(f"{turn[f'ms_{place}']['median']:.0f}" for place in ("memory", "disk", "restart"))
    gaps = " / ".join(f"{stall['gap_ms'][key]:.0f}" for key in ("median", "p99", "high"))
    chat = f"first token of a turn of {turn['new']} new tokens after {turn['history']:,}"
    streams = f"time between tokens of {stall['streams']} streams while {stall['tokens']:,} tokens are read"
    rows: list[list[object]] = [
        ["time per token of one client, relative to `lx.generate`", f"{speed['ratio']:.2f}"],
        [f"tokens per second of {speed['clients']} clients together", f"{speed['tokens_per_second_together']:.0f}"],
        [f"{chat}: state in memory / on the disk / after a restart", f"{first} ms"],
        [f"{streams}: median / 99th percentile / longest", f"{gaps} ms"],
    ]
    if chats := data.get("chats"):
        what = f"memory for the states of {chats['chats']:,} chats of up to {chats['tokens']:,} tokens"
        shared = f"of which {chats['sharing']} share the first {chats['tokens_of_beginning']:,}"
        sizes = " / ".join(f"{chats[key] / 1e9:.2f}" for key in ("bytes", "bytes_of_whole_states"))
        rows.append([f"{what}, {shared}: as differences / whole", f"{sizes} GB"])
        kept = f"{chats['chats_with_their_last_state']:,} of {chats['chats']:,}"
        rows.append(["chats of these that had their last state in memory", kept])
        alone = f"{chats['same']} of {chats['compared']}"
        rows.append(["answers of these that were those of a session alone", alone])
    peers = _result("serve_peers")
    chats = f"{peers['chats']} chats that ask at once, each after {peers['tokens']:,} tokens"
    speed, first = (
        " / ".join(f"{peers[row][name]:.0f}" for name in ("ours", "llama")) for row in ("tokens_per_second", "ms_held")
    )
    rows.append([f"tokens per second of {chats}: here / llama.cpp's server with Q4_1", speed])
    rows.append(["first token of one more turn in each of these: here / there", f"{first} ms"])
    gone = " / ".join(f"{peers['ms_evicted'][name]:,.0f}" for name in ("ours", "llama_cache", "llama"))
    where = "here from the disk, after a restart / there with its cache of prompts in memory / there without it"
    rows.append([f"the same for a chat that the server no longer holds: {where}", f"{gone} ms"])
    return ["figure", "measured"], rows


def speculation() -> Table:
    """Speed of answers with guessed tokens, over that without, by the kind of prompt."""
    data = _result("speculation")
    rows: list[list[object]] = []
    for kind, found in data["kinds"].items():
        answers = [row for row in data["rows"] if row["kind"] == kind]
        same = sum(row["same"] for row in answers)
        rows.append([kind, len(answers), f"{found['mean']:.2f}", f"{found['least']:.2f}", f"{same} of {len(answers)}"])
    return ["answers", "prompts", "speed, geometric mean", "the slowest", "the same text"], rows


def calls() -> Table:
    """What calls of several tokens cost, and taking them back."""
    rows: list[list[object]] = [
        [row["tokens"], f"{row['steps']:.2f}", f"{100 * row['back_of_step']:.1f} %"]
        for row in _result("speculation")["calls"]
    ]
    return ["tokens of a call", "its time in steps", "taking all back, of a step"], rows
