"""The releases of dependencies: the bounds, the tested releases, and the warning about all others."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import toy
from packaging.requirements import Requirement
from packaging.version import Version

from ligerexport import versions
from ligerexport.cli import doctor, main
from ligerexport.exporters.targets import TARGETS
from ligerexport.versions import TRIED

ROOT = Path(__file__).parents[1]


def bounds() -> dict[str, Requirement]:
    """Return the requirements of pyproject.toml for the packages in `TRIED`."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *(x for extra in project["optional-dependencies"].values() for x in extra)]
    return {r.name: r for r in map(Requirement, lines) if r.name in TRIED}


def test_tried_releases_are_those_that_ci_installs() -> None:
    assert bounds().keys() == TRIED.keys()
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name, requirement in bounds().items():
        oldest, newest = TRIED[name]
        assert f">={oldest}" in str(requirement.specifier).split(",")
        assert Version(pins[name]).release[:2] == Version(newest).release
    assert TARGETS["onnx"].requires["onnxruntime"] == str(bounds()["onnxruntime"].specifier)


def test_every_row_warns_where_it_is_used() -> None:
    sources = [
        file.read_text()
        for top in ("ligerexport", "exporters", "kernels", "demo")
        for file in (ROOT / top).rglob("*.py")
    ]
    named = {name for source in sources for name in re.findall(r'^ *warn_if_untried\("(.+)"\)', source, re.MULTILINE)}
    assert named == TRIED.keys()


@pytest.mark.parametrize(
    ("installed", "fine"),
    [("5.16.4", False), ("5.17.0", True), ("5.24.7+cpu", True), ("5.25.0.dev0", False), ("6.0", False), (None, True)],
)
def test_only_what_was_never_tried_is_named(monkeypatch: pytest.MonkeyPatch, installed: str | None, fine: bool) -> None:
    monkeypatch.setitem(TRIED, "transformers", ("5.17", "5.24"))
    monkeypatch.setattr(versions, "installed_version", lambda name: installed)
    said = f"{installed} was never tried with this version of ligerexport, only 5.17 to 5.24"
    assert versions.untried("transformers") == (None if fine else said)


def test_it_is_said_once_in_a_process(tmp_path: Path) -> None:
    code = (
        "import sys, ligerexport as lx; from ligerexport import versions\n"
        "versions.TRIED |= dict.fromkeys(versions.TRIED, ('0.1', '0.1'))\n"
        "import ligerexport.layers.mixer; [lx.load(sys.argv[1]) for _ in range(2)]"
    )
    command = [sys.executable, "-c", code, toy.build(tmp_path / "artifact")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    names = re.findall(r"^warning: (\S+) \S+ was never tried", done.stderr, re.MULTILINE)
    assert names == ["torch", "transformers", "onnxruntime"] and done.stdout == ""


def test_doctor_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def row() -> dict[str, object]:
        with pytest.raises(SystemExit):
            main(["doctor", "--json"])
        return next(x for x in json.loads(capsys.readouterr().out)["checks"] if x["name"] == "tried releases")

    with monkeypatch.context() as patch:
        patch.setattr(doctor, "untried", lambda name: None)
        fine = row()
    assert fine["ok"] and fine["found"] == "all installed packages"
    monkeypatch.setitem(TRIED, "transformers", ("0.1", "0.2"))
    found = row()
    assert not found["ok"] and "'transformers==0.2.*'" in str(found["mend"])
    assert "was never tried with this version of ligerexport, only 0.1 to 0.2" in str(found["found"])
