"""Kernel packs for the TensorRT plugin, of layers and products that together have every operator and table."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trt_harness import PACK, READER, ROOT, compile_harness

from ligerexport.kernels.linear import LinearSpec
from ligerexport.kernels.plans import spec_fields
from ligerexport.model.config import PRESETS
from ligerexport.model.state import MixerSpec

LAYER = MixerSpec(PRESETS["liger"].config, 2, 1, 32, 32, 32**-0.5, 300)
LEARNED = (("recent_use", 6), ("learned", 6))
FORESIGHT = replace(LAYER, config=replace(PRESETS["foresight"].config, window=12, slots=LEARNED))
JUDGED = replace(LAYER, config=replace(PRESETS["memory"].config, window=12, slots=(("novelty", 6),)), max_distance=400)
RECALL = replace(PRESETS["recall"].config, window=12, slots=(("learned", 6),), heads=("12+6 3",), attention_weight=0.5)
SPECS = {
    "recurrent": replace(LAYER, config=replace(LAYER.config, window=12)),
    "foresight": FORESIGHT,
    "judged": JUDGED,
    "evicted": replace(FORESIGHT, config=replace(PRESETS["evicted"].config, window=12, slots=LEARNED)),
    "keyed": replace(LAYER, config=replace(LAYER.config, window=12, gate="gsa")),
    "ragged": replace(LAYER, config=RECALL, q_heads=4, kv_heads=2),
}
PRODUCTS = {
    "first": (LinearSpec(96, 64, 1e-5, side=3), "fp16"),
    "last": (LinearSpec(96, 64, bias=True, residual=True, wide=True), "fp16"),
    "coded": (LinearSpec(96, 64, 1e-5, bias=True, side=3, coded=True), "fp16"),
    "added": (LinearSpec(96, 64, residual=True, wide=True, coded=True), "fp16"),
    "indexed": (LinearSpec(64, 96, wide=True, coded=True, indexed=True), "fp16"),
    "wide": (LinearSpec(40, 64, 1e-5, bias=True, wide=True), "fp32"),
}


@dataclass(frozen=True)
class Packed:
    """A pack, and its content according to `write_pack`."""

    file: Path
    manifest: dict[str, Any]

    @classmethod
    def read(cls, place: Path) -> Packed:
        """Return what `write` wrote."""
        return cls(place / PACK, json.loads((place / "kernels.json").read_text()))


def write(
    place: Path, specs: dict[str, MixerSpec], products: dict[str, tuple[LinearSpec, str]], sms: tuple[int, ...] = (90,)
) -> Packed:
    """Write a pack in a process without the interpreter, with layers and products given twice."""
    code = f"""
from ligerexport.model.config import LigerConfig
from ligerexport.exporters.tensorrt.pack import write_pack
from ligerexport.kernels.linear import LinearSpec
from ligerexport.model.state import MixerSpec

layers = {[*map(spec_fields, specs.values())]!r}
specs = [MixerSpec(**(x | {{"config": LigerConfig.from_dict(x["config"])}})) for x in layers]
products = [(LinearSpec(**x), dtype) for x, dtype in {[(spec_fields(x), dtype) for x, dtype in products.values()]!r}]
made = write_pack(
    specs * 2, "{place / PACK}", products=products * 2, dtype="fp16", max_batch=8, jobs=1, sms={sms}
)
open("{place}/kernels.json", "w").write(made.to_json())
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return Packed.read(place)


def make_harness(place: Path) -> None:
    """Write the pack of `SPECS` and `PRODUCTS`, and the program that reads it."""
    write(place, SPECS, PRODUCTS)
    compile_harness(place / READER)
