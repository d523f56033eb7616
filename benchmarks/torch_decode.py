"""The time of a token in torch on a GPU: a session of a converted model as a CUDA graph, without one, and its peers.

    python benchmarks/torch_decode.py -o benchmarks/results/torch_decode.json

Weights are those of `torch_prefill.py`. The Transformer attends with SDPA over as many tokens as the row says, and is
launched kernel by kernel as `generate` does. The floor is the time of a copy that moves as many bytes as a token of the
converted model must read: all weights of products, and the state of every sequence.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch_prefill import SIZES, make_models, quartiles, save, timed

from ligerexport.exporters.torch_session import TorchSession


def copy_speed(device: str) -> float:
    """Return the bytes that a copy reads and writes in a millisecond."""
    source = torch.zeros(1 << (30 if device == "cuda" else 24), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / sorted(timed(lambda: target.copy_(source), device) for _ in range(20))[10]


def main() -> None:
    """Measure and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[2048, 16384])
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--shapes", nargs="*", choices=SIZES, default=["SmolLM2-135M", "Qwen2.5-1.5B"])
    parser.add_argument("--layers", type=int, help="layers of a shape; default: all")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--chunk", type=int, default=1024, help="tokens of a session's calls for prompts")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    speed, rows = copy_speed(device), []
    for name in args.shapes:
        with tempfile.TemporaryDirectory() as place:
            path, ours, theirs = make_models(name, args.layers, Path(place), device)
            session = TorchSession(path, device=device)
            session.chunk = args.chunk
        weights = sum(x.nbytes for n, x in ours.named_parameters() if "embed_tokens" not in n)
        weights += 0 if any("lm_head" in n for n, _ in ours.named_parameters()) else ours.lm_head.weight.nbytes
        del ours
        for batch in args.batches:
            sides = {side: session.sibling(batch) for side in ("graph", "direct")}
            sides["direct"]._replay.eager = "measured without"
            ids = [1] * batch
            given = torch.ones(batch, 1, dtype=torch.long, device=device)
            for tokens in args.tokens:
                row: dict[str, Any] = {"shape": name, "sequences": batch, "tokens": tokens}
                prompt = torch.ones(batch, tokens, dtype=torch.long, device=device)
                with torch.inference_mode():
                    kept = None
                    for part in prompt.split(args.chunk, dim=1):
                        kept = theirs(part, past_key_values=kept, use_cache=True, logits_to_keep=1).past_key_values
                    calls: dict[str, Any] = {side: lambda x=x: x.step(ids) for side, x in sides.items()}
                    calls["transformer"] = lambda model=theirs, kept=kept: model(
                        given, past_key_values=kept, use_cache=True
                    )
                    for x in sides.values():
                        x.reset()
                        x.prefill(prompt.cpu().numpy())
                    times: dict[str, list[float]] = {side: [] for side in calls}
                    for _ in range(args.rounds + 5):
                        for side, call in calls.items():
                            times[side].append(timed(call, device))
                row |= {side: quartiles(samples[5:]) for side, samples in times.items()}
                row["floor"] = {"ms": (weights + sides["graph"].state_bytes) / speed}
                rows.append(row)
                print(json.dumps(row), flush=True)
                del kept, calls
            print(sides["graph"].eager, flush=True)
            del sides, x
        del theirs, session
    save(args.output, rows, device)


if __name__ == "__main__":
    main()
