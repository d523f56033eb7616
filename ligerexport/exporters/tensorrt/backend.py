"""The targets for GPUs: `trt` adds kernels, the plugin and an engine to the graph, `trt-rtx` replaces it by an engine.

Missing packages are reported before any work is done. The functions that need TensorRT import it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from ligerexport.artifact.artifact import Artifact, Manifest
from ligerexport.console import ProgressFactory
from ligerexport.dtypes import BY_ONNX
from ligerexport.errors import ArtifactError, MissingDependency, UsageError
from ligerexport.exporters.backend import Backend, BuildSettings, Check, SessionSettings
from ligerexport.exporters.build import BuildPlan
from ligerexport.exporters.targets import BLOCK
from ligerexport.exporters.tensorrt import machine
from ligerexport.exporters.tensorrt.engine import build_engine, check_engine
from ligerexport.exporters.tensorrt.machine import driver
from ligerexport.reading import sha256
from ligerexport.versions import installed_version

if TYPE_CHECKING:
    from ligerexport.exporters.onnx.spec import ModelSpec
    from ligerexport.exporters.tensorrt.session import TensorRTSession
    from ligerexport.model.state import MixerSpec

ENGINE_FILE = "model.engine"
PLUGIN_FILE = "libligerexport_trt.so"
_RTX = ("tensorrt_rtx", "tensorrt_rtx_bindings")  # the metapackage's module, and the one in its wheel


class _ForGpus(Backend):
    """The part that both targets share."""

    def prepare(self, settings: BuildSettings) -> BuildSettings:
        """Check options and libraries; see `Backend.prepare`."""
        if unknown := [str(sm) for sm in settings.sms or () if sm not in self.row.sms]:
            known = ", ".join(map(str, self.row.sms))
            raise UsageError(f"compute capability {', '.join(unknown)}", hint=f"{self.name} is built for: {known}")
        if settings.max_batch < 1:
            raise UsageError(f"max_batch {settings.max_batch}", hint="there is at least one sequence")
        if settings.block != BLOCK:
            raise UsageError(f"blocks of {settings.block} weights for {self.name}", hint="a row has one scale here")
        plugin = None if settings.plugin is None else Path(settings.plugin)
        if plugin is not None and not plugin.is_file():
            raise UsageError(
                f"there is no plugin library {plugin}", hint="build it with CMake, see docs/guides/tensorrt.md"
            )
        settings = replace(settings, sms=tuple(sorted(set(settings.sms or self.row.sms))), plugin=plugin)
        self._check_installed(settings)
        return settings

    def _check_installed(self, settings: BuildSettings) -> None:
        raise NotImplementedError

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse layers that are kept as softmax."""
        if kept := [str(i) for i, layer in enumerate(spec.mixers) if layer is None]:
            raise UsageError(
                f"layer {', '.join(kept)} is kept as softmax, but engines have no growing cache",
                hint="convert all layers, or build with --target onnx",
            )

    def describe(self, plan: BuildPlan, weight_bytes: int) -> dict[str, Any]:
        """Return the kernels' GPUs, and the memory that compiling needs."""
        parameters = sum(prod(weight.shape) for weight in plan.spec.weights.values())
        return {
            "sms": list(plan.sms),
            "layers_to_compile": len(set(plan.spec.mixers)) * len(plan.sms),
            "peak_memory_bytes": 8 * parameters + 3 * weight_bytes,  # verification holds everything in fp32 twice
        }

    def _examine_gpu(self, forward: int | None = None) -> list[Check]:
        """Check driver and GPU; GPUs later than the compute capability `forward` are supported too."""
        driver = machine.driver()
        version, gpus = (f"CUDA {driver.version}", driver.sms) if driver else ("not found", ())
        fits = bool(gpus) and all(sm in self.row.sms or (forward is not None and sm > forward) for sm in gpus)
        known = ", ".join(map(str, self.row.sms))
        return [
            Check("CUDA driver", version, driver is not None, mend="install NVIDIA's driver, where there is a GPU"),
            Check("GPU", ", ".join(f"sm_{sm}" for sm in gpus) or "none", fits,
                  mend=f"{self.name} is for compute capability {known}; name the device's with --sm"),
        ]  # fmt: skip


class TensorRT(_ForGpus):
    """A graph of the plugin's nodes with their kernels, and an engine if TensorRT and a GPU are here."""

    def _check_installed(self, settings: BuildSettings) -> None:
        if not find_spec("triton"):
            raise MissingDependency("Triton, which compiles the kernels,", extra="gpu")
        if settings.engine:
            here()
            if settings.plugin is None:
                raise MissingDependency("the plugin's library", hint=f"--plugin PATH; or {_LATER}")

    def check_model(self, spec: ModelSpec) -> None:
        """Refuse layers that the plugin has no kernels for."""
        super().check_model(spec)
        for layer in spec.mixers:
            if layer is not None and (what := _missing(layer)):
                raise UsageError(
                    f"no kernel of the plugin has {what}",
                    hint="convert in another way, or build with --target trt-rtx or --target onnx",
                )
        if any(2 * len(softmax.inv_freq) != spec.head_dim for softmax in spec.attention):
            raise UsageError(
                f"heads of {spec.head_dim} channels are only partly rotated, the plugin's kernels rotate all",
                hint="build with --target trt-rtx or --target onnx",
            )

    def choose_chunk(self, spec: ModelSpec, wanted: int | None) -> int:
        """Return the largest number of tokens per call; the plugin's kernels are limited by the rotary distance."""
        longest = min(layer.max_distance + 1 for layer in spec.mixers if layer is not None)
        if wanted is not None and wanted > longest:
            raise UsageError(
                f"calls of {wanted:,} tokens, but positions of this model reach only over {longest - 1:,}",
                hint=f"--max-chunk {longest}",
            )
        return wanted or min(self.row.chunk, longest)

    def finish(self, plan: BuildPlan, directory: Path, manifest: Manifest, progress: ProgressFactory) -> Manifest:
        """Add the kernels, and the plugin and an engine if they were asked for."""
        import onnx_ir as ir

        from ligerexport.exporters.tensorrt.node import CODED, EQUAL, KEYED, RAGGED, products
        from ligerexport.exporters.tensorrt.pack import PACK, write_pack

        asked, layers = plan.settings, [layer for layer in dict.fromkeys(plan.spec.mixers) if layer is not None]
        with progress(f"compiling kernels for {', '.join(f'sm_{sm}' for sm in plan.sms)}"):
            write_pack(layers, directory / PACK, products=products(ir.load(directory / manifest.graph.file).graph),
                       sms=plan.sms, dtype=BY_ONNX[plan.storage.activation].kernel,
                       max_batch=asked.max_batch)  # fmt: skip
        keyed = any(layer.config.keyed for layer in layers)
        contract = RAGGED if plan.spec.ragged else KEYED if keyed else EQUAL
        contract = CODED if plan.storage.precision.blocked else contract
        device: dict[str, Any] = {"sms": list(plan.sms), "max_batch": asked.max_batch, "contract": contract,
                                  "kernels": PACK}  # fmt: skip
        if asked.plugin is not None:
            shutil.copyfile(asked.plugin, directory / PLUGIN_FILE)
            device["plugin"] = PLUGIN_FILE
        if asked.engine:
            device |= _add_engine(directory, manifest, asked.max_batch, progress)
        return replace(manifest, device=device)

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> TensorRTSession:
        """Open an artifact on its GPU."""
        from ligerexport.exporters.tensorrt.session import TensorRTSession

        return TensorRTSession(artifact, batch=settings.batch, chunk=settings.chunk)

    def examine(self, plugin: Path | None) -> list[Check]:
        """Check TensorRT, driver, GPU, plugin and Triton."""
        from ligerexport.kernels.tuning import FORWARD

        found = [x for x in (machine.python_module(), machine.library()) if x]
        here = plugin is not None and plugin.is_file()
        said = "not given" if plugin is None else str(plugin) if here else f"{plugin} is not there"
        triton = installed_version("triton")
        return [
            _check_library("TensorRT", "trt", found, "; on a Jetson: apt install nvidia-jetpack"),
            *self._examine_gpu(FORWARD),
            Check("plugin", said, here, mend="cmake -S exporters/tensorrt/runner -B build/trt && cmake --build "
                  "build/trt, then --plugin FILE"),
            Check("triton", triton or "not installed", triton is not None, mend="pip install 'ligerexport[gpu]'"),
        ]  # fmt: skip


class TensorRTRTX(_ForGpus):
    """An engine instead of the graph and its weights."""

    def _check_installed(self, settings: BuildSettings) -> None:
        if settings.plugin is not None or not settings.engine:
            raise UsageError("trt-rtx is an engine without a plugin", hint="--plugin and --no-engine go with trt")
        rtx()

    def finish(self, plan: BuildPlan, directory: Path, manifest: Manifest, progress: ProgressFactory) -> Manifest:
        """Replace the graph by an engine."""
        import onnx_ir as ir

        from ligerexport.exporters.tensorrt.halves import halve_products

        trt, graph, max_batch = rtx(), directory / manifest.graph.file, plan.settings.max_batch
        model = ir.load(graph)
        halve_products(model.graph)
        ir.save(model, graph)
        build_engine(trt, graph, directory / ENGINE_FILE, graph=manifest.graph, max_batch=max_batch,
                     progress=progress, sms=plan.sms)  # fmt: skip
        graph.unlink()
        (directory / manifest.graph.data).unlink()
        device = {"sms": list(plan.sms), "max_batch": max_batch, "engine": ENGINE_FILE,
                  "tensorrt_rtx": trt.__version__}  # fmt: skip
        return replace(manifest, graph=replace(manifest.graph, file=ENGINE_FILE), device=device)

    def open_session(self, artifact: Artifact, settings: SessionSettings) -> NoReturn:
        """Refuse, because Python has no session for the engine, and report where it runs; see `Backend.open_session`.

        Raises:
            LigerError: The engine does not run on this machine's GPU.
        """
        check_engine(rtx(), artifact.graph)
        raise ArtifactError(
            f"no runtime here for target '{self.name}'",
            hint=f"run {artifact.graph} with TensorRT-RTX on an RTX GPU, see docs/guides/tensorrt.md",
        )

    def examine(self, plugin: Path | None) -> list[Check]:
        """Check TensorRT-RTX, driver and GPU."""
        found = [x for x in (machine.python_module(rtx=True),) if x]
        return [_check_library("TensorRT-RTX", "rtx", found), *self._examine_gpu()]


def _missing(layer: MixerSpec) -> str | None:
    """Return what the kernels of the plugin lack for a layer."""
    config = layer.config
    if config.routed:
        return "a recurrence with several memories"
    if config.ragged and not layer.splits:
        kept = "sizes for each KV head" if config.heads else f"slots in {config.state_dtype}"
        return f"{kept} together with a recurrence or with scores that are not learned"
    if config.scaled and layer.d_k % 4:
        return f"slots in int8 for heads of {layer.d_k} channels, which are no multiple of 4"
    return None


def _check_library(name: str, extra: str, found: list[str], more: str = "") -> Check:
    said = ", ".join(found) or "neither Python package nor library found"
    return Check(name, said, bool(found), True, f"pip install 'ligerexport[{extra}]'{more}")


_LATER = "--no-engine, and liger-run makes the engine on the device"


def tensorrt() -> Any:
    """Import TensorRT.

    Raises:
        MissingDependency: TensorRT is not installed, incomplete, or older than 10.
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
        MissingDependency: TensorRT-RTX is not installed or incomplete.
    """
    name = next((name for name in _RTX if find_spec(name)), None)
    try:
        if name is None:
            raise ImportError(_RTX[0])
        return import_module(name)
    except (ImportError, OSError) as error:
        raise MissingDependency("TensorRT-RTX", extra="rtx") from error


def _add_engine(directory: Path, manifest: Manifest, max_batch: int, progress: ProgressFactory) -> dict[str, str]:
    """Build an engine, and write the record by which `liger-run` checks whether the engine fits."""
    trt, (version, sm) = tensorrt(), here()
    build_engine(trt, directory / manifest.graph.file, directory / ENGINE_FILE, graph=manifest.graph,
                 max_batch=max_batch, progress=progress, plugin=directory / PLUGIN_FILE)  # fmt: skip
    record = {  # engines that `liger-run` builds have other names, since this one's hash is in the manifest
        "tensorrt": version, "sm": sm, "plugin": f"{zlib.crc32((directory / PLUGIN_FILE).read_bytes()):08x}",
        "precision": manifest.precision, "model": _model(directory, manifest), "batch": max_batch,
    }  # fmt: skip
    (directory / f"{ENGINE_FILE}.json").write_text(json.dumps(record, indent=1) + "\n")
    return {"engine": ENGINE_FILE, "tensorrt": trt.__version__}


def here() -> tuple[int, int]:
    """Return the version of TensorRT as one number and the compute capability of this machine's GPU, 90 for 9.0.

    Raises:
        MissingDependency: TensorRT or a GPU is missing.
    """
    version, found = [int(part) for part in tensorrt().__version__.split(".")[:3]], driver()
    if found is None or not found.sms:
        raise MissingDependency("a CUDA device", hint=_LATER)
    return version[0] * 10000 + version[1] * 100 + version[2], found.sms[0]


def _model(directory: Path, manifest: Manifest) -> str:
    """Return a hash that distinguishes engines of different models, as `runner/engine.cc` writes it."""
    from ligerexport.exporters.tensorrt.pack import PACK

    files = (directory / name for name in (manifest.graph.file, manifest.graph.data, PACK))
    return "-".join(sha256(file)[:8] for file in files if file.is_file())
