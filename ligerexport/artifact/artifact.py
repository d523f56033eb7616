"""The artifact: a directory with a graph, its weights, a tokenizer, and a manifest that describes them.

This file has the manifest, the writer, and the checks before an engine reads an artifact.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

from ligerexport.artifact.claims import check_claims
from ligerexport.artifact.pieces import sha256_pieces
from ligerexport.dtypes import DTYPES
from ligerexport.errors import ArtifactError, MissingDependency, quoted
from ligerexport.reading import from_plain, leads_away, read_json, sha256
from ligerexport.staging import staged_directory
from ligerexport.versions import installed_version

FORMAT_VERSION = 3
"""Newest format that is read. Format 2 has states with one axis for the slots of all KV heads, or of a smaller type;
format 3 has graphs that take adapters."""
MANIFEST = "manifest.json"

RUNTIMES = ("onnxruntime",)
"""Distributions that an artifact may require, so that a hint never names a package that a stranger's file chose."""


@dataclass(frozen=True)
class TensorInfo:
    """An input or output of the graph; `shape` mixes sizes and axis letters (`B`, `T`, `P`)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The axes that are sizes."""
        return tuple(axis for axis in self.shape if isinstance(axis, int))


@dataclass(frozen=True)
class StateTensor:
    """A tensor that is carried from one call to the next.

    Attributes:
        past: Name of the input.
        present: Name of the output.
        shape: Axes, `B` first; `P` is the axis that grows.
        dtype: Row of `DTYPES`.
        fill: Value of every element before the first token.
        grows: Whether it grows with the text (a layer kept as softmax); such a tensor starts with `P` = 0.
    """

    past: str
    present: str
    shape: tuple[int | str, ...]
    dtype: str
    fill: float = 0.0
    grows: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of one sequence, or of one of its tokens if the tensor grows."""
        return DTYPES[self.dtype].nbytes * prod(size for size in self.shape if isinstance(size, int))

    def bound(self, name: str, lowering: str) -> TensorInfo:
        """Return the graph's input or output `name` for it: for the TensorRT plugin, four codes are one int32.

        TensorRT before 10 takes int8 for a quantised type with a range of its own.
        """
        *axes, width = self.shape
        if lowering == "plugin" and self.dtype == "int8" and isinstance(width, int):
            return TensorInfo(name, "int32", (*axes, width // 4))
        return TensorInfo(name, self.dtype, self.shape)


@dataclass(frozen=True)
class Graph:
    """The step graph: its file, largest number of tokens per call, inputs, outputs; `weights` if not its own file."""

    file: str
    max_chunk: int
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    weights: str | None = None

    @property
    def data(self) -> str:
        """Name of the weights' file, which contains only numbers."""
        return self.weights or f"{self.file}.data"


@dataclass(frozen=True)
class Fallback:
    """A second graph for devices that cannot run the first: its lowering and file; weights and state are the same."""

    lowering: str
    file: str


@dataclass(frozen=True)
class Source:
    """Origin of the weights: name or directory, revision, licence, and sha256 of each weight file."""

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
    """Bytes of the weights, of the constant state of one sequence, and of one token in the Transformer's KV cache."""

    weights: int
    state_per_sequence: int
    kv_per_token: int


@dataclass(frozen=True)
class FileInfo:
    """sha256 in hex and size in bytes of one file, and of a large one the sha256 of its pieces (`sha256_pieces`)."""

    sha256: str
    bytes: int
    pieces: tuple[str, ...] = ()


@dataclass(frozen=True)
class Manifest:
    """The content of `manifest.json`.

    Attributes:
        ligerexport: Version that wrote the artifact.
        target: Row of `TARGETS`.
        lowering: How the mixer is written in the graph.
        precision: Type of the weights.
        source: Origin of the weights.
        family: Row of `FAMILIES`.
        liger: `LigerConfig.to_dict()`.
        model: Sizes of the model.
        graph: The step graph.
        state: All state tensors.
        bytes: Byte counts.
        requires: Distribution and version specifier of each runtime that the graph needs.
        verification: Result of the comparison with torch, as the verifier wrote it.
        recovery: How the weights were trained after the conversion, as in config.json; None if they were not.
        block: Number of weights that share a scale; None if weights have none.
        quality: Cost of the precision of the first graph against fp32 on a built-in text, as the verifier measured it:
            nats per token before and after, and the divergence. None for fp32.
        device: The GPUs that the artifact was built for: compute capabilities, largest number of sequences, plugin's
            names of kernels, plugin and engine. None for the CPU.
        files: Every other file of the artifact; filled when it is written.
        slots: Number of slots of each KV head in each layer; empty for a layer kept as softmax, and in artifacts of
            older versions.
        lora: Largest rank of the adapters that the graph takes after its state, for each sequence; 0 for none.
        fallback: The second graph, if there is one; `verification` has its result under `fallback`.
        format_version: Version of this structure, the oldest that has all that the artifact needs.
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
    slots: tuple[tuple[int, ...], ...] = ()
    lora: int = 0
    fallback: Fallback | None = None
    format_version: int = 1

    @property
    def growth(self) -> int:
        """Bytes by which the state of one sequence grows per token; 0 without layers kept as softmax."""
        return sum(tensor.nbytes for tensor in self.state if tensor.grows)

    @property
    def crossover(self) -> int | None:
        """Tokens of context from which the Transformer's KV cache is larger than the state; None if it never is."""
        saved = self.bytes.kv_per_token - self.growth
        return self.bytes.state_per_sequence // saved + 1 if saved > 0 else None

    @property
    def lowerings(self) -> str:
        """The lowering of each graph, separated by commas."""
        return f"{self.lowering},{self.fallback.lowering}" if self.fallback else self.lowering

    @property
    def meters(self) -> bool:
        """Whether the graph has the output `METER`, after the state."""
        return len(self.graph.outputs) > 1 + len(self.state)

    @property
    def fingerprint(self) -> str:
        """Digest of everything that gives a state its meaning: weights and conversion, but not target or lowering."""
        meaning: list[Any] = [self.source.files, self.liger, asdict(self.model)]
        if self.precision != "float32":  # rounding changes the weights
            meaning += [self.precision, self.block]
        return _digest(meaning)

    @property
    def identity(self) -> str:
        """Digests of the weights before rounding and of the conversion, which all that may exchange states share."""
        exchanged = {name: x for name, x in self.liger.items() if name != "state_dtype" and (x or name != "heads")}
        return f"{_digest(self.source.files)}-{_digest([exchanged, asdict(self.model)])}"

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, the format version first; the digests are for readers in other languages."""
        return {name: getattr(self, name) for name in ("format_version", "identity", "fingerprint")} | asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Manifest:
        """Read what `to_dict` wrote. Unknown keys are ignored.

        Raises:
            ArtifactError: The format is newer, or a value is missing or of the wrong type.
        """
        version = data.get("format_version") if isinstance(data, dict) else None
        if isinstance(version, int) and version > FORMAT_VERSION:
            raise ArtifactError(
                f"artifact format {version} is newer than this program reads (format {FORMAT_VERSION}); "
                f"it was written by ligerexport {data.get('ligerexport', 'of a later version')}",
                hint="pip install --upgrade ligerexport",
            )
        try:
            manifest = from_plain(cls, {"format_version": None} | data)
            check_claims(manifest)
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                f"{MANIFEST} is damaged: {error} where format {FORMAT_VERSION} was expected", hint=_REBUILD
            ) from error
        return manifest


def _digest(meaning: Any) -> str:
    return hashlib.sha256(json.dumps(meaning, sort_keys=True).encode()).hexdigest()[:16]


_REBUILD = "copy the artifact again, or rebuild it with: ligerexport build MODEL --target onnx -o DIRECTORY --force"


@dataclass(frozen=True)
class Artifact:
    """An artifact whose manifest and files were checked."""

    directory: Path
    manifest: Manifest

    @property
    def graph(self) -> Path:
        """The step graph's file."""
        return self.directory / self.manifest.graph.file

    def on_fallback(self) -> Artifact:
        """Return the artifact with its second graph in place of the first."""
        first, other = self.manifest, self.manifest.fallback
        assert other is not None
        graph = replace(first.graph, file=other.file, weights=first.graph.data)
        return replace(self, manifest=replace(first, lowering=other.lowering, graph=graph, fallback=None))


class ArtifactWriter:
    """Write an artifact so that it appears whole or not at all.

        with ArtifactWriter("engine/") as writer:
            build_graph(writer.directory / "model.onnx")
            writer.commit(manifest)

    Args:
        destination: Directory to make.
        force: Whether an older artifact there may be replaced; it stays until the new one is whole.

    Attributes:
        directory: Directory for the files; it exists only inside the `with` block.

    Raises:
        UsageError: The destination is not empty (on entry).
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
            manifest: Complete except for `files`.

        Returns:
            The manifest with `files`.
        """
        files = sorted(path for path in self.directory.rglob("*") if path.is_file())
        entries = {path.relative_to(self.directory).as_posix():
                   FileInfo(sha256(path), path.stat().st_size, sha256_pieces(path)) for path in files}  # fmt: skip
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


def is_artifact(path: Path | str) -> bool:
    """Return whether a path is a directory that `build` wrote."""
    return bool(str(path)) and (Path(path).expanduser() / MANIFEST).is_file()


def open_artifact(path: Path | str, *, hashes: bool = True, data: bool = True, runtime: bool = True) -> Artifact:
    """Check an artifact before any engine reads it.

    Args:
        hashes: Whether to read every file and compare its sha256; sizes are always compared.
        data: Whether to hash the weights too; otherwise `check_data` must do so before anything is computed with them.
        runtime: Whether the installed runtimes must fit.

    Raises:
        ArtifactError: The directory is no artifact, has a newer format, is incomplete or changed, or was built for
            other versions of a runtime.
        MissingDependency: A runtime is not installed.
    """
    directory = Path(path)
    file = directory / MANIFEST
    if not directory.is_dir():
        raise ArtifactError(f"there is no directory {directory}", hint="give the one that `ligerexport build` wrote")
    if not file.is_file():
        raise ArtifactError(f"{directory} is not an artifact: there is no {MANIFEST}", hint=_suggest(directory))
    for link in directory.iterdir():
        if link.is_symlink() and leads_away(link, directory):
            raise _link(link, directory)
    manifest = Manifest.from_dict(read_json(file, ArtifactError, _REBUILD))
    for graph in (manifest.graph, manifest.fallback):
        if graph is not None and graph.file not in manifest.files:
            raise ArtifactError(f"{file} does not list the graph {graph.file} among its files", hint=_REBUILD)
    for name, entry in manifest.files.items():
        _check_file(directory, name, entry, hashes and (data or name != manifest.graph.data))
    if runtime:
        for name, specifier in manifest.requires.items():
            _check_runtime(name, specifier)
    return Artifact(directory, manifest)


def check_data(artifact: Artifact) -> None:
    """Compare the sha256 of the weights with the manifest's.

    Raises:
        ArtifactError: The weights were changed.
    """
    name = artifact.manifest.graph.data
    if name in artifact.manifest.files:
        _check_hash(artifact.directory / name, artifact.manifest.files[name])


def _suggest(directory: Path) -> str:
    if (directory / "config.json").is_file():
        return f"build one from this checkpoint: ligerexport build {quoted(directory)} --target onnx"
    inside = sorted(file.parent for file in directory.glob(f"*/{MANIFEST}"))
    return f"did you mean {quoted(inside[0])}?" if inside else "give the directory that `ligerexport build` wrote"


def _check_file(directory: Path, name: str, entry: FileInfo, hashes: bool) -> None:
    """Check that a file is in the directory and matches the manifest."""
    if ".." in PurePosixPath(name).parts or not re.fullmatch(r"[\w. +@-]{1,200}(/[\w. +@-]{1,200}){0,9}", name):
        raise ArtifactError(f"{MANIFEST} names '{name}', which is outside the artifact", hint="do not use this one")
    file = directory / name
    if not file.is_file():
        raise ArtifactError(f"{file} is missing", hint=_REBUILD)
    if leads_away(file, directory):
        raise _link(file, directory)
    if (size := file.stat().st_size) != entry.bytes:
        raise ArtifactError(f"{file} has {size} bytes where {entry.bytes} were written", hint=_REBUILD)
    if hashes:
        _check_hash(file, entry)


def _link(file: Path, directory: Path) -> ArtifactError:
    return ArtifactError(
        f"{file} is a link to a place outside the artifact",
        hint=f"if that is meant to be, copy it with its links resolved: cp -rL {quoted(directory)} COPY",
    )


def _check_hash(file: Path, entry: FileInfo) -> None:
    if sha256_pieces(file) != entry.pieces if entry.pieces else sha256(file) != entry.sha256:
        raise ArtifactError(f"{file} was changed after the build: its sha256 is not the manifest's", hint=_REBUILD)


def _check_runtime(name: str, specifier: str) -> None:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if name not in RUNTIMES:
        raise ArtifactError(f"{MANIFEST} requires {name}, which does not run artifacts", hint=_REBUILD)
    try:
        wanted = SpecifierSet(specifier)
    except InvalidSpecifier as error:
        raise ArtifactError(f"{MANIFEST} is damaged: it requires {name} '{specifier}'", hint=_REBUILD) from error
    command = f"pip install '{name}{specifier}'"
    if (version := installed_version(name)) is None:
        raise MissingDependency(name, hint=command)
    if not wanted.contains(version, prereleases=True):
        raise ArtifactError(f"this artifact was built for {name} {specifier}, found {version}", hint=command)
