"""The shape of the project: which module may import which, what is public, what a wheel holds."""

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
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import ligerexport as lx

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ligerexport"

# A module imports from rows above its own, and from its own package; nothing else.
LAYERS = (
    ("errors",),
    ("reading", "render", "marks"),
    ("tokens",),
    ("console", "staging", "families", "gates", "memory", "sampling", "seal", "text"),
    ("checkpoint", "datafiles", "threads"),
    ("config", "artifact", "sources", "corpus", "snapshot"),
    ("versions",),
    ("state",),
    ("kernels",),
    ("cache_layer",),
    ("mixer",),
    ("loading",),
    ("calibrate", "adapter", "fidelity"),
    ("convert",),
    ("recover",),
    ("exporters",),
    ("runtime",),
    ("prompt_cache",),
    ("generate", "evaluate", "bench", "doctor"),
    ("allocate", "demo"),
    ("cli",),
    ("__main__",),
)
RANK = {name: rank for rank, row in enumerate(LAYERS) for name in row}


def modules() -> Iterator[tuple[str, Path]]:
    """Yield the dotted name below `ligerexport` and the file of every module but the package itself."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = file.relative_to(PACKAGE).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join(parts), file
    for link in sorted(path for path in PACKAGE.iterdir() if path.is_symlink()):  # rglob does not follow links
        for file in sorted(link.resolve().rglob("*.py")):
            yield ".".join((link.name, *file.relative_to(link.resolve()).with_suffix("").parts)), file


def imports(file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name below `ligerexport` of what a file imports of it, wherever the import stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            package, _, rest = name.partition(".")
            if package == "ligerexport" and rest and rest.split(".")[0] in RANK:
                yield node.lineno, rest


def python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("name", "file"), list(modules()), ids=lambda value: value if isinstance(value, str) else "")
def test_imports_go_one_way(name: str, file: Path) -> None:
    home = name.split(".")[0]
    assert home in RANK, f"give '{home}' a place in LAYERS"
    for line, imported in imports(file):
        other = imported.split(".")[0]
        assert other == home or RANK[other] < RANK[home], f"{file}:{line}: {home} must not import {other}"


@pytest.mark.parametrize("file", sorted((ROOT / "tests").glob("*.py")), ids=lambda file: file.stem)
def test_no_test_looks_at_a_clock(file: Path) -> None:
    """What asserts a duration, or gives up after one, fails on a busy machine; pytest's `--timeout` ends what hangs."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [node.arg or ""] if isinstance(node, ast.keyword) else []
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in ("wait", "select"):
            names += ["timeout" for part in node.args if isinstance(part, ast.Constant)]
        assert not {"time", "timeout"} & set(names), f"{file}: a test has no {' and no '.join(names)}"


def test_links_are_relative_and_have_no_init() -> None:
    links = {path.name: path.readlink() for path in PACKAGE.iterdir() if path.is_symlink()}
    assert {"kernels", "exporters", "demo"} <= set(links)
    for name, target in links.items():
        assert target == Path("..") / name
        assert not (ROOT / name / "__init__.py").exists()


def test_public_names() -> None:
    assert set(lx.__all__) == {"__version__", *lx._HOMES}
    assert set(lx.__all__) <= set(dir(lx))
    for name in lx.__all__:
        assert getattr(lx, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'conver'"):
        lx.conver  # noqa: B018


@pytest.mark.parametrize("first", ["import ligerexport.{0}", "lx.{0}"])
@pytest.mark.parametrize("name", ["allocate", "convert", "generate"])
def test_a_function_wins_over_its_module(name: str, first: str) -> None:
    code = f"import ligerexport as lx; {first}; import ligerexport.{name}; from ligerexport.{name} import {name} as f; "
    code += f"assert lx.{name} is f and callable(f); from ligerexport import {name} as g; assert g is f"
    python(code.replace("{0}", name), ROOT)


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
    for line in [
        *project["dependencies"],
        *extras["builtin"],
        *extras["onnx"],
        *extras["demo"],
        *extras["rtx"],
        *extras["dev"],
    ]:
        requirement = Requirement(line)
        assert pins[re.sub(r"[-_.]+", "-", requirement.name).lower()] in requirement.specifier, line


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from an sdist, built from a copy of the checkout without what git ignores."""
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


def test_wheel_holds_every_module_once(wheel: Path) -> None:
    expected = {f"ligerexport/{name.replace('.', '/')}.py" for name, _ in modules()}
    expected |= {"ligerexport/__init__.py", "ligerexport/py.typed"}
    data = [*(PACKAGE / "scores").glob("*.safetensors"), *(PACKAGE / "adapters").glob("*/*")]
    expected |= {f"ligerexport/{file.relative_to(PACKAGE)}" for file in data}
    native = (ROOT / "exporters" / "onnx" / "native").iterdir()
    expected |= {f"ligerexport/exporters/onnx/native/{file.name}" for file in native if file.suffix in (".h", ".cc")}
    expected.add("ligerexport/exporters/onnx/providers.json")
    expected |= {"ligerexport/demo/style.css", "ligerexport/demo/filler.txt"}
    trt = (ROOT / "exporters" / "tensorrt").glob("*/*.*")
    expected |= {f"ligerexport/{x.relative_to(ROOT)}" for x in trt if x.suffix in (".h", ".cc", ".txt")}
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if ".dist-info/" not in info.filename]
    assert {info.filename for info in infos} == expected
    assert not any(stat.S_ISLNK(info.external_attr >> 16) for info in infos)


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
