"""The structure of the project: which module may import which, what is public, and the content of a wheel."""

from __future__ import annotations

import ast
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ligerexport as lx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ligerexport"

# A room is a directory of the package, or a module beside them. It imports from rows above its own and from itself.
ROOMS = (
    ("dtypes", "errors"),
    ("console", "reading", "staging", "threads"),
    ("versions",),
    ("artifact", "model", "text"),
    ("kernels",),
    ("layers",),
    ("checkpoint",),
    ("exporters",),
    ("run",),
    ("measure",),
    ("demo", "serve", "train"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(ROOMS) for name in row}


def modules() -> dict[str, Path]:
    """Return the file of every module by its dotted name below `ligerexport`; a package's name has no `__init__`."""
    found = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(file: Path) -> dict[str, int]:
    """Return each module of `ligerexport` that a file imports while it runs, in functions too, and the line."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    checks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(part) for node in checks for part in ast.walk(node)}
    found = {}
    for node in ast.walk(tree):
        if id(node) in for_types or not isinstance(node, ast.ImportFrom | ast.Import):
            continue
        package = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        for name in (package + alias.name for alias in node.names):
            root, _, rest = name.partition(".")
            home = rest if rest in MODULES else rest.rpartition(".")[0]
            if root == "ligerexport" and home in MODULES:
                found[home] = node.lineno
    return found


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {""}))
def test_imports_go_one_way(name: str) -> None:
    home = name.split(".")[0]
    assert home in RANK, f"give '{home}' a place in ROOMS"
    for imported, line in imports(MODULES[name]).items():
        other = imported.split(".")[0] or home
        assert other == home or RANK[other] < RANK[home], f"{MODULES[name]}:{line}: {home} must not import {other}"


def test_no_modules_import_each_other() -> None:
    """No circle of any length is allowed, not even inside functions, where Python would allow it."""
    graph = {name: set(imports(file)) - {name} for name, file in MODULES.items()}
    while free := [name for name, needs in graph.items() if not needs & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, {name: sorted(needs & graph.keys()) for name, needs in graph.items()}


@pytest.mark.parametrize("file", sorted((ROOT / "tests").rglob("test_*.py")), ids=lambda file: file.stem)
def test_no_test_looks_at_a_clock(file: Path) -> None:
    """Tests that assert or wait for a duration fail on a busy machine; pytest's `--timeout` ends tests that hang."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [node.arg or ""] if isinstance(node, ast.keyword) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("wait", "select"):
            names += ["timeout" for part in node.args if isinstance(part, ast.Constant)]
        assert not {"time", "timeout"} & set(names), f"{file}: a test has no {' and no '.join(names)}"


def test_the_package_has_no_links() -> None:
    """Its directories are real, so that every tool finds them; the root links to the main ones for visitors."""
    assert not [path for path in PACKAGE.rglob("*") if path.is_symlink()]
    for name in ("kernels", "exporters", "demo"):
        assert (ROOT / name).readlink() == Path("ligerexport", name)
        assert not (PACKAGE / name / "__init__.py").exists()  # transformers would import the root's `kernels`


def test_public_names() -> None:
    assert set(lx.__all__) == {"__version__", *lx._HOMES}
    assert set(lx.__all__) <= set(dir(lx))
    for name in lx.__all__:
        assert getattr(lx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'conver'"):
        lx.conver  # noqa: B018


@pytest.mark.parametrize("module", ["ligerexport", "ligerexport.cli"])
def test_import_is_light(module: str) -> None:
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'onnxruntime', 'onnx'}} & set(sys.modules)))"
    assert python(code, ROOT).strip() == "[]"


def test_transformers_imports_in_the_checkout() -> None:
    code = "from transformers import LlamaForCausalLM, utils; print(utils.is_kernels_available())"
    installed = (Path(sysconfig.get_path("purelib")) / "kernels" / "__init__.py").exists()
    assert python(code, ROOT).strip() == str(installed)


def test_constraints_fit_the_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in lines}
    extras = project["optional-dependencies"]
    pinned = ("build", "builtin", "recover", "eval", "demo", "grammar", "serve", "rtx", "dev")
    for line in [*project["dependencies"], *(line for extra in pinned for line in extras[extra])]:
        requirement = Requirement(line)
        if requirement.name == "ligerexport":
            assert requirement.extras <= set(pinned)
            continue
        assert pins[re.sub(r"[-_.]+", "-", requirement.name).lower()] in requirement.specifier, line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel from an sdist from a copy of the checkout without ignored files."""
    if not (ROOT / ".git").exists() or not shutil.which("git") or not find_spec("build"):
        pytest.skip("needs a git checkout and the `dev` extra")
    copy, dist = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("dist")
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(dist), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(dist.glob("*.whl"))


@pytest.mark.system
def test_wheel_holds_every_module_once(wheel: Path) -> None:
    files = (file for file in PACKAGE.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    expected = {str(file.relative_to(ROOT)) for file in files}
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if ".dist-info/" not in info.filename]
    assert {info.filename for info in infos} == expected
    assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in infos)


@pytest.mark.system
def test_wheel_works_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    environment = tmp_path / "clean"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    interpreter = environment / "bin" / "python"
    purelib = next(environment.glob("lib/python*/site-packages"))
    # Borrows the dependencies without the editable install: only the environment's own .pth files are read.
    (purelib / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    install = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)

    code = "import ligerexport.kernels.ops as ops, ligerexport.exporters.targets as targets; "
    code += "print(ops.__file__, targets.__file__)"
    done = subprocess.run([interpreter, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(file.startswith(str(purelib)) for file in done.stdout.split())
    done = subprocess.run(
        [environment / "bin" / "ligerexport", "--version"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == f"ligerexport {lx.__version__}", done.stderr
