"""Time a layer of the 8B shape while it reads a prompt on a GPU: our products, cuBLAS's, and the mixer.

    python benchmarks/prompt_gpu.py --tokens 1024,2048,4096,8192 -o FILE

Milliseconds are medians of ten replays of a CUDA graph that repeats the work: launches from Python take too long.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from products import SHAPES
from transformer_gpu import graph_of, timed

from ligerexport.kernels.fused import linear as fused
from ligerexport.kernels.fused.prefill import prefill
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK
from ligerexport.model.config import get_preset
from ligerexport.model.state import MixerSpec

HEADS, KV_HEADS, WIDTH, LONGEST = 32, 8, 128, 8192
TYPES = {"float32": torch.float32, "int64": torch.int32, "activation": torch.float16}
TIMES = 10
"""Number of repetitions in one graph."""


def milliseconds(work: Callable[[], Any]) -> float:
    """Time some work on the device."""

    def often() -> None:
        for _ in range(TIMES):
            work()

    return timed(graph_of(often), 10)["median_ms"] / TIMES


def product(name: str, tokens: int) -> dict[str, float]:
    """Time one product with its gated unit or residual, its norm apart, and cuBLAS's product of the same sizes."""
    spec = SHAPES["8b"][name]
    make = partial(torch.randn, device="cuda")
    weight = make(spec.outputs * (1 if spec.activation is None else 2), spec.inputs, dtype=torch.float16)
    x, wide = make(tokens, spec.inputs, dtype=torch.float16), make(tokens, spec.inputs)
    norm, residual = make(spec.inputs), make(tokens, spec.outputs)
    side = (make(KV_HEADS, spec.inputs), make(KV_HEADS), make(tokens, KV_HEADS))

    def ours(spec: LinearSpec) -> float:
        out = make(tokens, spec.outputs, dtype=torch.float32 if spec.wide else torch.float16)
        given = (x, weight, None) if spec.epsilon is None else (wide, weight, norm)
        more = {"side": side} if spec.side else {}
        work = partial(fused.linear, *given, None, residual if spec.residual else None, spec, out=out, **more)
        return milliseconds(work)

    alone = LinearSpec(spec.outputs, spec.inputs, None, spec.activation, residual=spec.residual, wide=spec.wide)
    made = {name: ours(alone), f"cublas {name}": milliseconds(lambda: torch.mm(x, weight.T))}
    if name == "qkv":
        whole = LinearSpec(spec.outputs, spec.inputs, spec.epsilon, side=KV_HEADS)
        made["norm and learned score"] = ours(whole) - made[name]
    return made


def mixer(tokens: int) -> float:
    """Time the mixer of the preset `foresight` on an empty memory."""
    spec = MixerSpec(get_preset("foresight"), HEADS, KV_HEADS, WIDTH, WIDTH, WIDTH**-0.5, LONGEST)
    joint = torch.randn(1, tokens, HEADS + 2 * KV_HEADS, WIDTH, device="cuda", dtype=torch.float16)
    state = {x.name: torch.full((1, *x.shape), x.fill, dtype=TYPES[x.dtype], device="cuda") for x in spec.state()}
    rotary = rotary_table(torch.full((WIDTH // 2,), 0.01), LONGEST, BLOCK).cuda()
    score, position = torch.rand(1, tokens, KV_HEADS, device="cuda"), torch.zeros(1, device="cuda", dtype=torch.int32)
    projected = joint.split([HEADS, KV_HEADS, KV_HEADS], 2)
    return milliseconds(lambda: prefill(*projected, score, position, state, spec, rotary))


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=lambda text: [int(x) for x in text.split(",")], default=[1024, LONGEST])
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "device": torch.cuda.get_device_name()}
    for tokens in args.tokens:
        row: dict[str, float] = {"mixer": mixer(tokens)}
        for name in ("qkv", "o", "gate_up", "down"):
            row |= product(name, tokens)
        result[str(tokens)] = row
        print(tokens, row, flush=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
