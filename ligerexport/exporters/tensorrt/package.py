"""What an artifact for GPUs holds beside the graph: kernels and the plugin (`trt`), and an engine.

What is not installed is said before any work is done. TensorRT is imported by the functions that need it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.console import ProgressFactory
from ligerexport.dtypes import DTYPES
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.exporters.targets import get_target
from ligerexport.exporters.tensorrt.machine import driver
from ligerexport.reading import sha256

if TYPE_CHECKING:
    from ligerexport.artifact.artifact import Manifest
    from ligerexport.exporters.onnx.spec import ModelSpec
    from ligerexport.exporters.onnx.weights import WeightFormat

ENGINE_FILE = "model.engine"
PLUGIN_FILE = "libligerexport_trt.so"
_RTX = ("tensorrt_rtx", "tensorrt_rtx_bindings")  # the metapackage's module, and what is in its wheel


@dataclass(frozen=True)
class Gpu:
    """What an artifact is built for.

    Attributes:
        sms: Compute capabilities, 87 for 8.7.
        max_batch: Most sequences.
        plugin: The plugin's library, which goes into the artifact; None leaves it to the device.
        engine: Whether to build the engine.
    """

    sms: tuple[int, ...]
    max_batch: int
    plugin: Path | None
    engine: bool


def choose_gpu(
    target: str, sms: Sequence[int] | None, max_batch: int, plugin: Path | str | None, engine: bool
) -> Gpu | None:
    """Check what was asked for and what is installed; None for a target that is for no GPU.

    Raises:
        UsageError: An option is not for this target, or a number makes no sense.
        MissingDependency: Something is not installed.
    """
    row = get_target(target)
    if not row.sms:
        if sms or plugin or not engine:
            raise UsageError(f"GPU options with the target {target}", hint="--sm, --plugin, --no-engine go with trt")
        return None
    if unknown := [str(sm) for sm in sms or () if sm not in row.sms]:
        known = ", ".join(map(str, row.sms))
        raise UsageError(f"compute capability {', '.join(unknown)}", hint=f"{target} is built for: {known}")
    if max_batch < 1:
        raise UsageError(f"max_batch {max_batch}", hint="there is at least one sequence")
    if plugin is not None and not Path(plugin).is_file():
        raise UsageError(
            f"there is no plugin library {plugin}", hint="build it with CMake, see docs/guides/tensorrt.md"
        )
    gpu = Gpu(tuple(sorted(set(sms or row.sms))), max_batch, None if plugin is None else Path(plugin), engine)
    if target == "trt-rtx":
        if plugin is not None or not engine:
            raise UsageError("trt-rtx is an engine without a plugin", hint="--plugin and --no-engine go with trt")
        rtx()
    else:
        if not find_spec("triton"):
            raise MissingDependency("Triton, which compiles the kernels,", extra="gpu")
        if engine:
            here()
            if plugin is None:
                raise MissingDependency("the plugin's library", hint=f"--plugin PATH; or {_LATER}")
    return gpu


def check_layers(target: str, spec: ModelSpec) -> None:
    """Check that a target for GPUs has all that the layers of a checkpoint need.

    Raises:
        UsageError: It has not.
    """
    if kept := [str(i) for i, layer in enumerate(spec.mixers) if layer is None]:
        raise UsageError(
            f"layer {', '.join(kept)} is kept as softmax, and engines here have no growing cache",
            hint="convert all layers, or build with --target onnx",
        )
    if target == "trt" and not all(layer is None or layer.config.fuses for layer in spec.mixers):
        raise UsageError(
            "no kernel of the plugin has a recurrence with keyed rows",
            hint="convert with another gate, or build with --target trt-rtx or --target onnx",
        )
    if target == "trt" and any(2 * len(softmax.inv_freq) != spec.head_dim for softmax in spec.attention):
        raise UsageError(
            f"heads of {spec.head_dim} channels are rotated in part, the plugin's kernels rotate them whole",
            hint="build with --target trt-rtx or --target onnx",
        )


def choose_chunk(target: str, spec: ModelSpec, wanted: int | None) -> int:
    """Return the most tokens of one call; the plugin's kernels take no more than rotary embedding reaches.

    Raises:
        UsageError: It is to be more.
    """
    default = get_target(target).chunk
    if target != "trt":
        return default if wanted is None else wanted
    longest = min(layer.max_distance + 1 for layer in spec.mixers if layer is not None)
    if wanted is not None and wanted > longest:
        raise UsageError(
            f"calls of {wanted:,} tokens, and positions of this model reach over {longest - 1:,}",
            hint=f"--max-chunk {longest}",
        )
    return wanted or min(default, longest)


_LATER = "--no-engine, and liger-run makes the engine on the device"


def tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        MissingDependency: It is not there, not whole, or older than 10.
    """
    try:
        trt: Any = import_module("tensorrt")
        version = str(trt.__version__)
    except (ImportError, OSError, AttributeError) as error:
        raise MissingDependency("TensorRT", hint=f"pip install 'ligerexport[trt]'; or {_LATER}") from error
    if int(version.partition(".")[0]) < 10:
        raise MissingDependency("TensorRT 10 or later", hint=f"TensorRT {version} has no Python plugin; {_LATER}")
    return trt


def rtx() -> Any:
    """Import TensorRT-RTX.

    Raises:
        MissingDependency: It is not there or not whole.
    """
    name = next((name for name in _RTX if find_spec(name)), None)
    try:
        if name is None:
            raise ImportError(_RTX[0])
        return import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency("TensorRT-RTX", extra="rtx") from error


def package(
    directory: Path, manifest: Manifest, spec: ModelSpec, form: WeightFormat, gpu: Gpu, progress: ProgressFactory
) -> Manifest:
    """Add to an artifact what its target needs; return the manifest that says so."""
    add = _add_rtx if manifest.target == "trt-rtx" else _add_plugin
    return add(directory, manifest, spec, form, gpu, progress)


def _add_rtx(
    directory: Path, manifest: Manifest, spec: ModelSpec, form: WeightFormat, gpu: Gpu, progress: ProgressFactory
) -> Manifest:
    """Put an engine in place of the graph."""
    from ligerexport.exporters.onnx.weights import DATA_FILE
    from ligerexport.exporters.tensorrt.engine import build_engine

    trt, graph = rtx(), directory / manifest.graph.file
    build_engine(trt, graph, directory / ENGINE_FILE, graph=manifest.graph, max_batch=gpu.max_batch, progress=progress,
                 sms=gpu.sms)  # fmt: skip
    graph.unlink()
    (directory / DATA_FILE).unlink()
    device = {"sms": list(gpu.sms), "max_batch": gpu.max_batch, "engine": ENGINE_FILE, "tensorrt_rtx": trt.__version__}
    return replace(manifest, graph=replace(manifest.graph, file=ENGINE_FILE), device=device)


def _add_plugin(
    directory: Path, manifest: Manifest, spec: ModelSpec, form: WeightFormat, gpu: Gpu, progress: ProgressFactory
) -> Manifest:
    """Add kernels, and if there are any, the plugin and an engine."""
    import onnx_ir as ir

    from ligerexport.exporters.tensorrt.engine import build_engine
    from ligerexport.exporters.tensorrt.node import CONTRACT, products
    from ligerexport.exporters.tensorrt.pack import PACK, write_pack

    layers = [layer for layer in dict.fromkeys(spec.mixers) if layer is not None]
    with progress(f"compiling kernels for {', '.join(f'sm_{sm}' for sm in gpu.sms)}"):
        write_pack(layers, directory / PACK, products=products(ir.load(directory / manifest.graph.file).graph),
                   sms=gpu.sms, dtype=DTYPES[form.precision.dtype].kernel, max_batch=gpu.max_batch)  # fmt: skip
    device: dict[str, Any] = {"sms": list(gpu.sms), "max_batch": gpu.max_batch, "contract": CONTRACT, "kernels": PACK}
    if gpu.plugin is not None:
        shutil.copyfile(gpu.plugin, directory / PLUGIN_FILE)
        device["plugin"] = PLUGIN_FILE
    if gpu.engine:
        trt, (version, sm) = tensorrt(), here()
        build_engine(trt, directory / manifest.graph.file, directory / ENGINE_FILE, graph=manifest.graph,
                     max_batch=gpu.max_batch, progress=progress, plugin=directory / PLUGIN_FILE)  # fmt: skip
        record = {  # what `liger-run` looks at; those that it builds have other names, since this one's hash is kept
            "tensorrt": version, "sm": sm, "plugin": f"{zlib.crc32((directory / PLUGIN_FILE).read_bytes()):08x}",
            "precision": manifest.precision, "model": _model(directory, manifest), "batch": gpu.max_batch,
        }  # fmt: skip
        (directory / f"{ENGINE_FILE}.json").write_text(json.dumps(record, indent=1) + "\n")
        device |= {"engine": ENGINE_FILE, "tensorrt": trt.__version__}
    return replace(manifest, device=device)


def here() -> tuple[int, int]:
    """Return the version of TensorRT as one number and the compute capability of the GPU that is here, 90 for 9.0.

    Raises:
        MissingDependency: One of them is not here.
    """
    version, found = [int(part) for part in tensorrt().__version__.split(".")[:3]], driver()
    if found is None or not found.sms:
        raise MissingDependency("a CUDA device", hint=_LATER)
    return version[0] * 10000 + version[1] * 100 + version[2], found.sms[0]


def _model(directory: Path, manifest: Manifest) -> str:
    """Return what tells engines of different models apart, as `runner/engine.cc` writes it."""
    from ligerexport.exporters.tensorrt.pack import PACK

    files = (directory / name for name in (manifest.graph.file, manifest.graph.data, PACK))
    return "-".join(sha256(file)[:8] for file in files if file.is_file())
