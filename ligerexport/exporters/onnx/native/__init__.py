"""The operator library of the lowering `native`, compiled for this machine's processor when it is first needed.

Its sources are beside this file: the memory itself in plain C++, and ONNX Runtime's interface to it. Compiling needs
only a C++ compiler. The library is cached under a name that changes with sources, compiler and processor.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ligerexport.errors import LigerError, MissingDependency
from ligerexport.staging import CACHE_HINT, cache_dir, staged_file

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "ligerexport"
"""Domain of the operators."""
RAGGED_OPERATORS = {"activation": "RaggedMemory", "float16": "RaggedMemoryFloat16", "int8": "RaggedMemoryInt8"}
"""Operators of a ragged layer by the type of its slots, with the operands of `BoundedMemory`."""
EXACT_OPERATORS = {"RaggedMemoryFloat16": "RaggedMemory", "RaggedMemoryInt8": "RaggedMemoryExact"}
"""What computes the same without rounding, with slots in fp32."""

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")


def register(options: onnxruntime.SessionOptions) -> None:
    """Let a session load graphs of the lowering `native`.

    Raises:
        MissingDependency: There is no C++ compiler.
        LigerError: The compiler fails.
    """
    options.register_custom_ops_library(str(library()))


def check_ready() -> None:
    """Check that the library is in the cache, or that it can be compiled and written there.

    Raises:
        MissingDependency: There is no C++ compiler.
        LigerError: The cache is not writable.
    """
    _, path = _command()
    place = next(parent for parent in path.parents if os.path.exists(parent))
    if not os.path.isfile(path) and not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        raise LigerError(f"cannot write {path}: {place} is not a writable directory", hint=CACHE_HINT)


@lru_cache(maxsize=1)
def library() -> Path:
    """Return the path of the library; compile it first if it is not in the cache.

    Raises:
        MissingDependency: There is no C++ compiler.
        LigerError: The compiler fails.
    """
    command, path = _command()
    if not os.path.isfile(path):  # a directory that may not be read counts as one without it
        with staged_file(path, hint=CACHE_HINT) as made:
            _compile([*command, "-o", str(made)])
    return path


def _command() -> tuple[list[str], Path]:
    """Return the command that compiles the library, without its output option, and the library's path."""
    compiler = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise MissingDependency(
            "a C++ compiler",
            hint="install g++ or clang++, or set CXX; or build with --lowering ort, which needs none",
        )
    native = "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native"
    sources = sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cc"))
    features = _compile([compiler, native, "-dM", "-E", "-x", "c++", os.devnull])  # identify compiler and processor
    digest = hashlib.sha256("\n".join([*_FLAGS, features]).encode())
    for source in sources:
        digest.update(source.read_bytes())
    path = cache_dir() / "native" / f"liger-{digest.hexdigest()[:16]}.so"
    return [compiler, *_FLAGS, native, *(str(x) for x in sources if x.suffix == ".cc")], path


def _compile(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise LigerError(
            f"{command[0]} failed: {done.stderr.strip().partition(chr(10))[0]}",
            hint="set CXX to another C++ compiler, or build with --lowering ort, which needs none",
        )
    return done.stdout
