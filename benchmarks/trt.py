"""Build the TensorRT plugin and `liger-run` with nvcc on a GPU machine, run an artifact, and compare it with torch.

To write an artifact of a shape with random weights, and its checkpoint for `reference`:

    python benchmarks/trt.py shape llama-3-8b --checkpoint CHECKPOINT -o ARTIFACT

To write the expected results, on any machine with torch; `--ids` is a prompt:

    python benchmarks/trt.py reference CHECKPOINT --ids 1,2,3 --tokens 512 [--device cuda] -o expected

To measure on the GPU machine; a failed step does not stop later ones, and WORK/log.txt has all output:

    python benchmarks/trt.py run ARTIFACT --tensorrt LIBRARIES --include HEADERS --work WORK --expected expected

LIBRARIES holds libnvinfer and libnvonnxparser, HEADERS NvInfer.h, NvOnnxParser.h and nlohmann/json.hpp (several folders
with a colon between them). The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from build import SHAPES
from trt_session import by_head, slots_per_head

SOURCES = Path(__file__).resolve().parent.parent / "ligerexport" / "exporters" / "tensorrt"
CORE = ("pack.cc", "plan.cc", "node.cc", "mixer.cc", "linear.cc", "face.cc")
RUNNER = ("capi.cc", "session.cc", "engine.cc")
UNUSED = ("libcublas.so.11", "libcublasLt.so.11", "libcudnn.so.8")
"""Symbols that TensorRT 8 libraries need but our engines never call; stubs replace them if they are not installed."""
GREEDY = 64
"""Number of tokens that an engine generates by itself."""
MOST_DIVERGENCE = 0.02
"""Largest mean divergence over all tokens between torch's fp32 and the engine in 16 bits, in nats."""


class Log:
    """Runs commands, logs their output in a file, and continues after failures."""

    def __init__(self, work: Path, environment: dict[str, str]) -> None:
        self.file = (work / "log.txt").open("w", encoding="utf-8")
        self.environment = environment
        self.steps: dict[str, Any] = {}

    def run(self, name: str, command: Sequence[object]) -> str | None:
        """Run one step; return its stdout, or None if it failed."""
        words = [str(word) for word in command]
        begin = time.monotonic()
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, errors="replace")
        seconds = round(time.monotonic() - begin, 1)
        self.file.write(f"\n== {name}: {done.returncode} after {seconds} s\n$ {shlex.join(words)}\n")
        self.file.write(done.stdout + done.stderr)
        self.file.flush()
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of this step or an earlier one
        self.steps[name] = {"code": done.returncode, "seconds": seconds, "peak_bytes": peak}
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            print(f"-- {name} failed ({done.returncode}):\n{tail}", file=sys.stderr)
            return None
        print(f"-- {name}: {seconds} s", file=sys.stderr)
        return done.stdout


def library(folder: Path, name: str) -> Path:
    """Return the shortest file name of a library, which may include a version."""
    found = sorted(folder.glob(f"{name}.so*"), key=lambda path: len(path.name))
    if not found:
        raise SystemExit(f"there is no {name}.so in {folder}")
    return found[0].resolve()


def find_driver() -> Path:
    """Return the CUDA driver's library."""
    text = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    places = [line.rpartition("=> ")[2] for line in text.splitlines() if "libcuda.so.1 " in line]
    return Path(places[0] if places else "/usr/lib/x86_64-linux-gnu/libcuda.so.1")


def make_stubs(log: Log, needing: Path, folder: Path) -> None:
    """Make libraries with the functions of `UNUSED` that a library needs; none of them does anything."""
    folder.mkdir(exist_ok=True)
    named = subprocess.run(["nm", "-D", "--undefined-only", needing], capture_output=True, text=True, check=True).stdout
    for name in UNUSED:
        functions = [word.partition("@")[0] for word in named.split() if word.endswith(f"@{name}")]
        source, versions = folder / f"{name}.c", folder / f"{name}.map"
        source.write_text("".join(f"void {function}(void) {{}}\n" for function in functions))
        versions.write_text(f"{name} {{ *; }};\n")
        flags = ["-shared", "-fPIC", f"-Wl,-soname,{name}", f"-Wl,--version-script,{versions}"]
        log.run(f"stub {name}", ["gcc", *flags, source, "-o", folder / name])


def compile_all(log: Log, given: argparse.Namespace, work: Path) -> None:
    """Compile plugin and runner."""
    includes = [word for folder in given.include.split(":") for word in ("-I", folder)]
    versions = [Path(x) / "NvInferVersion.h" for x in given.include.split(":")]
    text = next(path.read_text() for path in versions if path.exists())
    old = "NV_TENSORRT_MAJOR 8" in text or "TRT_MAJOR_ENTERPRISE 8" in text
    if old:
        make_stubs(log, library(given.tensorrt, "libnvinfer_plugin"), work / "stubs")
    nvcc = [given.nvcc, "-std=c++17", "-O2", *includes, "-Xcompiler", "-Wno-deprecated-declarations"]
    nvinfer, nvonnxparser = (library(given.tensorrt, name) for name in ("libnvinfer", "libnvonnxparser"))
    unresolved = ["-Xlinker", "--allow-shlib-undefined"]

    def linked(*files: Path) -> list[object]:
        return [word for file in files for word in ("-Xlinker", file)]

    face = "plugin_v2.cc" if old else "plugin_v3.cc"
    plugin = [SOURCES / "plugin" / name for name in (*CORE, face)]
    shared = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    needs = linked(find_driver(), *([nvinfer] if old else []))
    runner, made = [SOURCES / "runner" / name for name in RUNNER], work / "libliger_run.so"
    soname = ["-Xlinker", "-soname", "-Xlinker", made.name]
    both = {
        "plugin": [*nvcc, *shared, *plugin, *needs, *unresolved, "-o", work / "libligerexport_trt.so"],
        "runner": [
            *nvcc, *shared, *soname, *runner, *linked(nvinfer, nvonnxparser), *unresolved, "-ldl", "-o", made,
        ],
    }  # fmt: skip
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda item: log.run(*item), both.items()))
    command = [SOURCES / "runner" / "main.cc", *linked(made), "-Xlinker", "-rpath", "-Xlinker", "$ORIGIN"]
    log.run("command", [*nvcc, *command, *unresolved, "-o", work / "liger-run"])


def run(given: argparse.Namespace) -> int:
    """Compile, build engines, generate, compare, measure."""
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    paths = [str(given.tensorrt.resolve()), os.environ.get("LD_LIBRARY_PATH", ""), str(work / "stubs")]
    cuda = {"CUDA_MODULE_LOADING": "LAZY", "CUDA_CACHE_MAXSIZE": str(4 << 30)}
    log = Log(work, os.environ | cuda | {"LD_LIBRARY_PATH": ":".join(x for x in paths if x)})
    log.run("device", ["nvidia-smi"])
    if not (work / "liger-run").exists():
        compile_all(log, given, work)
    expected = json.loads(given.expected.with_suffix(".json").read_text())
    for name in ("ids", "tokens"):
        (work / name).write_text(",".join(map(str, expected[name][: None if name == "ids" else -1])))
    command = [work / "liger-run", given.artifact, "--plugin", work / "libligerexport_trt.so", "--ids", f"@{work}/ids"]
    command += ["--tokens", min(GREEDY, len(expected["tokens"])), "--bench", given.bench]
    report: dict[str, Any] = {}
    for batch in given.batches:
        words = [*command, "--batch", given.max_batch or batch, "--sequences", batch, "--profile", 20]
        words += ["--prefill-bench", given.prefills] if batch == 1 else []
        words += ["--follow", f"@{work}/tokens", "--dump-logits", work / "logits", "--dump-state", work / "state"]
        if text := log.run(f"batch {batch}", words):
            made = json.loads(text.splitlines()[-1])
            report[f"batch {batch}"] = row = {
                k: v for k, v in made.items() if k not in ("generated", "state", "layers")
            }
            row["mixers_ms"] = sum(v for k, v in made["layers"].items() if "LigerMixer" in k)
            row["products_ms"] = sum(v for k, v in made["layers"].items() if "LigerLinear" in k)
            row["layers_ms"] = sum(made["layers"].values())
            row |= compare(made, work, expected, given.expected.with_suffix(".npz"))
    if text := log.run("no graph", [*command, "--batch", given.max_batch or 1, "--no-graph"]):
        tokens = json.loads(text.splitlines()[-1])["generated"]["tokens"]
        report["no graph"] = {"tokens_alike": alike([row[0] for row in tokens], expected["tokens"])}
    print(json.dumps({"command": shlex.join(sys.argv), "steps": log.steps, **report}))
    divergences = [row["divergence"]["mean"] for name, row in report.items() if "batch" in name]
    sound = len(divergences) == len(given.batches) and max(divergences) <= MOST_DIVERGENCE
    return 0 if sound and not any(step["code"] for step in log.steps.values()) else 1


def alike(found: Sequence[int], wanted: Sequence[int]) -> int:
    """Return the number of equal tokens before the first that differs."""
    pairs = list(zip(found, wanted, strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def compare(made: dict[str, Any], work: Path, expected: dict[str, Any], torch_file: Path) -> dict[str, Any]:
    """Compare the tokens that the engine generated, and logits and state after it was given torch's tokens."""
    generated = np.array(made["generated"]["tokens"])  # [tokens, B]
    batch, vocabulary = generated.shape[1], expected["vocabulary"]
    wanted = dict(np.load(torch_file))
    logits = np.fromfile(work / "logits", np.float32).reshape(-1, batch, vocabulary)
    found = {x["name"]: x for x in made["state"]}
    data, start = np.fromfile(work / "state", np.uint8), 0
    states: dict[str, np.ndarray] = {}
    for name, x in found.items():
        size = int(np.prod(x["shape"])) * np.dtype(x["dtype"]).itemsize
        states[name] = data[start : start + size].view(x["dtype"]).reshape(x["shape"])
        start += size
    rows_equal = all((x == x[:1]).all() for x in states.values()) and bool((logits == logits[:, :1]).all())
    return {
        "tokens_alike": alike(generated[:, 0].tolist(), expected["tokens"]), "of": len(generated),
        "rows_equal": rows_equal, "steps": len(logits),
        **errors(logits[:, 0], wanted["logits"]),
        "state_error": state_errors({k: x[:1] for k, x in states.items()}, wanted),
        "torch_in_half": expected.get("half"),
    }  # fmt: skip


def errors(found: np.ndarray, wanted: np.ndarray) -> dict[str, Any]:
    """Return the errors of logits `[calls, V]`."""

    def log_softmax(x: np.ndarray) -> np.ndarray:
        x = x.astype(np.float64) - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    divergence = []
    for a, b in zip(wanted, found, strict=True):
        p, q = log_softmax(a), log_softmax(b)
        divergence.append(float((np.exp(p) * (p - q)).sum()))
    return {
        "divergence": {"mean": float(np.mean(divergence)), "largest": max(divergence)},
        "largest_difference": float(np.abs(found - wanted).max()), "largest_logit": float(np.abs(wanted).max()),
        "same_choice": float((found.argmax(-1) == wanted.argmax(-1)).mean()),
    }  # fmt: skip


def state_errors(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> dict[str, float]:
    """Return the largest error of each kind of state, relative to the largest element; slots by their position.

    `slots_alike` is the share of slots that hold the same token; only those count for the errors of keys and values.
    """
    layers: dict[str, dict[str, np.ndarray]] = {}
    found, wanted = by_head(found, wanted), by_head(wanted, wanted)
    for name, tensor in found.items():
        _, layer, kind = name.split(".")
        layers.setdefault(layer, {})[kind] = tensor
    worst: dict[str, float] = {}
    same = total = 0
    for layer, kinds in layers.items():
        ours, theirs = kinds["slot_position"], wanted[f"{layer}.slot_position"]
        for kind, tensor in kinds.items():
            if kind.startswith("slot"):
                continue
            a, b = tensor.astype(np.float64), wanted[f"{layer}.{kind}"]
            worst[kind] = max(worst.get(kind, 0.0), float(np.abs(a - b).max() / max(1e-6, np.abs(b).max())))
        for head in range(ours.shape[1]):
            _, mine, yours = np.intersect1d(ours[0, head], theirs[0, head], return_indices=True)
            full = ours[0, head, mine] >= 0
            same, total = same + int(full.sum()), total + int((theirs[0, head] >= 0).sum())
            for kind in ("slot_key", "slot_value"):
                a = kinds[kind][0, head, mine[full]].astype(np.float64)
                b = wanted[f"{layer}.{kind}"]
                error = np.abs(a - b[0, head, yours[full]]).max(initial=0) / max(1e-6, np.abs(b).max())
                worst[kind] = max(worst.get(kind, 0.0), float(error))
    return worst | {"slots_alike": same / max(1, total)}


def shape(given: argparse.Namespace) -> int:
    """Write the artifact of a shape, without an engine or verification: `reference` gives torch's results."""
    from build import make_checkpoint

    import ligerexport as lx
    from ligerexport.model.config import get_preset

    liger, layers = get_preset(given.preset), given.layers or SHAPES[given.shape]["num_hidden_layers"]
    liger = replace(liger, heads=(given.heads,) * layers) if given.heads else liger
    make_checkpoint(given.checkpoint, given.shape, given.layers, liger)
    lx.build(given.checkpoint, given.output, target="trt", engine=False, sms=(90,),
             max_batch=given.max_batch, max_chunk=given.max_chunk, weights=given.weights, verify=False)  # fmt: skip
    return 0


def reference(given: argparse.Namespace) -> int:
    """Write torch's results for a prompt in fp32: greedy tokens, the logits before each, and the state after them.

    On a GPU, also write the error of torch in fp16. With weights in int8, torch has the values that they stand for.
    """
    import torch

    from ligerexport.checkpoint.convert import load_model
    from ligerexport.exporters.onnx.quantise import dequantise, quantise_rows
    from ligerexport.layers.mixer import layer_specs

    ids = [int(x) for x in (Path(given.ids[1:]).read_text() if given.ids[0] == "@" else given.ids).split(",")]
    model = load_model(given.checkpoint, dtype=torch.float32).eval().to(given.device)
    if given.weights == "int8":
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "score_proj" not in name:
                blocks = quantise_rows(weight.data.cpu().numpy())
                weight.data.copy_(torch.from_numpy(dequantise(blocks, weight.shape[1])))
    sizes = slots_per_head(layer_specs(model.config))

    def follow(tokens: list[int] | None) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        fed, cache, answers = torch.tensor([ids], device=given.device), None, []
        with torch.inference_mode():
            for i in range(given.tokens):
                made = model(fed, past_key_values=cache, use_cache=True)
                cache = made.past_key_values
                answers.append(made.logits[0, -1].float().cpu().numpy())
                fed = made.logits[:, -1:].argmax(-1) if tokens is None else fed.new_tensor([[tokens[i]]])
        state = {f"{i}.{k}": x for i, layer in enumerate(cache.layers) for k, x in layer.state.items()}
        return np.stack(answers), {
            k: (x.float() if x.is_floating_point() else x).cpu().numpy() for k, x in state.items()
        }

    logits, state = follow(None)
    state |= sizes
    np.savez(given.output.with_suffix(".npz"), logits=logits, **state)
    tokens = logits.argmax(-1).tolist()
    described: dict[str, Any] = {"ids": ids, "tokens": tokens, "vocabulary": logits.shape[1]}
    if given.device != "cpu":
        model.half()
        half, rounded = follow(tokens)
        described["half"] = errors(half, logits) | {"state_error": state_errors(
            {f"present.{k}": x for k, x in rounded.items()}, state)}  # fmt: skip
    given.output.with_suffix(".json").write_text(json.dumps(described))
    return 0


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    zero = verbs.add_parser("shape")
    zero.add_argument("shape", choices=SHAPES)
    zero.add_argument("--layers", type=int)
    zero.add_argument("--preset", default="foresight")
    zero.add_argument("--heads", help="sizes of the memories of a layer's KV heads, as in `LigerConfig.heads`")
    zero.add_argument("--weights", default="fp16", help="how weights are stored, as for `ligerexport build`")
    zero.add_argument("--max-chunk", type=int, default=1024)
    zero.add_argument("--max-batch", type=int, default=16)
    zero.add_argument("--checkpoint", type=Path, required=True)
    zero.add_argument("-o", "--output", type=Path, required=True)
    zero.set_defaults(run=shape)
    one = verbs.add_parser("reference")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("--ids", required=True)
    one.add_argument("--tokens", type=int, default=512)
    one.add_argument("--weights", choices=("fp16", "int8"), default="fp16", help="how the engine stores weights")
    one.add_argument("--device", default="cpu")
    one.add_argument("-o", "--output", type=Path, required=True)
    one.set_defaults(run=reference)
    two = verbs.add_parser("run")
    two.add_argument("artifact", type=Path)
    two.add_argument("--tensorrt", type=Path, required=True)
    two.add_argument("--include", required=True)
    two.add_argument("--work", type=Path, required=True)
    two.add_argument("--expected", type=Path, required=True)
    two.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    two.add_argument("--bench", type=int, default=200)
    two.add_argument("--prefills", default="1024", help="tokens of prompts that are timed, 1024,8192")
    two.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[1, 16])
    two.add_argument("--max-batch", type=int, help="largest batch of the engine; default: an engine for each batch")
    two.set_defaults(run=run)
    given = parser.parse_args()
    return int(given.run(given))


if __name__ == "__main__":
    raise SystemExit(main())
