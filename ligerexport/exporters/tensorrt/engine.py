"""Build an engine from a graph, with the interface that TensorRT and TensorRT-RTX share. Neither is imported here.

Networks are strongly typed, so the types in the graph are the ones that run. TF32 is off, so fp32 has full precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import Graph
from ligerexport.console import Advance, ProgressFactory
from ligerexport.errors import LigerError

FEW_TOKENS = 128
"""Tokens that each of many sequences may have in one call, even if its part of the chunk is smaller."""


def build_engine(
    trt: Any,
    file: Path,
    destination: Path,
    *,
    graph: Graph,
    max_batch: int,
    progress: ProgressFactory,
    sms: Sequence[int] = (),
    plugin: Path | None = None,
) -> None:
    """Build an engine with a profile for each of `calls`.

    Args:
        trt: The module `tensorrt` or `tensorrt_rtx`.
        file: The graph, with its weights beside it.
        destination: File to write.
        graph: The inputs, and the largest number of tokens per call.
        max_batch: Largest number of sequences.
        sms: Compute capabilities, if it is built for other GPUs than this machine's.
        plugin: Library with operators that the graph uses.

    Raises:
        LigerError: TensorRT rejects the plugin or the graph, or cannot build it; the message has its first error.
    """
    logger = _logger(trt)
    builder = trt.Builder(logger)
    if plugin is not None and builder.get_plugin_registry().load_library(str(plugin)) is None:
        raise LigerError(f"TensorRT {trt.__version__} does not load {plugin}: {logger.first()}",
                         hint="build the plugin against the headers of this version")  # fmt: skip
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(file)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        what = f"{errors[0].node_name()}: {errors[0].desc()}" if errors else logger.first()
        raise LigerError(f"TensorRT {trt.__version__} does not take the graph: {what}")
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)
    if sms:
        config.num_compute_capabilities = len(sms)
    for i, sm in enumerate(sms):
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{sm}"), i)
    for batch, tokens in calls(max_batch, graph.max_chunk):
        profile = builder.create_optimization_profile()
        for x in graph.inputs:
            least, most = ([{"B": b, "T": t}.get(str(n), n) for n in x.shape] for b, t in ((1, 1), (batch, tokens)))
            profile.set_shape(x.name, least, most, most)
        config.add_optimization_profile(profile)
    config.progress_monitor = monitor = _monitor(trt, progress)
    engine = builder.build_serialized_network(network, config)
    monitor.close()
    if engine is None:
        raise LigerError(f"TensorRT {trt.__version__} cannot build an engine: {logger.first()}")
    destination.write_bytes(memoryview(engine))


def calls(max_batch: int, max_chunk: int) -> list[tuple[int, int]]:
    """Return the largest sequences and tokens of each profile, in the order that `runner/engine.cc` has.

    Many sequences share the chunk, so that memory does not grow with both; but each may always have 128 tokens.
    """
    if max_batch == 1:
        return [(1, 1), (1, max_chunk)]
    few = min(max_chunk, max(FEW_TOKENS, max_chunk // max_batch))
    return [(1, 1), (max_batch, 1), (1, max_chunk), (max_batch, few)]


def check_engine(trt: Any, file: Path) -> None:
    """Check whether an engine of TensorRT-RTX runs on this machine's GPU.

    Raises:
        LigerError: The engine does not run; the message has the reason.
    """
    logger = _logger(trt)
    with file.open("rb") as engine:
        validity, reasons = trt.Runtime(logger).get_engine_validity(engine.read())
    if validity == trt.EngineValidity.INVALID:
        raise LigerError(
            f"{file} does not run here: {logger.first() or f'diagnostics {reasons:#x}'}",
            hint="build it for this GPU's compute capability with --sm, or for another runtime with --target",
        )


def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc]
        """Collects TensorRT's errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

        def first(self) -> str:
            return self.errors[0].strip().partition("\n")[0] if self.errors else ""

    return Logger()


def _monitor(trt: Any, progress: ProgressFactory) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """Shows the outermost phases; inner phases come from several threads."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.name: str | None = None
            self.phase: AbstractContextManager[Advance] | None = None

        def phase_start(self, name: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.close()
                self.name, self.phase = name, progress(f"TensorRT: {name}", steps, "steps")
                self.advance = self.phase.__enter__()

        def step_complete(self, name: str, step: int) -> bool:
            if name == self.name:
                self.advance(1)
            return True

        def phase_finish(self, name: str) -> None:
            if name == self.name:
                self.close()

        def close(self) -> None:
            if self.phase is not None:
                self.phase.__exit__(None, None, None)
            self.name = self.phase = None

    return Monitor()
