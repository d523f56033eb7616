"""One token of layers whose KV heads have memories of their own sizes, against equal heads and the floor of memory.

python benchmarks/ragged_step.py -o benchmarks/results/ragged_step.json [--blocks 64 128 256]

Every step of a CUDA graph takes another state, so that the cache does not hold it. `floor` is the time in which the
bytes of the state are read at the bandwidth of a copy.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton
from fused_step import DEVICE, DTYPE, bench, filled, gate, inputs, layer, replayed, rotary

from ligerexport.kernels.fused.mixer_step import mixer_step
from ligerexport.kernels.fused.ragged_step import choose_block, ragged_step
from ligerexport.kernels.ops import liger_mixer
from ligerexport.model.config import PRESETS
from ligerexport.model.state import MixerSpec

SEEN = 5000
SHAPES: dict[str, tuple[tuple[int, int, int], tuple[str, ...]]] = {
    "SmolLM2-135M": ((9, 3, 64), ("16 64 256+384", "64+128 256+512 512+1024", "16 16+64 1024+1024")),
    "Llama-3-8B": ((32, 8, 128), ("16 16 64+64 64+128 128+256 256+512 512+1024 1024+2048",)),
}
"""Query heads, KV heads and channels, and the sizes of layers that take turns."""


def check(spec: MixerSpec) -> dict[str, float]:
    """Compare one step from a random full state with plain torch in fp32, or stop."""
    state, table = filled(spec, 2, SEEN), rotary(spec)
    q, k, v = (x[:, 0] for x in inputs(2, 1, spec.q_heads, spec.kv_heads, spec.d_k, raw=True))
    score, position = torch.rand(2, spec.kv_heads, device=DEVICE), torch.full((2,), SEEN, device=DEVICE)
    before = {name: x.cpu() for name, x in state.items()}
    step = (x[:, None].float().cpu() for x in (q, k, v))
    wanted, after = liger_mixer(*step, position.cpu(), before, spec, table.cpu(), score[:, None].cpu())
    found = ragged_step((q, k, v), position, state, spec, table, score=score)
    for name, slots in (("slot_position", spec.slots_per_head), ("slot_score", None)):
        heads = [state[name].cpu(), after[name]]
        sides = [x.split(slots, dim=1) if slots else (x,) for x in heads]
        for mine, theirs in zip(*sides, strict=True):
            assert torch.equal(mine.sort(-1).values, theirs.sort(-1).values), name
    return gate("ragged_step", {"output": (found.cpu(), wanted[:, 0])})


def measure(name: str, batch: int, blocks: list[int], rate: float) -> dict[str, Any]:
    """Return microseconds of a step in a mean layer for each number of slots in a tile.

    Args:
        name: Row of `SHAPES`.
        batch: Sequences.
        blocks: Slots in a tile.
        rate: Bandwidth of a copy, bytes per second.
    """
    (q_heads, kv_heads, d), sizes = SHAPES[name]
    config = replace(PRESETS["recall"].config, heads=sizes)
    specs = [layer(config.for_layer(i), q_heads, kv_heads, d) for i in range(len(sizes))]
    q, k, v = (x[:, 0] for x in inputs(batch, 1, q_heads, kv_heads, d, raw=True))
    table, position = rotary(specs[0]), torch.full((batch,), SEEN, device=DEVICE)
    score, out = torch.rand(batch, kv_heads, device=DEVICE), torch.empty_like(q)
    size = batch * sum(tensor.nbytes(2) for spec in specs for tensor in spec.state()) / len(specs)
    states = [filled(specs[i % len(specs)], batch, SEEN) for i in range(_copies(size, len(specs)))]
    row: dict[str, Any] = {"shape": name, "batch": batch, "bytes": size, "floor": size / rate * 1e6}
    row |= {"slots": sum(sum(spec.slots_per_head) for spec in specs) / len(specs), "sizes": sizes}
    row["errors"], row["chosen"] = [check(spec) for spec in specs], choose_block(specs[0], batch)
    for block in blocks:

        def call(i: int, block: int = block) -> None:
            i %= len(states)
            ragged_step((q, k, v), position, states[i], specs[i % len(specs)], table, None, out, block, score)

        for i in range(len(specs)):  # a graph cannot record what a first call does
            call(i)
        row[f"tiles of {block}"] = replayed(call, len(states))
    whole = [x[:, None] for x in (q, k, v)]
    row["liger_mixer"] = bench(lambda: liger_mixer(*whole, position, states[0], specs[0], table, score[:, None]))
    equal = layer(PRESETS["memory"].config, q_heads, kv_heads, d)
    size = batch * sum(tensor.nbytes(2) for tensor in equal.state())
    equals = [filled(equal, batch, SEEN) for _ in range(_copies(size, 1))]

    def equal_call(i: int) -> None:
        mixer_step((q, k, v), position, equals[i % len(equals)], equal, table, out=out)

    row["memory"] = {"bytes": size, "slots": equal.config.num_slots * kv_heads, **replayed(equal_call, len(equals))}
    return row


def _copies(size: float, layers: int) -> int:
    """Return the number of states that no cache holds, a multiple of `layers`, for states of `size` bytes."""
    return layers * max(1, min(64, round(160e6 / (size * layers))))


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--blocks", type=int, nargs="*", default=[64, 128, 256], help="slots in a tile")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16, 64, 256], help="numbers of sequences")
    args = parser.parse_args()
    source = torch.empty(1 << 28, dtype=DTYPE, device=DEVICE)
    target = torch.empty_like(source)
    rate = 2 * source.nbytes / bench(lambda: target.copy_(source))["ms"] * 1e3
    result: dict[str, Any] = {
        "command": "python benchmarks/ragged_step.py -o benchmarks/results/ragged_step.json",
        "device": torch.cuda.get_device_name(), "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "copy": rate, "rows": [],
    }  # fmt: skip
    for name, batch in product(SHAPES, args.batches):
        result["rows"].append(measure(name, batch, args.blocks, rate))
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
