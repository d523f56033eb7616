"""From a converted checkpoint to a verified artifact: spec, graph, weights, comparison, manifest, rename.

An artifact that differs from the torch model is not written.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport import __version__
from ligerexport.artifact.artifact import (
    FORMAT_VERSION,
    MANIFEST,
    Artifact,
    ArtifactWriter,
    ByteCounts,
    Fallback,
    Graph,
    Manifest,
    Source,
    TensorInfo,
)
from ligerexport.artifact.claims import METER
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, UsageError, close_matches, look_up
from ligerexport.exporters.backend import BuildSettings
from ligerexport.exporters.onnx.native import check_ready
from ligerexport.exporters.targets import BLOCK, STATES, get_backend, get_precision, get_target
from ligerexport.reading import from_plain, sha256
from ligerexport.staging import check_destination
from ligerexport.text.pieces import PIECES, chat_pieces
from ligerexport.text.tokenizer import TextModel
from ligerexport.versions import require, warn_if_untried

if TYPE_CHECKING:
    from ligerexport.checkpoint.checkpoint import CheckpointInfo
    from ligerexport.exporters.onnx.spec import ModelSpec
    from ligerexport.exporters.onnx.weights import WeightStorage

COPIED = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "LICENSE",
)  # fmt: skip
"""Files of the checkpoint that are copied into the artifact."""
PAIR = ("native", "ort")
"""The lowerings of two graphs that read the same weights and state, the faster one first."""
MAX_LORA = 256
"""Largest rank of adapters."""


def build(
    model: Path | str = ".",
    output: Path | str | None = None,
    *,
    target: str = "onnx",
    lowering: str | None = None,
    max_chunk: int | None = None,
    weights: str | None = None,
    state: str | None = None,
    block: int = BLOCK,
    sms: Sequence[int] | None = None,
    max_batch: int = 8,
    plugin: Path | str | None = None,
    engine: bool = True,
    genai: bool = False,
    lora: int = 0,
    force: bool = False,
    verify: bool = True,
    meter: bool = False,
    progress: ProgressFactory | None = None,
) -> Path:
    """Export a converted checkpoint.

    Args:
        model: Directory that `convert` wrote.
        output: Directory to make; None takes the target's name inside the checkpoint.
        target: Row of `TARGETS`.
        lowering: How the mixer is written; None takes the target's default. `native,ort` writes two graphs on the same
            weights: `load` takes the second where it cannot run the operator of the first.
        max_chunk: Largest number of tokens per call; None takes 128, for `trt` up to 1,024 if positions reach that far.
        weights: Row of `WEIGHTS`; None takes the target's default. On GPUs, products also run in this type.
        state: Row of `STATES`, the type in which slots are kept; None takes that of the conversion.
        block: Number of elements of a row that share a scale, for int8 and int4.
        sms: Compute capabilities of GPUs, 87 for 8.7; None takes all that the target can be built for.
        max_batch: Largest number of sequences on a GPU.
        plugin: Library of the TensorRT plugin, which is copied into the artifact and used to build the engine.
        engine: Whether `trt` also builds the engine, which needs TensorRT and this machine's GPU. Without it,
            the device makes the engine from the artifact.
        genai: Whether to add a second graph and the configuration for onnxruntime-genai.
        lora: Largest rank of the adapters that sessions may use; 0 for none. Only for ONNX Runtime.
        force: Whether an older artifact at `output` may be replaced.
        verify: Whether to compare logits and state with the torch model first. The manifest records if this is skipped.
        meter: Whether the graph also returns `Session.forgotten`.
        progress: Opens a phase of long work; see `ligerexport.console.progress`.

    Returns:
        The artifact's directory.

    Raises:
        UsageError: A name is in no table, a number is out of range, or `output` is not empty.
        CheckpointError: The checkpoint is incomplete, damaged or not converted.
        VerificationError: The graph differs from the torch model; nothing was written.
        ArtifactError: The tokenizer cannot be read.
        MissingDependency: The extra `build` or that of the target is not installed.
    """
    settings = BuildSettings(
        target, lowering, max_chunk, weights, block, sms, max_batch, plugin, engine, genai, verify, state, meter, lora
    )
    return BuildPlan(model, output, settings, force=force).run(progress)


class BuildPlan:
    """A build of which everything is checked and decided. No weight is read and nothing is written.

    Args:
        model: Directory that `convert` wrote.
        output: Directory to make; None takes the target's name inside the checkpoint.
        settings: What to build.
        force: Whether an older artifact at `output` may be replaced.

    Attributes:
        info: The checkpoint.
        spec: The parts of the checkpoint that the graph is written from.
        settings: What to build, with nothing left open.
        storage: How weights are stored.
        backend: The target.
    """

    def __init__(
        self,
        model: Path | str = ".",
        output: Path | str | None = None,
        settings: BuildSettings | None = None,
        *,
        force: bool = False,
    ) -> None:
        settings = settings or BuildSettings()
        self.lowerings, weights = _resolve(settings)
        lowering = self.lowerings[0]

        from ligerexport.checkpoint.checkpoint import check_checkpoint
        from ligerexport.exporters.onnx.genai import check_genai
        from ligerexport.exporters.onnx.graph import weight_storage
        from ligerexport.exporters.onnx.spec import read_spec

        self.backend = get_backend(settings.target)
        settings = self.backend.prepare(settings)
        if lowering == "native" and settings.verify:
            check_ready()
        self.output = Path(model) / settings.target if output is None else Path(output)
        check_destination(self.output, force=force, marker=MANIFEST)
        self.info = check_checkpoint(model, tokenizer=False)
        self.spec = read_spec(self.info, settings.state and look_up("type of the state", settings.state, STATES))
        for each in self.lowerings:
            _check_memory(self.spec, settings.target, each)
        _check_lora(settings)
        if settings.meter:
            _check_meter(self.spec, lowering, settings.genai)
        self.backend.check_model(self.spec)
        max_chunk = self.backend.choose_chunk(self.spec, settings.max_chunk)
        if settings.genai:
            check_genai(self.info.path, settings.target, lowering, ragged=self.spec.ragged)
        self.force = force
        self.settings = replace(settings, lowering=",".join(self.lowerings), weights=weights, max_chunk=max_chunk)
        self.storage = weight_storage(weights, settings.block, lowering)

    @property
    def sms(self) -> tuple[int, ...]:
        """Compute capabilities; empty if the target also runs without a GPU."""
        return tuple(self.settings.sms or ())

    def describe(self) -> dict[str, Any]:
        """Return what `run` would write and need."""
        from ligerexport.exporters.onnx.weights import weight_bytes

        planned = weight_bytes(self.spec, self.storage)
        facts = {"path": str(self.output), "weight_bytes": planned}
        return facts | self.backend.describe(self, planned)

    def run(self, progress: ProgressFactory | None = None) -> Path:
        """Build, verify and write the artifact; return its directory. Arguments and errors as for `build`."""
        from ligerexport.exporters.onnx.genai import write_genai
        from ligerexport.exporters.verify.verify import verify_artifact

        progress = progress or silent
        with ArtifactWriter(self.output, force=self.force) as writer:
            manifest = self._write_graph(writer.directory, progress)
            if self.settings.verify:
                unfinished = Artifact(writer.directory, manifest)
                checked, quality = verify_artifact(self.spec, unfinished, self.storage, progress=progress)
                manifest = replace(manifest, verification=checked, quality=quality)
                gc.collect()
            manifest = self.backend.finish(self, writer.directory, manifest, progress)
            if self.settings.genai:
                write_genai(Artifact(writer.directory, manifest))
            writer.commit(manifest)
        return self.output

    def _write_graph(self, directory: Path, progress: ProgressFactory) -> Manifest:
        """Write tokenizer, weights, graph and companions; return the manifest of an unverified artifact."""
        from ligerexport.exporters.onnx import graph as onnx_graph
        from ligerexport.exporters.onnx.weights import weight_bytes, write_weights
        from ligerexport.exporters.verify.inputs import second_moments

        info, spec, settings, storage = self.info, self.spec, self.settings, self.storage
        assert settings.max_chunk is not None
        if (info.path / "tokenizer.json").is_file():
            text = TextModel(info.path)
            text.write_tokenizer(directory / "tokenizer.json")
            if (pieces := chat_pieces(text)) is not None:
                (directory / PIECES).write_text(json.dumps(pieces, indent=1) + "\n", encoding="utf-8")
        with progress("writing weights", weight_bytes(spec, storage)) as advance:
            moments = second_moments(spec) if storage.precision.mixed else ()
            write_weights(spec, directory, storage, advance, moments)
        constants: dict[bytes, int] = {}
        for lowering, file in zip(self.lowerings, (onnx_graph.GRAPH_FILE, onnx_graph.FALLBACK_FILE), strict=False):
            onnx_graph.write_graph(
                spec, directory, lowering=lowering, max_chunk=settings.max_chunk, storage=storage,
                lora=settings.lora, meter=settings.meter, file=file, constants=constants,
            )  # fmt: skip
        for name in COPIED:
            if (info.path / name).is_file():
                shutil.copyfile(info.path / name, directory / name)
        with progress("hashing the source", info.bytes) as advance:
            source = source_of(info, advance)
        recovery = info.config.get("liger_recovery")
        if not isinstance(recovery, dict | None):
            raise CheckpointError(f"config.json has liger_recovery {recovery!r:.60}", hint="convert the model again")
        skipped: dict[str, Any] = {"passed": False, "skipped": True}
        manifest = make_manifest(
            spec, source, settings.target, self.lowerings[0], settings.max_chunk, get_target(settings.target).requires,
            skipped, recovery=recovery, storage=storage, meter=settings.meter,
        )  # fmt: skip
        if len(self.lowerings) > 1:
            manifest = replace(manifest, fallback=Fallback(self.lowerings[1], onnx_graph.FALLBACK_FILE))
        return _taking_adapters(manifest, spec, storage, settings.lora) if settings.lora else manifest


def _resolve(settings: BuildSettings) -> tuple[tuple[str, ...], str]:
    """Check names and installed packages; return the lowering of each graph, and the precision of weights."""
    row, weights = get_target(settings.target), settings.weights
    lowerings = (row.lowerings[0],) if settings.lowering is None else tuple(settings.lowering.split(","))
    for name in lowerings:
        if name not in row.lowerings:
            raise UsageError(
                f"unknown lowering '{name}' for {settings.target}", hint=close_matches(name, row.lowerings)
            )
    if len(lowerings) > 1 and lowerings != PAIR:
        raise UsageError(f"the lowerings {settings.lowering} on the same weights", hint=f"only {','.join(PAIR)} fit")
    weights = row.weights[0] if weights is None else weights
    get_precision(weights, settings.block)
    if weights not in row.weights:
        raise UsageError(f"weights in {weights} for {settings.target}", hint=close_matches(weights, row.weights))
    if settings.max_chunk is not None and settings.max_chunk < 1:
        raise UsageError(f"max_chunk {settings.max_chunk}", hint="a call takes at least one token")
    require("build")
    warn_if_untried("onnx")
    warn_if_untried("onnx-ir")
    return lowerings, weights


def _check_memory(spec: ModelSpec, target: str, lowering: str) -> None:
    """Check that a lowering supports the memory of every layer."""
    if any(mixer is not None and mixer.config.celled for mixer in spec.mixers):
        raise CheckpointError(
            "evicted tokens go to cells, which no target supports yet",
            hint="it runs in torch; convert with --recurrence evicted to build it",
        )
    supported = get_target(target).ragged
    if spec.ragged and lowering not in supported:
        raise CheckpointError(
            "this memory has sizes for each KV head or a small type of its slots, which "
            f"the lowering {lowering} of {target} does not support",
            hint=f"build with --lowering {supported[0]}" if supported else "build for --target onnx",
        )


def _check_lora(settings: BuildSettings) -> None:
    if settings.lora < 0 or settings.lora > MAX_LORA:
        raise UsageError(f"adapters of rank {settings.lora}", hint=f"--lora takes a rank from 1 to {MAX_LORA}")
    if settings.lora and (settings.target != "onnx" or settings.genai):
        what = "onnxruntime-genai" if settings.genai else f"the target {settings.target}"
        raise UsageError(f"adapters at run time with {what}", hint="build for --target onnx, without --genai")


def _check_meter(spec: ModelSpec, lowering: str, genai: bool) -> None:
    """Check that a graph can return the share of attention on forgotten tokens.

    Raises:
        UsageError: The lowering or onnxruntime-genai does not support it, or the model does not know the share.
    """
    if lowering == "plugin" or genai:
        what = "onnxruntime-genai" if genai else "the TensorRT plugin"
        raise UsageError(f"a meter with {what}", hint="it goes with the lowerings ort, portable and native")
    if not spec.evicts:
        raise UsageError(
            "a meter, but nothing keeps what this model forgets, so the share of attention on it is unknown",
            hint="convert with --preset evicted, or leave --meter out",
        )


def _taking_adapters(manifest: Manifest, spec: ModelSpec, storage: WeightStorage, rank: int) -> Manifest:
    """Return the manifest of a graph that takes adapters up to a rank."""
    from ligerexport.exporters.onnx.lora import adapter_inputs
    from ligerexport.exporters.onnx.weights import data_layout

    inputs = (*manifest.graph.inputs, *adapter_inputs(spec, data_layout(spec, storage), rank))
    graph = replace(manifest.graph, inputs=inputs)
    return replace(manifest, graph=graph, lora=rank, format_version=FORMAT_VERSION)


def make_manifest(
    spec: ModelSpec,
    source: Any,
    target: str,
    lowering: str,
    max_chunk: int,
    requires: Mapping[str, str],
    verification: dict[str, Any],
    *,
    storage: WeightStorage,
    recovery: dict[str, Any] | None = None,
    meter: bool = False,
) -> Manifest:
    """Return the manifest of an artifact, without its files."""
    from ligerexport.exporters.onnx import graph as onnx_graph
    from ligerexport.exporters.onnx.graph import LOWERINGS
    from ligerexport.exporters.onnx.weights import weight_bytes

    tensors = onnx_graph.state_tensors(spec, lowering, storage)
    integer = LOWERINGS[lowering].integer
    ids = TensorInfo("input_ids", integer, ("B", "T")), TensorInfo("position", integer, ("B",))
    inputs = (*ids, *(t.bound(t.past, lowering) for t in tensors))
    logits = TensorInfo("logits", "float32", ("B", spec.vocab_size))
    measured = [TensorInfo(METER, "float32", ("B", len(spec.mixers)))] if meter else []
    outputs = (logits, *(t.bound(t.present, lowering) for t in tensors), *measured)
    return Manifest(
        ligerexport=__version__,
        target=target,
        lowering=lowering,
        precision=storage.precision.dtype,
        block=storage.shared,
        source=source,
        family=spec.family,
        liger=spec.liger.to_dict(),
        model=spec.shape,
        graph=Graph(onnx_graph.GRAPH_FILE, max_chunk, inputs, outputs),
        state=tensors,
        bytes=ByteCounts(
            weights=weight_bytes(spec, storage),
            state_per_sequence=sum(t.nbytes for t in tensors if not t.grows),
            kv_per_token=spec.kv_per_token,
        ),
        requires=dict(requires),
        verification=verification,
        recovery=recovery,
        slots=tuple(() if mixer is None else mixer.slots_per_head for mixer in spec.mixers),
        format_version=2 if spec.ragged else 1,
    )  # fmt: skip


def source_of(info: CheckpointInfo, advance: Any) -> Source:
    """Return where the weights come from; links to the original files have the originals' hashes."""
    hashes = {}
    for file in info.files:
        hashes[file.name] = sha256(file)
        advance(file.stat().st_size)
    origin = info.config.get("liger_source") or {"model": info.path.resolve().name}
    try:
        return from_plain(Source, origin | {"files": hashes})
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"config.json has liger_source {origin!r:.60}", hint="convert the model again") from error
