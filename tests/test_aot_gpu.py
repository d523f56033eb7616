"""Compiled kernels, launched by their plans on a GPU, compute what torch computes."""

from __future__ import annotations

import ctypes
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from test_aot import MEMORY, PLAIN, RECALL, TYPES, choose, read, table
from test_fused_ragged_step import assert_same

from ligerexport.kernels import aot
from ligerexport.kernels.launches import evaluate
from ligerexport.kernels.ops import BLOCK, rotary_table
from ligerexport.kernels.plans import spec_fields
from ligerexport.model.state import MixerSpec
from tests.tolerances import FUSED_BF16

KEYED = replace(PLAIN, config=replace(PLAIN.config, gate="gsa:16"))


class Driver:
    """Loads cubins and launches plans through the CUDA driver alone, like a caller in C."""

    def __init__(self, place: Path, sm: int) -> None:
        self.place, self.manifest, self.sm = place, read(place), sm
        self.library = ctypes.CDLL("libcuda.so.1")
        self.persistent: dict[str, Tensor] = {}

    def check(self, name: str, *arguments: Any) -> None:
        assert getattr(self.library, name)(*arguments) == 0, name

    def run(self, operator: str, given: dict[str, int], tensors: dict[str, Tensor], spec: MixerSpec = MEMORY) -> None:
        """Launch a plan; `tensors` holds inputs, outputs and state."""
        fields = json.loads(json.dumps(spec_fields(spec)))
        plans = [x for x in self.manifest["plans"] if x["operator"] == operator and x["spec"] == fields]
        plan, axes = choose(plans, given)
        buffers = {name: self.buffer(name, buffer, axes, tensors) for name, buffer in plan["buffers"].items()}
        for launch in plan["launches"]:
            kernel = self.manifest["kernels"][launch["kernel"]]
            parameters: list[Any] = []
            for argument, value in zip(kernel["arguments"], launch["values"], strict=True):
                if value["buffer"] is not None:
                    address = buffers[value["buffer"]].data_ptr() + evaluate(value["offset"], axes)
                    assert address % argument["divisible"] == 0
                    parameters.append(ctypes.c_uint64(address))
                elif argument["type"] == "fp32":
                    parameters.append(ctypes.c_float(value["number"]))
                else:
                    number = evaluate(value["integer"], axes)
                    assert number % argument["divisible"] == 0
                    parameters.append({"i32": ctypes.c_int32, "i64": ctypes.c_int64}[argument["type"]](number))
            self.launch(kernel["cubins"][str(self.sm)], [evaluate(x, axes) for x in launch["grid"]], parameters)
        torch.cuda.synchronize()

    def buffer(self, name: str, buffer: dict[str, Any], axes: dict[str, int], tensors: dict[str, Tensor]) -> Tensor:
        shape = [evaluate(x, axes) for x in buffer["shape"]]
        if buffer["role"] in ("input", "output", "state"):
            assert list(tensors[name].shape) == shape and tensors[name].dtype == TYPES[buffer["type"]]
            return tensors[name]
        if buffer["role"] == "table":
            made = torch.tensor(table(name, axes), dtype=torch.int32, device="cuda")
            assert list(made.shape) == shape
            return made
        if buffer["role"] == "constant":
            return torch.tensor([int(x) for x in buffer["fill"].split()], dtype=torch.int32, device="cuda")
        kept = self.persistent.get(name)
        if buffer["role"] == "persistent" and kept is not None and list(kept.shape) == shape:
            return kept
        made = torch.empty(shape, dtype=TYPES[buffer["type"]], device="cuda")
        made.view(torch.uint8).fill_(0 if buffer["fill"].startswith("zero") else 255)  # a NaN of any width
        if buffer["role"] == "persistent":
            self.persistent[name] = made
        return made

    def launch(self, cubin: dict[str, Any], grid: list[int], parameters: list[Any]) -> None:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self.check("cuModuleLoadData", ctypes.byref(module), (self.place / cubin["file"]).read_bytes())
        self.check("cuModuleGetFunction", ctypes.byref(function), module, cubin["symbol"].encode())
        if cubin["shared"] > 48 << 10:
            self.check("cuFuncSetAttribute", function, 8, cubin["shared"])
        assert cubin["global_scratch"] == cubin["profile_scratch"] == 0
        parameters = [*parameters, *(ctypes.c_uint64(0) for _ in self.manifest["hidden"])]
        addresses = (ctypes.c_void_p * len(parameters))(*(ctypes.addressof(x) for x in parameters))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        block = (cubin["threads"], 1, 1)
        self.check("cuLaunchKernel", function, *grid, *block, cubin["shared"], stream, addresses, None)


def error(found: Tensor, expected: Tensor) -> float:
    """Return the relative root mean square error; NaN counts as infinite."""
    a, b = found.double(), expected.double()
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).nan_to_num(float("inf")).item()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    major, minor = torch.cuda.get_device_capability()
    sm, place = 10 * major + minor, tmp_path_factory.mktemp("device")
    operators = ("step", "linear_attention", "memory_attention", "prefill")
    layers = [MEMORY, PLAIN, KEYED]
    aot.compile_kernels(layers, "bf16", [sm], place / "cubins", operators=operators, max_batch=8, jobs=1)
    torch.zeros(1, device="cuda")  # makes the context
    return Driver(place / "cubins", sm)


@pytest.fixture(scope="module")
def ragged_driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    major, minor = torch.cuda.get_device_capability()
    sm, place = 10 * major + minor, tmp_path_factory.mktemp("ragged")
    aot.compile_kernels([RECALL], "bf16", [sm], place / "cubins", operators=("step", "prefill"), max_batch=8, jobs=1)
    torch.zeros(1, device="cuda")
    return Driver(place / "cubins", sm)


def projections(*sizes: int) -> dict[str, Tensor]:
    """Return query, key and value as slices of one tensor, as a fused projection makes them."""
    heads = (MEMORY.q_heads, MEMORY.kv_heads, MEMORY.kv_heads)
    fused = torch.randn(*sizes, sum(heads), MEMORY.d_k, device="cuda", dtype=torch.bfloat16)
    return dict(zip(("query", "key", "value"), fused.split(heads, dim=-2), strict=True))


def axes_of(tensors: dict[str, Tensor], **sizes: int) -> dict[str, int]:
    strides = {f"{name}_stride_{i}": s for name, x in tensors.items() for i, s in enumerate(x.stride()[:-1])}
    return sizes | strides


def rotary() -> Tensor:
    frequency = 10.0 ** (-torch.arange(MEMORY.d_k // 2, device="cuda") / 8)
    return rotary_table(frequency, MEMORY.max_distance, BLOCK, turns=True)


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [MEMORY, KEYED], ids=["memory", "keyed"])
@pytest.mark.parametrize("batch", [1, 7])
def test_steps_on_a_gpu(driver: Driver, batch: int, layer: MixerSpec) -> None:
    from ligerexport.kernels.fused.mixer_step import mixer_step

    eager = layer.initial_state(batch, torch.bfloat16, "cuda")
    eager["slot_position"] = eager["slot_position"].int()  # as plans have it
    compiled = {name: x.clone() for name, x in eager.items()}
    for step in range(60):
        tensors = projections(batch)
        position = torch.full((batch,), step, device="cuda", dtype=torch.int32)
        expected = mixer_step(tuple(tensors.values()), position, eager, layer, rotary())
        output = torch.full_like(expected, float("nan"))
        inputs = {**tensors, **compiled, "position": position, "rotary": rotary(), "output": output}
        driver.run("step", axes_of(tensors, batch=batch), inputs, layer)
        assert error(output, expected) < FUSED_BF16
    assert (eager["slot_position"] >= 0).all()
    assert torch.equal(compiled["slot_position"], eager["slot_position"])
    for name, x in compiled.items():
        assert error(x, eager[name]) < FUSED_BF16, name


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (3, 1000), (1, 9001)])
def test_linear_attention_on_a_gpu(driver: Driver, batch: int, tokens: int) -> None:
    from ligerexport.kernels.fused.linear_attention import forward

    tensors = projections(batch, tokens)
    past = torch.randn(batch, MEMORY.kv_heads, MEMORY.d_k, MEMORY.d_v, device="cuda")
    expected, expected_state, _ = forward(*tensors.values(), None, past, None, MEMORY.config.gate, 1.0)
    output, state = torch.full_like(expected, float("nan")), torch.full_like(past, float("nan"))
    inputs = {**tensors, "past_recurrent_state": past, "output": output, "present_recurrent_state": state}
    driver.run("linear_attention", axes_of(tensors, batch=batch, tokens=tokens), inputs)
    assert error(output, expected) < FUSED_BF16
    assert error(state, expected_state) < FUSED_BF16


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (3, 200)])
def test_memory_attention_on_a_gpu(driver: Driver, batch: int, tokens: int) -> None:
    from ligerexport.kernels.fused.memory_attention import forward

    past = MEMORY.initial_state(batch, torch.bfloat16, "cuda")
    past = {name: x for name, x in past.items() if name.startswith("slot_")}
    past["slot_position"] = past["slot_position"].int()
    position = torch.zeros(batch, dtype=torch.int32, device="cuda")
    for _ in range(2):  # the second call finds slots that are full
        tensors = projections(batch, tokens)
        arrival = torch.rand(batch, tokens, MEMORY.kv_heads, device="cuda")
        expected = forward(*tensors.values(), arrival, position, past, MEMORY, rotary())
        outputs = {f"present_{name}": torch.zeros_like(x) for name, x in expected.present.items()}
        outputs["output"] = torch.full_like(expected.output, float("nan"))
        inputs = {**tensors, "arrival": arrival, "position": position, "rotary": rotary()}
        inputs |= {f"past_{name}": x for name, x in past.items()} | outputs
        driver.run("memory_attention", axes_of(tensors, batch=batch, tokens=tokens), inputs)
        assert error(outputs["output"], expected.output) < FUSED_BF16
        assert torch.equal(outputs["present_slot_position"], expected.present["slot_position"])
        for name, x in expected.present.items():
            assert error(outputs[f"present_{name}"], x) < FUSED_BF16, name
        past, position = expected.present, position + tokens


@pytest.mark.gpu
@pytest.mark.parametrize("layer", [PLAIN, KEYED], ids=["plain", "keyed"])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 50), (3, 200)])
def test_prefill_on_a_gpu(driver: Driver, batch: int, tokens: int, layer: MixerSpec) -> None:
    from ligerexport.kernels.ops import liger_mixer

    past = layer.initial_state(batch, torch.bfloat16, "cuda")
    position = torch.full((batch,), -5, device="cuda")
    for _ in range(2):
        tensors = projections(batch, tokens)
        expected, state = liger_mixer(*tensors.values(), position, past, layer, rotary())
        inputs = {f"past_{name}": x.int() if x.dtype == torch.int64 else x for name, x in past.items()}
        outputs = {f"present_{name[5:]}": torch.zeros_like(x) for name, x in inputs.items()}
        outputs["output"] = torch.full_like(expected, float("nan"))
        inputs |= {**tensors, **outputs, "position": position.int(), "rotary": rotary()}
        driver.run("prefill", axes_of(tensors, batch=batch, tokens=tokens), inputs, layer)
        assert error(outputs["output"], expected) < FUSED_BF16
        for name, x in state.items():
            assert error(outputs[f"present_{name}"], x) < FUSED_BF16, name
        past, position = state, position + tokens


@pytest.mark.gpu
def test_ragged_slots_on_a_gpu(ragged_driver: Driver) -> None:
    """Prompts and steps in turns; codes and scales are those of torch, bit for bit."""
    from ligerexport.kernels.ops import liger_mixer

    expected_state = RECALL.initial_state(3, torch.bfloat16, "cuda")
    state = {name: x.clone() for name, x in expected_state.items()}
    position = torch.tensor([0, -7, 0], device="cuda")
    for tokens in (50, 1, 1, 90, 1, 1, 1, 33):
        tensors = projections(3, tokens)
        score = torch.randn(3, tokens, RECALL.kv_heads, device="cuda")
        expected, expected_state = liger_mixer(
            *tensors.values(), position, expected_state, RECALL, rotary(), score
        )  # fmt: skip
        output = torch.full_like(expected, float("nan"))
        given = {"position": position.int(), "rotary": rotary()}
        if tokens == 1:
            tensors = {name: x[:, 0] for name, x in tensors.items()}
            output = output[:, 0]
            given |= {**tensors, **state, "score": score[:, 0], "output": output}
            ragged_driver.run("step", axes_of(tensors, batch=3), given, RECALL)
        else:
            present = {name: torch.empty_like(x) for name, x in state.items()}
            given |= {**tensors, "score": score, "output": output}
            given |= {f"{when}_{name}": x for when, side in (("past", state), ("present", present))
                      for name, x in side.items()}  # fmt: skip
            ragged_driver.run("prefill", axes_of(tensors, batch=3, tokens=tokens), given, RECALL)
            state = present
        real = position[:, None] + torch.arange(tokens, device="cuda") >= 0
        assert error(output.view_as(expected)[real], expected[real]) < FUSED_BF16, tokens
        position = position + tokens
        assert_same(state, expected_state, RECALL)
