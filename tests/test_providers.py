"""The nodes that execution providers take: in a small graph, in a built artifact, and in the documents."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import onnx_ir as ir
import pytest
from checkpoints import BUILT, MEMORY, make_checkpoint
from typer.testing import CliRunner

import ligerexport as lx
from ligerexport.cli.app import app
from ligerexport.cli.inspect import _most_frequent
from ligerexport.exporters.onnx.builder import CONTRIB, Builder, graph_input
from ligerexport.exporters.onnx.graph import build_graph, weight_storage
from ligerexport.exporters.onnx.providers import operators, place
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.model.gates import GATES

GUIDE = Path(__file__).parent.parent / "docs" / "guides" / "apps.md"


def test_reasons_and_partitions() -> None:
    g = Builder()
    x, n = graph_input("x", "FLOAT", (2,)), graph_input("n", "INT64", (2,))
    y = g.op("Exp", g.op("Add", x, x))  # two nodes, one run
    g.op("Add", n, n)  # int64
    values, index = g.op("TopK", g.op("Mul", y, y), g.const([1]), outputs=2)  # a run of one, and no kernel
    g.op("Neg", index)  # int64
    g.op("Where", g.op("Less", y, values), y, y)  # the last run
    g.op("LinearAttention", y, domain=CONTRIB)
    graph = ir.Graph([x, n], [], nodes=g.nodes, initializers=list(g.initializers.values()))
    found = place(graph, "WebGPU")
    expected = {"Add: int64": 1, "TopK: no kernel": 1, "Neg: int64": 1, "LinearAttention: no kernel": 1}
    assert (found.taken, found.partitions, found.fallback) == (5, 3, expected)
    assert place(graph, "DirectML").fallback == {"LinearAttention: no kernel": 1}


def test_inspect(tmp_path: Path) -> None:
    """DirectML takes the whole graph of the lowering portable; ort has operators that it lacks."""
    source = make_checkpoint(tmp_path / "liger", LigerConfig(window=20))
    rows = {}
    for lowering in ("portable", "ort"):
        path = lx.build(source, tmp_path / lowering, lowering=lowering, verify=False)
        done = CliRunner().invoke(app, ["inspect", str(path), "--providers", "--json"])
        assert done.exit_code == 0, done.output
        rows[lowering] = json.loads(done.stdout)
        assert "WebGPU" in CliRunner().invoke(app, ["inspect", str(path), "--providers"]).output
    assert rows["portable"].keys() == operators().keys()
    assert rows["portable"]["DirectML"]["fallback"] == rows["portable"]["CUDA"]["fallback"] == {}
    assert rows["ort"]["DirectML"]["fallback"] == {"LinearAttention: no kernel": 3}


def test_the_guide_names_what_providers_lack(tmp_path: Path) -> None:
    """Every preset, gate, precision and activation, in the lowering portable."""
    configs = [PRESETS[name].config for name in BUILT]
    configs += [replace(MEMORY, gate=gate, attention_weight=0.5, recurrence_weight=0.5) for gate in GATES]
    sources = [(config, "llama") for config in configs] + [(LigerConfig(window=20, keep_softmax=(1,)), "gemma3_text")]
    kinds = set()
    for i, (config, family) in enumerate(sources):
        spec = read_spec(make_checkpoint(tmp_path / str(i), config, family))
        for weights in ("fp32", "fp16", "int4"):
            storage = weight_storage(weights, lowering="portable")
            kinds |= {node.op_type for node in build_graph(spec, lowering="portable", storage=storage).graph}
    named = dict(re.findall(r"^\| (\w+) \| ([\w, ]+) \|$", GUIDE.read_text(encoding="utf-8"), re.MULTILINE))
    for provider in operators():
        assert named[provider] == (", ".join(sorted(kinds - operators()[provider]["ops"].keys())) or "none"), provider


@pytest.mark.parametrize("provider", operators())
def test_lists_are_whole(provider: str) -> None:
    for kind, (since, until, inputs) in operators()[provider]["ops"].items():
        assert 1 <= since <= 21 <= (until or 21), kind
        assert inputs and all(inputs), kind


def test_the_table_shows_the_most_frequent_reasons() -> None:
    reasons = {f"{kind}: no kernel": count for count, kind in enumerate("ABCDEFG", 1)}
    assert _most_frequent(reasons).startswith("G: no kernel (7)  F: no kernel (6)  ")
    assert _most_frequent(reasons).endswith("C: no kernel (3)  and 2 more")
    assert _most_frequent({"Gelu: no kernel": 1}) == "Gelu: no kernel (1)"
