"""Measure how well a Transformer reads with the bounded caches of other methods, whose scores come from kvpress.

    python benchmarks/memory_peers_kvpress.py MODEL prompts.json -o kvpress.json      writes kvpress.0.json and so on

kvpress 0.5.5 needs transformers below 5.3, so this script has an environment of its own and imports nothing of
ligerexport. `memory_peers.py` writes the prompts and reads the results.

A context is read before its question is known. Question and answer are then read with what was kept of the context,
and the loss of the answer is measured in nats per token. A peer is one of three kinds:

- `prompt`: the context is read with full attention, and its cache is cut down once, at the end. The memory that is
  needed grows with the context. All budgets share one reading; what a head dropped is masked for the question.
- `stream`: the cache is cut down after every chunk, so that the memory is constant: the budget and one chunk.
- `exact`: every token sees the first tokens and the most recent ones, as many as the budget holds.

The budget is a number of tokens for each KV head, or their average where heads share. Its bytes are those of keys and
values alone, as numbers of 2 bytes, or of 1 with a scale of 2 bytes for each key and value. Question and answer come on
top of it. Nothing is rounded to 16 bits; in 8 bits, keys (with their rotation) and values are rounded as they are read.

H2O in a stream keeps the most recent tokens with half of its budget, and with the other half those that got the most
attention while they were kept; after a prompt it keeps those that got the most from each token that could see them.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peer_caches import CHUNK, PRESSES, SHARED, STREAMS, Budget, Item, Prompt, Reader, Scored, Stream
from transformers.utils.logging import disable_progress_bar

PROSE_FROM = 2048
"""Position from which the loss of prose counts."""

Found = Iterator[tuple[str, str, Budget, int, Scored]]
"""Peer, kind, budget, number of the prompt, and what was scored."""


def after_prompt(reader: Reader, prompts: list[Item], budgets: list[Budget]) -> Found:
    """Ask with what peers keep of a context that was read with full attention."""
    peers = ["StreamingLLM", *PRESSES, "H2O", *(f"AdaKV, {name}" for name in SHARED), "KVzip"]
    for i, prompt in enumerate(prompts):
        read = Prompt(reader, prompt["context"])
        for bits in (16, 8):
            rows = [(peer, budget) for peer in peers for budget in budgets if budget.bits == bits]
            rows.append(("Transformer", Budget(0, bits, 0)))
            for (peer, budget), scored in zip(rows, read.ask(prompt, rows, bits), strict=True):
                yield peer, "prompt", budget, i, scored


def in_stream(reader: Reader, prompts: list[Item], budgets: list[Budget]) -> Found:
    """Ask with what peers keep of contexts of equal length that were read in chunks."""
    ids = torch.tensor([prompt["context"] for prompt in prompts], device=reader.device)
    for budget in budgets:
        for peer in STREAMS:
            for _ in Stream(reader, peer, budget).read(ids):
                pass
            reader.bits = 16
            for i, scored in enumerate(reader.ask(ids.shape[1], prompts)):
                yield peer, "stream", budget, i, scored


def exact_window(reader: Reader, prompts: list[Item], budgets: list[Budget]) -> Found:
    """Ask with a window in which every token, of context, question and answer, sees as many as the budget holds."""
    ids = torch.tensor([prompt["context"] for prompt in prompts], device=reader.device)
    for budget in budgets:
        reader.stored, reader.bits, reader.window = {}, budget.bits, budget.tokens
        reader.read(ids)
        reader.stored, reader.bits = {i: new.recent(budget.tokens) for i, new in reader.new.items()}, 16
        for i, scored in enumerate(reader.ask(ids.shape[1], prompts)):
            yield "window with sinks", "exact", budget, i, scored
        reader.window = None


def prose(reader: Reader, texts: list[Item], budgets: list[Budget], kinds: list[str]) -> Found:
    """Measure the Transformer and the peers of constant memory on texts of equal length."""
    ids = torch.tensor([text["ids"] for text in texts], device=reader.device)
    runs = [("Transformer", "prompt", Budget(0, 16, 0))]
    for budget in budgets:
        runs += [(peer, "stream", budget) for peer in STREAMS if "stream" in kinds]
        runs += [("window with sinks", "exact", budget)] if "exact" in kinds else []
    for peer, kind, budget in runs:
        reader.stored, reader.bits = {}, budget.bits
        reader.window = budget.tokens if kind == "exact" else None
        if kind == "stream":
            hidden = torch.cat(list(Stream(reader, peer, budget).read(ids)), 1)
        else:
            hidden = torch.cat([reader.read(row) for row in ids.split(1)])
        reader.window = None
        for i, (one, text) in enumerate(zip(hidden, texts, strict=True)):
            yield peer, kind, budget, i, reader.score(one[PROSE_FROM - 1 :], text["ids"][PROSE_FROM:])


KINDS = {"prompt": after_prompt, "stream": in_stream, "exact": exact_window}


def units(parts: dict[str, list[Item]], batch: int) -> list[tuple[str, list[int]]]:
    """Return batches of prompts whose contexts are equally long, so that all parts advance evenly."""
    found: list[tuple[float, str, list[int]]] = []
    for part, prompts in parts.items():
        lengths: dict[int, list[int]] = {}
        for i, prompt in enumerate(prompts):
            lengths.setdefault(len(prompt.get("context", prompt.get("ids"))), []).append(i)
        batches = [same[i : i + batch] for same in lengths.values() for i in range(0, len(same), batch)]
        found += [(i / len(batches), part, numbers) for i, numbers in enumerate(batches)]
    return [(part, numbers) for _, part, numbers in sorted(found)]


@torch.no_grad()
def measure(args: argparse.Namespace, share: int) -> None:
    """Measure every n-th batch, from number `share` on, until the time is up; write what was found after each."""
    end = time.monotonic() + 60 * args.minutes
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high" if args.tf32 else "highest")
    logging.getLogger("kvpress").setLevel(logging.ERROR)
    disable_progress_bar()
    reader = Reader(args.model, args.device, args.dtype)
    sizes = [(1e6 * mb, bits) for mb in args.megabytes for bits in (16, 8)]
    budgets = [Budget(int(total), bits, int(total / reader.token_bytes(bits))) for total, bits in sizes]
    budgets += [Budget(count * reader.token_bytes(16), 16, count) for count in args.tokens]
    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "chunk": CHUNK}
    result |= {name: version(name) for name in ("torch", "transformers", "kvpress")}
    result["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    parts = json.loads(args.prompts.read_text())["parts"]
    rows: dict[Any, dict[str, Any]] = {}
    asked = {
        (row["part"], int(i))
        for path in args.skip
        for row in json.loads(path.read_text())["rows"]
        for i in row["found"]
    }
    left = [(part, numbers) for part, numbers in units(parts, args.batch) if (part, numbers[0]) not in asked]
    for part, numbers in left[share :: args.workers]:
        if time.monotonic() > end:
            break
        reader.writes = args.write if part.startswith("reading") else 0
        items, begun = [parts[part][i] for i in numbers], time.monotonic()
        if part.startswith("prose"):
            found = [prose(reader, items, budgets, args.kinds)]
        elif part.startswith("floor"):  # what is guessed without any memory of it
            found = [after_prompt(reader, items, [])]
        else:
            found = [KINDS[kind](reader, items, budgets) for kind in args.kinds]
        for peer, kind, budget, i, scored in (one for some in found for one in some):
            row = {"peer": peer, "kind": kind, **vars(budget), "part": part, "found": {}}
            rows.setdefault((peer, kind, budget, part), row)["found"][numbers[i]] = scored
        args.output.with_suffix(f".{share}.json").write_text(json.dumps(result | {"rows": list(rows.values())}) + "\n")
        print(f"{part}: {len(items)} in {time.monotonic() - begun:.1f} s", flush=True)


def main() -> None:
    """Measure in several processes, each of which writes a file of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("prompts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tf32", action="store_true", help="multiply in TensorFloat-32")
    parser.add_argument("--megabytes", type=float, nargs="*", default=[2, 4, 8, 24])
    parser.add_argument("--tokens", type=int, nargs="*", default=[], help="further budgets, in tokens for each head")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--batch", type=int, default=16, help="prompts that a stream reads together")
    parser.add_argument("--skip", type=Path, nargs="*", default=[], help="earlier results; their prompts are left out")
    parser.add_argument("--write", type=int, default=0, help="tokens of a written answer; 0 writes none")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the device")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=60, help="time after which no further batch is begun")
    args = parser.parse_args()
    with ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn")) as pool:
        list(pool.map(measure, [args] * args.workers, range(args.workers)))


if __name__ == "__main__":
    main()
