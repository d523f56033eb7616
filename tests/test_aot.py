"""Level 1: cubins against their manifest, plans against the calls that they record, and both on a GPU.

Compiling needs a separate process, because Triton's interpreter, which other tests use, replaces the compiler.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from ligerexport.errors import LigerError, MissingDependency, UsageError
from ligerexport.kernels import aot
from ligerexport.kernels.fused.segments import cut_batch
from ligerexport.kernels.launch_manifest import HIDDEN, MANIFEST
from ligerexport.kernels.launches import evaluate
from ligerexport.kernels.plans import spec_fields
from ligerexport.kernels.tuning import SHARED_MEMORY
from ligerexport.model.config import PRESETS
from ligerexport.model.state import MixerSpec

ROOT = Path(__file__).parent.parent
RECURRENT = replace(
    PRESETS["memory"].config, window=12, slots=(("recent_use", 6), ("novelty", 6)), recurrence_weight=0.3
)
TINY = MixerSpec(replace(PRESETS["liger"].config, window=12), 2, 1, 32, 32, 32**-0.5, 128)
SMOLLM2 = MixerSpec(PRESETS["liger"].config, 9, 3, 64, 64, 64**-0.5, 8192)
MEMORY = replace(SMOLLM2, config=RECURRENT, max_distance=300)
PLAIN = replace(MEMORY, config=replace(RECURRENT, slots=(("recent_use", 12),)))
FORESIGHT = replace(MEMORY, config=replace(RECURRENT, slots=(("recent_use", 6), ("learned", 6))))
RECALL = replace(
    SMOLLM2, config=replace(PRESETS["recall"].config, heads=("12+6 3 70+20",), attention_weight=0.5), max_distance=300
)
SIZES = {"i32": 4, "i64": 8, "fp32": 4}
TYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "i8": torch.int8,
    "i32": torch.int32,
    "i64": torch.int64,
}

PREAMBLE = f"""
import dataclasses, json, sys
from ligerexport.model.config import LigerConfig
from ligerexport.kernels import aot, plans
from ligerexport.kernels.launches import Pointer, record
from ligerexport.model.state import MixerSpec

def spec(data):
    return MixerSpec(**(data | {{"config": LigerConfig.from_dict(data["config"])}}))

TINY, SMOLLM2, MEMORY, FORESIGHT, RECALL = (
    spec(data) for data in {[spec_fields(x) for x in (TINY, SMOLLM2, MEMORY, FORESIGHT, RECALL)]!r}
)
"""


def python(code: str) -> str:
    """Run code in a process with Triton's compiler and return what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", PREAMBLE + code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Kernels of a tiny layer for two GPUs, of a small model's layer for one, the tiny step again, and a refusal.

    The process, which takes seconds to start, also writes what two tests look at.
    """
    place = tmp_path_factory.mktemp("cubins")
    python(f"""
with open("{place}/far.txt", "w") as file:
    for preset in ("sinks", "memory"):
        layer = aot.parse_spec(f"{{preset}}:9:3:64")
        work = aot._plan([layer], "bf16", [90], ["memory_attention"], 1)[2].values()
        far = [job for job in work if job.constants.get("FAR") and job.constants.get("WITH_OUTPUT")]
        print(len(far), sum(aot._make(job).asm["ptx"].count(", 2147483648;") for job in far), file=file)
with open("{place}/decays.txt", "w") as file:
    for gate in ("mlstm", "rwkv6"):
        layer = dataclasses.replace(TINY, config=dataclasses.replace(TINY.config, gate=gate))
        for job in aot._plan([layer], "bf16", [90], ["step", "prefill"], 1)[2].values():
            if "DECAY" in job.constants and job.kernel.name != "strong_pairs":
                print(job.kernel.name, aot._compile(job).failure, file=file)
small = dict(jobs=1, max_batch=4)
aot.compile_kernels([TINY], "bf16", [90, 86], "{place}/tiny", **small)
aot.compile_kernels([SMOLLM2], "bf16", [90], "{place}/smollm2", **small)
aot.compile_kernels([TINY], "bf16", [90], "{place}/again", operators=["step"], **small)
aot.SHARED_MEMORY = {{90: 64}}
try:
    aot.compile_kernels([TINY], "bf16", [90], "{place}/refused", operators=["step"], **small)
except aot.LigerError as e:
    open("{place}/refusal.txt", "w").write(e.message)
""")
    return place


def read(place: Path) -> dict[str, Any]:
    found = json.loads((place / MANIFEST).read_text())
    assert isinstance(found, dict)
    return found


def cubins(place: Path) -> Iterator[tuple[dict[str, Any], int, dict[str, Any], bytes]]:
    for kernel in read(place)["kernels"].values():
        for sm, cubin in kernel["cubins"].items():
            yield kernel, int(sm), cubin, (place / cubin["file"]).read_bytes()


def sections(elf: bytes) -> dict[str, bytes]:
    """Return the sections of a 64-bit ELF file by name."""
    start, size, count, names = struct.unpack_from("<Q10xHHH", elf, 40)
    headers = [struct.unpack_from("<II8x8xQQ", elf, start + i * (size or 64)) for i in range(count)]
    text = elf[headers[names][2] :]
    return {text[h[0] : text.index(b"\0", h[0])].decode(): elf[h[2] : h[2] + h[3]] for h in headers}


def parameter_bytes(elf: bytes, symbol: str) -> int:
    """Return the bytes of a kernel's parameters from the compiler's notes."""
    info, at = sections(elf)[f".nv.info.{symbol}"], 0
    while at < len(info):
        form, attribute, value = struct.unpack_from("<BBH", info, at)
        if (form, attribute) == (3, 0x19):
            return int(value)
        at += 4 + (value if form == 4 else 0)
    raise AssertionError(f"{symbol} has no parameters")


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_cubins_are_what_the_manifest_says(compiled: Path, name: str) -> None:
    place, kernels = compiled / name, set()
    for kernel, sm, cubin, content in cubins(place):
        kernels.add((kernel["name"], sm))
        assert hashlib.sha256(content).hexdigest() == cubin["sha256"]
        assert len(content) == cubin["bytes"]
        assert content[:4] == b"\x7fELF"
        assert struct.unpack_from("<H", content, 18) == (190,), "not CUDA code"
        assert content[48] == sm
        assert f".text.{cubin['symbol']}" in sections(content)
        assert cubin["shared"] <= SHARED_MEMORY[sm]
        assert cubin["threads"] == 32 * kernel["options"].get("num_warps", 4)
        assert cubin["registers"] is None or 0 < cubin["registers"] <= 255
        # arguments in order, each at a multiple of its size, then the hidden pointers
        end = 0
        for kind in [x["type"] for x in kernel["arguments"]] + ["*"] * len(HIDDEN):
            size = 8 if kind[0] == "*" else SIZES[kind]
            end = -(-end // size) * size + size
        assert parameter_bytes(content, cubin["symbol"]) == end, kernel["name"]
    expected = {"prepare", "segment_states", "scan_states", "attend_segments", "_mixer_step_kernel"}
    for sm in (86, 90) if name == "tiny" else (90,):
        assert {kernel for kernel, other in kernels if other == sm} >= expected
    files = {path.name for path in place.iterdir()}
    assert files == {MANIFEST, *(cubin["file"] for _, _, cubin, _ in cubins(place))}


def test_same_bytes_twice(compiled: Path) -> None:
    again = {cubin["file"]: content for _, _, cubin, content in cubins(compiled / "again")}
    assert again and all((compiled / "tiny" / name).read_bytes() == content for name, content in again.items())
    assert not any(str(ROOT).encode() in content or b"/tmp" in content for content in again.values())


@pytest.mark.parametrize("name", ["tiny", "smollm2"])
def test_plans_are_whole(compiled: Path, name: str) -> None:
    found = read(compiled / name)
    assert found["hidden"] == list(HIDDEN)
    written: set[str] = set()
    for plan in found["plans"]:
        for launch in plan["launches"]:
            kernel = found["kernels"][launch["kernel"]]
            assert {int(sm) for sm in kernel["cubins"]} >= set(plan["sms"])
            for argument, value in zip(kernel["arguments"], launch["values"], strict=True):
                given = {key for key in value if value[key] is not None}
                if argument["type"][0] == "*":
                    assert given == {"buffer", "offset"} and value["buffer"] in plan["buffers"]
                else:
                    assert given == ({"number"} if argument["type"] == "fp32" else {"integer"})
                if argument["type"][0] == "*" or argument["name"].startswith(("stride_", "s_")):
                    assert argument["divisible"] == 16, argument
        written |= {buffer["role"] for buffer in plan["buffers"].values()}
    assert {plan["operator"] for plan in found["plans"]} == {"step", "linear_attention"}
    assert written >= {"input", "output", "state", "scratch", "table"}


def test_plans_hold_for_other_sizes() -> None:
    """Sizes that no expression was derived from; also the memory's attention, which has plans but no kernels here."""
    output = python("""
cases = []
def rows(spec):
    return plans.RAGGED_OPERATORS if spec.config.ragged else plans.OPERATORS
made = {(spec, name): list(plans.make_plans(name, spec, "bf16", 90, 9))
        for spec in (SMOLLM2, MEMORY, FORESIGHT, RECALL) for name in rows(spec)
        if name != "prefill" or not spec.config.judged}
sizes = [(1, 11), (3, 77), (4, 10), (9, 61), (17, 128), (40, 700), (2, 6001), (1, 12345), (300, 1234)]
plans._prefill_sizes = lambda longest: [(b, t) for b, t in sizes if t <= longest]
for (spec, name), found in made.items():
    row = rows(spec)[name]
    for call in row.calls(spec, plans.torch.bfloat16, 9):
        recorded = record(call, tuple(row.tables))
        cases.append({
            "plans": [dataclasses.asdict(plan) for plan, _ in found],
            "axes": recorded.axes,
            "launches": [[x.kernel.__name__.strip("_"), x.grid,
                          [[y.buffer, y.offset] if isinstance(y, Pointer) else y for y in x.arguments.values()]]
                         for x in recorded.launches],
            "shapes": {key: x.shape() for key, x in recorded.buffers.items()},
        })
print(json.dumps(cases))
""")
    checked, scored, constants = set(), set(), {}
    for case in json.loads(output):
        plan, axes = choose(case["plans"], case["axes"])
        checked.add((plan["operator"], len(plan["launches"])))
        for name, buffer in plan["buffers"].items():
            if buffer["role"] == "constant":
                constants[plan["operator"], name] = buffer["fill"].split()
        if ["learned", 6] in plan["spec"]["config"]["slots"]:
            given = {name for name, buffer in plan["buffers"].items() if buffer["role"] in ("input", "state")}
            scored |= {(plan["operator"], name) for name in given & {"score", "arrival", "judge_state"}}
        for launch, (kernel, grid, values) in zip(plan["launches"], case["launches"], strict=True):
            assert launch["kernel"].rpartition("-")[0] == kernel
            assert [evaluate(text, axes) for text in launch["grid"]] == grid, (kernel, launch["grid"], axes)
            for value, expected in zip(launch["values"], values, strict=True):
                assert resolve(value, axes) == expected, (kernel, value, axes)
        shapes = {name: [evaluate(x, axes) for x in buffer["shape"]] for name, buffer in plan["buffers"].items()}
        assert shapes == case["shapes"]
    assert {name for name, _ in checked} == {"step", "linear_attention", "memory_attention", "prefill"}
    assert scored == {("step", "score"), ("memory_attention", "arrival"), ("prefill", "score")}
    assert {count for name, count in checked if name == "linear_attention"} == {3, 5}
    assert constants["prefill", "sizes"] == ["12", "6", "3", "0", "70", "20"]
    places = constants["prefill", "places"]  # first slot, slots, first score, whether it keeps scores
    assert [places[8 * h : 8 * h + 4] for h in range(3)] == [
        ["0", "22", "0", "1"], ["22", "7", "22", "0"], ["29", "94", "22", "1"]
    ]  # fmt: skip
    assert [constants["step", "heads"][i : i + 3] for i in (0, 8, 16)] == [
        ["0", "1", "21"], ["1", "1", "28"], ["2", "2", "122"]
    ]  # fmt: skip
    assert len(constants["step", "tiles"]) == 4 * 8


def table(name: str, axes: dict[str, int]) -> list[Any]:
    """Build a table that the manifest describes."""
    a = SimpleNamespace(**axes)
    if name == "offsets":
        return [b * a.pieces for b in range(a.batch + 1)]
    size = a.segment if name == "segments" else a.chunk
    count, chunks = -(-a.tokens // size), -(-a.tokens // a.chunk)
    return [
        [
            b * a.tokens + i * size, min(b * a.tokens + (i + 1) * size, (b + 1) * a.tokens), b,
            int(i == count - 1), b * chunks + i * size // a.chunk,
        ]
        for b in range(a.batch) for i in range(count)
    ]  # fmt: skip


def choose(plans: list[dict[str, Any]], given: dict[str, int]) -> tuple[dict[str, Any], dict[str, int]]:
    """Return the one plan for these axes, and the axes with the derived ones."""
    fitting = []
    for plan in plans:
        axes = dict(given)
        for name, expression in plan["derived"].items():
            axes[name] = evaluate(expression, axes)
        if all(
            low <= axes[name] and (high is None or axes[name] <= high) for name, (low, high) in plan["ranges"].items()
        ):
            fitting.append((plan, axes))
    assert len(fitting) == 1, given
    return fitting[0]


def resolve(value: dict[str, Any], axes: dict[str, int]) -> Any:
    """Return an argument of a launch: a number, or a buffer and an offset in bytes."""
    if value["buffer"] is not None:
        return [value["buffer"], evaluate(value["offset"], axes)]
    return value["number"] if value["integer"] is None else evaluate(value["integer"], axes)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 7), (3, 1000), (2, 9001)])
def test_tables_can_be_made_from_what_the_manifest_says(compiled: Path, batch: int, tokens: int) -> None:
    plans = [plan for plan in read(compiled / "smollm2")["plans"] if plan["operator"] == "linear_attention"]
    _, axes = choose(plans, {"batch": batch, "tokens": tokens})
    segments = cut_batch(batch, tokens, axes["segment"], axes["chunk"], torch.device("cpu"))
    assert table("segments", axes) == segments.table.tolist()
    assert table("offsets", axes) == segments.offsets.tolist()
    chunks = cut_batch(batch, tokens, axes["chunk"], axes["chunk"], torch.device("cpu"))
    assert table("chunks", axes) == chunks.table.tolist()


def test_too_much_shared_memory_is_found_before_anything_is_written(compiled: Path) -> None:
    message = (compiled / "refusal.txt").read_text()
    assert "kernel '_mixer_step_kernel' for sm_90 takes" in message and "64 are there" in message
    assert not (compiled / "refused").exists()


def test_far_attention_computes_its_addresses_right(compiled: Path) -> None:
    """LLVM of Triton 3.6 makes `tid << 31` a 64-bit product, which overflows into the upper half."""
    assert (compiled / "far.txt").read_text().split() == ["1", "0"] * 2


def test_every_decay_compiles(compiled: Path) -> None:
    """Interpreted kernels accept more than the compiler; the wider state of `mlstm` has plans too."""
    assert (compiled / "decays.txt").read_text().split() == ["_mixer_step_kernel", "prepare"] * 2


def test_unknown_names_are_told(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="for cells, memories"):
        aot._plan([replace(TINY, config=PRESETS["mom"].config)], "bf16", [90], ["step"], 1)
    with pytest.raises(UsageError, match="unknown compute capability '91'") as caught:
        aot.compile_kernels([TINY], "bf16", [91], tmp_path / "none")
    assert caught.value.hint is not None and "90" in caught.value.hint
    for text in ("memory", "memory:9:3", "memory:9:x:64"):
        with pytest.raises(UsageError, match="is no layer"):
            aot.parse_spec(text)
    assert aot.parse_spec("liger:9:3:64") == SMOLLM2
    assert aot.main(["liger:9:3:64", "-o", str(tmp_path / "none"), "--sm", "sm_90"]) == UsageError.exit_code


def test_without_triton(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aot, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        aot.compile_kernels([TINY], "bf16", [90], tmp_path / "none")
    assert caught.value.hint == "pip install 'ligerexport[gpu]'"


def test_expressions() -> None:
    axes = {"batch": 3, "tokens": 129}
    assert evaluate("12 * batch * cdiv(tokens, 64) - 1 + 0", axes) == 107
    for text in ("heads", "tokens / 2", "abs(tokens)", "'a'"):
        with pytest.raises(LigerError, match="cannot evaluate"):
            evaluate(text, axes)
