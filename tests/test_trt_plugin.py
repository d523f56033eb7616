"""The core of the TensorRT plugin, in C++, against Python's own evaluation of the plans, on a driver that only records.

Kernels are compiled in a separate process, as in test_aot. Tests of the plugin in TensorRT itself need a GPU.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Once

pytest.importorskip("triton")

from test_aot import choose, table
from trt_harness import ENVIRONMENT, PLUGIN, READER, ROOT, cuda_headers
from trt_packs import FORESIGHT, LAYER, PRODUCTS, SPECS, Packed, make_harness, write

from ligerexport.errors import UsageError
from ligerexport.exporters.tensorrt.node import CODED, EQUAL, RAGGED, mixer_attributes
from ligerexport.exporters.tensorrt.pack import write_pack
from ligerexport.kernels.launches import evaluate
from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.plans import layer_digest, spec_fields
from ligerexport.model.config import PRESETS
from ligerexport.model.state import MixerSpec

NUMBERS = re.findall(r'\{"(\w+)", &MixerAttributes', (PLUGIN / "mixer.cc").read_text())  # in the order of an engine
WIDTHS = {"bf16": 2, "fp16": 2, "fp32": 4, "i8": 1, "u8": 1, "i32": 4, "i64": 8}
MIXED, WORKSPACE, ALLOCATED = 64 << 32, 65 << 32, 66 << 32

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="no g++")


@pytest.fixture(scope="module")
def harness(once: Once) -> Path:
    return once("harness", make_harness) / READER


@pytest.fixture(scope="module")
def packed(once: Once) -> Packed:
    return Packed.read(once("harness", make_harness))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return write(tmp_path_factory.mktemp("several"), {"recurrent": SPECS["recurrent"]}, {}, (86, 90))


def attributes(spec: MixerSpec, joint: bool = False) -> list[str]:
    """Return a node's attributes in the form of an engine."""
    numbers = mixer_attributes(spec, joint)
    return [layer_digest(spec_fields(spec)), *(str(numbers.get(name, 0)) for name in NUMBERS)]


def run(harness: Path, *words: object) -> str:
    return run_lines(harness, [], *words)


def run_lines(harness: Path, lines: list[str], *words: object, overlap: bool = False) -> str:
    done = subprocess.run(
        [harness, *map(str, words)], input="\n".join(lines), capture_output=True, text=True, errors="replace",
        env=ENVIRONMENT | ({} if overlap else {"LIGEREXPORT_OVERLAP": "0"}),
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stderr  # a crash is neither
    return done.stdout


class Memory:
    """Maps addresses to buffers: the first launch with a buffer shows where it begins, which must not change."""

    def __init__(self, spec: MixerSpec, workspace: int, joint: bool = False) -> None:
        names = ["query", *([] if joint else ["key", "value"]), "position", "rotary"]
        names += [*(["score"] if spec.config.foresees else []), *(x.name for x in spec.state())]
        self.known = {name: (1 + i) << 32 for i, name in enumerate(names)} | {"output": MIXED}
        self.known |= {f"past_{x.name}": self.known[x.name] for x in spec.state()}
        if joint:  # fp16
            self.known["key"] = self.known["query"] + 2 * spec.q_heads * spec.d_k
            self.known["value"] = self.known["key"] + 2 * spec.kv_heads * spec.d_k
        self.given = set(self.known)
        self.workspace = workspace
        self.extents: dict[int, int] = {}

    def check(self, name: str, role: str, nbytes: int, address: int) -> None:
        """Check the address of a buffer's first byte."""
        assert self.known.setdefault(name, address) == address, name
        if name in self.given:
            return
        low, high = (WORKSPACE, WORKSPACE + self.workspace) if role in ("scratch", "output") else (ALLOCATED, 1 << 48)
        assert low <= address <= address + nbytes <= high, name
        if nbytes:
            self.extents[address] = nbytes

    def check_apart(self) -> None:
        places = sorted(self.extents.items())
        for (begin, nbytes), (after, _) in pairwise(places):
            assert begin + nbytes <= after


def launches(text: str) -> Iterator[list[str]]:
    for line in text.splitlines():
        if line.startswith("launch "):
            yield line.split()[1:]


def check_launches(
    found: list[list[str]], manifest: dict[str, Any], plan: dict[str, Any], axes: dict[str, int], memory: Memory
) -> None:
    assert len(found) == len(plan["launches"])
    for (symbol, *numbers), launch in zip(found, plan["launches"], strict=True):
        kernel = manifest["kernels"][launch["kernel"]]
        cubin = kernel["cubins"]["90"]
        grid = [evaluate(x, axes) for x in launch["grid"]]
        assert (symbol, [int(x) for x in numbers[:5]]) == (cubin["symbol"], [*grid, cubin["threads"], cubin["shared"]])
        arguments = numbers[5:]
        assert arguments[len(launch["values"]) :] == ["0", "0"]  # hidden
        for value, number in zip(launch["values"], arguments, strict=False):
            if value["buffer"] is not None:
                buffer = plan["buffers"][value["buffer"]]
                nbytes = WIDTHS[buffer["type"]]
                for size in buffer["shape"]:
                    nbytes *= evaluate(size, axes)
                memory.check(value["buffer"], buffer["role"], nbytes, int(number) - evaluate(value["offset"], axes))
            elif value["number"] is not None:
                assert float(number) == pytest.approx(value["number"], rel=1e-6)
            else:
                assert int(number) == evaluate(value["integer"], axes)


def strides(spec: MixerSpec, *sizes: int, joint: bool = False) -> dict[str, int]:
    """Return strides of `[*sizes, H, d]`, contiguous or side by side."""
    found = {}
    whole = (spec.q_heads + spec.kv_heads) * spec.d_k + spec.kv_heads * spec.d_v
    for name, heads, width in (
        ("query", spec.q_heads, spec.d_k), ("key", spec.kv_heads, spec.d_k), ("value", spec.kv_heads, spec.d_v)
    ):  # fmt: skip
        stride = list(torch.empty(*sizes, heads, width, device="meta").stride())[:-1]
        if joint:
            stride[:-1] = [x // (heads * width) * whole for x in stride[:-1]]
        found |= {f"{name}_stride_{i}": x for i, x in enumerate(stride)}
    return found


def plans_of(packed: Packed, spec: MixerSpec | LinearSpec, operator: str) -> list[dict[str, Any]]:
    fields = json.loads(json.dumps(spec_fields(spec)))
    return [x for x in packed.manifest["plans"] if x["operator"] == operator and x["spec"] == fields]


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("batch", "tokens"), [(1, 1), (8, 1), (1, 2), (3, 7), (2, 64), (1, 65), (5, 200)])
def test_launches_are_what_python_evaluates(
    harness: Path, packed: Packed, name: str, batch: int, tokens: int, joint: bool
) -> None:
    spec = SPECS[name]
    text = run_lines(harness, [f"{batch} {tokens}"], "run", packed.file, 90, "fp16", *attributes(spec, joint))
    assert "error" not in text, text
    memory = Memory(spec, int(text.splitlines()[0].split()[1]), joint)
    if tokens == 1:
        plan, axes = choose(plans_of(packed, spec, "step"), {"batch": batch} | strides(spec, batch, joint=joint))
        check_launches(list(launches(text)), packed.manifest, plan, axes, memory)
        memory.check_apart()
    else:
        sizes = {"batch": batch, "tokens": tokens}
        plan, axes = choose(plans_of(packed, spec, "prefill"), sizes | strides(spec, batch, tokens, joint=joint))
        check_launches(list(launches(text)), packed.manifest, plan, axes, memory)
        memory.check_apart()
        check_copies(text, plan, axes, memory)
    check_tables(text, plan, axes, memory)


@pytest.mark.parametrize("name", PRODUCTS)
@pytest.mark.parametrize("rows", [1, 2, 16, 17, 65, 1000])
def test_products_are_what_python_evaluates(harness: Path, packed: Packed, name: str, rows: int) -> None:
    spec, dtype = PRODUCTS[name]
    flags = [spec.epsilon is not None, spec.bias, spec.residual, spec.wide]
    coded = [int(spec.coded), int(spec.indexed)]
    numbers = [CODED if spec.coded else EQUAL, spec.outputs, spec.inputs, *map(int, flags), spec.side, *coded]
    text = run_lines(harness, [str(rows)], "product", packed.file, 90, dtype, layer_digest(spec_fields(spec)), *numbers)
    assert "error" not in text, text
    memory = Memory(LAYER, int(text.splitlines()[0].split()[1]))
    flags[3:] = [spec.side > 0] * 2
    names = ["input", "weight", *(["scale"] if spec.coded else [])]
    names += [x for x, y in zip(("norm", "bias", "residual", "side_weight", "side_bias"), flags, strict=True) if y]
    memory.known = {x: (1 + i) << 32 for i, x in enumerate(names)} | {"output": MIXED, "side_output": 63 << 32}
    memory.given = set(memory.known)
    plan, axes = choose(plans_of(packed, spec, "linear"), {"rows": rows})
    check_launches(list(launches(text)), packed.manifest, plan, axes, memory)
    memory.check_apart()


def check_copies(text: str, plan: dict[str, Any], axes: dict[str, int], memory: Memory) -> None:
    """The new state takes the place of the old after the last launch."""
    after = text.splitlines()[max(i for i, x in enumerate(text.splitlines()) if x.startswith("launch ")) + 1 :]
    expected = []
    for name, buffer in plan["buffers"].items():
        if not name.startswith("present_"):
            continue
        nbytes = WIDTHS[buffer["type"]]
        for size in buffer["shape"]:
            nbytes *= evaluate(size, axes)
        expected.append(f"copy {memory.known[name.replace('present_', 'past_')]} {memory.known[name]} {nbytes}")
    assert after == expected and expected


def check_tables(text: str, plan: dict[str, Any], axes: dict[str, int], memory: Memory) -> None:
    """Each table and constant is uploaded once, and nothing else."""
    uploads = [[int(x) for x in line.split()[1:]] for line in text.splitlines() if line.startswith("upload ")]
    expected = {}
    for name, buffer in plan["buffers"].items():
        if buffer["role"] == "constant":
            expected[memory.known[name]] = [int(word) for word in buffer["fill"].split()]
        elif buffer["role"] == "table":
            expected[memory.known[name]] = torch.tensor(table(name, axes)).flatten().tolist()
    assert {address: rows for address, *rows in uploads} == expected and len(uploads) == len(expected)


@pytest.mark.parametrize(("sm", "text"), [(86, False), (89, False), (90, False), (100, True), (121, True)])
def test_later_gpus_take_text(harness: Path, several: Packed, sm: int, text: bool) -> None:
    """A GPU without compiled kernels takes the PTX of 8.6 with its plans, which the driver compiles."""
    said = run_lines(harness, ["1 1", "2 64"], "run", several.file, sm, "fp16", *attributes(SPECS["recurrent"]))
    assert "error" not in said and said.count("launch ") > 10, said
    sizes = [int(line.split()[1]) for line in said.splitlines() if line.startswith("text ")]
    assert bool(sizes) == text and all(size > 1000 for size in sizes)
    assert several.file.read_bytes().count(b".target sm_86") == len(
        [x for x in several.manifest["kernels"].values() if "86" in x["cubins"]]
    )


def test_earlier_gpus_are_refused(harness: Path, several: Packed) -> None:
    said = run_lines(harness, ["1 1"], "run", several.file, 80, "fp16", *attributes(SPECS["recurrent"]))
    assert "on sm_80 in fp16" in said and "PTX of sm_86/fp16" in said


def test_what_waits_may_overlap(harness: Path, packed: Packed) -> None:
    """Only steps and products of few rows overlap, because they wait for the launch before them; none if disabled."""
    words = ["run", packed.file, 90, "fp16", *attributes(FORESIGHT)]
    first, dtype = PRODUCTS["first"]
    product = ["product", packed.file, 90, dtype, layer_digest(spec_fields(first)), EQUAL, 96, 64, 1, 0, 0, 0, 3, 0, 0]
    assert "overlap" not in run_lines(harness, ["1 1"], *words)
    assert run_lines(harness, ["1 1"], *words, overlap=True).splitlines()[1] == "overlap"
    assert "overlap" not in run_lines(harness, ["2 64"], *words, overlap=True)
    told = run_lines(harness, ["1", "9"], *product, overlap=True)
    assert told.count("overlap") == told.count("launch") == 1 + 2  # of nine rows the norm and the product
    assert "overlap" not in run_lines(harness, ["70"], *product, overlap=True)
    kernels = packed.manifest["kernels"].values()
    assert {x["name"] for x in kernels if x["constants"].get("OVERLAP")} == {
        "_mixer_step_kernel", "_row_kernel", "_norm_kernel", "_tile_kernel",
    }  # fmt: skip


def test_state_must_be_in_place(harness: Path, packed: Packed) -> None:
    words = ["run", packed.file, 90, "fp16", *attributes(SPECS["recurrent"])]
    assert "'recurrent_state' must be bound to one address" in run_lines(harness, ["1 1 apart"], *words)
    timed = run_lines(harness, ["1 1 timed"], *words)
    assert "error" not in timed and "copy" in timed


def test_workspace_covers_smaller_calls(harness: Path, packed: Packed) -> None:
    lines = [f"{batch} {tokens}" for batch in (1, 3) for tokens in (1, 63, 64, 65, 129, 300)]
    text = run_lines(harness, [*lines, "3 300"], "run", packed.file, 90, "fp16", *attributes(SPECS["recurrent"]))
    sizes = [int(line.split()[1]) for line in text.splitlines() if line.startswith("call ")]
    assert max(sizes) == sizes[-1] > 0


def test_tables_and_counters_are_made_once(harness: Path, packed: Packed) -> None:
    words = ["run", packed.file, 90, "fp16", *attributes(SPECS["recurrent"])]
    once, twice = run_lines(harness, ["2 70", "2 1"], *words), run_lines(harness, ["2 70", "2 1"] * 2, *words)
    assert once.count("upload") == twice.count("upload") > 0
    assert once.count("set") == twice.count("set") > 0
    assert 2 * once.count("launch") == twice.count("launch")


def test_what_does_not_fit_is_told(harness: Path, packed: Packed) -> None:
    layer = attributes(SPECS["recurrent"])
    assert "nothing for layer" in run(harness, "run", packed.file, 86, "fp16", *layer)
    assert "sm_90/fp16" in run(harness, "run", packed.file, 86, "fp16", *layer)
    assert "nothing for layer" in run(harness, "run", packed.file, 90, "fp16", "0" * 16, *layer[1:])
    assert "contract 1 of LigerMixer" in run(harness, "run", packed.file, 90, "fp16", layer[0], "1", *layer[2:])
    assert "no valid attributes" in run(harness, "run", packed.file, 90, "fp16", *layer[:2], "0", *layer[3:])
    assert "another version" in run(harness, "run", packed.file, 90, "fp16", *layer[:-1])
    assert "differ in length" in run_lines(harness, ["2 3 ragged"], "run", packed.file, 90, "fp16", *layer)
    assert "no step for batch 9" in run_lines(harness, ["9 1"], "run", packed.file, 90, "fp16", *layer)
    wider = [*layer[:4], "64", *layer[5:]]  # another d_k than the kernels have
    assert "bytes where the kernels take" in run_lines(harness, ["1 1"], "run", packed.file, 90, "fp16", *wider)


def test_damaged_packs_are_refused(harness: Path, packed: Packed, tmp_path: Path) -> None:
    whole, chance = packed.file.read_bytes(), random.Random(0)
    body = whole[:-4]
    head = 40_000  # kernels and plans come before the blobs
    damaged: list[bytes] = [whole[: chance.randrange(len(whole))] for _ in range(60)]
    damaged += [b"", whole[:8], b"LIGERPK1" + whole[8:], whole + b"\0"]
    for _ in range(100):
        at = chance.randrange(len(whole))
        damaged.append(whole[:at] + bytes([whole[at] ^ (1 << chance.randrange(8))]) + whole[at + 1 :])
    mended = []
    for _ in range(300):  # with a check sum that fits, so that every other check is reached
        changed = bytearray(body)
        for _ in range(chance.choice((1, 1, 4))):
            at = chance.randrange(8, head)
            changed[at] = chance.choice((0, 1, 0x7F, 0x80, 0xFF, changed[at] ^ 1, chance.randrange(256)))
        mended.append(bytes(changed[: chance.choice((len(changed), len(changed), chance.randrange(len(changed))))]))
    files = []
    for i, content in enumerate([*damaged, *(x + struct.pack("<I", zlib.crc32(x)) for x in mended)]):
        files.append(tmp_path / f"{i}.liger")
        files[-1].write_bytes(content)
    told = run(harness, "check", packed.file, *files).splitlines()
    assert told[0] == "ok" and len(told) == 1 + len(files)
    assert all(line.startswith("error ") for line in told[1 : 1 + len(damaged)])
    assert sum(line.startswith("error ") for line in told[1 + len(damaged) :]) > 100


def test_an_error_shows_no_bytes_that_a_terminal_obeys(harness: Path, packed: Packed, tmp_path: Path) -> None:
    changed = packed.file.read_bytes()[:-4].replace(b"key_stride_0", b"key\x1bstride_0")
    (tmp_path / "pack").write_bytes(changed + struct.pack("<I", zlib.crc32(changed)))
    assert run(harness, "check", tmp_path / "pack") == "error the kernel pack is damaged: a name is not plain text\n"


def test_equal_code_is_packed_once(packed: Packed) -> None:
    cubins = (cubin for x in packed.manifest["kernels"].values() for cubin in x["cubins"].values())
    code = sum({x["sha256"]: x["bytes"] for x in cubins}.values())
    assert packed.file.stat().st_size < code + len(json.dumps(packed.manifest)) + 20_000


def test_memories_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("triton.knobs.runtime.interpret", False)
    with pytest.raises(UsageError, match="for cells, memories"):
        write_pack([replace(LAYER, config=PRESETS["mom"].config)], tmp_path / "kernels.liger")
    assert not (tmp_path / "kernels.liger").exists()


@pytest.mark.parametrize("place", os.environ.get("LIGEREXPORT_TENSORRT_INCLUDE", "").split(":"))
def test_faces_compile(place: str, tmp_path: Path) -> None:
    if not place:
        pytest.skip("LIGEREXPORT_TENSORRT_INCLUDE names no directories of TensorRT headers")
    version = (Path(place) / "NvInferVersion.h").read_text()
    face = "plugin_v2.cc" if "NV_TENSORRT_MAJOR 8" in version else "plugin_v3.cc"
    sources = [PLUGIN / name for name in ("face.cc", face)]
    if (Path(place) / "NvOnnxParser.h").exists() and Path("/usr/include/nlohmann/json.hpp").exists():
        sources += sorted((ROOT / "ligerexport" / "exporters" / "tensorrt" / "runner").glob("*.cc"))
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror", "-Wno-deprecated-declarations"]
    command = ["g++", *flags, "-isystem", place, "-isystem", cuda_headers(), *sources]
    subprocess.run(command, check=True, cwd=tmp_path)


REGISTRY = """
import sys
import numpy as np
import tensorrt_rtx_bindings as trt

builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
registry = builder.get_plugin_registry()
assert registry.load_library(sys.argv[1]) is not None
mixer = {"q_heads": 2, "kv_heads": 1, "d_k": 32, "d_v": 32, "max_distance": 64}
for kind, numbers in (("LigerMixer", mixer), ("LigerLinear", {"N": 8, "K": 8})):
    for contract in (int(sys.argv[2]), 1):
        creator = registry.get_creator(kind, "1", "ligerexport")
        text = np.frombuffer(b"0123456789abcdef", np.int8)
        given = [trt.PluginField("layer_spec", text, trt.PluginFieldType.CHAR)]
        given += [
            trt.PluginField(name, np.array([x], np.int32), trt.PluginFieldType.INT32)
            for name, x in (numbers | {"contract": contract}).items()
        ]
        made = creator.create_plugin("node", trt.PluginFieldCollection(given), trt.TensorRTPhase.BUILD)
        print(kind, contract, made is not None)
"""


@pytest.mark.parametrize("place", os.environ.get("LIGEREXPORT_TENSORRT_INCLUDE", "").split(":"))
def test_a_registry_makes_the_nodes(place: str, tmp_path: Path) -> None:
    """TensorRT-RTX has the registry of TensorRT 10 and 11, and needs no GPU to make a plugin."""
    if not place or "NV_TENSORRT_MAJOR 8" in (Path(place) / "NvInferVersion.h").read_text():
        pytest.skip("LIGEREXPORT_TENSORRT_INCLUDE names no directories of headers of TensorRT 10 or later")
    pytest.importorskip("tensorrt_rtx_bindings")
    sources = [PLUGIN / name for name in ("pack.cc", "plan.cc", "node.cc", "mixer.cc", "linear.cc", "face.cc")]
    command = ["g++", "-std=c++17", "-shared", "-fPIC", "-isystem", place, "-isystem", cuda_headers(), *sources]
    subprocess.run([*command, PLUGIN / "plugin_v3.cc", "-o", tmp_path / "plugin.so"], check=True)
    words = [sys.executable, "-c", REGISTRY, tmp_path / "plugin.so", RAGGED]
    done = subprocess.run([str(x) for x in words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [*done.stdout.splitlines(), *done.stderr.splitlines()]  # TensorRT's messages among them
    assert [line for line in told if line.startswith("Liger")] == [
        f"LigerMixer {RAGGED} True", "LigerMixer 1 False", f"LigerLinear {RAGGED} True", "LigerLinear 1 False",
    ]  # fmt: skip
    assert sum("made for contract 1" in line for line in told) == 2
