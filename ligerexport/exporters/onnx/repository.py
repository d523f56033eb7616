"""A model repository for NVIDIA's Triton Inference Server, which keeps the state of each sequence between requests.

The server calls it implicit state: each tensor `present.*` of one request is `past.*` of the next one of the same
sequence. A client sends token ids in pieces with the number of tokens before them, and gets the logits after the last.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from ligerexport.artifact.artifact import Artifact, StateTensor, TensorInfo
from ligerexport.errors import UsageError
from ligerexport.exporters.onnx.session import optimisation
from ligerexport.exporters.targets import get_target
from ligerexport.staging import staged_directory

CONFIG_FILE = "config.pbtxt"
VERSION = "1"
TYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int64": "INT64", "int32": "INT32", "int8": "INT8"}
"""The server's names of types."""
LEVELS = {"ORT_DISABLE_ALL": 2, "ORT_ENABLE_BASIC": -1, "ORT_ENABLE_ALL": 0}
"""The server's numbers of the levels at which ONNX Runtime loads a graph."""
NUMPY = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int64": np.int64, "int32": np.int32,
         "int8": np.int8}  # fmt: skip


def write_repository(
    artifact: Artifact, destination: Path, *, max_batch: int = 16, seen: str | None = None, force: bool = False
) -> Path:
    """Write the directory of one model, whose name is the model's.

    Args:
        artifact: The artifact, for ONNX Runtime.
        destination: Directory to make, below that of the repository.
        max_batch: Largest number of sequences in one call.
        seen: Directory of the repository as the server sees it, such as `/models` in a container; default: as it is
            here. It is needed where the graph has an operator of a library.
        force: Whether an older one may be replaced.

    Raises:
        UsageError: The artifact is not for ONNX Runtime, its state grows, or `max_batch` is not positive.
    """
    manifest = artifact.manifest
    if not get_target(manifest.target).onnxruntime:
        raise UsageError(f"the server's ONNX Runtime with the target {manifest.target}", hint="build --target onnx")
    if any(tensor.grows for tensor in manifest.state):
        raise UsageError("layers kept as softmax have a state that grows", hint="convert without --keep-softmax")
    if max_batch < 1:
        raise UsageError(f"--max-batch {max_batch}", hint="give at least 1")
    place = Path(destination).absolute()
    library = None
    with staged_directory(destination, force=force, marker=CONFIG_FILE) as stage:
        version, initial = stage / VERSION, stage / "initial_state"
        version.mkdir()
        for name in (manifest.graph.file, manifest.graph.data):
            if (artifact.directory / name).is_file():
                shutil.copy2(artifact.directory / name, version / name)
        if manifest.lowering == "native":
            from ligerexport.exporters.onnx.native import library as native_library

            shutil.copy2(native_library(), version)
            home = PurePosixPath(seen, place.name) if seen else PurePosixPath(place)
            library = str(home / VERSION / native_library().name)
        for tensor in manifest.state:
            if tensor.fill:
                initial.mkdir(exist_ok=True)
                np.full(_sizes(tensor.shape), tensor.fill, NUMPY[tensor.dtype]).tofile(initial / tensor.past)
        (stage / CONFIG_FILE).write_text(configuration(artifact, place.name, max_batch, library), encoding="utf-8")
    return place


def configuration(artifact: Artifact, name: str, max_batch: int, library: str | None = None) -> str:
    """Return `config.pbtxt`: a `ModelConfig` of the server's `model_config.proto` as text.

    Args:
        artifact: The artifact.
        name: The model's name, that of its directory.
        max_batch: Largest number of sequences in one call.
        library: Library of operators, as the server sees it.
    """
    graph, state = artifact.manifest.graph, artifact.manifest.state
    past, present = {tensor.past for tensor in state}, {tensor.present for tensor in state}
    inputs = [_tensor("input", info) for info in graph.inputs if info.name not in past]
    outputs = [_tensor("output", info) for info in graph.outputs if info.name not in present]
    states = "".join(map(_state, state))
    operators = f'model_operations {{ op_library_filename: "{library}" }}\n' if library else ""
    return (
        f'name: "{name}"\nbackend: "onnxruntime"\ndefault_model_filename: "{graph.file}"\nmax_batch_size: {max_batch}\n'
        f"optimization {{ graph {{ level: {LEVELS[optimisation(artifact.manifest)]} }} }}\n"
        f"{''.join(inputs)}{''.join(outputs)}"
        f"sequence_batching {{\n  oldest {{ max_candidate_sequences: {8 * max_batch} }}\n"
        f"  max_sequence_idle_microseconds: 600000000\n{states}}}\n{operators}"
    )


def _sizes(shape: Sequence[int | str]) -> list[int]:
    """Return the axes without that of the batch; -1 for one of any size."""
    return [size if isinstance(size, int) else -1 for size in shape[1:]]


def _tensor(kind: str, info: TensorInfo) -> str:
    """Return an input or output. The server knows no scalar in a batch, so one becomes a row of one number."""
    sizes = _sizes(info.shape)
    shape = f"dims: {sizes}" if sizes else "dims: [1] reshape: { shape: [] }"
    return f'{kind} {{ name: "{info.name}" data_type: TYPE_{TYPES[info.dtype]} {shape} }}\n'


def _state(tensor: StateTensor) -> str:
    kind, sizes = f"data_type: TYPE_{TYPES[tensor.dtype]}", f"dims: {_sizes(tensor.shape)}"
    start = f'data_file: "{tensor.past}"' if tensor.fill else "zero_data: true"
    return (
        f'  state {{\n    input_name: "{tensor.past}" output_name: "{tensor.present}" {kind} {sizes}\n'
        f'    initial_state {{ name: "{tensor.past}" {kind} {sizes} {start} }}\n  }}\n'
    )
