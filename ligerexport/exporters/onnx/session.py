"""Run a step graph with ONNX Runtime: buffers are bound once, the state is updated in place, logits are not copied.

The graph promises that each `past.*` has one consumer and that its `present.*` comes after it, so both share a buffer.
On a device the state stays there between calls; only ids, positions and logits are copied.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ligerexport.artifact.artifact import Artifact, Manifest, StateTensor
from ligerexport.artifact.claims import METER
from ligerexport.artifact.snapshot import Snapshot
from ligerexport.dtypes import HALVES
from ligerexport.errors import ArtifactError, LigerError, MissingDependency, UsageError, close_matches
from ligerexport.exporters.onnx.lent import KEEP, UNDO, lent, with_inputs
from ligerexport.exporters.onnx.lora import adapters_of, read_adapter
from ligerexport.exporters.onnx.native import register
from ligerexport.exporters.onnx.native.undo import Undo
from ligerexport.exporters.onnx.screen import check_graph
from ligerexport.exporters.session import DRAFT, BatchSession, choose_chunk
from ligerexport.threads import default_threads
from ligerexport.versions import require, warn_if_untried

if TYPE_CHECKING:
    import onnxruntime

DEFAULT_CHUNK = 64
"""Prompt tokens per call, if the graph takes more. On SmolLM2, 64 and 128 are equally fast; 64 needs less memory."""

PROVIDERS: dict[str, list[str | tuple[str, dict[str, str]]]] = {
    "cpu": ["CPUExecutionProvider"],
    "cuda": [("CUDAExecutionProvider", {"use_tf32": "0"}), "CPUExecutionProvider"],  # no TF32 in fp32 products
}
"""Execution providers of each device, in ONNX Runtime's spelling."""

EXACT = "session.qdq_matmulnbits_accuracy_level", "1"
"""Option that leaves activations in fp32 in the products that ONNX Runtime fuses itself."""
FOLDER = "session.model_external_initializers_file_folder_path"
"""Option that gives the directory of the weights when the graph is passed as bytes."""
SPIN = "30"
"""Microseconds that a thread waits for the next operator before it sleeps: long enough for that operator to arrive, and
short enough to leave the core to other processes."""


class OnnxSession(BatchSession):
    """One batch of sequences on an ONNX artifact. See `ligerexport.run.runtime.Session` for the interface.

    Args:
        artifact: Artifact from `open_artifact`, or an unfinished artifact under verification.
        batch, threads, chunk, prepack, scoring: As for `ligerexport.run.runtime.load`.
        exact: Whether activations stay in fp32, also in products with quantised weights and in the state. This is
            slower, and serves to compare a graph with arithmetic on the same weights.
        device: Row of `PROVIDERS`.
        adapters: Directories of PEFT adapters, by the names that `use` takes.

    Raises:
        ArtifactError: ONNX Runtime does not load the graph, or it does not match the manifest.
        MissingDependency: ONNX Runtime is not installed, or does not support this device.
        UsageError: `batch`, `threads` or `chunk` is out of range, or the lowering does not run on this device.
    """

    def __init__(
        self,
        artifact: Artifact,
        *,
        batch: int = 1,
        threads: int | None = None,
        chunk: int | None = None,
        prepack: bool = True,
        scoring: bool = False,
        exact: bool = False,
        device: str = "cpu",
        adapters: Mapping[str, Path | str] | None = None,
    ) -> None:
        manifest = artifact.manifest
        self.artifact = artifact
        self.batch = batch
        self.chunk = choose_chunk(chunk, DEFAULT_CHUNK, manifest.graph.max_chunk)
        self.threads = default_threads() if threads is None else threads
        if batch < 1 or self.threads < 1:
            raise UsageError(f"batch {batch} and threads {self.threads}", hint="both are at least 1")
        if device not in PROVIDERS:
            raise UsageError(f"unknown device '{device}'", hint=f"choose from {', '.join(PROVIDERS)}")
        if device != "cpu" and manifest.lowering == "native":
            raise UsageError("the lowering native runs on the CPU", hint="ligerexport build --lowering ort")
        self._known = {name: read_adapter(place, manifest) for name, place in (adapters or {}).items()}
        check_graph(artifact)
        graph = artifact.graph.read_bytes()
        if exact:
            require("build")
            from ligerexport.exporters.onnx.variants import exact_graph, exact_manifest

            graph = exact_graph(artifact.graph)
            self.artifact = replace(artifact, manifest=exact_manifest(manifest))
        self._lent = lent(graph)
        self._scoring = scoring and KEEP in self._lent
        self._device = device
        self._session = _open(artifact, self.threads, prepack, with_inputs(graph), exact, device)
        self._allocate()

    def _allocate(self) -> None:
        """Make and bind the state before the first token."""
        manifest = self.artifact.manifest
        self._fixed = {t: np.full(self._shape(t), t.fill, t.dtype) for t in manifest.state if not t.grows}
        self._values = {t: _value(array, self._device) for t, array in self._fixed.items()}
        self._growing = {t: self._empty(t) for t in manifest.state if t.grows}
        zeros = {x.name: np.zeros((self.batch, *x.sizes), np.float32) for x in adapters_of(manifest)}
        self._lora = {name: (array, _value(array, self._device)) for name, array in zeros.items()}
        self.adapters = (None,) * self.batch
        self._position = np.zeros(self.batch, np.int64)
        self._logits = np.zeros((self.batch, manifest.model.vocab_size), np.float32)
        self._step_ids = np.zeros((self.batch, 1), np.int64)
        self._forgotten = np.zeros((self.batch, manifest.model.layers), np.float32) if manifest.meters else None
        self._step, self._chunk = self._bind(), self._bind()
        self._step.bind_ortvalue_input("input_ids", _value(self._step_ids))
        self._drafts: onnxruntime.IOBinding | None = None
        self._undo: Undo | None = None
        self._begin()

    def sibling(self, batch: int = 1) -> OnnxSession:
        """Return a session for other sequences on the same loaded weights, which may run in another thread.

        Raises:
            UsageError: `batch` is out of range.
        """
        if batch < 1:
            raise UsageError(f"batch {batch}", hint="it is at least 1")
        other = copy.copy(self)
        other.batch = batch
        other._allocate()
        return other

    @property
    def forgotten(self) -> np.ndarray | None:
        return self._forgotten

    @property
    def state_bytes(self) -> int:
        """Current size of the state of all sequences, in bytes."""
        fixed = sum(array.nbytes for array in self._fixed.values())
        return fixed + sum(value.tensor_size_in_bytes() for value in self._growing.values())

    def use(self, adapters: str | Sequence[str | None] | None) -> None:
        rows = [adapters] * self.batch if isinstance(adapters, str | None) else list(adapters)
        if len(rows) != self.batch:
            raise UsageError(f"{len(rows)} adapters for {self.batch} sequences", hint="name one for each, or None")
        for name in rows:
            if name is not None and name not in self._known:
                raise UsageError(f"no adapter '{name}' was loaded", hint=close_matches(name, self._known))
        if tuple(rows) == self.adapters:
            return
        with self._alone():
            for row, (old, new) in enumerate(zip(self.adapters, rows, strict=True)):
                if old != new:
                    chosen = {} if new is None else self._known[new]
                    for name, (array, _) in self._lora.items():
                        array[row] = chosen.get(name, 0)
            if self._device != "cpu":
                for array, value in self._lora.values():
                    value.update_inplace(array)
            self.adapters = tuple(rows)

    def _advance(self, ids: np.ndarray) -> np.ndarray:
        if ids is self._step_ids:
            self._run(self._step, ids)
        else:
            for start in range(0, ids.shape[1], self.chunk):
                self._run(self._chunk, np.array(ids[:, start : start + self.chunk], np.int64, order="C"))
        return self._logits

    def every(self, ids: Sequence[int] | np.ndarray) -> Iterator[np.ndarray]:
        if not self._scoring:
            yield from super().every(ids)
            return
        array = np.atleast_2d(np.asarray(ids))
        for start in range(0, max(1, array.shape[1]), self.chunk):
            self.prefill(array[:, start : start + self.chunk])
            yield self._every

    @property
    def drafts(self) -> bool:
        return KEEP in self._lent and not self._scoring and self.artifact.manifest.graph.max_chunk >= DRAFT

    def _draft(self, ids: np.ndarray) -> np.ndarray:
        if not self.drafts:
            return super()._draft(ids)
        if self._drafts is None:
            self._drafts = self._bind()
            self._draft_logits = np.empty((self.batch * DRAFT, self._logits.shape[1]), np.float32)
            ragged = all(len(self._shape(t)) == 2 for t in self._fixed if t.past.endswith("slot_position"))
            if UNDO in self._lent and ragged and self._device == "cpu" and not self._growing:
                model = self.artifact.manifest.model
                self._undo = Undo(self._fixed, model.layers, model.kv_heads, DRAFT)
                self._drafts.bind_ortvalue_input(UNDO, _value(self._undo.memory))
        if self._undo is None:
            self._before = self._copy(None)
        logits = self._draft_logits[: ids.size].reshape(*ids.shape, -1)
        _keep_all(self._drafts, logits)
        with self._fading():
            self._run(self._drafts, ids)
        return logits

    def _settle(self, kept: list[int]) -> None:
        if self._undo is None or self._before is not None:
            super()._settle(kept)
            return
        assert self._drafted is not None
        self._undo.kept[:] = kept
        self._undo.take_back()
        self._position += self._undo.kept
        self._position -= self._drafted.shape[1]

    def _forget(self, row: int | None) -> None:
        rows = self._rows(row)
        self._position[rows] = 0
        self._fetch()
        for tensor, array in self._fixed.items():
            array[rows] = tensor.fill
        self._put()
        self._regrow(rows, {tensor: self._empty(tensor, 1).numpy() for tensor in self._growing})

    def _copy(self, row: int | None) -> Snapshot:
        rows = self._rows(row)
        self._fetch()
        tensors = {t.past: array[rows].copy() for t, array in self._fixed.items()}
        for tensor, value in self._growing.items():
            grown = value.numpy()[rows]
            first = 0 if row is None else grown.shape[2] - max(0, self._position[row])
            tensors[tensor.past] = grown[:, :, first:].copy()
        return Snapshot(self.artifact.manifest.fingerprint, self._position[rows].copy(), tensors)

    def _replace(self, snapshot: Snapshot, row: int | None) -> None:
        rows = self._rows(row)
        self._position[rows] = snapshot.position
        self._fetch()
        for tensor, array in self._fixed.items():
            array[rows] = snapshot.tensors[tensor.past]
        self._put()
        self._regrow(rows, {tensor: snapshot.tensors[tensor.past] for tensor in self._growing})

    def _fetch(self) -> None:
        """Copy the state from the device into `_fixed`; on the CPU both are the same memory."""
        if self._device != "cpu":
            for tensor, array in self._fixed.items():
                array[:] = self._values[tensor].numpy()

    def _put(self) -> None:
        """Copy `_fixed` to the device."""
        if self._device != "cpu":
            for tensor, array in self._fixed.items():
                self._values[tensor].update_inplace(array)

    def _regrow(self, rows: slice, given: dict[StateTensor, np.ndarray]) -> None:
        """Put rows into tensors that grow. The newest token is in the last column, so short sequences begin later."""
        columns = max(0, int(self._position.max()))
        for tensor, new in given.items():
            grown = np.zeros(self._shape(tensor, grown=columns), tensor.dtype)
            if columns:
                old, new = self._growing[tensor].numpy()[:, :, -columns:], new[:, :, -columns:]
                grown[:, :, columns - old.shape[2] :] = old
                grown[rows] = 0
                grown[rows, :, columns - new.shape[2] :] = new
            self._growing[tensor] = _value(grown)

    def _empty(self, tensor: StateTensor, batch: int | None = None) -> onnxruntime.OrtValue:
        return _value(np.empty(self._shape(tensor, batch), tensor.dtype))

    def _bind(self) -> onnxruntime.IOBinding:
        """Bind all fixed buffers; ids and growing tensors are bound later."""
        binding = self._session.io_binding()
        binding.bind_ortvalue_input("position", _value(self._position))
        binding.bind_ortvalue_output("logits", _value(self._logits))
        for name, (_, value) in self._lora.items():
            binding.bind_ortvalue_input(name, value)
        if self._forgotten is not None:
            binding.bind_ortvalue_output(METER, _value(self._forgotten))
        for tensor, value in self._values.items():
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_ortvalue_output(tensor.present, value)
        return binding

    def _run(self, binding: onnxruntime.IOBinding, ids: np.ndarray) -> None:
        tokens = ids.shape[1]
        if ids is not self._step_ids or self._device != "cpu":
            binding.bind_ortvalue_input("input_ids", _value(ids))
        if self._device != "cpu":  # copied when it is bound
            binding.bind_ortvalue_input("position", _value(self._position))
        for tensor, value in self._growing.items():
            binding.bind_ortvalue_input(tensor.past, value)
            binding.bind_output(tensor.present, self._device)
        if self._scoring:
            self._every = np.empty((self.batch, tokens, self._logits.shape[1]), np.float32)
            _keep_all(binding, self._every)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise LigerError(
                f"ONNX Runtime failed after {self._position.max()} tokens: {_first_line(error)}",
                hint="the state is undefined now: reset the session or restore a snapshot",
            ) from error
        if self._growing:
            # a binding answers in the order in which outputs were bound
            names = ["logits", *([METER] if self._forgotten is not None else ())]
            names += [tensor.present for tensor in (*self._fixed, *self._growing)]
            values = dict(zip(names, binding.get_outputs(), strict=True))
            self._growing = {tensor: values[tensor.present] for tensor in self._growing}
        if self._scoring:
            self._logits[:] = self._every[:, -1]
        self._position += tokens


def _keep_all(binding: onnxruntime.IOBinding, logits: np.ndarray) -> None:
    """Let a call of T tokens write the logits `[B, T, V]` of them all."""
    batch, tokens, vocabulary = logits.shape
    binding.bind_ortvalue_input(KEEP, _value(np.arange(tokens)))
    binding.bind_ortvalue_output("logits", _value(logits.reshape(batch * tokens, vocabulary)))


def _value(array: np.ndarray, device: str = "cpu") -> onnxruntime.OrtValue:
    """Return a tensor of ONNX Runtime over the memory of `array`, or a copy on a device."""
    import onnxruntime

    return onnxruntime.OrtValue.ortvalue_from_numpy(array, device)


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def optimisation(manifest: Manifest, device: str = "cpu") -> str:
    """Return how far ONNX Runtime may rewrite a graph when it loads it, by the name of the level.

    A graph that is loaded at another level rounds differently. With int4 weights, whose products round activations to
    8 bits, a difference in the last place can grow to a whole logit.
    """
    if manifest.lowering != "portable":
        # The graph has the fused operators already, and a search for more takes up to two fifths of the loading time.
        if device == "cpu" and manifest.precision not in {row.name for row in HALVES}:
            return "ORT_DISABLE_ALL"
        if manifest.block is None:  # this converts fp16 weights to fp32 once, not in each call
            return "ORT_ENABLE_BASIC"
    return "ORT_ENABLE_ALL"


def _open(
    artifact: Artifact, threads: int, prepack: bool, graph: bytes, exact: bool, device: str
) -> onnxruntime.InferenceSession:
    """Load a graph, and compare it with the manifest."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependency("onnxruntime", hint="pip install onnxruntime") from error
    warn_if_untried("onnxruntime")
    wanted = [row if isinstance(row, str) else row[0] for row in PROVIDERS[device]]
    missing = MissingDependency(wanted[0], hint="pip install 'onnxruntime-gpu[cuda,cudnn]', in place of onnxruntime")
    if wanted[0] not in onnxruntime.get_available_providers():
        raise missing
    if device == "cuda":
        onnxruntime.preload_dlls()  # the libraries that pip installed
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # The planner's search for buffers to reuse is quadratic in nodes and takes most of the loading time of SmolLM2. The
    # arena reuses them anyway, at the same speed and with the same memory.
    options.enable_mem_reuse = False
    level = optimisation(artifact.manifest, device)
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    # Waking a thread for an operator takes as long as many operators themselves.
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    options.add_session_config_entry("session.intra_op.spin_duration_us", SPIN)
    options.add_session_config_entry("session.disable_prepacking", str(int(not prepack)))
    if artifact.manifest.lowering == "native":
        register(options)
    if exact:  # for the products that ONNX Runtime fuses itself
        options.add_session_config_entry(*EXACT)
    options.add_session_config_entry(FOLDER, str(artifact.directory))  # bytes do not say where the weights are
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=PROVIDERS[device])
    except Exception as error:  # ONNX Runtime's own classes have no common base
        raise ArtifactError(
            f"onnxruntime {onnxruntime.__version__} cannot load {artifact.graph}: {_first_line(error)}",
            hint="ligerexport doctor",
        ) from error
    if session.get_providers()[0] != wanted[0]:  # ONNX Runtime falls back silently if a CUDA library is missing
        raise missing
    promised = artifact.manifest.graph
    for side, found, expected in (
        ("inputs", session.get_inputs(), promised.inputs),
        ("outputs", session.get_outputs(), promised.outputs),
    ):
        if [x.name for x in found] != [x.name for x in expected]:
            raise ArtifactError(f"the {side} of {artifact.graph} are not those of its manifest", hint="build it again")
    return session
