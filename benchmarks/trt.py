"""Build the TensorRT plugin and `liger-run` with nvcc on a GPU machine, run an artifact, and compare it with torch.

On any machine with torch, what is expected; `--ids` is a prompt:

    python benchmarks/trt.py reference CHECKPOINT --ids 1,2,3 --tokens 32 -o expected

On the GPU machine, where only Python is needed; each step goes on after one that failed, and all is in WORK/log.txt:

    python benchmarks/trt.py run ARTIFACT --tensorrt LIBRARIES --include HEADERS --work WORK --expected expected

LIBRARIES holds libnvinfer and libnvonnxparser, HEADERS NvInfer.h, NvOnnxParser.h and nlohmann/json.hpp (several folders
with a colon between them). The last line is JSON.
"""

from __future__ import annotations

import argparse
import array
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = Path(__file__).resolve().parent.parent / "exporters" / "tensorrt"
CORE = ("pack.cc", "plan.cc", "mixer.cc", "face.cc")
RUNNER = ("capi.cc", "session.cc", "engine.cc")
UNUSED = ("libcublas.so.11", "libcublasLt.so.11", "libcudnn.so.8")
"""What libraries of TensorRT 8 name and our engines never call; empty ones do where they are not installed."""
MOST_DIVERGENCE = 0.02
"""Nats between torch's fp32 and the engine's next token, for activations of 16 bits."""


class Log:
    """Runs commands, notes what they said in a file, and goes on whatever comes."""

    def __init__(self, work: Path, environment: dict[str, str]) -> None:
        self.file = (work / "log.txt").open("w", encoding="utf-8")
        self.environment = environment
        self.steps: dict[str, Any] = {}

    def run(self, name: str, command: Sequence[object]) -> str | None:
        """Run one step; return its stdout, or None where it failed."""
        words = [str(word) for word in command]
        begin = time.monotonic()
        done = subprocess.run(words, capture_output=True, text=True, env=self.environment, errors="replace")
        seconds = round(time.monotonic() - begin, 1)
        self.file.write(f"\n== {name}: {done.returncode} after {seconds} s\n$ {shlex.join(words)}\n")
        self.file.write(done.stdout + done.stderr)
        self.file.flush()
        self.steps[name] = {"code": done.returncode, "seconds": seconds}
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).splitlines()[-40:])
            print(f"-- {name} failed ({done.returncode}):\n{tail}", file=sys.stderr)
            return None
        print(f"-- {name}: {seconds} s", file=sys.stderr)
        return done.stdout


def library(folder: Path, name: str) -> Path:
    """Return the shortest name of a library, which may carry a version."""
    found = sorted(folder.glob(f"{name}.so*"), key=lambda path: len(path.name))
    if not found:
        raise SystemExit(f"there is no {name}.so in {folder}")
    return found[0].resolve()


def find_driver() -> Path:
    """Return the CUDA driver's library."""
    text = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True).stdout
    places = [line.rpartition("=> ")[2] for line in text.splitlines() if "libcuda.so.1 " in line]
    return Path(places[0] if places else "/usr/lib/x86_64-linux-gnu/libcuda.so.1")


def compile_all(log: Log, given: argparse.Namespace, work: Path) -> None:
    """Compile plugin and runner."""
    includes = [word for folder in given.include.split(":") for word in ("-I", folder)]
    versions = [Path(x) / "NvInferVersion.h" for x in given.include.split(":")]
    text = next(path.read_text() for path in versions if path.exists())
    old = "NV_TENSORRT_MAJOR 8" in text or "TRT_MAJOR_ENTERPRISE 8" in text
    stubs = work / "stubs"
    stubs.mkdir(exist_ok=True)
    (stubs / "empty.cc").write_text("")
    for name in UNUSED if old else ():
        empty = [stubs / "empty.cc", "-o", stubs / name]
        log.run(f"stub {name}", ["g++", "-shared", "-fPIC", f"-Wl,-soname,{name}", *empty])
    nvcc = [given.nvcc, "-std=c++17", "-O2", *includes, "-Xcompiler", "-Wno-deprecated-declarations"]
    nvinfer, parser = (library(given.tensorrt, name) for name in ("libnvinfer", "libnvonnxparser"))
    unresolved = ["-Xlinker", "--allow-shlib-undefined"]

    def linked(*files: Path) -> list[object]:
        return [word for file in files for word in ("-Xlinker", file)]

    face = "plugin_v2.cc" if old else "plugin_v3.cc"
    plugin = [SOURCES / "plugin" / name for name in (*CORE, face)]
    shared = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    needs = linked(find_driver(), *([nvinfer] if old else []))
    log.run("plugin", [*nvcc, *shared, *plugin, *needs, *unresolved, "-o", work / "libligerexport_trt.so"])
    runner, made = [SOURCES / "runner" / name for name in RUNNER], work / "libliger_run.so"
    soname = ["-Xlinker", "-soname", "-Xlinker", made.name]
    log.run("runner", [*nvcc, *shared, *soname, *runner, *linked(nvinfer, parser), *unresolved, "-ldl", "-o", made])
    command = [SOURCES / "runner" / "main.cc", *linked(made), "-Xlinker", "-rpath", "-Xlinker", "$ORIGIN"]
    log.run("command", [*nvcc, *command, *unresolved, "-o", work / "liger-run"])


def run(given: argparse.Namespace) -> int:
    """Compile, build the engine, generate, measure, compare."""
    work: Path = given.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    paths = [str(given.tensorrt.resolve()), os.environ.get("LD_LIBRARY_PATH", ""), str(work / "stubs")]
    log = Log(work, os.environ | {"LD_LIBRARY_PATH": ":".join(x for x in paths if x)})
    log.run("device", ["nvidia-smi"])
    compile_all(log, given, work)
    expected = json.loads(given.expected.with_suffix(".json").read_text())
    ids = ",".join(map(str, expected["ids"]))
    command = [work / "liger-run", given.artifact, "--plugin", work / "libligerexport_trt.so", "--ids", ids]
    command += ["--tokens", len(expected["tokens"])]
    report: dict[str, Any] = {}
    logits = work / "logits.bin"
    build = ["--build", "--dump-logits", logits, "--dump-state", work / "state.bin"]
    if text := log.run("build and generate", [*command, *build]):
        report["generate"] = json.loads(text.splitlines()[-1])
        report["parity"] = compare(report["generate"], logits, expected, given.expected.with_suffix(".bin"))
    measure = ["--bench", given.bench, "--prefill-bench", given.prefill]
    for name, words in (("graph", []), ("no graph", ["--no-graph"])):
        if text := log.run(name, [*command, *measure, *words]):
            made = json.loads(text.splitlines()[-1])
            report[name] = {key: made.get(key) for key in ("step", "prefill", "state_bytes")}
            report[name]["same_tokens"] = made["generated"]["tokens"] == report.get("generate", {}).get(
                "generated", {}
            ).get("tokens")
    for batch in given.batches:
        if text := log.run(f"batch {batch}", [*command, "--batch", batch, "--bench", given.bench]):
            made = json.loads(text.splitlines()[-1])
            rows = made["generated"]["tokens"]
            report[f"batch {batch}"] = {"step": made["step"], "rows_agree": all(len(set(row)) == 1 for row in rows)}
    print(json.dumps({"steps": log.steps, **report}))
    sound = report.get("parity", {}).get("largest_divergence", math.inf) <= MOST_DIVERGENCE
    return 0 if sound and not any(step["code"] for step in log.steps.values()) else 1


def compare(made: dict[str, Any], logits: Path, expected: dict[str, Any], expected_logits: Path) -> dict[str, Any]:
    """Compare logits up to and with the first token that differs: after it the texts are others."""
    vocabulary = expected["vocabulary"]
    found, wanted = read_floats(logits), read_floats(expected_logits)
    tokens = [row[0] for row in made["generated"]["tokens"]]
    pairs = list(zip(tokens, expected["tokens"], strict=True))
    same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))
    largest, most = 0.0, 0.0
    for i in range(min(same + 1, len(tokens))):
        a, b = (x[i * vocabulary : (i + 1) * vocabulary] for x in (found, wanted))
        largest = max(largest, max(abs(x - y) if math.isfinite(x) else math.inf for x, y in zip(a, b, strict=True)))
        most = max(most, divergence(b, a))
    return {"tokens_alike": same, "of": len(tokens), "largest_difference": largest, "largest_divergence": most}


def read_floats(path: Path) -> array.array[float]:
    """Read a file of fp32."""
    made = array.array("f")
    made.frombytes(path.read_bytes())
    return made


def divergence(wanted: Sequence[float], found: Sequence[float]) -> float:
    """Return the Kullback-Leibler divergence of two distributions over tokens, in nats."""
    if not all(map(math.isfinite, found)):
        return math.inf

    def log_sum(x: Sequence[float]) -> float:
        top = max(x)
        return top + math.log(sum(math.exp(value - top) for value in x))

    a, b = log_sum(wanted), log_sum(found)
    return sum(math.exp(x - a) * ((x - a) - (y - b)) for x, y in zip(wanted, found, strict=True))


def reference(given: argparse.Namespace) -> int:
    """Write what torch makes of a prompt in fp32: greedy tokens, and logits before each of them."""
    import numpy as np
    import torch

    from ligerexport.convert import load_model

    ids = [int(x) for x in given.ids.split(",")]
    model = load_model(given.checkpoint, dtype=torch.float32).eval()
    fed, cache, answers = torch.tensor([ids]), None, []
    with torch.inference_mode():
        for _ in range(given.tokens):
            made = model(fed, past_key_values=cache, use_cache=True)
            cache = made.past_key_values
            answers.append(made.logits[0, -1].numpy())
            fed = made.logits[:, -1:].argmax(-1)
    np.stack(answers).astype(np.float32).tofile(given.output.with_suffix(".bin"))
    tokens = [int(x.argmax()) for x in answers]
    described = {"ids": ids, "tokens": tokens, "vocabulary": len(answers[0])}
    given.output.with_suffix(".json").write_text(json.dumps(described))
    return 0


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("reference")
    one.add_argument("checkpoint", type=Path)
    one.add_argument("--ids", required=True)
    one.add_argument("--tokens", type=int, default=32)
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
    two.add_argument("--prefill", type=int, default=1024)
    two.add_argument("--batches", type=lambda text: [int(x) for x in text.split(",")], default=[4])
    two.set_defaults(run=run)
    given = parser.parse_args()
    return int(given.run(given))


if __name__ == "__main__":
    raise SystemExit(main())
