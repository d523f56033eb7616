"""Weights in int8 for TensorRT: what is written, and that verification finds faults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trt import checkpoint, packed  # noqa: F401

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import VerificationError
from ligerexport.exporters.onnx import graph, quantise, weights
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.tensorrt import evaluation
from ligerexport.kernels.fused.linear import linear
from ligerexport.kernels.linear import LinearSpec


def test_weights_in_int8(checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]]) -> None:
    """Codes take half of the bytes of fp16, which activations and slots keep."""
    made = [
        open_artifact(lx.build(checkpoint, tmp_path / kind, target="trt", engine=False, sms=(87,), weights=kind))
        for kind in ("fp16", "int8")
    ]
    wide, coded = (artifact.manifest for artifact in made)
    assert (coded.precision, coded.block) == ("int8", None) and coded.verification["passed"]
    assert coded.device is not None and coded.device["contract"] == 5
    assert [x.dtype for x in coded.state] == [x.dtype for x in wide.state]
    assert 0.5 * wide.bytes.weights < coded.bytes.weights < 0.6 * wide.bytes.weights
    assert packed[1]["dtype"] == "fp16"
    assert {(spec.coded, kind) for spec, kind in packed[1]["products"]} == {(True, "fp16")}
    assert sum(spec.indexed for spec, _ in packed[1]["products"]) == 1


def test_kernels_read_what_is_stored(checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]]) -> None:
    """The bytes of the file are the codes that a kernel takes."""
    directory = lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(87,), weights="int8")
    spec, storage = read_spec(checkpoint), graph.storage_of(open_artifact(directory).manifest)
    name = "model.layers.0.self_attn.o_proj.weight"
    outputs, inputs = spec.weights[name].shape
    layout = weights.data_layout(spec, storage)
    file = torch.from_numpy(np.fromfile(directory / weights.DATA_FILE, np.uint8))
    codes, scale = (file[part.offset : part.offset + part.nbytes] for part in (layout[name], layout[f"{name}_scale"]))
    x, out = torch.randn(1, inputs, dtype=torch.float16), torch.empty(1, outputs)
    made = LinearSpec(outputs, inputs, wide=True, coded=True)
    linear(x, codes.view(outputs, inputs), None, None, None, made, out=out, scale=scale.view(torch.float32))
    values = np.concatenate([slab for slab, _ in weights.stored_slabs(spec, storage, directory, name)])
    torch.testing.assert_close(out, x.float() @ torch.from_numpy(values).T, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("fault", ["code", "scale", "tolerance"])
def test_wrong_codes_are_not_written(
    checkpoint: Path, tmp_path: Path, packed: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """One code that is not the nearest, a scale that the graph reads wrongly, and rows that lose too much."""
    right = quantise.quantise_rows

    def wrong(matrix: np.ndarray) -> quantise.Blocks:
        made = right(matrix)
        made.codes[3, 5] ^= 1
        return made

    if fault == "code":
        monkeypatch.setattr(weights, "quantise_rows", wrong)
    elif fault == "scale":
        linear = evaluation.run_linear
        monkeypatch.setattr(evaluation, "run_linear", lambda spec, x, w, rest: linear(spec, x, w * 1.01, rest))
    else:
        monkeypatch.setattr(weights, "ROW_ERROR", 1e-3)
    with pytest.raises(VerificationError, match="plugin graph" if fault == "scale" else "as it is stored"):
        lx.build(checkpoint, tmp_path / "a", target="trt", engine=False, sms=(90,), weights="int8")
    assert not (tmp_path / "a").exists() and not packed


def test_rows_are_quantised_to_the_nearest_code() -> None:
    """Zero is a code, the largest element has the last one, and rows of zeros stay zero."""
    matrix = np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32)
    matrix[1], matrix[2, 3] = 0, 0
    blocks = quantise.quantise_rows(matrix)
    assert blocks.codes.dtype == np.uint8 and blocks.scale.shape == (5, 1) and set(blocks.zero_point[:, 0]) == {128}
    stored = quantise.dequantise(blocks, 12)
    assert (stored[1] == 0).all() and stored[2, 3] == 0
    largest = np.abs(matrix).max(1, keepdims=True)
    assert (np.abs(stored - matrix) <= largest / 254 * 1.0001).all()
    assert (np.abs(blocks.codes.astype(int) - 128).max(1) == [127, 0, 127, 127, 127]).all()
