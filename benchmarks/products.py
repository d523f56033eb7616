"""Sweep the tiles of products with weights on a GPU, to choose those of `get_product_tile` in kernels/tuning.py.

    python benchmarks/products.py --shape 8b --rows 1,16 -o FILE
    python benchmarks/products.py --shape smollm2 --rows 1,16 -o FILE

Each tile is timed in replays of a CUDA graph over copies of the weight that together do not fit a cache. Tiles are
compiled in several processes first, into Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from itertools import product
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from ligerexport.kernels.fused import linear as fused
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.tuning import ProductTile

NORMED = 1e-5
SHAPES = {
    name: {
        "qkv": LinearSpec(qkv, hidden, NORMED), "o": LinearSpec(hidden, hidden, residual=True, wide=True),
        "gate_up": LinearSpec(inner, hidden, NORMED, "silu"),
        "down": LinearSpec(hidden, inner, residual=True, wide=True),
        "head": LinearSpec(vocabulary, hidden, NORMED, wide=True),
    }
    for name, qkv, hidden, inner, vocabulary in (("8b", 6144, 4096, 14336, 128256), ("smollm2", 960, 576, 1536, 49152))
}  # fmt: skip
SHARED = 220_000
"""Bytes of shared memory that the stages of a tile may take."""
UNCACHED = 200e6
"""Bytes of all copies of a weight."""
Case = tuple[int, LinearSpec, ProductTile]


def tiles(rows: int, spec: LinearSpec) -> Iterator[ProductTile]:
    """Yield the tiles worth trying."""
    k, halves = spec.inputs, 1 if spec.activation is None else 2
    if rows == 1:
        for n, depth, warps in product((1, 2, 4, 8, 16), (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8)):
            loads = 2 * n * depth * halves // (32 * warps)  # bytes per thread
            if 16 <= loads <= 256 and depth < 2 * k and (k % depth == 0 or k < 2048) and (depth >= 512 or k < 2048):
                yield ProductTile(1, n, depth, warps, 1)
        return
    few = rows <= 16
    heights, widths = ((16,), (16, 32, 64, 128)) if few else ((64, 128, 256), (64, 128, 256))
    for m, n, depth, warps, stages in product(heights, widths, (32, 64, 128, 256), (4, 8), (3, 4, 6)):
        tile = m * n * halves
        fits = (m + n * halves) * depth * 2 * stages <= SHARED and k % depth == 0
        if fits and (few or (depth <= 64 and 64 * 128 <= tile <= min(128 * 256, 128 * 32 * warps))):
            yield ProductTile(m, n, depth, warps, stages)


def tensors(rows: int, spec: LinearSpec, device: str, copies: int = 1) -> tuple[list[Tensor], dict[str, Any]]:
    """Return copies of the weight, and the other arguments of `fused.linear`."""
    make = partial(torch.randn, device=device) if device == "cuda" else partial(torch.empty, device=device)
    height, normed = spec.outputs * (1 if spec.activation is None else 2), spec.epsilon is not None
    half = torch.float16
    weights = [make(height, spec.inputs, dtype=half) for _ in range(copies)]
    return weights, {
        "x": make(rows, spec.inputs, dtype=torch.float32 if normed else half),
        "norm": make(spec.inputs) if normed else None, "bias": None,
        "residual": make(rows, spec.outputs) if spec.residual else None, "spec": spec,
        "out": make(rows, spec.outputs, dtype=torch.float32 if spec.wide else half),
    }  # fmt: skip


def launch(case: Case, weight: Tensor, given: dict[str, Any]) -> None:
    """Run one product with a tile, including its norm if that is a separate launch."""
    with patch.object(fused, "get_product_tile", lambda *sizes: case[2]):
        fused.linear(weight=weight, **given)


def compile_some(cases: list[Case]) -> None:
    """Fill Triton's cache."""
    for case in cases:
        weights, given = tensors(case[0], case[1], "cuda")
        launch(case, weights[0], given)


def time_case(case: Case, weights: list[Tensor], given: dict[str, Any]) -> float:
    """Return microseconds of one product, the median of five replays."""
    launch(case, weights[0], given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weight in weights:
            launch(case, weight, given)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    times = []
    for _ in range(5):
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(weights) * 1e3)
    return statistics.median(times)


def main() -> None:
    """Time all tiles and keep the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=lambda text: [int(x) for x in text.split(",")], default=[1, 16])
    parser.add_argument("--keep", type=int, default=5, help="number of fastest tiles to keep for each product")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    products = SHAPES[args.shape]
    cases = [(m, spec, tile) for m in args.rows for spec in products.values() for tile in tiles(m, spec)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, [cases[i :: 4 * workers] for i in range(4 * workers)]))
    found: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "device": torch.cuda.get_device_name()}
    for m, (name, spec) in product(args.rows, products.items()):
        size = 2 * spec.outputs * spec.inputs * (1 if spec.activation is None else 2)
        weights, given = tensors(m, spec, "cuda", max(2, min(64, int(UNCACHED / size) + 1)))
        rows = [{"us": round(time_case((m, spec, x), weights, given), 2), **asdict(x)} for x in tiles(m, spec)]
        found[f"{args.shape} {m} {name}"] = sorted(rows, key=itemgetter("us"))[: args.keep]
        print(name, m, found[f"{args.shape} {m} {name}"][0], flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
