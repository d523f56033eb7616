"""The program `tests/trt/harness.cc`: the core of the TensorRT plugin on a driver that records, with sanitizers."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).parent.parent
PLUGIN = ROOT / "ligerexport" / "exporters" / "tensorrt" / "plugin"
PACK, READER = "kernels.liger", "reader"
"""A pack of kernels, and the program beside it."""
ENVIRONMENT = {"ASAN_OPTIONS": "detect_leaks=0:exitcode=99:hard_rss_limit_mb=1024", "UBSAN_OPTIONS": "exitcode=99"}
"""Exit code 99 ends the program after a sanitizer's finding, or above a gigabyte of memory."""


def cuda_headers() -> Path:
    """Return the directory of cuda.h."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "include"


def compile_harness(program: Path) -> None:
    """Compile the program with sanitizers for bad reads and overflows."""
    core = ("pack.cc", "plan.cc", "node.cc", "mixer.cc", "linear.cc")
    sources = [*(PLUGIN / name for name in core), ROOT / "tests" / "trt" / "harness.cc"]
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *sanitizers, "-isystem", cuda_headers(), "-I", PLUGIN]
    subprocess.run(["g++", *flags, *sources, "-o", program, "-ldl"], check=True)
