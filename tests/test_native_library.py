"""Which operator library is loaded: named, brought by a wheel, cached or compiled; and libraries for other machines."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from checkpoints import FORESIGHT, make_checkpoint

import ligerexport as lx
from ligerexport.artifact.artifact import Manifest, open_artifact
from ligerexport.cli import main
from ligerexport.cli.doctor import examine
from ligerexport.errors import ArtifactError, LigerError, MissingDependency, UsageError
from ligerexport.exporters.onnx import backend, native
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


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("two") / "model", FORESIGHT, num_hidden_layers=2)


@pytest.fixture(scope="module")
def both(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact with a graph in native and one in ort."""
    return lx.build(checkpoint, tmp_path_factory.mktemp("both") / "a", lowering="native,ort")


def test_two_graphs_are_both_verified(both: Path) -> None:
    checked = open_artifact(both).manifest.verification
    assert checked["passed"] and checked["fallback"]["passed"]
    assert checked["fallback"]["checks"] == checked["checks"] > 0


def test_two_graphs_read_the_same_weights(checkpoint: Path, tmp_path: Path) -> None:
    """The second adds only its constants to their file."""
    artifact, alone = (
        open_artifact(lx.build(checkpoint, tmp_path / name, weights="int4", lowering=name, verify=False))
        for name in ("native,ort", "ort")
    )
    manifest, other = artifact.manifest, artifact.on_fallback()
    assert manifest.lowerings == "native,ort"
    places = [
        {(name, x.const_value.location, x.const_value.offset) for name, x in ir.load(graph).graph.initializers.items()
         if isinstance(x.const_value, ir.ExternalTensor)}
        for graph in (artifact.graph, other.graph)
    ]  # fmt: skip
    weights = {place for place in places[0] if place[0].startswith("model.")}
    assert weights and weights <= places[1] and {place[1] for place in places[0] | places[1]} == {"model.onnx.data"}
    constants = alone.manifest.files["model.onnx.data"].bytes - alone.manifest.bytes.weights
    assert manifest.files["model.onnx.data"].bytes <= alone.manifest.files["model.onnx.data"].bytes + constants


def test_the_second_graph_runs_where_the_first_cannot(
    both: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It continues from the state of the first, and only one line on stderr tells of it."""
    first = lx.load(both)
    assert first.artifact.manifest.lowering == "native" and "ort" not in capsys.readouterr().err
    ids = np.random.default_rng(0).integers(3, 131, 40)
    logits = first.prefill(ids[:32]).copy()
    request.getfixturevalue("bare")
    backend._warn.cache_clear()
    second, third = lx.load(both), lx.load(both)
    said = capsys.readouterr().err
    assert said.count("so the slower ort graph runs") == said.count("\n") == 1
    assert second.artifact.manifest.lowering == "ort"
    np.testing.assert_allclose(second.prefill(ids[:32]), logits, atol=1e-4)
    third.restore(first.snapshot())
    for token in ids[32:]:
        np.testing.assert_allclose(third.step(int(token)), first.step(int(token)), atol=1e-4)
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(both / "manifest.json"))  # where no library can be written
    assert lx.load(both).artifact.manifest.lowering == "ort" and "cannot write" in capsys.readouterr().err
    monkeypatch.setenv(native.VARIABLE, str(both / "none.so"))
    with pytest.raises(LigerError, match=r"none\.so"):
        lx.load(both)


def test_which_graphs_an_artifact_may_have(both: Path, checkpoint: Path, tmp_path: Path) -> None:
    for pair in ("ort,native", "native,portable", "native,ort,ort"):
        with pytest.raises(UsageError, match="on the same weights") as caught:
            lx.build(checkpoint, tmp_path / "b", lowering=pair)
        assert caught.value.hint == "only native,ort fit"
    data = json.loads((both / "manifest.json").read_text())
    assert Manifest.from_dict(data).lowerings == "native,ort"
    shutil.copytree(both, tmp_path / "c")
    del data["files"]["fallback.onnx"]
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match="does not list the graph fallback"):
        open_artifact(tmp_path / "c")
