"""The artifact: a directory with a graph, its weights, a tokenizer, and a manifest that says what they are.

Here is the manifest, how an artifact is written whole or not at all, and the checks before an engine reads it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from importlib import metadata
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, TypeVar

from ligerexport.errors import ArtifactError, MissingDependency
from ligerexport.staging import staged_directory

FORMAT_VERSION = 1
MANIFEST = "manifest.json"

Row = TypeVar("Row")


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the graph; `shape` mixes sizes and axis letters (`B`, `T`, `P`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class StateTensor:
    """A tensor that goes from one call to the next.

    Attributes:
        past: Name of the input.
        present: Name of the output.
        shape: Axes, `B` first; `P` is the axis that grows.
        dtype: As numpy calls it.
        fill: Value of every element before the first token.
        grows: Whether it grows with the text (a layer kept as softmax); such a tensor starts with `P` = 0.
    """

    past: str
    present: str
    shape: tuple[int | str, ...]
    dtype: str
    fill: float = 0.0
    grows: bool = False


@dataclass(frozen=True)
class Graph:
    """The step graph: file, most tokens of one call, and its inputs and outputs in order."""

    file: str
    max_chunk: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]

    @property
    def data(self) -> str:
        """File of its weights, numbers and nothing else."""
        return f"{self.file}.data"


@dataclass(frozen=True)
class Source:
    """Where the weights come from: name or directory, revision, licence, and sha256 of each weight file."""

    model: str
    revision: str | None = None
    license: str | None = None
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelShape:
    """Sizes of the model; `trained_length` in tokens."""

    layers: int
    hidden_size: int
    vocab_size: int
    q_heads: int
    kv_heads: int
    d_k: int
    d_v: int
    trained_length: int
    parameters: int


@dataclass(frozen=True)
class ByteCounts:
    """Bytes: weights; constant state of one sequence; what the Transformer's KV cache takes for one token."""

    weights: int
    state_per_sequence: int
    kv_per_token: int


@dataclass(frozen=True)
class FileInfo:
    """sha256 in hex and size in bytes of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """What `manifest.json` says.

    Attributes:
        ligerexport: Version that wrote the artifact.
        target: Row of `TARGETS`.
        lowering: How the mixer is written in the graph.
        precision: Of the weights.
        source: Where the weights come from.
        family: Row of `FAMILIES`.
        liger: `LigerConfig.to_dict()`.
        model: Sizes.
        graph: The step graph.
        state: All state tensors.
        bytes: Byte counts.
        requires: Distribution and version specifier of each runtime that the graph needs.
        verification: Result of the parity check against torch, as the verifier wrote it.
        recovery: How the weights were trained after the conversion, as config.json says it; None where they were not.
        block: Weights that share a scale, None where each stands for itself.
        quality: What storing the weights so costs, against fp32 on a built-in text, as the verifier measured it: nats a
            token before and after, and the divergence. None for fp32.
        device: What it was built for: compute capabilities, most sequences, the plugin's contract, and the names of
            kernels, plugin and engine. None for the CPU.
        files: Every other file of the artifact; filled when it is written.
        format_version: Of this structure.
    """

    ligerexport: str
    target: str
    lowering: str
    precision: str
    source: Source
    family: str
    liger: dict[str, Any]
    model: ModelShape
    graph: Graph
    state: tuple[StateTensor, ...]
    bytes: ByteCounts
    requires: dict[str, str]
    verification: dict[str, Any]
    recovery: dict[str, Any] | None = None
    block: int | None = None
    quality: dict[str, Any] | None = None
    device: dict[str, Any] | None = None
    files: dict[str, FileInfo] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def growth(self) -> int:
        """Bytes by which the state of one sequence grows a token; 0 without layers kept as softmax."""
        width = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4}
        total = 0
        for tensor in self.state:
            if tensor.grows:
                count = width[tensor.dtype]
                for size in tensor.shape:
                    count *= size if isinstance(size, int) else 1
                total += count
        return total

    @property
    def crossover(self) -> int | None:
        """Tokens of context from which the Transformer's KV cache is larger than the state; None is never."""
        saved = self.bytes.kv_per_token - self.growth
        return self.bytes.state_per_sequence // saved + 1 if saved > 0 else None

    @property
    def fingerprint(self) -> str:
        """Digest of what gives a state its meaning: weights and conversion, whatever the target or lowering."""
        meaning: list[Any] = [self.source.files, self.liger, asdict(self.model)]
        if self.precision != "float32":  # other weights, in effect
            meaning += [self.precision, self.block]
        return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, the format version first."""
        return {"format_version": self.format_version} | asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Read what `to_dict` wrote. Unknown keys are ignored.

        Raises:
            ArtifactError: The format is newer, or something is missing or of the wrong kind.
        """
        try:
            version = data["format_version"]
            if version > FORMAT_VERSION:
                raise ArtifactError(
                    f"artifact format {version} is newer than this program reads (format {FORMAT_VERSION}); "
                    f"it was written by ligerexport {data.get('ligerexport', 'of a later version')}",
                    hint="pip install --upgrade ligerexport",
                )
            manifest = _read(cls, data)
            graph = _read(Graph, data["graph"])
            return replace(
                manifest,
                source=_read(Source, data["source"]),
                model=_read(ModelShape, data["model"]),
                graph=replace(graph, inputs=_read_all(TensorInfo, graph.inputs),
                              outputs=_read_all(TensorInfo, graph.outputs), max_chunk=int(graph.max_chunk)),
                state=_read_all(StateTensor, data["state"]),
                bytes=_read(ByteCounts, data["bytes"]),
                files={name: _read(FileInfo, entry) for name, entry in data["files"].items()},
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"{MANIFEST} is damaged: {error!r} where format {FORMAT_VERSION} was expected", hint=_REBUILD
            ) from error


_REBUILD = "copy the artifact again, or rebuild it with: ligerexport build MODEL --target onnx -o DIRECTORY --force"


def _read(cls: type[Row], data: Any) -> Row:
    """Make a dataclass from the keys that it knows."""
    known = fields(cls)  # type: ignore[arg-type]
    for entry in known:
        if entry.name not in data and entry.default is MISSING and entry.default_factory is MISSING:
            raise KeyError(entry.name)
    values = {entry.name: data[entry.name] for entry in known if entry.name in data}
    return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _read_all(cls: type[Row], rows: Iterable[Any]) -> tuple[Row, ...]:
    return tuple(_read(cls, row) for row in rows)


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest and files were checked."""

    directory: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The step graph's file."""
        return self.directory / self.manifest.graph.file


class ArtifactWriter:
    """Write an artifact so that it appears whole or not at all.

        with ArtifactWriter("engine/") as writer:
            build_graph(writer.directory / "model.onnx")
            writer.commit(manifest)

    Args:
        destination: Directory to make.
        force: Whether an older artifact there may be replaced; it stays until the new one is whole.

    Attributes:
        directory: Where the files go; exists inside the `with` block only.

    Raises:
        UsageError: The destination holds something (on entry).
        LigerError: The disk is full.
    """

    directory: Path

    def __init__(self, destination: Path | str, *, force: bool = False) -> None:
        self._stage = staged_directory(destination, force=force, marker=MANIFEST)
        self._committed = False

    def __enter__(self) -> ArtifactWriter:
        self.directory = self._stage.__enter__()
        return self

    def commit(self, manifest: Manifest) -> Manifest:
        """Hash all files and write the manifest, last; the artifact gets its name when the block ends.

        Args:
            manifest: Complete but for `files`.

        Returns:
            The manifest with `files`.
        """
        files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        entries = {path.relative_to(self.directory).as_posix(): FileInfo(sha256(path), path.stat().st_size)
                   for path in files}  # fmt: skip
        manifest = replace(manifest, files=entries)
        (self.directory / MANIFEST).write_text(json.dumps(manifest.to_dict(), indent=1) + "\n", encoding="utf-8")
        self._committed = True
        return manifest

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None and not self._committed:
            kind = RuntimeError
            error = kind("an artifact was written without its manifest")
            self._stage.__exit__(kind, error, None)
            raise error
        self._stage.__exit__(kind, error, trace)


def sha256(path: Path) -> str:
    """Return the sha256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_artifact(path: Path | str, *, hashes: bool = True, data: bool = True, runtime: bool = True) -> Artifact:
    """Check an artifact before any engine reads it.

    Args:
        path: The artifact's directory.
        hashes: Whether to read every file and compare its sha256; sizes are compared in any case.
        data: Whether that goes for the weights too; else `check_data` does, before anything is computed with them.
        runtime: Whether the installed runtimes must fit.

    Raises:
        ArtifactError: It is no artifact, of a newer format, incomplete, changed, or built for other runtime versions.
        MissingDependency: A runtime is not installed.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"there is no directory {directory}", hint="give the one that `ligerexport build` wrote")
    if not file.is_file():
        raise ArtifactError(f"{directory} is not an artifact: there is no {MANIFEST}", hint=_suggest(directory))
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{file} is not JSON: {error}", hint=_REBUILD) from error
    manifest = Manifest.from_dict(content)
    if manifest.graph.file not in manifest.files:
        raise ArtifactError(f"{file} does not list the graph {manifest.graph.file} among its files", hint=_REBUILD)
    for name, entry in manifest.files.items():
        _check_file(directory, name, entry, hashes and (data or name != manifest.graph.data))
    if runtime:
        for name, specifier in manifest.requires.items():
            _check_runtime(name, specifier)
    return Artifact(directory, manifest)


def check_data(artifact: Artifact) -> None:
    """Compare the sha256 of the weights with the manifest's.

    Raises:
        ArtifactError: They were changed.
    """
    name = artifact.manifest.graph.data
    if name in artifact.manifest.files:
        _check_hash(artifact.directory / name, artifact.manifest.files[name])


def _suggest(directory: Path) -> str:
    if (directory / "config.json").is_file():
        return f"build one from this checkpoint: ligerexport build {directory} --target onnx"
    return "give the directory that `ligerexport build` wrote"


def _check_file(directory: Path, name: str, entry: FileInfo, hashes: bool) -> None:
    """Check that a file lies in the directory and is what the manifest says."""
    parts = PurePosixPath(name)
    if parts.is_absolute() or ".." in parts.parts or "\\" in name or ":" in name:
        raise ArtifactError(
            f"{MANIFEST} names '{name}', which lies outside the artifact", hint="do not use this artifact"
        )
    file = directory / name
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", hint=_REBUILD)
    if not file.resolve().is_relative_to(directory.resolve()):
        raise ArtifactError(
            f"{file} is a link to a place outside the artifact",
            hint=f"copy it with its links resolved: cp -rL {directory} COPY",
        )
    size = file.stat().st_size
    if size != entry.bytes:
        raise ArtifactError(f"{file} has {size} bytes where {entry.bytes} were written", hint=_REBUILD)
    if hashes:
        _check_hash(file, entry)


def _check_hash(file: Path, entry: FileInfo) -> None:
    if sha256(file) != entry.sha256:
        raise ArtifactError(f"{file} was changed after the build: its sha256 is not the manifest's", hint=_REBUILD)


def installed_version(runtime: str) -> str | None:
    """Return the version of a runtime under any of the names it is distributed by; None when there is none."""
    for suffix in ("", "-gpu", "-directml", "-openvino", "-qnn"):
        try:
            return metadata.version(runtime + suffix)
        except metadata.PackageNotFoundError:
            continue
    return None


def _check_runtime(name: str, specifier: str) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    try:
        wanted = SpecifierSet(specifier)
    except InvalidSpecifier as error:
        raise ArtifactError(f"{MANIFEST} is damaged: it requires {name} '{specifier}'", hint=_REBUILD) from error
    command = f"pip install '{name}{specifier}'"
    version = installed_version(name)
    if version is None:
        raise MissingDependency(name, hint=command)
    if not wanted.contains(version, prereleases=True):
        raise ArtifactError(f"this artifact was built for {name} {specifier}, found {version}", hint=command)
