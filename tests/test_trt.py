"""Targets for GPUs on a machine without a GPU: written files, refused inputs, missing dependencies."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zlib
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import toy
from checkpoints import MEMORY, make_checkpoint

import ligerexport as lx
from ligerexport.artifact.artifact import MANIFEST, Artifact, open_artifact
from ligerexport.cli import main
from ligerexport.cli.doctor import examine
from ligerexport.console import silent
from ligerexport.errors import LigerError, MissingDependency, UsageError, VerificationError
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.targets import TARGETS, get_backend
from ligerexport.exporters.tensorrt import backend, evaluation, machine, pack
from ligerexport.exporters.tensorrt.engine import build_engine, check_engine
from ligerexport.exporters.tensorrt.halves import halve_products
from ligerexport.exporters.tensorrt.session import VARIABLE
from ligerexport.model.config import PRESETS, LigerConfig


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("tiny") / "model", MEMORY, num_hidden_layers=2)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The arguments of `write_pack`, which is not run; other tests compile."""
    calls: list[dict[str, Any]] = []

    def write_pack(specs: Sequence[Any], path: Path, **options: Any) -> None:
        path.write_bytes(b"LIGERPK2")
        calls.append({"specs": list(specs)} | options)

    monkeypatch.setattr(pack, "write_pack", write_pack)
    return calls


def test_trt_without_tensorrt(
    checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graph, kernels and plugin for a device that builds the engine itself."""
    library = tmp_path / "libplugin.so"
    library.write_bytes(b"plugin")
    path = lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(87, 86), max_batch=2, plugin=library,
                    max_chunk=32)  # fmt: skip
    manifest = open_artifact(path).manifest
    assert manifest.target == "trt" and manifest.lowering == "plugin" and manifest.precision == "float16"
    assert manifest.device == {
        "sms": [86, 87], "max_batch": 2, "contract": 2, "kernels": "kernels.liger",
        "plugin": "libligerexport_trt.so",
    }  # fmt: skip
    assert {"model.onnx", "model.onnx.data", "kernels.liger", "libligerexport_trt.so"} <= set(manifest.files)
    assert manifest.verification["passed"] and manifest.verification["tokens"] > 400
    (call,) = packed
    assert len(call["specs"]) == 1 and call["sms"] == (86, 87) and call["dtype"] == "fp16" and call["max_batch"] == 2
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(MissingDependency, match=r"libliger_run\.so") as caught:
        lx.load(path)
    assert VARIABLE in str(caught.value.hint)


def test_the_pack_has_what_nodes_ask_for(checkpoint: Path, tmp_path: Path) -> None:
    """Kernels are compiled in a process without Triton's interpreter."""
    code = "import sys, ligerexport as lx; lx.build(*sys.argv[1:], target='trt', engine=False, sms=(90,), verify=False)"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "a")]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    nodes = onnx.load(tmp_path / "a" / "model.onnx", load_external_data=False).graph.node
    asked = {a.s for node in nodes for a in node.attribute if a.name == "layer_spec"}
    held = (tmp_path / "a" / "kernels.liger").read_bytes()
    assert len(asked) == 6 and all(name in held for name in asked)  # the mixers are alike, products are of five kinds


def test_a_wrong_graph_is_not_written(
    checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = evaluation.run_mixer

    def wrong(spec: Any, tensors: Sequence[np.ndarray]) -> tuple[np.ndarray, ...]:
        mixed, *state = right(spec, tensors)
        return mixed * np.float32(1.01), *state

    monkeypatch.setattr(evaluation, "run_mixer", wrong)
    with pytest.raises(VerificationError, match="plugin graph"):
        lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(90,))
    assert not (tmp_path / "a").exists() and not packed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": "trt", "sms": (75,)}, "compute capability 75"),
        ({"target": "trt-rtx", "sms": (90,)}, "compute capability 90"),
        ({"target": "trt", "weights": "int4"}, "weights in int4"),
        ({"target": "trt-rtx", "weights": "int8"}, "weights in int8"),
        ({"target": "trt", "weights": "int8", "block": 64}, "blocks of 64"),
        ({"target": "onnx", "weights": "bf16"}, "weights in bf16"),
        ({"target": "onnx", "sms": (90,)}, "GPU options"),
        ({"target": "onnx", "engine": False}, "GPU options"),
        ({"target": "trt-rtx", "engine": False}, "without a plugin"),
        ({"target": "trt", "engine": False, "genai": True}, "genai with the target trt"),
        ({"target": "trt", "max_batch": 0}, "max_batch 0"),
        ({"target": "trt", "plugin": "nowhere.so"}, "nowhere.so"),
    ],
)
def test_what_makes_no_sense(checkpoint: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        lx.build(checkpoint, tmp_path / "a", **options)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("target", ["trt", "trt-rtx"])
def test_kept_softmax(tmp_path: Path, target: str, packed: list[dict[str, Any]], monkeypatch: Any) -> None:
    monkeypatch.setattr(backend, "rtx", lambda: None)
    path = make_checkpoint(tmp_path / "model", LigerConfig(window=8, keep_softmax=(1,)))
    with pytest.raises(UsageError, match="layer 1 is kept as softmax"):
        lx.build(path, tmp_path / "a", target=target, engine=target != "trt", sms=(86,))


def test_layers_without_kernels(tmp_path: Path, packed: list[dict[str, Any]]) -> None:
    path = make_checkpoint(tmp_path / "model", replace(PRESETS["mom"].config, window=8))
    with pytest.raises(UsageError, match="several memories"):
        lx.build(path, tmp_path / "a", target="trt", engine=False, sms=(86,))


def test_partly_rotated_heads(tmp_path: Path, packed: list[dict[str, Any]]) -> None:
    """The plugin's kernels rotate only whole heads."""
    path = make_checkpoint(tmp_path / "model", MEMORY, "phi3")
    with pytest.raises(UsageError, match="only partly rotated"):
        lx.build(path, tmp_path / "a", target="trt", engine=False, sms=(86,))


def missing(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(backend, "find_spec", lambda name: None if name in names else find_spec(name))


@pytest.mark.parametrize(
    ("target", "modules", "hint"),
    [
        ("trt", ("tensorrt",), "--no-engine"),
        ("trt", ("triton",), "ligerexport[gpu]"),
        ("trt-rtx", ("tensorrt_rtx", "tensorrt_rtx_bindings"), "ligerexport[rtx]"),
    ],
)
def test_missing_libraries(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    target: str, modules: tuple[str, ...], hint: str,
) -> None:  # fmt: skip
    missing(monkeypatch, *modules)
    with pytest.raises(MissingDependency) as caught:
        lx.build(checkpoint, tmp_path / "a", target=target)
    assert hint in str(caught.value.hint) and not (tmp_path / "a").exists()
    with pytest.raises(SystemExit) as left:
        main(["build", str(checkpoint), "--target", target, "-o", str(tmp_path / "a"), "--dry-run"])
    assert left.value.code == 4 and hint in capsys.readouterr().err


def test_old_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="8.5.3.1"))  # type: ignore[arg-type]
    with pytest.raises(MissingDependency, match="TensorRT 10") as caught:
        backend.tensorrt()
    assert "8.5.3.1" in str(caught.value.hint)


def test_engine_of_tensorrt(
    checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls to TensorRT, and the record that the runner reads."""
    asked: dict[str, Any] = {}

    class Recorder:
        """Stands for every class and object of TensorRT, and accepts all calls."""

        __version__ = "10.13.2.6"

        def __init__(self, path: str = "trt") -> None:
            self.path = path

        def __getattr__(self, name: str) -> Any:
            if name in ("ILogger", "IProgressMonitor"):
                return type(name, (), {"__init__": lambda self: None})
            return Recorder(f"{self.path}.{name}")

        def __call__(self, *arguments: Any, **options: Any) -> Any:
            asked.setdefault(self.path.rpartition(".")[2], []).append(arguments)
            if self.path.endswith(("build_serialized_network", "serialize")):
                return b"engine"
            return self

        def __int__(self) -> int:
            return 0

    monkeypatch.setitem(sys.modules, "tensorrt", Recorder())  # type: ignore[arg-type]
    monkeypatch.setattr(backend, "driver", lambda: None)
    library = tmp_path / "build" / "plugin.so"
    library.parent.mkdir()
    library.write_bytes(b"plugin")
    with pytest.raises(MissingDependency, match="CUDA device"):
        lx.build(checkpoint, tmp_path / "a", target="trt", plugin=library)
    monkeypatch.setattr(backend, "driver", lambda: machine.Driver("13.0", (90,)))
    with pytest.raises(MissingDependency, match="plugin"):
        lx.build(checkpoint, tmp_path / "a", target="trt")
    path = lx.build(checkpoint, tmp_path / "a", target="trt", plugin=library, sms=(90,), max_batch=4, max_chunk=48,
                    weights="bf16", verify=False)  # fmt: skip
    device = open_artifact(path).manifest.device
    assert device is not None and device["engine"] == "model.engine" and device["tensorrt"] == "10.13.2.6"
    assert (path / "model.engine").read_bytes() == b"engine"
    record = json.loads((path / "model.engine.json").read_text())
    assert len(record.pop("model")) == 3 * 8 + 2
    assert record == {
        "tensorrt": 101302, "sm": 90, "plugin": f"{zlib.crc32(b'plugin'):08x}", "precision": "bfloat16", "batch": 4,
    }  # fmt: skip
    assert asked["load_library"][0][0].endswith("libligerexport_trt.so") and packed[0]["dtype"] == "bf16"
    shapes = {}
    for name, *sizes in asked["set_shape"]:
        shapes.setdefault(name, []).append(sizes)
    assert shapes["input_ids"] == [[[1, 1], most, most] for most in ([1, 1], [4, 1], [1, 48], [4, 48])]
    assert shapes["past.1.slot_position"] == [[[1, 2, 26], [b, 2, 26], [b, 2, 26]] for b in (1, 4, 1, 4)]
    assert "set_compute_capability" not in asked


def test_calls_are_no_longer_than_positions_reach(tmp_path: Path) -> None:
    """The plugin's kernels read distances from the rotary table; the default is 1,024 tokens if the table is longer."""
    checkpoint = make_checkpoint(tmp_path / "model", MEMORY)
    spec = read_spec(checkpoint)
    reach, choose_chunk = spec.mixers[0].max_distance, get_backend("trt").choose_chunk
    assert choose_chunk(spec, None) == choose_chunk(spec, reach + 1) == reach + 1 < 1024
    assert choose_chunk(spec, 7) == 7 and get_backend("trt-rtx").choose_chunk(spec, None) == 128
    longer = replace(spec, mixers=tuple(replace(x, max_distance=4000) for x in spec.mixers))
    assert choose_chunk(longer, None) == 1024
    with pytest.raises(UsageError, match=f"reach only over {reach}") as caught:
        lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(90,), max_chunk=reach + 2)
    assert caught.value.hint == f"--max-chunk {reach + 1}" and not (tmp_path / "a").exists()


def test_dry_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_checkpoint(tmp_path / "model", MEMORY)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    arguments = ["build", str(path), "--target", "trt", "-o", str(tmp_path / "a"), "--no-engine", "--dry-run"]
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--sm", "8.6,90", "--json"])
    assert left.value.code == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sms"] == "86,90" and plan["layers_to_compile"] == 2
    assert plan["peak_memory_bytes"] > 2 * plan["weight_bytes"] > 0
    assert not (tmp_path / "a").exists()
    with pytest.raises(SystemExit) as left:
        main([*arguments, "--sm", "sm_86"])
    assert left.value.code == 2 and "--sm 87,89" in capsys.readouterr().err


def test_doctor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(machine, "python_module", lambda rtx=False: None)
    monkeypatch.setattr(machine, "library", lambda: None)
    monkeypatch.setattr(machine, "driver", lambda: None)
    with pytest.raises(SystemExit) as left:
        main(["doctor", "--target", "trt", "--json"])
    assert left.value.code == 4
    found = {check["name"]: check for check in json.loads(capsys.readouterr().out)["checks"]}
    assert not found["TensorRT"]["ok"] and "ligerexport[trt]" in found["TensorRT"]["mend"]
    assert not found["plugin"]["ok"] and "cmake" in found["plugin"]["mend"]
    assert "TensorRT" not in {check.name for check in examine()} | {check.name for check in examine("onnx")}
    with pytest.raises(UsageError, match="unknown target"):
        examine("tensor")

    monkeypatch.setattr(machine, "library", lambda: "libnvinfer.so.8, version 8.5.3")
    monkeypatch.setattr(machine, "driver", lambda: machine.Driver("13.0", (90,)))
    plugin = tmp_path / "libplugin.so"
    plugin.touch()
    checks = {check.name: check for check in examine("trt", plugin)}
    assert all(checks[name].ok for name in ("TensorRT", "CUDA driver", "GPU", "plugin"))
    assert checks["TensorRT"].found == "libnvinfer.so.8, version 8.5.3" and checks["GPU"].found == "sm_90"
    assert not {check.name: check for check in examine("trt-rtx")}["GPU"].ok  # which has no code for it
    for sm, ours in ((75, False), (110, True)):  # PTX is for what is later
        monkeypatch.setattr(machine, "driver", lambda sm=sm: machine.Driver("13.0", (sm,)))
        fits = [{check.name: check for check in examine(target)}["GPU"].ok for target in ("trt", "trt-rtx")]
        assert fits == [ours, False]


@pytest.mark.parametrize(
    ("loads", "number", "version"), [("8", 8503, "8.5.3"), ("10", 101302, "10.13.2"), ("11", 110400, "11.4.0")]
)
def test_version_of_a_library(monkeypatch: pytest.MonkeyPatch, loads: str, number: int, version: str) -> None:
    def load(name: str) -> Any:
        if not name.endswith(f".{loads}"):
            raise OSError(name)
        return SimpleNamespace(getInferLibVersion=lambda: number)

    monkeypatch.setattr(machine.ctypes, "CDLL", load)
    assert machine.library() == f"libnvinfer.so.{loads}, version {version}"


def test_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    class Cuda:
        def cuDriverGetVersion(self, number: Any) -> int:
            number._obj.value = 13000
            return 0

        def cuInit(self, flags: int) -> int:
            return 0

        def cuDeviceGetCount(self, count: Any) -> int:
            count._obj.value = 2
            return 0

        def cuDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:
            value._obj.value = {75: (9, 8), 76: (0, 7)}[attribute][device]
            return 0

    monkeypatch.setattr(machine.ctypes, "CDLL", lambda name: Cuda())
    assert machine.driver() == machine.Driver("13.0", (90, 87))


def rtx() -> Any:
    """TensorRT-RTX; tests are skipped without it."""
    try:
        return backend.rtx()
    except MissingDependency as error:
        pytest.skip(error.message)


def test_rtx_engine(checkpoint: Path, tmp_path: Path) -> None:
    """A real engine for two kinds of GPU, on a machine with or without a GPU."""
    rtx()
    path = lx.build(checkpoint, tmp_path / "a", target="trt-rtx", sms=(89, 120), max_batch=2, max_chunk=16)
    manifest = open_artifact(path).manifest
    assert manifest.graph.file == "model.engine" and manifest.precision == "float16"
    assert {"model.engine", "config.json", "generation_config.json"} == set(manifest.files)
    assert manifest.device is not None and manifest.device["sms"] == [89, 120]
    assert manifest.device["tensorrt_rtx"] == rtx().__version__
    assert manifest.verification["passed"] and manifest.quality is not None
    engine = (path / "model.engine").read_bytes()
    assert len(engine) > manifest.bytes.weights
    for tensor in (*manifest.graph.inputs, *manifest.graph.outputs):
        assert tensor.name.encode() in engine
    with pytest.raises(LigerError, match=r"does not run here|no runtime here"):
        lx.load(path)


def test_products_of_rtx_run_in_halves(checkpoint: Path, tmp_path: Path) -> None:
    path = lx.build(checkpoint, tmp_path / "a", lowering="portable", weights="fp16", max_chunk=16)
    artifact, ids = open_artifact(path), np.arange(1, 12)
    expected = OnnxSession(artifact).prefill(ids)[0]
    model = ir.load(artifact.graph)
    weights = [node.inputs[1] for node in model.graph if node.op_type == "Gemm"]
    stored = [x.producer() for x in weights if x is not None]
    halve_products(model.graph)
    products = [node.inputs for node in model.graph if node.op_type == "Gemm"]
    halves = [weight for _, weight, *_ in products if weight is not None and weight.dtype == ir.DataType.FLOAT16]
    assert len(products) == len(weights) and len(halves) == sum(cast is not None for cast in stored) > 0
    ir.save(model, artifact.graph)
    found = OnnxSession(artifact).prefill(ids)[0]
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_a_graph_that_tensorrt_does_not_take(tmp_path: Path) -> None:
    trt = rtx()
    info = onnx.helper.make_tensor_value_info
    kind = onnx.TensorProto.FLOAT
    node = onnx.helper.make_node("Add", ["x", "missing"], ["y"], "layers.3/Add")
    graph = onnx.helper.make_graph([node], "g", [info("x", kind, ["B"])], [info("y", kind, ["B"])])
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]), tmp_path / "x.onnx")
    with pytest.raises(LigerError, match="does not take the graph"):
        build_engine(trt, tmp_path / "x.onnx", tmp_path / "x.engine", graph=SimpleNamespace(), max_batch=1,  # type: ignore[arg-type]
                     progress=silent, sms=(89,))  # fmt: skip


def test_validity_becomes_our_error(tmp_path: Path) -> None:
    """TensorRT-RTX validates an engine before it reads one for other GPUs."""
    (tmp_path / "model.engine").write_bytes(b"engine")

    class Logger:
        Severity = SimpleNamespace(ERROR=1, INTERNAL_ERROR=0)

        def __init__(self) -> None:
            pass

    class Runtime:
        def __init__(self, logger: Any) -> None:
            self.logger = logger

        def get_engine_validity(self, engine: bytes) -> tuple[str, int]:
            assert engine == b"engine"
            self.logger.log(2, "a warning")
            self.logger.log(1, "The engine cannot run on this GPU\nat line 7")
            return "invalid", 1

    trt = SimpleNamespace(ILogger=Logger, Runtime=Runtime, EngineValidity=SimpleNamespace(INVALID="invalid"))
    with pytest.raises(LigerError, match=r"The engine cannot run on this GPU$") as caught:
        check_engine(trt, tmp_path / "model.engine")
    assert "--sm" in str(caught.value.hint)


def test_older_manifests(checkpoint: Path, tmp_path: Path) -> None:
    path = lx.build(checkpoint, tmp_path / "a", verify=False)
    data = json.loads((path / MANIFEST).read_text())
    assert data.pop("device") is None
    (path / MANIFEST).write_text(json.dumps(data))
    assert replace(Artifact(path, open_artifact(path).manifest).manifest).device is None


def test_targets_name_what_there_is() -> None:
    for name, target in TARGETS.items():
        assert target.weights and target.lowerings and target.onnxruntime != bool(target.sms), name
