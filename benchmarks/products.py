"""Sweep the tiles of products with weights on a GPU, to choose those of `get_product_tile` in kernels/tuning.py.

    python benchmarks/products.py --shape 8b --rows 1,16 -o FILE
    python benchmarks/products.py --shape smollm2 --rows 1,16 -o FILE
    python benchmarks/products.py --shape 8b --rows 1,16,64,1024 --weights int8 --chosen -o FILE

With `--chosen` only the tile that `get_product_tile` returns is timed. `floor_us` is the time to read the weight once.
Each tile is timed in replays of a CUDA graph over copies of the weight that together do not fit a cache. Tiles are
compiled in several processes first, into Triton's cache.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from multiprocessing import get_context
from operator import itemgetter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ligerexport.kernels.fused import linear as fused
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.tuning import ProductTile, get_product_tile

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


def chosen(rows: int, spec: LinearSpec) -> Iterator[ProductTile]:
    """Yield the tile that is used."""
    yield get_product_tile(rows, spec.outputs, spec.inputs, 1 if spec.coded else 2, spec.activation is not None)


def coded_tiles(rows: int, spec: LinearSpec) -> Iterator[ProductTile]:
    """Yield the tiles worth trying for codes of 8 bits."""
    k, halves = spec.inputs, 1 if spec.activation is None else 2
    if rows == 1:
        for n, depth, warps in product((1, 2, 4, 8), (512, 1024, 2048, 4096), (1, 2, 4, 8)):
            loads = n * depth * halves // (32 * warps)
            if k >= 2048 and (n == 1 or depth == 512):
                continue
            if 16 <= loads <= 128 and depth < 2 * k and (k % depth == 0 or k < 2048):
                yield ProductTile(1, n, depth, warps, 1)
        return
    heights = (16,) if rows <= 16 else (64,) if rows <= 64 else (128, 256)
    few = rows <= 16
    widths, depths = ((16, 32, 64), (64, 128, 256)) if few else ((64, 128), (64, 128))
    for m, n, depth, warps, stages in product(heights, widths, depths, (4, 8), (4, 6) if few else (3, 4)):
        fits = (2 * m + n * halves) * depth * stages <= SHARED and k % depth == 0
        if fits and (few or 64 * 64 <= m * n * halves <= 128 * 32 * warps):
            yield ProductTile(m, n, depth, warps, stages)


def tiles(rows: int, spec: LinearSpec) -> Iterator[ProductTile]:
    """Yield the tiles worth trying."""
    if spec.coded:
        yield from coded_tiles(rows, spec)
        return
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
    if spec.coded:
        shape = (height, spec.inputs)
        weights = [torch.randint(256, shape, dtype=torch.uint8, device=device) for _ in range(copies)]
    else:
        weights = [make(height, spec.inputs, dtype=half) for _ in range(copies)]
    return weights, {
        "scale": make(height) if spec.coded else None,
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
        with suppress(OutOfResources):
            launch(case, weights[0], given)


def time_case(case: Case, weights: list[Tensor], given: dict[str, Any]) -> float:
    """Return microseconds of one product, the median of five replays; infinity if the tile does not fit the device."""
    try:
        launch(case, weights[0], given)
    except OutOfResources:
        return math.inf
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


def bandwidth() -> float:
    """Return the bytes that a copy of one gigabyte reads and writes in a microsecond."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(5):
        begin.record()
        target.copy_(source)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return 2 * len(source) / statistics.median(times) / 1e3


def main() -> None:
    """Time all tiles and keep the best."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--rows", type=lambda text: [int(x) for x in text.split(",")], default=[1, 16])
    parser.add_argument("--weights", choices=("fp16", "int8"), default="fp16")
    parser.add_argument("--chosen", action="store_true", help="time only the tiles that are used")
    parser.add_argument("--keep", type=int, default=5, help="number of fastest tiles to keep for each product")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    coded, tried = args.weights == "int8", chosen if args.chosen else tiles
    products = {name: replace(spec, coded=coded) for name, spec in SHAPES[args.shape].items()}
    cases = [(m, spec, tile) for m in args.rows for spec in products.values() for tile in tried(m, spec)]
    workers = min(12, os.cpu_count() or 1)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        list(pool.map(compile_some, [cases[i :: 4 * workers] for i in range(4 * workers)]))
    found: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "device": torch.cuda.get_device_name()}
    found["bytes_per_us"] = round(bandwidth())
    for m, (name, spec) in product(args.rows, products.items()):
        size = (1 if coded else 2) * spec.outputs * spec.inputs * (1 if spec.activation is None else 2)
        weights, given = tensors(m, spec, "cuda", max(2, min(64, int(UNCACHED / size) + 1)))
        rows = [{"us": round(time_case((m, spec, x), weights, given), 2), **asdict(x)} for x in tried(m, spec)]
        rows = [row | {"floor_us": round(size / found["bytes_per_us"], 2)} for row in rows if row["us"] < math.inf]
        found[f"{args.shape} {m} {name}"] = sorted(rows, key=itemgetter("us"))[: args.keep]
        print(name, m, found[f"{args.shape} {m} {name}"][0], flush=True)
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
