"""The loss of weights of 8 bits with one scale for each row, as TensorRT engines store them, against other forms.

    python benchmarks/row_codes.py TEXT CONVERTED -o benchmarks/results/row_codes.json

TEXT is a directory of .txt files, of which the beginnings are read. torch computes in fp32 with the values that the
stored weights stand for, so that only the weights differ. `largest_row_error` is the root mean square error of a row,
relative to that of the row.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from quantised import windows
from torch import Tensor

from ligerexport.checkpoint.convert import load_model
from ligerexport.exporters.onnx.quantise import dequantise, quantise, quantise_rows


def by_row(weight: Tensor) -> Tensor:
    """Return what TensorRT engines store for int8."""
    return torch.from_numpy(dequantise(quantise_rows(weight.numpy()), weight.shape[1]))


def in_blocks(weight: Tensor) -> Tensor:
    """Return what artifacts for ONNX Runtime store for int8."""
    return torch.from_numpy(dequantise(quantise(weight.numpy(), 8, 32), weight.shape[1]))


def e4m3(weight: Tensor) -> Tensor:
    """Return the nearest values of fp8 (4 bits of exponent, 3 of mantissa) with one scale for each row."""
    scale = weight.abs().amax(1, keepdim=True).clamp(min=1e-30) / torch.finfo(torch.float8_e4m3fn).max
    return (weight / scale).to(torch.float8_e4m3fn).float() * scale


FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "fp32": lambda weight: weight,
    "fp16": lambda weight: weight.half().float(),
    "int8, one scale for a row": by_row,
    "int8, a scale and a zero point for 32": in_blocks,
    "fp8 e4m3, one scale for a row": e4m3,
}


def losses(model: Any, texts: list[np.ndarray]) -> np.ndarray:
    """Return the NLL of every token but the first of each text, in nats."""
    found = []
    for ids in texts:
        with torch.inference_mode():
            logits = model(torch.from_numpy(ids[None, :-1])).logits[0].double()
        found.append(logits.logsumexp(-1) - logits.gather(1, torch.from_numpy(ids[1:, None]))[:, 0])
    return torch.cat(found).numpy()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--windows", type=int, default=6)
    parser.add_argument("--length", type=int, default=513)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    texts = windows(args.text, args.checkpoint / "tokenizer.json", args.windows, args.length)
    model = load_model(args.checkpoint, dtype=torch.float32).eval()
    named = model.named_parameters()
    matrices = {name: (x, x.data) for name, x in named if x.ndim == 2 and "score_proj" not in name}
    rows: list[dict[str, Any]] = []
    first = np.empty(0)
    for form, store in FORMS.items():
        worst = (0.0, "")
        for name, (parameter, own) in matrices.items():
            parameter.data = store(own)
            error = (parameter.data - own).square().mean(1) / own.square().mean(1).clamp(min=1e-30)
            worst = max(worst, (float(error.max().sqrt()), name))
        nll = losses(model, [*texts.values()])
        first = first if len(first) else nll
        change = nll - first
        rows.append({
            "form": form, "nll": float(nll.mean()), "nll_change": float(change.mean()),
            "nll_change_error": float(change.std(ddof=1) / len(change) ** 0.5),
            "largest_row_error": worst[0], "in": worst[1],
        })  # fmt: skip
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    result = {
        "command": "python " + " ".join(sys.argv), "texts": list(texts), "tokens": len(first),
        "versions": {"torch": version("torch")}, "rows": rows,
    }  # fmt: skip
    args.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
