"""A Transformer's decode and prefill on a GPU, as a baseline for our engines.

    python benchmarks/transformer_gpu.py --shape llama-3-8b --contexts 1024,8192,32768 --batches 1,16 -o FILE

Random weights in fp16 in the shape of Llama are computed by cuBLAS, fused norms and PyTorch's attention (FlashAttention
with split keys, or cuDNN's) and replayed as a CUDA graph. There are no masks, the cache is as long as the context, and
projections are joint, as in inference engines. `--check` compares it with transformers' model on a small shape.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from build import SHAPES
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
EPS = 1e-6


class Transformer:
    """The weights of a shape, and one call over a cache `[layers, 2, B, H_kv, N, d]` that is updated in place.

    Args:
        sizes: Sizes as in `SHAPES`.
        device: Device that computes.
        dtype: Type of weights, activations and cache.
    """

    def __init__(self, sizes: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        self.heads, self.kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        self.layers, self.hidden, self.vocab = sizes["num_hidden_layers"], sizes["hidden_size"], sizes["vocab_size"]
        self.inner, self.d = sizes["intermediate_size"], sizes["hidden_size"] // sizes["num_attention_heads"]
        self.device, self.dtype = device, dtype

        def weight(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, device=device, dtype=dtype).mul_(0.02)

        joint = (self.heads + 2 * self.kv_heads) * self.d
        self.embedding, self.head = weight(self.vocab, self.hidden), weight(self.vocab, self.hidden)
        self.weights = [
            (weight(joint, self.hidden), weight(self.hidden, self.heads * self.d), weight(2 * self.inner, self.hidden),
             weight(self.hidden, self.inner)) for _ in range(self.layers)
        ]  # fmt: skip
        self.ones = torch.ones(self.hidden, device=device, dtype=dtype)
        theta = sizes.get("rope_parameters", {}).get("rope_theta", 10000.0)
        self.inv_freq = theta ** (-torch.arange(0, self.d, 2, device=device).float() / self.d)

    def cache(self, batch: int, context: int) -> torch.Tensor:
        """Return an empty cache for the keys and values of a context."""
        shape = (self.layers, 2, batch, self.kv_heads, context, self.d)
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

    def __call__(self, ids: torch.Tensor, cache: torch.Tensor, start: int) -> torch.Tensor:
        """Return logits `[B, V]` after ids `[B, T]`, which begin at `start`."""
        batch, tokens = ids.shape
        at = torch.arange(start, start + tokens, device=self.device)
        angle = at[:, None] * self.inv_freq
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        x = self.embedding[ids]
        for i, (qkv, out, up, down) in enumerate(self.weights):
            y = F.linear(F.rms_norm(x, (self.hidden,), self.ones, EPS), qkv).view(batch, tokens, -1, self.d)
            y = y.transpose(1, 2)
            rotated = rotate(y[:, : self.heads + self.kv_heads], cos, sin)
            query, key = rotated.split([self.heads, self.kv_heads], 1)
            cache[i, 0, :, :, start : start + tokens] = key
            cache[i, 1, :, :, start : start + tokens] = y[:, self.heads + self.kv_heads :]
            keys, values = (cache[i, j, :, :, : start + tokens] for j in range(2))
            y = F.scaled_dot_product_attention(query, keys, values, is_causal=tokens > 1, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, tokens, -1), out)
            gate, wide = F.linear(F.rms_norm(x, (self.hidden,), self.ones, EPS), up).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * wide, down)
        return F.linear(F.rms_norm(x[:, -1], (self.hidden,), self.ones, EPS), self.head)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of the last axis."""
    left, right = x.chunk(2, -1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)


def check() -> None:
    """Compare with transformers' own model of a small shape, a prompt and a step."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = SHAPES["tiny"] | {"rms_norm_eps": EPS, "tie_word_embeddings": False}
    theirs = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ours = Transformer(sizes, "cpu", torch.float32)
    model = theirs.model
    ours.embedding, ours.head = model.embed_tokens.weight, theirs.lm_head.weight
    ours.weights = [
        (torch.cat([layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight]),
         layer.self_attn.o_proj.weight, torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight]),
         layer.mlp.down_proj.weight) for layer in model.layers
    ]  # fmt: skip
    ids = torch.randint(0, sizes["vocab_size"], (2, 33))
    with torch.inference_mode():
        cache = ours.cache(2, 33)
        ours(ids[:, :32], cache, 0)
        torch.testing.assert_close(ours(ids[:, 32:], cache, 32), theirs(ids).logits[:, -1], atol=1e-5, rtol=1e-4)
    print("the same logits as transformers", file=sys.stderr)


def timed(work: Callable[[], Any], runs: int) -> dict[str, float]:
    """Return median and spread in milliseconds of device time."""
    times = []
    for _ in range(runs + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    times = sorted(times[3:])
    tenth = len(times) // 10
    return {"median_ms": statistics.median(times), "p10_ms": times[tenth], "p90_ms": times[-1 - tenth]}


def bandwidth() -> dict[str, float]:
    """Return bytes per second of a copy (read and written) and of a read alone, of 4 GB."""
    x = torch.zeros(1 << 30, device="cuda")
    y = torch.empty_like(x)
    copied = timed(lambda: y.copy_(x), 20)["median_ms"]
    read = timed(lambda: torch.sum(x), 20)["median_ms"]
    return {"copy": 2 * x.nbytes / copied * 1e3, "read": x.nbytes / read * 1e3}


def graph_of(work: Callable[[], Any]) -> Callable[[], None]:
    """Capture work as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    return graph.replay


@torch.inference_mode()
def measure(model: Transformer, batch: int, context: int, prefill: bool) -> dict[str, Any]:
    """Time one step at the end of a context, or reading the context, with each attention kernel."""
    row: dict[str, Any] = {"batch": batch, "context": context, "what": "prefill" if prefill else "step"}
    torch.cuda.empty_cache()
    try:
        cache = model.cache(batch, context)
        row["kv_bytes"] = cache.nbytes
        ids = torch.ones(batch, context if prefill else 1, dtype=torch.long, device="cuda")
        start = 0 if prefill else context - 1
        for name, backend in BACKENDS.items():
            try:
                with sdpa_kernel([backend]):
                    work = (lambda: model(ids, cache, start)) if prefill else graph_of(lambda: model(ids, cache, start))
                    row[name] = timed(work, 3 if prefill else 50)
            except RuntimeError as error:
                if isinstance(error, torch.OutOfMemoryError):
                    raise
                row[name] = str(error).partition("\n")[0]
    except torch.OutOfMemoryError:
        row["error"] = "out of device memory"
    row["device_bytes"] = torch.cuda.max_memory_reserved()
    torch.cuda.reset_peak_memory_stats()
    return row


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--contexts", type=lambda text: [int(x) for x in text.split(",")], default=[1024])
    parser.add_argument("--prefills", type=lambda text: [int(x) for x in text.split(",")], default=[])
    parser.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("-o", "--output", type=Path)
    args = parser.parse_args()
    if args.check:
        check()
    if args.output is None:
        return
    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "device": torch.cuda.get_device_name(),
                              "torch": torch.__version__, "bandwidth": bandwidth(), "rows": []}  # fmt: skip
    model = Transformer(SHAPES[args.shape], "cuda", torch.float16)
    calls = [(b, n, False) for b in args.batches for n in args.contexts] + [(1, n, True) for n in args.prefills]
    for call in calls:
        result["rows"].append(measure(model, *call))
        print(json.dumps(result["rows"][-1]), file=sys.stderr, flush=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
