"""From the name of a model to an artifact that runs: convert and build it once, and keep the artifact in the cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

from ligerexport import __version__
from ligerexport.artifact.artifact import MANIFEST, is_artifact
from ligerexport.artifact.hub import is_hub_id, pull, snapshot
from ligerexport.checkpoint.sources import BUILTIN_MODELS, is_gguf
from ligerexport.console import ProgressFactory, say, silent
from ligerexport.errors import LigerError
from ligerexport.exporters.onnx.native import check_ready
from ligerexport.staging import CACHE_HINT, cache_dir, remove_directory

WEIGHTS = "int4"
"""How a prepared artifact stores its weights."""


def is_model(name: str | Path) -> bool:
    """Return whether a name is that of a model to prepare, and not the directory of an artifact or converted model."""
    path, text = Path(name).expanduser(), str(name)
    if text and path.is_dir():
        config = path / "config.json"
        return not is_artifact(path) and config.is_file() and '"liger"' not in config.read_text(errors="replace")
    if is_gguf(path) or text in BUILTIN_MODELS:
        return True
    return is_hub_id(text) and not path.parent.exists()  # otherwise a path with a typing error


def prepare(model: str | Path, progress: ProgressFactory | None = None) -> Path:
    """Return an artifact of a model from the cache, and make it there first if needed.

    The model is converted with the default preset, and with the adapter that ships for it, if there is one. It is built
    in int4, for the fastest lowering that works here, and verified. If a repository on the hub has an artifact, that is
    fetched instead.

    Args:
        model: A Transformer's directory, a GGUF file, a built-in name, or the hub id of a model or an artifact.
        progress: Opens a phase of long work; see `ligerexport.console.progress`.

    Raises:
        SourceError: There is no such model, or it could not be fetched.
        CheckpointError: The model cannot be converted.
        LigerError: The cache cannot be written.
        VerificationError: The graph differs from the torch model.
        MissingDependency: The extra `build`, `builtin` or `hub` is not installed.
    """
    progress, name, path = progress or silent, str(model), Path(model).expanduser()
    pulled = False
    if path.exists():
        files = [path] if path.is_file() else sorted(path.iterdir())
        made_from = repr([(str(file.resolve()), (of := file.stat()).st_size, of.st_mtime_ns) for file in files])
    elif name in BUILTIN_MODELS:
        made_from = BUILTIN_MODELS[name].sha256
    else:
        place = snapshot(
            name, [MANIFEST, "config.json"], progress, here=f"there is no directory '{name}' here, and ",
            hint="check the path or the network, or give a built-in model: " + ", ".join(BUILTIN_MODELS),
        )  # fmt: skip
        name, pulled = f"{name.partition('@')[0]}@{place.name}", (place / MANIFEST).is_file()
        made_from = name
    key = hashlib.sha256(f"{__version__} {WEIGHTS} {made_from}".encode()).hexdigest()[:12]
    short = path.stem if is_gguf(path) else path.resolve().name if path.exists() else name.partition("@")[0]
    output = cache_dir() / "artifacts" / f"{short.replace('/', '--')}-{key}"
    if is_artifact(output):
        return output
    with _locked(output):
        if is_artifact(output):  # another process made it while this one waited
            return output
        if pulled:
            return pull(name, output, progress=progress)
        return _make(name, output, progress)


@contextmanager
def _locked(output: Path) -> Iterator[None]:
    """Keep other processes from making the same artifact.

    Raises:
        LigerError: The cache cannot be written.
    """
    lock = FileLock(f"{output}.lock")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise LigerError(f"cannot write {output.parent}: {error.strerror}", hint=CACHE_HINT) from error
    try:
        yield
    finally:
        lock.release()


def _make(model: str, output: Path, progress: ProgressFactory) -> Path:
    """Convert, build and verify a model."""
    from ligerexport.checkpoint.convert import SHIPPED, ConvertPlan
    from ligerexport.exporters.build import build

    try:
        check_ready()
        lowering = "native"
    except LigerError:
        lowering = "ort"
    converted = output.with_name(f".{output.name}.converted")
    remove_directory(converted)  # of a killed run; the lock says that no other one has it
    try:
        say(f"converting {model}, once")
        ConvertPlan(model, converted, adapter=SHIPPED if model in BUILTIN_MODELS else None).run(progress)
        say(f"building it for the lowering {lowering} in {WEIGHTS}, and comparing it with torch")
        build(converted, output, weights=WEIGHTS, lowering=lowering, progress=progress)
    finally:
        remove_directory(converted)
    say(f"the artifact is kept in {output}")
    return output
