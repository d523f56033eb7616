"""From a converted checkpoint to a verified artifact: spec, graph, weights, parity, manifest, rename.

An artifact that does not compute what the torch model computes is not written.
"""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, MissingDependency, UsageError, close_matches
from ligerexport.exporters.targets import BLOCK, Target, get_precision, get_target
from ligerexport.versions import warn_if_untried

if TYPE_CHECKING:
    from ligerexport.artifact.artifact import Manifest
    from ligerexport.checkpoint.checkpoint import CheckpointInfo
    from ligerexport.exporters.onnx.spec import ModelSpec
    from ligerexport.exporters.onnx.weights import WeightFormat

COMPANIONS = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "LICENSE",
)  # fmt: skip
"""Files of the checkpoint that go into the artifact as they are."""


def build(
    model: Path | str = ".",
    output: Path | str | None = None,
    *,
    target: str = "onnx",
    lowering: str | None = None,
    max_chunk: int | None = None,
    weights: str | None = None,
    block: int = BLOCK,
    sms: Sequence[int] | None = None,
    max_batch: int = 8,
    plugin: Path | str | None = None,
    engine: bool = True,
    genai: bool = False,
    force: bool = False,
    verify: bool = True,
    progress: ProgressFactory | None = None,
) -> Path:
    """Export a converted checkpoint.

    Args:
        model: Directory that `convert` wrote.
        output: Directory to make; None is the target's name inside the checkpoint.
        target: Row of `TARGETS`.
        lowering: How the mixer is written; None takes the target's default.
        max_chunk: Most tokens of one call; None is 128, and for `trt` 1,024 where positions reach as far.
        weights: Row of `WEIGHTS`; None takes the target's default. For GPUs also what products run in.
        block: Elements of a row that share a scale, for int8 and int4.
        sms: Compute capabilities of GPUs, 87 for 8.7; None takes all that the target can be built for.
        max_batch: Most sequences on a GPU.
        plugin: Library of the plugin for TensorRT, to put into the artifact and to build the engine with.
        engine: Whether the target `trt` builds the engine too, which takes TensorRT and this machine's GPU; without,
            the artifact is what one is made of on the device.
        genai: Whether to add what onnxruntime-genai runs: a second graph on the same weights, and its configuration.
        force: Whether an older artifact at `output` may be replaced.
        verify: Whether to compare logits and state with the torch model first; without it the manifest says so.
        progress: Opens a phase of long work; see `ligerexport.console.progress`.

    Returns:
        The artifact's directory.

    Raises:
        UsageError: A name is in no table, a number makes no sense, or `output` holds something.
        CheckpointError: The checkpoint is not converted, incomplete or damaged.
        VerificationError: The graph differs from the torch model; nothing was written.
        ArtifactError: The tokenizer cannot be read.
        MissingDependency: The extra of the target is not installed.
    """
    row, lowering, weights = _resolve(target, lowering, weights, block)
    if max_chunk is not None and max_chunk < 1:
        raise UsageError(f"max_chunk {max_chunk}", hint="a call takes at least one token")

    from ligerexport.artifact.artifact import Artifact, ArtifactWriter
    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.exporters.onnx import graph as onnx_graph
    from ligerexport.exporters.onnx.genai import check_genai, write_genai
    from ligerexport.exporters.onnx.spec import read_spec
    from ligerexport.exporters.onnx.weights import weight_bytes, write_weights
    from ligerexport.exporters.tensorrt.package import check_layers, choose_chunk, choose_gpu, package
    from ligerexport.exporters.verify.verify import verify_artifact
    from ligerexport.text.tokenizer import TextModel

    progress = progress or silent
    gpu = choose_gpu(target, sms, max_batch, plugin, engine)
    info = check_checkpoint(model, tokenizer=False)
    spec = read_spec(info)
    if gpu is not None:
        check_layers(target, spec)
    max_chunk = choose_chunk(target, spec, max_chunk)
    if genai:
        check_genai(info.path, target, lowering)
    form = onnx_graph.weight_format(weights, block, lowering, row.typed)
    # ONNX Runtime verifies the graph of an engine with the same weights and products in fp32
    checked_form = form if lowering == "plugin" else replace(form, typed=False)
    destination = Path(model) / target if output is None else Path(output)
    with ArtifactWriter(destination, force=force) as writer:
        if (info.path / "tokenizer.json").is_file():
            TextModel(info.path).write_tokenizer(writer.directory / "tokenizer.json")
        with progress("writing weights", weight_bytes(spec, form)) as advance:
            write_weights(spec, writer.directory, form, advance)
        onnx_graph.write_graph(spec, writer.directory, lowering=lowering, max_chunk=max_chunk, form=checked_form)
        for name in COMPANIONS:
            if (info.path / name).is_file():
                shutil.copyfile(info.path / name, writer.directory / name)
        with progress("hashing the source", info.bytes) as advance:
            source = _source(info, advance)
        recovery = info.config.get("liger_recovery")
        if not isinstance(recovery, dict | None):
            raise CheckpointError(f"config.json says liger_recovery {recovery!r:.60}", hint="convert the model again")
        skipped: dict[str, Any] = {"passed": False, "skipped": True}
        manifest = make_manifest(
            spec, source, target, lowering, max_chunk, row.requires, skipped, recovery=recovery, form=form
        )
        if verify:
            checked, quality = verify_artifact(spec, Artifact(writer.directory, manifest), form, progress=progress)
            manifest = replace(manifest, verification=checked, quality=quality)
            gc.collect()
        if gpu is not None:
            manifest = package(writer.directory, manifest, spec, form, gpu, progress)
        if genai:
            write_genai(Artifact(writer.directory, manifest))
        writer.commit(manifest)
    return destination


def planned_weight_bytes(
    model: Path | str,
    *,
    target: str = "onnx",
    lowering: str | None = None,
    weights: str | None = None,
    block: int = BLOCK,
) -> int:
    """Return the bytes that `build` would store for the weights; reads no weight. Arguments and errors as there."""
    _, lowering, weights = _resolve(target, lowering, weights, block)
    from ligerexport.exporters.onnx.graph import weight_format
    from ligerexport.exporters.onnx.spec import read_spec
    from ligerexport.exporters.onnx.weights import weight_bytes

    return weight_bytes(read_spec(model), weight_format(weights, block, lowering))


def _resolve(target: str, lowering: str | None, weights: str | None, block: int) -> tuple[Target, str, str]:
    """Check names and what is installed; return the target, its lowering and the precision of its weights."""
    row = get_target(target)
    lowering = row.lowerings[0] if lowering is None else lowering
    if lowering not in row.lowerings:
        raise UsageError(f"unknown lowering '{lowering}' for {target}", hint=close_matches(lowering, row.lowerings))
    weights = row.weights[0] if weights is None else weights
    get_precision(weights, block)
    if weights not in row.weights:
        raise UsageError(f"weights in {weights} for {target}", hint=close_matches(weights, row.weights))
    _check_installed()
    return row, lowering, weights


def make_manifest(
    spec: ModelSpec,
    source: Any,
    target: str,
    lowering: str,
    max_chunk: int,
    requires: Mapping[str, str],
    verification: dict[str, Any],
    *,
    form: WeightFormat,
    recovery: dict[str, Any] | None = None,
) -> Manifest:
    """Say what an artifact is, all but its files."""
    from ligerexport import __version__
    from ligerexport.artifact.artifact import ByteCounts, Graph, Manifest, ModelShape, StateTensor, TensorInfo
    from ligerexport.exporters.onnx import graph as onnx_graph
    from ligerexport.exporters.onnx.lowerings import LOWERINGS
    from ligerexport.exporters.onnx.weights import weight_bytes, weight_names

    tensors = onnx_graph.state_tensors(spec, lowering, form)
    integer = LOWERINGS[lowering].integer
    ids = TensorInfo("input_ids", integer, ("B", "T")), TensorInfo("position", integer, ("B",))
    inputs = (*ids, *(TensorInfo(t.past, t.dtype, t.shape) for t in tensors))
    logits = TensorInfo("logits", "float32", ("B", spec.vocab_size))
    outputs = (logits, *(TensorInfo(t.present, t.dtype, t.shape) for t in tensors))
    return Manifest(
        ligerexport=__version__,
        target=target,
        lowering=lowering,
        precision=form.precision.dtype,
        block=form.block if form.precision.blocked else None,
        source=source,
        family=spec.family,
        liger=spec.liger.to_dict(),
        model=ModelShape(
            layers=len(spec.mixers), hidden_size=spec.hidden_size, vocab_size=spec.vocab_size, q_heads=spec.q_heads,
            kv_heads=spec.kv_heads, d_k=spec.head_dim, d_v=spec.head_dim, trained_length=spec.trained_length,
            parameters=sum(prod(spec.weights[name].shape) for name in weight_names(spec)),
        ),
        graph=Graph(onnx_graph.GRAPH_FILE, max_chunk, inputs, outputs),
        state=tuple(StateTensor(t.past, t.present, t.shape, t.dtype, t.fill, t.grows) for t in tensors),
        bytes=ByteCounts(
            weights=weight_bytes(spec, form),
            state_per_sequence=sum(t.nbytes for t in tensors if not t.grows),
            kv_per_token=len(spec.mixers) * 2 * spec.kv_heads * spec.head_dim * 4,
        ),
        requires=dict(requires),
        verification=verification,
        recovery=recovery,
    )  # fmt: skip


def _source(info: CheckpointInfo, advance: Any) -> Any:
    """Say where the weights come from; links of `convert` to the original files have the original's hashes."""
    from ligerexport.artifact.artifact import Source
    from ligerexport.reading import from_plain, sha256

    hashes = {}
    for file in info.files:
        hashes[file.name] = sha256(file)
        advance(file.stat().st_size)
    origin = info.config.get("liger_source") or {"model": info.path.resolve().name}
    try:
        return from_plain(Source, origin | {"files": hashes})
    except (ValueError, TypeError) as error:
        raise CheckpointError(
            f"config.json says liger_source {origin!r:.60}", hint="convert the model again"
        ) from error


def _check_installed() -> None:
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingDependency(error.name or "onnx", extra="onnx") from error
    warn_if_untried("onnx")
    warn_if_untried("onnx-ir")
