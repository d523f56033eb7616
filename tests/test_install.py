"""What `pip install ligerexport` is enough for, in an environment that has nothing else and no compiler."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import arm64
import pytest
import toy

import ligerexport as lx
from ligerexport.exporters.onnx.native.cpus import levels, machine

ROOT = Path(__file__).parents[1]
CROSS = {"aarch64": "aarch64-linux-gnu-g++"}
CHOICE = (
    "import runpy; from ligerexport.exporters.onnx.native import find; "
    "print(find(), flush=True); runpy.run_module('ligerexport', run_name='__main__')"
)
"""Program that prints the library of the operator and then runs a command."""
HERE = [name for name in levels() if name == machine() or shutil.which(CROSS.get(name, "none"))]
"""Types of machines for which this one can build a wheel."""

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="builds wheels for Linux"),
    pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"]),
]


class Installed:
    """An environment with the wheel of this machine and what pip installs with it."""

    def __init__(self, place: Path) -> None:
        self.dist, self.place, self.bin = place / "dist", place / "elsewhere", place / "environment" / "bin"
        self.place.mkdir()
        names = f"WHEELS={self.dist}", f"PYTHON={sys.executable}", f"MACHINES={' '.join(HERE)}"
        done = subprocess.run(["make", "wheels", *names], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        subprocess.run([sys.executable, "-m", "venv", place / "environment"], check=True)
        (self.wheel,) = self.dist.glob(f"*_{machine()}.whl")
        self.pip("install", "--quiet", self.wheel)

    def pip(self, *arguments: object) -> str:
        command = [self.bin / "python", "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
        return subprocess.run(command, cwd=self.place, check=True, capture_output=True, text=True).stdout

    def run(self, *arguments: object, code: int = 0, text: str = "") -> tuple[str, str]:
        """Run a command without a compiler; return what it wrote to stdout and to stderr."""
        environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CXX")}
        environment |= {"LIGEREXPORT_CACHE": str(self.place / "cache"), "PATH": str(self.bin)}
        command = [self.bin / "ligerexport", *map(str, arguments)]
        done = subprocess.run(command, cwd=self.place, env=environment, input=text, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        return done.stdout, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    return Installed(tmp_path_factory.mktemp("installed"))


@pytest.fixture(scope="module")
def artifact(built: tuple[Path, Path]) -> Path:
    """An artifact of the lowering native, with a chat template."""
    (built[0] / "tokenizer_config.json").write_text(json.dumps({"chat_template": toy.TEMPLATE}))
    return lx.build(built[0], built[0].with_name("chat"), lowering="native", max_chunk=16)


def test_artifacts_run_without_torch_and_without_a_compiler(installed: Installed, artifact: Path) -> None:
    """Every command that takes an artifact gives what it gives here."""
    names = {row["name"].lower() for row in json.loads(installed.pip("list", "--format", "json"))}
    assert {"onnxruntime", "tokenizers"} <= names and not names & {"torch", "transformers", "onnx", "onnx-ir"}
    expected = "".join(chunk.text for chunk in lx.generate(lx.load(artifact), "Once", max_new_tokens=6))
    assert json.loads(installed.run("run", artifact, "Once", "-n", 6, "--json")[0])["text"] == expected
    turns = json.loads(installed.run("chat", artifact, "-n", 3, "--json", text="hi\nand\n")[0].splitlines()[-1])[
        "turns"
    ]
    assert len(turns) == 2
    bench = "bench", artifact, "--against", artifact, "--context", 8, "--blocks", 2, "--json"
    assert json.loads(installed.run(*bench)[0])
    assert json.loads(installed.run("inspect", artifact, "--json")[0])["kind"] == "artifact"
    checks = {row["name"]: row for row in json.loads(installed.run("doctor", "--json")[0])["checks"]}
    assert checks["onnxruntime"]["ok"] and checks["extra build"]["mend"] == "pip install 'ligerexport[build]'"
    assert "torch" in checks["extra build"]["found"] and "torch" in checks["extra recover"]["found"]
    assert f"prebuilt/liger-{machine()}-" in checks["operator of native"]["found"]
    assert json.loads(installed.run("list", "--json")[0])["families"]
    assert "Would install" not in installed.pip("install", "--dry-run", f"{installed.wheel}[onnx]")  # a former extra


def test_what_is_missing_is_named_with_its_command(installed: Installed, built: tuple[Path, Path]) -> None:
    """The exit code is 4 and the last line can be pasted, whatever the command needed."""
    liger, artifact = built
    for extra, *arguments in (
        ("builtin", "convert", "smollm2-135m", "-o", "a"),
        ("build", "convert", liger.with_name("source"), "-o", "a"),
        ("build", "build", liger, "-o", "a"),
        ("build", "run", liger, "a"),
        ("build", "inspect", liger),
        ("build", "inspect", artifact, "--providers"),
        ("build", "eval", artifact, "--text", ROOT / "README.md"),
        ("build", "bench", artifact, "--against", liger, "--context", 8),
        ("build", "allocate", liger, "--data", liger, "--text", liger, "-o", "a"),
        ("recover", "recover", liger, "--data", liger, "-o", "a"),
        ("demo", "demo", artifact, "--against", artifact),
        ("serve", "serve", artifact),
        ("grammar", "run", artifact, "a", "--regex", "a"),
    ):
        error = installed.run(*arguments, code=4)[1]
        assert error.splitlines()[-1] == f"hint: pip install 'ligerexport[{extra}]'", error


def test_wheels_run_on_old_systems_and_bring_every_level(installed: Installed, built: tuple[Path, Path]) -> None:
    """auditwheel names the oldest glibc that a wheel needs."""
    assert len(HERE) == len(list(installed.dist.iterdir()))
    for name in HERE:
        (wheel,) = installed.dist.glob(f"*_{name}.whl")
        glibc = re.findall(rf"manylinux_2_(\d+)_{name}", wheel.name)
        assert glibc and int(glibc[0]) <= 28 and "-py3-none-" in wheel.name
        with zipfile.ZipFile(wheel) as archive:
            brought = {Path(file).name for file in archive.namelist() if file.endswith(".so")}
        assert brought == {row.file for row in levels()[name]}


def test_the_aarch64_wheel_in_an_emulator(installed: Installed, artifact: Path, tmp_path: Path) -> None:
    """The tokens are those of this machine, with each library that the wheel brings."""
    if not shutil.which("qemu-aarch64") or not arm64.ROOT.is_dir() or "aarch64" not in HERE:
        pytest.skip("needs qemu-user, g++-aarch64-linux-gnu and `python tests/arm64.py build/arm64`")
    (python,) = (path for path in (arm64.ROOT / "usr" / "bin").glob("python3.*") if path.name[8:].isdecimal())
    (wheel,) = installed.dist.glob("*_aarch64.whl")
    platforms = [f"--platform=manylinux_2_{glibc}_aarch64" for glibc in (28, 27, 17)]
    version = f"--python-version={python.name[6:]}"
    installed.pip("install", "--quiet", "--only-binary=:all:", version, *platforms, "--target", tmp_path, wheel)
    expected = "".join(chunk.text for chunk in lx.generate(lx.load(artifact), "Once", max_new_tokens=6))
    for processor, library in (("cortex-a72", "base"), ("cortex-a76", "dotprod"), ("max,sve=off", "i8mm")):
        run = ["qemu-aarch64", "-cpu", processor, "-L", arm64.ROOT, "-E", f"PYTHONPATH={tmp_path}", python]
        words = ["-c", CHOICE, "run", artifact, "Once", "-n", "6", "--json"]
        done = subprocess.run([*run, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        chosen, said = done.stdout.splitlines()
        assert Path(chosen).name == f"liger-aarch64-{library}.so" and json.loads(said)["text"] == expected
