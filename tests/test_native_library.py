"""Which operator library is loaded: named, brought by a wheel, cached or compiled; and libraries for other machines."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from ligerexport.cli import main
from ligerexport.cli.doctor import examine
from ligerexport.errors import LigerError, MissingDependency
from ligerexport.exporters.onnx import native
from ligerexport.exporters.onnx.native import cpus

A72 = "asimd crc32"
A76 = "asimd atomics fphp asimdhp asimddp"
N2 = A76 + " i8mm sve"
HASWELL = "avx avx2 fma f16c bmi2 movbe"
ICE_LAKE = HASWELL + " avx512f avx512bw avx512cd avx512dq avx512vl avx512_vnni"


def cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, *features: str) -> None:
    """Give this machine other cores."""
    word = "flags" if machine == "x86_64" else "Features"
    text = "\n\n".join(f"processor\t: {i}\n{word}\t: {has}" for i, has in enumerate(features))
    (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpus, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(cpus.platform, "machine", lambda: machine)


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("aarch64", [A72, A72], "base"),
        ("aarch64", [A76, A76], "dotprod"),
        ("aarch64", [N2], "i8mm"),
        ("aarch64", [N2, A72], "base"),  # a process may move to the small core
        ("arm64", [], None),  # a Mac, which has no such file
        ("x86_64", ["sse4_2 avx"], None),
        ("x86_64", [HASWELL], "avx2"),
        ("x86_64", [HASWELL + " avx_vnni"], "avxvnni"),
        ("x86_64", [ICE_LAKE], "avx512vnni"),
        ("riscv64", ["v"], None),
    ],
)
def test_the_fastest_level_that_every_core_has(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: str, features: list[str], expected: str | None
) -> None:
    cores(monkeypatch, tmp_path, machine, *features)
    for row in (row for rows in cpus.levels().values() for row in rows):
        (tmp_path / row.file).touch()
    found = cpus.best(tmp_path)
    assert found == (tmp_path / f"liger-{machine}-{expected}.so" if expected else None)
    if expected in ("dotprod", "avx512vnni"):  # a directory with fewer libraries
        assert found is not None
        found.unlink()
        below = {"dotprod": "base", "avx512vnni": "avx2"}[expected]
        assert cpus.best(tmp_path) == tmp_path / f"liger-{machine}-{below}.so"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without a compiler and with an empty cache; its directory."""
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(native.VARIABLE, raising=False)
    monkeypatch.setattr(native, "__file__", str(tmp_path / "native" / "__init__.py"))
    (tmp_path / "native" / "prebuilt").mkdir(parents=True)
    return tmp_path


def test_where_the_library_is_found(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cached one needs no compiler, a wheel's is preferred to it, and a named one to both."""
    cores(monkeypatch, bare, "x86_64", HASWELL)
    cached = native._cached()
    cached.parent.mkdir(parents=True)
    cached.touch()
    native.check_ready()
    assert native.library.__wrapped__() == cached
    brought = bare / "native" / "prebuilt" / "liger-x86_64-avx2.so"
    brought.touch()
    assert native.library.__wrapped__() == brought
    for place in (bare / "named", bare / "named" / brought.name):
        monkeypatch.setenv(native.VARIABLE, str(place))
        with pytest.raises(LigerError, match="where no library for this processor is") as caught:
            native.library.__wrapped__()
        assert "ligerexport native --target x86_64 -o operator" in str(caught.value.hint)
    brought.parent.rename(bare / "named")
    for place in (bare / "named", bare / "named" / brought.name):
        monkeypatch.setenv(native.VARIABLE, str(place))
        assert native.library.__wrapped__() == bare / "named" / brought.name


def test_another_processor_does_not_take_the_cached_library(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = set()
    for has in (HASWELL, ICE_LAKE):
        cores(monkeypatch, bare, "x86_64", has)
        paths.add(native._cached())
    monkeypatch.setenv("CXX", "clang++")
    assert len(paths | {native._cached()}) == 3


def test_without_a_library_and_a_compiler(bare: Path) -> None:
    """Loading, `doctor` and `native --target` name the command that helps."""
    for name in ("apt-get", "xcode-select"):
        (bare / name).touch(stat.S_IRWXU)
    with pytest.raises(MissingDependency) as caught:
        native.library.__wrapped__()
    assert caught.value.exit_code == 4 and "apt-get install g++; or build with --lowering ort" in str(caught.value.hint)
    row = next(check for check in examine() if check.name == "operator of native")
    assert not row.ok and not row.needed and row.mend == caught.value.hint
    other = next(name for name in cpus.levels() if name != cpus.machine())
    with pytest.raises(MissingDependency, match=f"{other}-linux-gnu-g") as caught:
        native.compile_levels(other, bare / "out")
    assert "apt-get install g++-" in str(caught.value.hint)


def test_a_library_that_cannot_be_loaded(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    (bare / "broken.so").write_bytes(b"no library")
    monkeypatch.setattr(native, "library", lambda: bare / "broken.so")
    with pytest.raises(LigerError, match=r"broken\.so cannot be loaded"):
        native.register(onnxruntime.SessionOptions())


def test_the_command_compiles_every_level(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\nwords="$*"\nwhile [ "$1" != -o ]; do shift; done\necho "$words" > "$2"\n')
    compiler.chmod(stat.S_IRWXU)
    monkeypatch.setenv("CXX", str(compiler))
    for force in ([], ["--force"]):
        with pytest.raises(SystemExit) as done:
            main(["native", "--target", "aarch64", "-o", str(tmp_path / "out"), "--json", *force])
        assert done.value.code == 0
        paths = [Path(name) for name in json.loads(capsys.readouterr().out)["libraries"]]
        for path, row in zip(paths, cpus.levels()["aarch64"], strict=True):
            words = path.read_text().split()
            assert path.name == row.file and set(row.flags) <= set(words) and words[-3].endswith("ort_operator.cc")
    with pytest.raises(SystemExit) as done:
        main(["native", "--target", "aarch64", "-o", str(tmp_path / "out")])
    assert done.value.code == 2
