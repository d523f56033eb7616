"""No process that we start sends telemetry or leaves a device id behind, unless its user wants it.

The processes do not get a build server's environment, which would turn ONNX Runtime's telemetry off.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import toy

RUN = "from ligerexport.cli import main; main(['run', sys.argv[1], 'hi', '-n', '2'])"
STARTS = {
    "run": RUN,
    "a worker": "from ligerexport.measure.bench.worker import Worker; Worker(sys.argv[1], threads=1).close()",
    "genai": (  # it is set up before it sees that this is no model
        "import ligerexport, contextlib, onnxruntime_genai as og\n"
        "with contextlib.suppress(Exception): og.Model(sys.argv[1])"
    ),
}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


def left(home: Path, code: str, artifact: Path) -> list[Path]:
    """Run a program and return the files that it left in its user's home."""
    command = [sys.executable, "-c", f"import sys; {code}", str(artifact)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [path for path in home.rglob("*") if path.is_file()]


@pytest.mark.parametrize("start", STARTS)
def test_no_process_leaves_a_file(start: str, home: Path, artifact: Path) -> None:
    if start == "genai" and not find_spec("onnxruntime_genai"):
        pytest.skip("needs onnxruntime-genai")
    assert left(home, STARTS[start], artifact) == []


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the files have other places")
def test_who_asks_for_telemetry_has_it(home: Path, artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This shows that the test above can fail."""
    if tuple(map(int, version("onnxruntime").split(".")[:2])) < (1, 29):
        pytest.skip("this version has no telemetry on Linux")
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nobody listens there, so nothing is sent
    assert "deviceid" in [path.name for path in left(home, RUN, artifact)]


@pytest.mark.parametrize("value", [None, "mine"])
def test_libraries_learn_it_before_they_are_imported(
    home: Path, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    names = ["ORT_DISABLE_TELEMETRY", "HF_HUB_DISABLE_TELEMETRY", "GRADIO_ANALYTICS_ENABLED"]
    if value:
        for name in names:
            monkeypatch.setenv(name, value)
    code = f"import sys, os, ligerexport; print(*(os.environ[name] for name in {names}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ([value] * 3 if value else ["1", "1", "False"]), done.stderr
