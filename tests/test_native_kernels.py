"""The kernels of the lowering `native` on each level of each processor, under both compilers and the sanitizers.

`tests/native/kernels.cc` compares them with plain arithmetic. Levels of another processor run in an emulator. Debian
has what this needs as `clang`, `g++-aarch64-linux-gnu` and `qemu-user`; what is missing is skipped.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from ligerexport.exporters.onnx import native

SOURCE = Path(__file__).parent / "native" / "kernels.cc"
SANITIZERS = ("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COMPILERS = {"gcc": ("g++",), "clang": ("clang++", "clang++-19")}


def found(*names: str) -> str:
    """Return the first program of these that is installed; skip the test without one."""
    path = next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip(f"{names[0]} is not installed")
    return path


def check(compiler: str, flags: tuple[str, ...], place: Path, *runner: str) -> str:
    """Compile the comparison without warnings, run it, and return its level."""
    program = place / "kernels"
    command = [compiler, "-std=c++17", "-O1", *flags, "-Wall", "-Wextra", "-I", str(Path(native.__file__).parent)]
    made = subprocess.run([*command, str(SOURCE), "-o", str(program)], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert not re.search(r"native/\S+ warning", made.stderr), made.stderr  # headers of gcc warn of themselves
    done = subprocess.run([*runner, str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.partition(":")[0]


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="not an x86-64 processor")
@pytest.mark.parametrize(
    ("compiler", "level", "march", "flags"),
    [
        ("gcc", "avx2", "x86-64-v3", SANITIZERS),
        ("clang", "avx2", "x86-64-v3", SANITIZERS),
        ("clang", "plain", "x86-64", ()),
    ],
)
def test_levels_of_x86(compiler: str, level: str, march: str, flags: tuple[str, ...], tmp_path: Path) -> None:
    assert check(found(*COMPILERS[compiler]), (f"-march={march}", *flags), tmp_path) == level


@pytest.mark.parametrize("compiler", COMPILERS)
def test_this_processor(compiler: str, tmp_path: Path) -> None:
    arm = platform.machine() in ("arm64", "aarch64")
    check(found(*COMPILERS[compiler]), ("-mcpu=native" if arm else "-march=native",), tmp_path)


@pytest.mark.parametrize(
    ("processor", "level"), [("cortex-a72", "neon"), ("cortex-a76", "dotprod"), ("neoverse-v1", "i8mm")]
)
def test_levels_of_arm(processor: str, level: str, tmp_path: Path) -> None:
    """Neoverse V1 has SVE, which compilers use for what is not written with intrinsics."""
    compiler, emulator = found("aarch64-linux-gnu-g++"), found("qemu-aarch64", "qemu-aarch64-static")

    assert check(compiler, (f"-mcpu={processor}", "-static"), tmp_path, emulator, "-cpu", processor) == level
