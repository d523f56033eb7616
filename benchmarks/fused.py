"""The fused kernels against their peers on one GPU: same run, same inputs, medians of triton's do_bench.

python benchmarks/fused.py -o benchmarks/results/fused.json [--only forward,raw,...]

Needs a CUDA device and flash-linear-attention 0.6. Each section first compares a part of its inputs with fp64 and
does not time wrong results. Floors: bytes read and written once over the copy bandwidth, and operations of the
chunked form over the rate of a large bf16 matrix product, both measured in the same run.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from fused_step import DEVICE, DTYPE, bench, gate, inputs, layer, peak, rotary, step
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import logsigmoid, scaled_dot_product_attention

from ligerexport.kernels.library.linear_attention import _plain, linear_attention
from ligerexport.kernels.library.memory_attention import memory_attention
from ligerexport.model.config import PRESETS

SHAPES = ((1, 8192, 32, 128), (4, 2048, 16, 128), (8, 1024, 8, 64), (1, 65536, 16, 128))
GROUP = 4


def rates() -> dict[str, float]:
    """Measure bytes per second of a copy, read and written, and operations per second of a bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=DEVICE, dtype=DTYPE) for _ in range(2))
    return {
        "copy": 2 * source.numel() / bench(lambda: target.copy_(source))["ms"] * 1e3,
        "product": 2 * 8192**3 / bench(lambda: a @ b)["ms"] * 1e3,
    }


def floors(batch: int, length: int, heads: int, kv: int, d: int, raw: bool, both: bool) -> dict[str, float]:
    """Return bytes and operations of one call with chunks of 64."""
    tokens = batch * length
    q, k = tokens * heads * d * 2, tokens * kv * d * 2
    decay = 0 if raw else tokens * kv * d * 4
    size = 2 * q + 2 * k + decay
    operations = tokens * heads * (2 * 64 * d + 2 * d * d) + tokens * kv * 2 * d * d
    if both:
        size += size + q + 2 * k + decay + q  # inputs again, gradient of the output, gradients of the inputs
        operations *= 3.5
    return {"bytes": size, "operations": operations}


def ours(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    """Run the fused operator."""
    return linear_attention(q, k, v, g, gate=None if g is not None else "gla")[0]


def peer(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None) -> Tensor:
    """Run the same with flash-linear-attention, which needs repeated heads, feature maps and gate computed before."""
    from fla.ops.gla import chunk_gla

    if g is None:
        group = q.shape[2] // k.shape[2]
        g = (logsigmoid(k.float()) / 16).repeat_interleave(group, 2)
        q, k = q.softmax(-1), k.softmax(-1).repeat_interleave(group, 2)
        v = v.repeat_interleave(group, 2)
    return chunk_gla(q, k, v, g, scale=1.0)[0]


@contextmanager
def alone(path: Path | None) -> Iterator[None]:
    """Hold the lock that other runs on this GPU wait for; a file beside it names the run that is ready."""
    if path is None:
        yield
        return
    path.with_suffix(f".{os.getpid()}").touch()
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def linear(raw: bool, shapes: Sequence[tuple[int, ...]], lock: Path | None) -> list[dict[str, Any]]:
    """Time forward, and forward and backward, on each shape."""
    rows = []
    for batch, length, heads, d in shapes:
        kv = heads // GROUP if raw else heads
        cut = [x[:1, :512].contiguous() for x in inputs(batch, length, heads, kv, d, raw)]
        leaves, exact = ([y.detach().requires_grad_() for y in x] for x in (cut, [x.double() for x in cut]))
        out = ours(*leaves)
        truth, _ = _plain(*(exact if not raw else [*exact, None]), None, None, "gla" if raw else None, 1.0)  # type: ignore[arg-type]
        weight = torch.randn_like(out)
        found, wanted = torch.autograd.grad(out, leaves, weight), torch.autograd.grad(truth, exact, weight.double())
        pairs = {"output": (out.detach(), truth.detach())}
        pairs |= {f"gradient {i}": pair for i, pair in enumerate(zip(found, wanted, strict=True))}
        row: dict[str, Any] = {
            "shape": [batch, length, heads, kv, d],
            "raw": raw,
            "errors": gate(str(cut[0].shape), pairs),
        }
        args = inputs(batch, length, heads, kv, d, raw)
        for x in args:
            x.requires_grad_()
        weight = torch.randn(batch, length, heads, d, device=DEVICE, dtype=DTYPE)

        def forward(op: Any) -> None:
            with torch.no_grad():
                op(*args)

        def both(op: Any) -> None:
            op(*args).backward(weight)

        def clear() -> None:
            for x in args:
                x.grad = None
            torch.cuda.empty_cache()

        peers = {"ours": ours, "fla": peer}
        for op in peers.values():  # compile and tune
            both(op)
            forward(op)
            clear()
        with alone(lock):
            for name, op in peers.items():
                row[name] = {"forward": bench(lambda: forward(op)), "both": bench(lambda: both(op), args)}
                clear()
                row[name]["peak"] = peak(lambda: both(op))
                clear()
        row["floors"] = {
            "forward": floors(batch, length, heads, kv, d, raw, both=False),
            "both": floors(batch, length, heads, kv, d, raw, both=True),
        }
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    return rows


def profile() -> list[dict[str, Any]]:
    """Return microseconds of every kernel, forward and backward, by torch's profiler, without the host's time."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as record

    rows = []
    for raw in (False, True):
        for batch, length, heads, d in SHAPES:
            kv = heads // GROUP if raw else heads
            args = [x.requires_grad_() for x in inputs(batch, length, heads, kv, d, raw)]
            weight = torch.randn(batch, length, heads, d, device=DEVICE, dtype=DTYPE)
            torch.autograd.grad(ours(*args), args, weight)
            with record(activities=[ProfilerActivity.CUDA]) as found:
                for _ in range(8):
                    torch.autograd.grad(ours(*args), args, weight)
                torch.cuda.synchronize()
            kernels: dict[str, float] = {}
            for event in found.events():
                if event.device_type == torch.autograd.DeviceType.CUDA:
                    kernels[event.name] = kernels.get(event.name, 0.0) + event.time_range.elapsed_us() / 8
            rows.append({"shape": [batch, length, heads, kv, d], "raw": raw, "kernels": kernels})
    return rows


def softmax() -> list[dict[str, Any]]:
    """Time the recurrence from raw projections against softmax over all tokens; 32 and 8 heads of 128 channels."""
    rows = []
    for length in (2048, 4096, 8192, 16384, 32768, 65536):
        args = inputs(1, length, 32, 8, 128, raw=True)
        q, k, v = (x.transpose(1, 2) for x in args)
        row: dict[str, Any] = {"length": length, "ours": bench(lambda: ours(*args))}
        for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
            with sdpa_kernel(backend):
                row[name] = bench(lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
        rows.append(row)
    return rows


def memory() -> list[dict[str, Any]]:
    """Time softmax over the bounded memory against softmax over all tokens, and FlexAttention with the same mask."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    from ligerexport.kernels.fused.candidates import gather_candidates
    from ligerexport.kernels.fused.slot_scores import complete_scores
    from ligerexport.kernels.fused.slots import deaths

    rows = []
    for length in (2048, 8192):
        for preset in ("sinks", "memory"):
            spec = layer(PRESETS[preset].config)
            table = rotary(spec)
            args = [x.requires_grad_() for x in inputs(1, length, 32, 8, 128, raw=True)]
            novelty = torch.rand(1, length, 8, device=DEVICE)
            position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
            state = spec.initial_state(1, DTYPE, DEVICE)
            weight = torch.randn(1, length, 32, 128, device=DEVICE, dtype=DTYPE)
            row: dict[str, Any] = {"length": length, "preset": preset}

            def run(args: Any = args, rest: Any = (novelty, position, state, spec, table)) -> Tensor:
                return memory_attention(*args, *rest)[0]

            def clear(args: Any = args) -> None:
                for x in args:
                    x.grad = None

            def time_both(call: Callable[[], Tensor], weight: Tensor, args: Any = args) -> dict[str, Any]:
                with torch.no_grad():
                    forward = bench(call)
                return {"forward": forward, "both": bench(lambda: call().backward(weight), args)}

            row["ours"] = time_both(run, weight)
            row["ours"]["peak"] = peak(lambda: run().backward(weight))
            q, k, v = (x.transpose(1, 2) for x in args)
            for name, backend in (("flash", SDPBackend.FLASH_ATTENTION), ("cudnn", SDPBackend.CUDNN_ATTENTION)):
                with sdpa_kernel(backend):
                    row[name] = time_both(
                        lambda: scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
                        weight.transpose(1, 2),
                    )
            clear()
            with torch.no_grad():
                found = gather_candidates(*(x.detach() for x in args), novelty, position, state, spec, table)
                complete_scores(found)
                death = deaths(found)[:, :, spec.config.num_slots :]

            def seen(b: Tensor, h: Tensor, t: Tensor, c: Tensor, death: Tensor = death) -> Tensor:
                return (c <= t) & (t < death[b, h // GROUP, c])

            row["flex mask"] = bench(lambda: create_block_mask(seen, 1, 32, length, length, DEVICE))
            mask = create_block_mask(seen, 1, 32, length, length, DEVICE)
            flex = torch.compile(flex_attention)
            row["flex"] = time_both(lambda: flex(q, k, v, block_mask=mask, enable_gqa=True), weight.transpose(1, 2))
            rows.append(row)
            print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def first(name: str) -> float:
    """Return seconds from the start of a fresh process with an empty cache to the first result of `ours` or `peer`."""
    code = (
        "import sys, time; start = time.time(); sys.path[:0] = ['benchmarks']; import torch, fused\n"
        "args = fused.inputs(1, 8192, 32, 8, 128, raw=True)\n"
        f"out = fused.{name}(*args); torch.cuda.synchronize(); print(time.time() - start)"
    )
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


SECTIONS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "forward": lambda args: linear(False, [SHAPES[i] for i in args.shapes], args.lock),
    "raw": lambda args: linear(True, [SHAPES[i] for i in args.shapes], args.lock),
    "profile": lambda _: profile(),
    "softmax": lambda _: softmax(),
    "memory": lambda _: memory(),
    "step": lambda _: step(),
    "first": lambda _: first("ours"),
    "first of fla": lambda _: first("peer"),
}


def main() -> None:
    """Run the sections and write their results; results of earlier runs are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--shapes", type=int, nargs="*", default=range(len(SHAPES)), help="rows of forward and raw")
    parser.add_argument("--lock", type=Path, help="runs that share this file time one at a time")
    args = parser.parse_args()
    result: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {}
    result |= {
        "command": "python benchmarks/fused.py -o benchmarks/results/fused.json",
        "device": torch.cuda.get_device_name(),
        "versions": {name: version(name) for name in ("torch", "triton", "flash-linear-attention")},
    }
    for name in args.only.split(","):
        start = time.time()
        result[name] = SECTIONS[name](args)
        print(f"{name}: {time.time() - start:.0f} s", file=sys.stderr, flush=True)
        with alone(args.lock):
            result["rates"] = rates()
        args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
