"""The time of a prompt in torch on a GPU: a converted model against the Transformer with SDPA.

    python benchmarks/torch_prefill.py -o benchmarks/results/torch_prefill.json

Weights are random in bf16, in the shapes of SmolLM2-135M and Qwen2.5-1.5B; the time does not depend on them. All read
the same ids, keep what they need to go on, and return the logits of the last token, and they take turns: the converted
model in one call, in a session that replays CUDA graphs of whole chunks (with the time to forget the last prompt), and
the Transformer in one call.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from build import SHAPES, make_checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from ligerexport.checkpoint.convert import load_model
from ligerexport.exporters.torch_session import TorchSession
from ligerexport.model.config import PRESETS

SIZES: dict[str, dict[str, Any]] = {
    "SmolLM2-135M": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
    },
    "Qwen2.5-1.5B": {
        "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 32768,
    },
    "Llama-3-8B": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
}  # fmt: skip
BUDGETS = ("16 64", "64+128 256+512", "512+1024 16+64", "256+256 1024+1024")
"""Sizes of the memories of a layer's KV heads, which take turns."""


def make_models(name: str, layers: int | None, directory: Path, device: str) -> tuple[Path, Any, Any]:
    """Return a converted checkpoint of a shape, its model, and the Transformer."""
    sizes = SIZES[name] | ({"num_hidden_layers": layers} if layers else {})
    kv_heads = sizes["num_key_value_heads"]
    heads = [" ".join((BUDGETS * 2)[i % 4] for i in range(j, j + 4)) for j in range(4)]
    preset = replace(
        PRESETS["recall"].config,
        heads=tuple(" ".join(heads[i % 4].split()[:kv_heads]) for i in range(sizes["num_hidden_layers"])),
    )
    SHAPES[name] = sizes
    path = make_checkpoint(directory / name, name, None, preset)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        theirs = LlamaForCausalLM(LlamaConfig(**sizes, attn_implementation="sdpa")).eval()
    torch.set_default_dtype(torch.float32)
    return path, load_model(path, torch.bfloat16).to(device).eval(), theirs


def make_sessions(path: Path, chunks: list[int], device: str) -> dict[str, TorchSession]:
    """Return sessions on the same weights, with graphs of some numbers of tokens."""
    loaded, made = TorchSession(path, device=device), {}
    for chunk in chunks:
        loaded.chunk = chunk
        made[f"session {chunk}"] = loaded.sibling()
    return made


def quartiles(samples: list[float]) -> dict[str, float]:
    """Return the median and the quartiles of times in milliseconds."""
    low, median, high = statistics.quantiles(samples, n=4)
    return {"ms": median, "low": low, "high": high}


def timed(call: Any, device: str) -> float:
    """Return the milliseconds of a call."""
    if device == "cpu":
        import time

        begin = time.perf_counter()
        call()
        return (time.perf_counter() - begin) * 1e3
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def save(output: Path, rows: list[dict[str, Any]], device: str) -> None:
    """Write the rows of a benchmark with its command, its device and the versions."""
    result = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
        "rows": rows,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--lengths", type=int, nargs="*", default=[2048, 4096, 16384])
    parser.add_argument("--chunks", type=int, nargs="*", default=[1024, 4096], help="tokens of a session's graph")
    parser.add_argument("--shapes", nargs="*", choices=SIZES, default=["SmolLM2-135M", "Qwen2.5-1.5B"])
    parser.add_argument("--layers", type=int, help="layers of a shape; default: all")
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows = []
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as place:
            path, ours, theirs = make_models(name, args.layers, Path(place), device)
            sessions = make_sessions(path, args.chunks, device)
        for length in args.lengths:
            ids = torch.randint(SIZES[name]["vocab_size"], (1, length), device=device)
            given = ids.cpu().numpy()

            def fresh(session: TorchSession, given: Any = given) -> None:
                session.reset()
                session.prefill(given)

            calls = {
                side: lambda model=model, ids=ids: model(ids, use_cache=True, logits_to_keep=1)
                for side, model in (("converted", ours), ("transformer", theirs))
            } | {side: lambda x=x: fresh(x) for side, x in sessions.items() if x.chunk <= length}
            times: dict[str, list[float]] = {side: [] for side in calls}
            with torch.inference_mode():
                for _ in range(args.rounds + 3):
                    for side, call in calls.items():
                        times[side].append(timed(call, device))
            row: dict[str, Any] = {"shape": name, "tokens": length}
            row |= {side: quartiles(samples[3:]) for side, samples in times.items()}
            row["speedup"] = {
                side: statistics.median(b / a for a, b in zip(times[side][3:], times["transformer"][3:], strict=True))
                for side in times.keys() - {"transformer"}
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
        print({side: session.eager for side, session in sessions.items()}, flush=True)
        del ours, theirs, sessions, calls
    save(args.output, rows, device)


if __name__ == "__main__":
    main()
