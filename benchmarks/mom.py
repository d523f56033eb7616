"""Train and judge Mixture-of-Memories beside GLA and beside one state of the same size, at once on one GPU.

    python benchmarks/mom.py smollm2-135m --chats train.jsonl --heldout-chats heldout.jsonl --text speeches/ -o mom.json

Each row is converted, recovered by the paper's recipe and evaluated as in `recovery.py`, in a process of its own.
`gla` is the preset `liger`, with one state of `[d_k, d_v]` per KV head. `mom` has the shared state and 4 memories, and
`mom, 0.01` the published factor of the loss that balances them. `one state` has as many numbers in its state as `mom`,
without a router: every token changes and reads all of it. Its further rows come from fixed random rotations of key and
query, so it needs no weights either.

`key_nll` is the NLL of the digits of a key that was said once, which shows more than the share of right digits. `mom`
also has the share of tokens that each memory of a head takes, from the most used one to the least, as means over heads
and layers.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from recovery import Row, judge, rendered, trained
from torch import Tensor

from ligerexport.checkpoint.convert import load_model
from ligerexport.checkpoint.sources import resolve
from ligerexport.console import say
from ligerexport.kernels import ops
from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.memories import choose
from ligerexport.measure.evaluate.recall import ONCE, PlainTokenizer, answer_all, passkey_prompts
from ligerexport.measure.opened import TorchModel
from ligerexport.model.config import LigerConfig
from ligerexport.model.gates import get_gate
from ligerexport.text.corpus import read_tokens, text_files
from ligerexport.text.tokenizer import TextModel
from ligerexport.train import loop, phases

MEMORIES = Row("mom", {}, "paper")
ROWS = {"gla": Row("liger", {}, "paper"), "mom": MEMORIES, "mom, 0.01": MEMORIES, "one state": MEMORIES}


@cache
def turns(count: int, width: int) -> Tensor:
    """Return the identity and fixed random rotations, `[count, width, width]`."""
    random = torch.randn(count - 1, width, width, generator=torch.Generator().manual_seed(0))
    return torch.cat([torch.eye(width)[None], torch.linalg.qr(random).Q])


def one_state(
    query: Tensor, key: Tensor, value: Tensor, padding: Tensor, state: Tensor, config: LigerConfig
) -> tuple[Tensor, Tensor]:
    """Do what `routed_recurrence` does without a router; the output is as large as with one."""
    heads, count = state.shape[1:3]
    turn = turns(count, key.shape[-1]).to(key)
    still = padding[..., None]
    read, state = linear_attention(
        torch.einsum("bthgc,mcd->bthmgd", query.unflatten(2, (heads, -1)), turn).flatten(2, 4),
        torch.where(still, get_gate(config.gate).open_key, torch.einsum("bthc,mcd->bthmd", key, turn)).flatten(2, 3),
        torch.where(still, 0.0, value[:, :, :, None].expand(-1, -1, -1, count, -1)).flatten(2, 3),
        gate=config.gate, initial_state=state.flatten(1, 2),
    )  # fmt: skip
    read = read.unflatten(2, (heads, count, -1)).to(state.dtype).sum(dim=3) * (2 / count)
    return read.flatten(2, 3), state.unflatten(1, (heads, count))


@contextmanager
def without_router() -> Iterator[None]:
    """Let the memories be one state, and leave their balance out of the loss."""
    before = ops.routed_recurrence, loop.balance
    ops.routed_recurrence, loop.balance = one_state, lambda student, batch: 0.0
    try:
        yield
    finally:
        ops.routed_recurrence, loop.balance = before


@torch.no_grad()
def used(model: Path, files: list[Path], length: int) -> list[float]:
    """Return the share of tokens that each memory takes, the most used one of each head first."""
    ids = TextModel(model).encode(rendered(model, files))[:length]
    student = load_model(model).train()  # in which mixers keep the logits of their routers
    student.model(input_ids=torch.tensor([ids]), use_cache=False)
    shares = []
    for layer in student.model.layers:
        chosen, _ = choose(layer.self_attn.routing, layer.self_attn.spec.config.active)
        shares.append(chosen[0, :, :, :-1].double().mean(dim=0).sort(dim=-1, descending=True).values)
    return torch.cat(shares).mean(dim=0).tolist()


def key_nll(model: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Return the NLL of keys by the number of tokens after them, in nats per token."""
    text, device = TextModel(model), "cuda" if torch.cuda.is_available() else "cpu"
    opened, prose = TorchModel(load_model(model).to(device).eval(), batch=args.batch), read_tokens(args.texts, text)
    prompts = {d: passkey_prompts(PlainTokenizer(text), prose, ONCE, d, 2 * args.trials) for d in (128, 512, 1024)}
    return {str(distance): asdict(answer_all(opened, made)[1]) for distance, made in prompts.items()}


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Return the tables of a row, and the cost of training."""
    routed = name != "one state"
    if name == "mom, 0.01":
        phases.BALANCE = 0.01  # a row has a process of its own
    with nullcontext() if routed else without_router(), tempfile.TemporaryDirectory() as place:
        model, found = trained(name, ROWS[name], args, Path(place))
        found |= judge(model, args) | {"key_nll": key_nll(model, args)}
        if routed and found["preset"] == "mom":
            found["used"] = used(model, args.heldout_chats, args.length)
    return found


def main() -> None:
    """Run the rows and write their results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chats", type=Path, nargs="+", required=True)
    parser.add_argument("--heldout-chats", type=Path, nargs="+", required=True)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2_000_000)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--row", choices=ROWS, help="only this row, in this process")
    parser.set_defaults(tasks=None, task_data=None, limit=None, calibrate=None, adapters=None)
    args = parser.parse_args()
    args.texts = text_files(args.text)
    if args.row:
        args.output.write_text(json.dumps(measure(args.row, args)))
        return
    model, start = str(resolve(args.model).path), time.perf_counter()  # fetched once for all rows
    given = [model if x == args.model else x for x in sys.argv[1:]]
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        outputs = {name: Path(place, f"{number}.json") for number, name in enumerate(ROWS)}
        running = {
            name: subprocess.Popen([sys.executable, __file__, *given, "--row", name, "-o", str(output)])
            for name, output in outputs.items()
        }
        for name, process in running.items():
            if process.wait() == 0:
                rows[name] = json.loads(outputs[name].read_text())
                result = {"command": "python " + " ".join(sys.argv), "machine": machine, "torch": torch.__version__,
                          "seconds": time.perf_counter() - start, "rows": rows}  # fmt: skip
                args.output.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in rows.items():
        say(f"{name}: {json.dumps(row['tables'])[:400]} {json.dumps(row['key_nll'])}")
    if failed := running.keys() - rows.keys():
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
