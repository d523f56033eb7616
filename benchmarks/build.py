"""Time and peak memory of `ligerexport build`, verification included, with each build in its own process.

    python benchmarks/build.py CONVERTED -o benchmarks/results/build.json
    python benchmarks/build.py --shape llama-3-8b --window 124 --lowerings native --weights int4 \
        -o benchmarks/results/build_8b.json

`peak` is all resident memory, including mapped files, and `anonymous` the part that is not backed by a file, which a
machine must have. `seconds` is wall time, and `cpu_seconds` the sum over all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ligerexport.model.config import LigerConfig, get_preset

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0}, "tie_word_embeddings": True,
    },
    "tiny": {
        "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256,
    },
}  # fmt: skip


def make_checkpoint(directory: Path, shape: str, layers: int | None, liger: LigerConfig) -> Path:
    """Write a converted checkpoint of a shape with random weights in bf16, one shard for each layer."""
    import torch
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models, pre_tokenizers

    from ligerexport.checkpoint.convert import converted_config
    from ligerexport.exporters.verify.text import PROMPT
    from ligerexport.layers.mixer import model_classes
    from ligerexport.model.families import get_family

    config_class, model_class = model_classes(get_family("llama"))
    sizes = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    settings = converted_config(config_class(**sizes).to_dict(), liger)
    with torch.device("meta"):
        named = dict(model_class(config_class.from_dict(settings)).named_parameters())
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    words = {word: i for i, word in enumerate(dict.fromkeys(PROMPT.split()))}
    tokenizer = Tokenizer(models.WordLevel(words))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    shards: dict[str, list[str]] = {}
    for name in named:
        part = name.split(".")[2] if ".layers." in name else name.removesuffix(".weight")
        shards.setdefault(f"model-{part}.safetensors", []).append(name)
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for file, names in shards.items():
        tensors = {}
        for name in names:
            tensor = torch.empty(named[name].shape, dtype=torch.bfloat16, device=device)
            tensors[name] = (tensor.fill_(1) if tensor.ndim == 1 else tensor.normal_(0, 0.02)).cpu()
        save_file(tensors, directory / file)
    index = {"metadata": {}, "weight_map": {name: file for file, names in shards.items() for name in names}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index) + "\n")
    return directory


def build(checkpoint: Path, output: Path, lowering: str, weights: str) -> dict[str, Any]:
    """Build in a separate process and return its measurements."""
    command = [sys.executable, "-m", "ligerexport", "build", str(checkpoint), "--lowering", lowering]
    command += ["--weights", weights, "-o", str(output)]
    begin, anonymous = time.perf_counter(), 0
    process = subprocess.Popen(command)
    while True:
        done, status, usage = os.wait4(process.pid, os.WNOHANG)
        if done:
            break
        anonymous = max(anonymous, anonymous_bytes(process.pid))
        time.sleep(0.02)
    seconds = time.perf_counter() - begin
    assert status == 0, command
    manifest = json.loads((output / "manifest.json").read_text())
    stored, peak = manifest["bytes"]["weights"], usage.ru_maxrss * 1024
    row = {"lowering": lowering, "precision": weights, "parameters": manifest["model"]["parameters"]}
    row |= {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak": peak, "anonymous": anonymous}
    return row | {"weights": stored, "ratio": peak / stored, "verification": manifest["verification"]}


def anonymous_bytes(pid: int) -> int:
    """Return the resident memory of a process that is not backed by a file; 0 if Linux does not report it."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")), 0)


def main() -> None:
    """Measure each lowering."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--shape", choices=SHAPES, help="build random weights of this shape instead of a checkpoint")
    parser.add_argument("--layers", type=int, help="layers of the shape; default: all")
    parser.add_argument("--preset", default="memory", help="preset of the shape's conversion")
    parser.add_argument(
        "--window",
        type=int,
        help="window of the shape's conversion without pools: scores of random weights often tie, and verification "
        "searches for each tie",
    )
    parser.add_argument("--place", type=Path, help="directory for temporary files, with room for all weights")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--lowerings", nargs="*", default=["ort", "portable"])
    parser.add_argument("--weights", default="fp32")
    args = parser.parse_args()
    if (args.checkpoint is None) == (args.shape is None):
        parser.error("give a converted checkpoint or --shape")
    result: dict[str, Any] = {
        "command": "python " + " ".join(sys.argv),
        "cores": os.cpu_count(),
        "versions": {name: version(name) for name in ("torch", "transformers", "onnxruntime", "onnx_ir")},
        "rows": [],
    }
    with tempfile.TemporaryDirectory(dir=args.place) as place:
        checkpoint = args.checkpoint
        if args.shape is not None:
            liger = get_preset(args.preset)
            if args.window is not None:
                liger = replace(liger, window=args.window, slots=())
            checkpoint = make_checkpoint(Path(place, "checkpoint"), args.shape, args.layers, liger)
        for lowering in args.lowerings:
            with tempfile.TemporaryDirectory(dir=place) as directory:
                result["rows"].append(build(checkpoint, Path(directory, "engine"), lowering, args.weights))
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
