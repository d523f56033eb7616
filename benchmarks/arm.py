"""Count the instructions that a token takes on ARM, and the cycles of the products of the lowering `native`.

    python benchmarks/arm.py --artifact ARTIFACT --runtime DIRECTORY -o FILE

The artifact is one of `build --lowering native,ort`, whose two graphs share their weights; without it, only cycles are
found. `DIRECTORY` has `libonnxruntime.so` for aarch64, as the package `onnxruntime-node` has it. A whole process runs
in QEMU's emulator of a Cortex-A76, and a plugin of QEMU counts. Debian 12 has what this needs as `qemu-user`, `gcc`,
`g++-aarch64-linux-gnu` and `llvm`; the `qemu-user` of later releases takes no plugins. A count hardly differs from run
to run, so one run is enough. Cycles are those that `llvm-mca` finds on a Neoverse N1, which is close to a Cortex-A76,
for the loop over the blocks of two rows.
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
PROCESSOR = "cortex-a76"
CPUINFO = """\
processor : 0
Features : fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer : 0x41
CPU architecture: 8
CPU variant : 0x4
CPU part : 0xd0b
CPU revision : 1
"""
"""What Linux says of the processor, which ONNX Runtime reads."""


def compile_step(place: Path, runtime: Path) -> None:
    """Compile the operator as `operator.so`, the program as `steps` and the plugin as `count.so`."""
    operator = (*COMPILE, f"-mcpu={PROCESSOR}", "-fPIC", "-shared", str(OPERATOR / "ort_operator.cc"))
    subprocess.run([*operator, "-o", str(place / "operator.so")], check=True)
    example = ROOT / "examples" / "cpp"
    (place / "nlohmann").symlink_to("/usr/include/nlohmann")
    sources = [str(example / name) for name in ("session.cpp", "state.cpp")]
    sources += [str(Path(__file__).with_name("arm_steps.cpp"))]
    headers = [f"-I{x}" for x in (example, ROOT / "tests" / "ort", place)]
    library = (f"-L{runtime}", "-lonnxruntime")
    subprocess.run([*COMPILE, *headers, *sources, *library, "-o", str(place / "steps")], check=True)
    plugin = str(Path(__file__).with_name("arm_count.c"))
    subprocess.run(["gcc", "-O2", "-fPIC", "-shared", plugin, "-o", str(place / "count.so")], check=True)


def make_root(place: Path) -> None:
    """Make the emulated machine's root: the libraries of the compiler, and the processor as ONNX Runtime reads it."""
    root = place / "root"
    (root / "proc").mkdir(parents=True)
    (root / "lib").symlink_to("/usr/aarch64-linux-gnu/lib")
    (root / "proc" / "cpuinfo").write_text(CPUINFO)


def run(place: Path, artifact: Path, runtime: Path, operator: str, tokens: int) -> dict[str, float]:
    """Return million instructions a token for the prompt and for one more token."""
    command = ["qemu-aarch64", "-cpu", PROCESSOR, "-L", str(place / "root"), "-E", f"LD_LIBRARY_PATH={runtime}"]
    command += ["-plugin", str(place / "count.so"), str(place / "steps"), str(artifact), operator, str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    _, *found = map(int, done.stdout.split())
    return {part: n / size / 1e6 for part, n, size in zip(PARTS, found, (tokens, 1), strict=True)}


def loops(code: str) -> Iterator[list[str]]:
    """Yield the bodies of all loops of an assembly."""
    lines = [line.strip() for line in code.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".L") and line.endswith(":")}
    for i, line in enumerate(lines):
        target = re.match(r"(?:b\.?\w*|cbn?z|tbn?z)\s.*?(\.L\d+)$", line)
        if target and labels.get(target[1], i) < i:
            yield lines[labels[target[1]] : i + 1]


def cycles(place: Path, bits: int, block: int) -> float:
    """Return the cycles that 32 codes of one token take: those of the loop with the most products."""
    source, made = place / "rows.cc", place / "rows.s"
    source.write_text(
        '#include "block_linear.h"\n'
        f"template void liger::multiply_run<{bits}, {block // 32}>("
        "const liger::BlockMatrix&, int64_t, int64_t, const liger::RoundedInputs&, int64_t, float*);\n"
    )
    subprocess.run([*COMPILE, f"-mcpu={PROCESSOR}", f"-I{OPERATOR}", "-S", str(source), "-o", str(made)], check=True)
    body = max(loops(made.read_text()), key=lambda lines: (sum("dot" in x for x in lines), -len(lines)))
    codes = sum(line.startswith(("sdot", "usdot")) for line in body) * 16 / 32  # in units of 32
    text = "\n".join(x for x in body if not x.startswith("."))
    mca = [MCA, "-mtriple=aarch64", "-mcpu=neoverse-n1", "-iterations=200"]
    done = subprocess.run(mca, input=text, capture_output=True, text=True, check=True)
    return float(re.findall(r"Total Cycles:\s+(\d+)", done.stdout)[0]) / 200 / codes


def main() -> None:
    """Count all of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", type=Path)
    parser.add_argument("--runtime", type=Path)
    parser.add_argument("--tokens", type=int, default=16, help="tokens of the prompt")
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    found: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "processor": PROCESSOR}
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found["cycles for 32 codes"] = {
            f"{bits} bit, blocks of {block}": round(cycles(place, bits, block), 2)
            for bits in (4, 8)
            for block in (32, 64, 128)
        }
        print(found["cycles for 32 codes"], flush=True)
        if args.artifact:
            compile_step(place, args.runtime)
            make_root(place)
            for kind, operator in (("native", str(place / "operator.so")), ("ort", "")):
                found[kind] = run(place, args.artifact, args.runtime, operator, args.tokens)
                print(kind, found[kind], flush=True)
            found["tokens of the prompt"] = args.tokens
            found["native over ort"] = {part: found["native"][part] / found["ort"][part] for part in PARTS}
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
