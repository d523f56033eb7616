"""What a release promises: the same bytes twice, a version and a changelog, known licences, a frozen interface."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import api
import licences
import pytest

import ligerexport as lx

ROOT = Path(__file__).parents[1]
SEMVER = r"(0|[1-9]\d*)\.(0|[1-9]\d*)\.(0|[1-9]\d*)(-[0-9A-Za-z.-]+)?(\+[0-9A-Za-z.-]+)?"


def test_interface_is_frozen() -> None:
    """A change is made on purpose: written again by the command on top of the file."""
    assert (ROOT / "docs" / "reference" / "api.md").read_text() == api.text()


def test_every_public_name_is_documented() -> None:
    assert not [line for line in api.text().splitlines() if line.startswith("#") and line.endswith("``")]
    for name in lx.__all__:
        assert name.startswith("__") or (getattr(lx, name).__doc__ or "").strip(), name


def test_version_and_changelog() -> None:
    assert re.fullmatch(SEMVER, lx.__version__)
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased" or headings[0] == lx.__version__
    assert all(re.fullmatch(SEMVER, heading) for heading in headings[1:])
    assert f"version: {lx.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_licences_of_all_dependencies() -> None:
    """Every pinned package is listed, with a licence under which it may be used beside Apache-2.0."""
    listed = licences.read(ROOT / "docs" / "reference" / "licences.md")
    pins = dict(re.findall(r"^([A-Za-z0-9_.-]+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    names = {licences.canonical(name): version for name, version in pins.items()}
    assert {name: version for name, (version, _) in listed.items()} == names
    for name, (_, licence) in listed.items():
        assert licences.is_known(licence) or name in licences.PROGRAMS, f"{name}: {licence}"


@pytest.mark.system
@pytest.mark.skipif(not find_spec("build") or not shutil.which("git"), reason="needs git and the `dev` extra")
def test_wheel_is_reproducible(tmp_path: Path) -> None:
    """Two builds in two places have the same bytes."""
    digests = []
    for name in ("one", "two"):
        copy, dist = tmp_path / name, tmp_path / f"{name}-dist"
        subprocess.run(["git", "clone", "--quiet", "--no-hardlinks", ROOT, copy], check=True)
        environment = os.environ | {"SOURCE_DATE_EPOCH": "1767225600"}
        command = [sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", str(dist), str(copy)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stdout + done.stderr
        digests.append(hashlib.sha256(next(dist.glob("*.whl")).read_bytes()).hexdigest())
    assert digests[0] == digests[1]


@pytest.mark.system
@pytest.mark.skipif(not find_spec("mkdocs"), reason="needs the `dev` extra")
def test_documents_build_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    pages = {page.relative_to(tmp_path / "site"): page.read_text() for page in (tmp_path / "site").rglob("*.html")}
    for page, html in pages.items():
        assert not re.findall(r"<(?!a )[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>", html), page
        assert page.name == "404.html" or "default-src 'self'" in html, page
    python, build = (pages[Path(name, "index.html")] for name in ("reference/python", "commands/build"))
    for name in lx._HOMES:
        section = re.search(rf'<h2 id="ligerexport[\w.]*\.{name}".*?(?=<h2 |$)', python, re.DOTALL)
        assert section, name
        documented = set(re.findall(r"<td>\s*<code>(?:<span[^>]*>)?\**(\w+)", section[0]))
        if name != "Session":  # a protocol, which nobody calls
            assert documented >= set(inspect.signature(getattr(lx, name)).parameters), name
    assert "--max-batch" in build
