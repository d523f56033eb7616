"""The operator library of the lowering `native`: one that is named, that a wheel brought, or that is compiled here.

Its sources are beside this file: the memory itself in plain C++, and ONNX Runtime's interface to it. Compiling needs
only a C++ compiler. The library is cached under a name that changes with sources, processor and the variable CXX, so
that a compiler is needed only once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_int64, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from ligerexport.errors import LigerError, MissingDependency
from ligerexport.exporters.onnx.native.cpus import best, levels, machine, processor
from ligerexport.staging import CACHE_HINT, cache_dir, staged_directory, staged_file

if TYPE_CHECKING:
    import onnxruntime

DOMAIN = "ligerexport"
"""Domain of the operators."""
RAGGED_OPERATORS = {"activation": "RaggedMemory", "float16": "RaggedMemoryFloat16", "int8": "RaggedMemoryInt8"}
"""Operators of a ragged layer by the type of its slots, with the operands of `BoundedMemory`."""
EXACT_OPERATORS = {"RaggedMemoryFloat16": "RaggedMemory", "RaggedMemoryInt8": "RaggedMemoryExact"}
"""What computes the same without rounding, with slots in fp32."""
VARIABLE = "LIGEREXPORT_NATIVE_LIBRARY"
"""Environment variable that names a library, or a directory that `compile_levels` wrote."""

_COMPILERS = ("c++", "g++", "clang++")
_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread")
_INSTALL = {
    "xcode-select": "xcode-select --install",
    "apt-get": "apt-get install g++",
    "dnf": "dnf install gcc-c++",
    "zypper": "zypper install gcc-c++",
    "pacman": "pacman -S gcc",
}
"""Command that installs a C++ compiler, by a program that only such systems have."""


def register(options: onnxruntime.SessionOptions) -> None:
    """Let a session load graphs of the lowering `native`.

    Raises:
        MissingDependency: There is no library and no C++ compiler.
        LigerError: The compiler fails, or the library cannot be loaded.
    """
    path = library()
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime's own classes have no common base
        said = str(error).strip().partition("\n")[0]
        raise LigerError(f"{path} cannot be loaded: {said}", hint=f"unset {VARIABLE}, or remove this file") from error


def check_ready() -> None:
    """Check that there is a library, or that one can be compiled and written into the cache.

    Raises:
        MissingDependency: There is no library and no C++ compiler.
        LigerError: The cache is not writable, or `VARIABLE` names no library.
    """
    if find() is not None:
        return
    _compiler()
    path = _cached()
    place = next(parent for parent in path.parents if os.path.exists(parent))
    if not (os.path.isdir(place) and os.access(place, os.W_OK | os.X_OK)):
        raise LigerError(f"cannot write {path}: {place} is not a writable directory", hint=CACHE_HINT)


def find() -> Path | None:
    """Return the library to load: the one that `VARIABLE` names, that of the wheel, or a compiled one in the cache.

    Raises:
        LigerError: `VARIABLE` names no library for this processor.
    """
    if named := os.environ.get(VARIABLE):
        place = Path(named)
        path = best(place) if place.is_dir() else place
        if path is None or not path.is_file():
            raise LigerError(
                f"{VARIABLE} is {named}, where no library for this processor is",
                hint=f"unset {VARIABLE}, or compile one: ligerexport native --target {machine()} -o operator",
            )
        return path
    path = best(Path(__file__).parent / "prebuilt") or _cached()
    return path if os.path.isfile(path) else None  # a directory that may not be read counts as one without it


@lru_cache(maxsize=1)
def library() -> Path:
    """Return the path of the library; compile it first if there is none.

    Raises:
        MissingDependency: There is no library and no C++ compiler.
        LigerError: The compiler fails, or `VARIABLE` names no library.
    """
    path = find()
    if path is None:
        path = _cached()
        native = "-mcpu=native" if machine() == "aarch64" else "-march=native"
        compiler = _compiler()
        with staged_file(path, hint=CACHE_HINT) as made:
            _compile(compiler, [native], made)
    return path


def take_back() -> Callable[..., int]:
    """Return the library's function `liger_take_back`; see `ort_operator.cc`."""
    function = ctypes.CDLL(str(library())).liger_take_back
    function.argtypes = [c_void_p, *[c_int64] * 4, c_void_p, c_void_p]
    return function  # type: ignore[no-any-return]


def compile_levels(target: str, output: Path, *, force: bool = False) -> list[Path]:
    """Compile the library of each level of a type of machine, with a cross compiler if it is another type than this.

    Args:
        target: Key of `levels()`.
        output: Directory to make.
        force: Whether an older one may be replaced.

    Raises:
        MissingDependency: There is no compiler for the target.
        LigerError: The compiler fails.
    """
    rows = levels()[target]
    compiler = _compiler() if target == machine() else _cross_compiler(target)
    with staged_directory(output, force=force, marker=rows[-1].file) as stage, ThreadPoolExecutor() as pool:
        list(pool.map(lambda row: _compile(compiler, row.flags, stage / row.file), rows))
    return [output / row.file for row in rows]


def _cross_compiler(target: str) -> str:
    name = f"{target}-linux-gnu-g++"
    found = os.environ.get("CXX") or shutil.which(name)
    if found is None:
        package = f"g++-{target.replace('_', '-')}-linux-gnu"
        raise MissingDependency(name, hint=f"apt-get install {package}, or set CXX to a compiler for {target}")
    return found


def _compiler() -> str:
    found = os.environ.get("CXX") or next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        programs = _INSTALL if sys.platform == "darwin" else list(_INSTALL)[1:]
        install = next((_INSTALL[name] for name in programs if shutil.which(name)), "install g++ or clang++")
        raise MissingDependency(
            "a C++ compiler or a compiled operator",
            hint=f"{install}; or build with --lowering ort, which needs neither",
        )
    return found


def _cached() -> Path:
    """Return the path of the library that this machine compiles."""
    digest = hashlib.sha256("\n".join([*_FLAGS, os.environ.get("CXX", ""), processor()]).encode())
    for source in sorted(path for path in Path(__file__).parent.iterdir() if path.suffix in (".h", ".cc")):
        digest.update(source.read_bytes())
    return cache_dir() / "native" / f"liger-{digest.hexdigest()[:16]}.so"


def _compile(compiler: str, flags: Sequence[str], output: Path) -> None:
    sources = sorted(str(path) for path in Path(__file__).parent.glob("*.cc"))
    done = subprocess.run([compiler, *_FLAGS, *flags, *sources, "-o", str(output)], capture_output=True, text=True)
    if done.returncode:
        raise LigerError(
            f"{compiler} failed: {done.stderr.strip().partition(chr(10))[0]}",
            hint="set CXX to another C++ compiler, or build with --lowering ort, which needs none",
        )
