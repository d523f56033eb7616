"""Files, functions and parameter lists are short enough to be read at once."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import ligerexport as lx

ROOT = Path(__file__).parent.parent
LINES, BODY, PARAMETERS = 450, 60, 10
SOURCES = {".py", ".cc", ".cpp", ".c", ".h", ".mjs"}
WIDE = ("jit", "torch.library", "custom_op", "register_fake")
"""Decorators of functions whose signature has another origin: a kernel or an operator."""


def sources() -> list[Path]:
    """Return each code file of the project once."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs a git checkout")
    files = (ROOT / name for name in listed.stdout.split("\0") if name)
    return [file for file in files if file.suffix in SOURCES and file.is_file() and not file.is_symlink()]


def functions(file: Path) -> Iterator[tuple[ast.FunctionDef, int, int]]:
    """Yield every function with the number of its lines, without its docstring, and the number of its parameters."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            lines = node.end_lineno - node.lineno + 1 - (doc.end_lineno - doc.lineno + 1 if doc else 0)  # type: ignore[operator]
            taken = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            yield node, lines, len([part for part in taken if part.arg not in ("self", "cls")])


def is_wide(file: Path, node: ast.FunctionDef) -> bool:
    """Return whether a function's number of parameters is decided elsewhere."""
    marks = " ".join(ast.unparse(mark) for mark in node.decorator_list)
    return file.parent.name == "cli" or node.name in lx.__all__ or any(mark in marks for mark in WIDE)


def test_files_are_short() -> None:
    for file in sources():
        assert len(file.read_text(encoding="utf-8").splitlines()) <= LINES, file


def test_functions_are_short_and_narrow() -> None:
    for file in sources():
        if file.suffix == ".py":
            for node, lines, parameters in functions(file):
                where = f"{file}:{node.lineno}: {node.name}"
                assert lines <= BODY or is_wide(file, node), f"{where} has {lines} lines"
                assert parameters <= PARAMETERS or is_wide(file, node), f"{where} has {parameters} parameters"
