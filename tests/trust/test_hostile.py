"""Hostile input: the short form of tests/trust/hostile.py, tests of its watches, and inputs that it once found."""

from __future__ import annotations

import ast
import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from conftest import Once
from trt_packs import make_harness

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.checkpoint.sources import resolve
from ligerexport.errors import ArtifactError, CheckpointError, LigerError, UsageError, one_line
from ligerexport.exporters.onnx import screen
from ligerexport.exporters.tensorrt import session as tensorrt
from ligerexport.text.render import Renderer
from ligerexport.text.tokenizer import TextModel

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def short(once: Once, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return the result of the first hundredth of the inputs."""
    output = tmp_path_factory.mktemp("hostile") / "hostile.json"
    pack = once("harness", make_harness)
    options = ["--share", "0.01", "--pack", pack, "-o", output]
    command = [sys.executable, "-W", "ignore", "tests/trust/hostile.py", *options]
    here = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | here, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(output.read_text())


@pytest.mark.skipif(sys.platform != "linux", reason="limits and watches of Linux")
def test_hostile_input_is_refused_or_valid(short: dict[str, Any]) -> None:
    assert {name: row["found"] for name, row in short["kinds"].items() if row["findings"]} == {}
    assert short["inputs"] > 190 and short["refused"] > 100 and short["valid"] > 10


def _outside(place: Path) -> None:
    ctypes.CDLL(None).open(os.fsencode(place / "outside" / "secret"), 0)  # like native code


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "crash": (lambda place: os.abort(), "crash: SIGABRT"),
    "exit": (lambda place: os._exit(0), "crash: it left without a word"),
    "loop": (lambda place: [None for _ in iter(int, 1)], "hang: SIGXCPU"),
    "memory": (lambda place: bytearray(b"x") * (1100 << 20), "memory grew by 1"),
    "much memory": (lambda place: bytearray(5 << 30), "MemoryError"),
    "exception": (lambda place: {}["x"], "KeyError at"),
    "outside": (_outside, "a file outside was opened"),
    "elsewhere": (lambda place: open("/etc/passwd").close(), "open of '/etc/passwd'"),
    "process": (lambda place: subprocess.run(["true"]), "subprocess.Popen"),
    "no hint": (lambda place: (_ for _ in ()).throw(LigerError("x")).__next__(), "no hint"),
}


@pytest.mark.skipif(sys.platform != "linux", reason="limits and watches of Linux")
def test_the_watch_sees_what_it_is_for(tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret").write_text("")
    code = (
        "import sys; sys.path[:0] = ['tests/trust', 'tests']; "
        "import json, pathlib, functools, test_hostile, hostile_worker; "
        f"place = pathlib.Path({str(tmp_path)!r}); bad = list(test_hostile.BAD.values()); "
        "found = hostile_worker.run(range(len(bad)), lambda i: functools.partial(bad[i][0], place), place); "
        "print(json.dumps([outcome.what for _, outcome in found]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for found, (_, expected) in zip(json.loads(done.stdout), BAD.values(), strict=True):
        assert expected in found


def test_operators_are_those_that_the_exporter_writes() -> None:
    written = set()
    exporter = ROOT / "ligerexport" / "exporters" / "onnx"
    for file in exporter.rglob("*.py"):
        if file.name != "screen.py":
            tree = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            written |= {node.value for node in tree if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    for names in screen.OPERATORS.values():
        assert names - screen.EARLIER <= written


@pytest.mark.parametrize("template", ["{{ 'a' * 10**10 }}", "{% for i in range(99999) %}{% for j in range(99999) %}"
                                      "{% endfor %}{% endfor %}"], ids=["memory", "time"])  # fmt: skip
def test_a_template_has_little_memory_and_time(template: str) -> None:
    render = Renderer(template)
    for _ in range(2):
        with pytest.raises(ValueError, match="it takes more than 2 seconds or 512 MB"):
            render()


def test_a_renderer_keeps_its_process() -> None:
    render = Renderer("{{ messages[0] }}")
    assert [render(messages=["a"]), render(messages=["\u00e9\n"])] == ["a", "\u00e9\n"]
    with pytest.raises(ValueError, match="undefined"):
        render()
    assert render(messages=["b"]) == "b"


def test_a_panic_of_the_tokenizer_is_an_error(tmp_path: Path) -> None:
    artifact = toy.build(tmp_path / "artifact")
    file = artifact / "tokenizer.json"
    content = json.loads(file.read_text())
    broken = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}}], "pair": [],
              "special_tokens": {}}  # fmt: skip
    file.write_text(json.dumps(content | {"post_processor": broken}))
    with pytest.raises(ArtifactError, match="does not work"):
        TextModel(artifact).encode("hello")
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    file.write_text(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": [doubling] * 40}}))
    with pytest.raises(ArtifactError, match="characters of one"):
        TextModel(artifact)


def test_a_link_of_a_checkpoint_leads_nowhere_else(built: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("{}")
    model = tmp_path / "hub" / "snapshots" / "1"
    model.mkdir(parents=True)
    (tmp_path / "hub" / "blobs").mkdir()
    (tmp_path / "hub" / "blobs" / "0").write_bytes((built[0] / "config.json").read_bytes())
    (model / "config.json").symlink_to("../../blobs/0")
    assert resolve(model).path == model.resolve()
    (model / "LICENSE").symlink_to(tmp_path / "secret")
    with pytest.raises(CheckpointError, match="LICENSE is a link to a place outside"):
        lx.build(model, tmp_path / "engine")


def test_code_of_a_config_is_left_out(built: tuple[Path, Path]) -> None:
    from ligerexport.layers.mixer import read_config

    content = json.loads((built[0] / "config.json").read_text())
    made = read_config(content | {"auto_map": {"AutoConfig": "evil.C"}, "attn_implementation": "evil/kernel"})
    assert not hasattr(made, "auto_map") and made._attn_implementation != "evil/kernel"
    with pytest.raises(CheckpointError, match="head_dim 1000000000"):
        read_config(content | {"head_dim": 10**9})


def test_code_in_an_artifact_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = toy.build(tmp_path / "artifact")
    artifact = open_artifact(directory)
    (directory / tensorrt.RUNNER_FILE).write_bytes(b"")
    opened: list[str] = []
    monkeypatch.setattr("ctypes.CDLL", lambda file: opened.append(file) or pytest.fail("opened"))
    monkeypatch.delenv(tensorrt.VARIABLE, raising=False)
    with pytest.raises(pytest.fail.Exception):
        tensorrt.open_runner()
    assert opened == [tensorrt.RUNNER_FILE]
    with pytest.raises(ArtifactError, match="not a file of this artifact's manifest"):
        tensorrt.check_plugin(artifact, directory / tensorrt.RUNNER_FILE)
    assert tensorrt.check_plugin(artifact, None) is None
    assert tensorrt.check_plugin(artifact, directory / "model.onnx") == (directory / "model.onnx").resolve()


def test_a_state_that_no_text_leaves_is_refused(built: tuple[Path, Path]) -> None:
    session = lx.load(built[1])
    session.prefill(list(range(20)))
    kept = session.snapshot()
    for position in (10**15, -(10**15)):
        with pytest.raises(UsageError):
            session.restore(lx.Snapshot(kept.model, np.array([position]), kept.tensors))
    name = next(name for name in kept.tensors if name.endswith("slot_position"))
    with pytest.raises(UsageError, match="cannot be the one after 20 tokens"):
        session.restore(lx.Snapshot(kept.model, kept.position, kept.tensors | {name: kept.tensors[name] - 3}))


def test_an_error_is_one_line() -> None:
    error = LigerError("a\nb\x1b[31m", hint="c\nd")
    assert (error.message, error.hint) == ("a b\\x1b[31m", "c d")
    assert len(one_line("x" * 5000)) == 1000
