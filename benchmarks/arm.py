"""Count the instructions that a token takes on ARM, and the cycles of the products of the lowering `native`.

    python benchmarks/arm.py --native ARTIFACT --ort ARTIFACT --runtime DIRECTORY -o FILE

Both artifacts are of one checkpoint with the same weights; without them, only cycles are found. `DIRECTORY` has
`libonnxruntime.so` for aarch64, as the package `onnxruntime-node` has it. A whole process runs in QEMU's emulator
of a Cortex-A76, which logs each block that it executes; Debian has what this needs as `qemu-user`,
`g++-aarch64-linux-gnu` and `llvm`. A count hardly differs from run to run, so one run is enough. Cycles are those
that `llvm-mca` finds on a Neoverse N1, which is close to a Cortex-A76, for the loop over the blocks of two rows.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
OPERATOR = ROOT / "ligerexport" / "exporters" / "onnx" / "native"
COMPILE = ("aarch64-linux-gnu-g++", "-std=c++17", "-O3")
MCA = next(filter(None, map(shutil.which, ("llvm-mca-19", "llvm-mca"))), "llvm-mca")
PARTS = ("prompt", "decode")


def compile_step(place: Path, runtime: Path, processor: str) -> None:
    """Compile the operator as `operator.so` and the program as `steps`."""
    operator = (*COMPILE, f"-mcpu={processor}", "-fPIC", "-shared", str(OPERATOR / "ort_operator.cc"))
    subprocess.run([*operator, "-o", str(place / "operator.so")], check=True)
    example = ROOT / "examples" / "cpp"
    (place / "nlohmann").symlink_to("/usr/include/nlohmann")
    sources = [str(example / name) for name in ("session.cpp", "state.cpp")]
    sources += [str(Path(__file__).with_name("arm_steps.cpp"))]
    headers = [f"-I{x}" for x in (example, ROOT / "tests" / "ort", place)]
    library = (f"-L{runtime}", "-lonnxruntime")
    subprocess.run([*COMPILE, *headers, *sources, *library, "-o", str(place / "steps")], check=True)


def count(log: Iterator[bytes]) -> list[int]:
    """Return the instructions between the marks of a log of QEMU."""
    sizes: dict[bytes, int] = {}  # of blocks, by address
    counts: list[int] = []
    block = b""
    for line in log:
        if line.startswith(b"Trace"):
            if counts:
                counts[-1] += sizes[line.split(b"/", 2)[1]]
        elif line.startswith(b"0x"):
            if not block:
                block = line[2 : line.index(b":")].rjust(16, b"0")
                sizes[block] = 0
            sizes[block] += 1
        elif b"getppid" in line:
            counts.append(0)
        else:
            block = b""
    return counts[:-1]


def run(place: Path, artifact: Path, runtime: Path, processor: str, tokens: int) -> dict[str, float]:
    """Return million instructions a token for the prompt and for one more token."""
    command = ["qemu-aarch64", "-cpu", processor, "-L", "/usr/aarch64-linux-gnu", "-E", f"LD_LIBRARY_PATH={runtime}"]
    command += ["-d", "exec,nochain,in_asm,strace", str(place / "steps"), str(artifact), str(place / "operator.so")]
    with subprocess.Popen([*command, str(tokens)], stderr=subprocess.PIPE) as process:
        assert process.stderr is not None
        found = count(process.stderr)
    return {part: n / size / 1e6 for part, n, size in zip(PARTS, found, (tokens, 1), strict=True)}


def loops(code: str) -> Iterator[list[str]]:
    """Yield the bodies of all loops of an assembly."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".L") and line.endswith(":")}
    for i, line in enumerate(lines):
        target = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\d+)$", line)
        if target and labels.get(target[1], i) < i:
            yield lines[labels[target[1]] : i + 1]


def cycles(place: Path, bits: int, block: int, processor: str) -> float:
    """Return the cycles that 32 codes of one token take: those of the loop with the most products."""
    source, made = place / "rows.cc", place / "rows.s"
    source.write_text(
        '#include "block_linear.h"\n'
        f"template void liger::multiply_run<{bits}, {block // 32}>("
        "const liger::BlockMatrix&, int64_t, int64_t, const liger::RoundedInputs&, int64_t, float*);\n"
    )
    subprocess.run([*COMPILE, f"-mcpu={processor}", f"-I{OPERATOR}", "-S", str(source), "-o", str(made)], check=True)
    body = max(loops(made.read_text()), key=lambda lines: (sum("dot" in x for x in lines), -len(lines)))
    codes = sum(line.startswith(("sdot", "usdot")) for line in body) * 16 / 32  # in units of 32
    text = "\n".join(x for x in body if not x.startswith("."))
    mca = [MCA, "-mtriple=aarch64", "-mcpu=neoverse-n1", "-iterations=200"]
    done = subprocess.run(mca, input=text, capture_output=True, text=True, check=True)
    return float(re.findall(r"Total Cycles:\s+(\d+)", done.stdout)[0]) / 200 / codes


def main() -> None:
    """Count all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("native", "ort", "runtime"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--processor", default="cortex-a76")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "processor": args.processor}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found["cycles for 32 codes"] = {
            f"{bits} bit, blocks of {block}": round(cycles(place, bits, block, args.processor), 2)
            for bits in (4, 8)
            for block in (32, 64, 128)
        }
        print(found["cycles for 32 codes"], flush=True)
        if args.native:
            compile_step(place, args.runtime, args.processor)
            for kind in ("native", "ort"):
                found[kind] = run(place, getattr(args, kind), args.runtime, args.processor, args.tokens)
                print(kind, found[kind], flush=True)
            found["native over ort"] = {part: found["native"][part] / found["ort"][part] for part in PARTS}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
