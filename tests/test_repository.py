"""Model repositories for NVIDIA's Triton Inference Server."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import toy

from ligerexport.artifact.artifact import Artifact, open_artifact
from ligerexport.cli import main
from ligerexport.errors import UsageError
from ligerexport.exporters.onnx.repository import configuration, write_repository


@pytest.fixture
def artifact(tmp_path: Path) -> Artifact:
    """The toy without its layer that is kept as softmax. The first of its states begins with 0, the second with -1."""
    made = toy.manifest()
    kept = [[x for x in values if "key" not in x.name] for values in (made.graph.inputs, made.graph.outputs)]
    graph = replace(made.graph, inputs=tuple(kept[0]), outputs=tuple(kept[1]))
    return open_artifact(toy.build(tmp_path / "toy", graph=graph, state=made.state[:2]))


def test_a_repository_has_the_graph_its_state_and_where_it_begins(
    artifact: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["triton", str(artifact.directory), str(tmp_path / "models/small"), "--max-batch", "4"])
    place = Path(capsys.readouterr().out.strip())
    assert done.value.code == 0 and place == tmp_path / "models/small"
    assert (place / "1/model.onnx").read_bytes() == (artifact.directory / "model.onnx").read_bytes()
    text = (place / "config.pbtxt").read_text()
    for said in ('name: "small"', "max_batch_size: 4", 'output { name: "logits" data_type: TYPE_FP32 dims: [259] }',
                 'input { name: "input_ids" data_type: TYPE_INT64 dims: [-1] }'):  # fmt: skip
        assert said in text
    states = re.findall(r'input_name: "(.*?)" output_name: "(.*?)"', text)
    assert states == [(x.past, x.present) for x in artifact.manifest.state]
    (file,) = (place / "initial_state").iterdir()
    assert file.name == artifact.manifest.state[1].past and np.fromfile(file, np.int64).tolist() == [-1, -1]


def test_what_the_server_cannot_run_is_refused(artifact: Artifact, tmp_path: Path) -> None:
    other = replace(artifact, manifest=replace(artifact.manifest, target="trt"))
    grows = replace(artifact, manifest=toy.manifest())
    for wrong, batch, said in ((other, 1, "target trt"), (grows, 1, "grows"), (artifact, 0, "--max-batch 0")):
        with pytest.raises(UsageError, match=said):
            write_repository(wrong, tmp_path / "x", max_batch=batch)
    assert not (tmp_path / "x").exists()


def test_the_configuration_follows_its_schema(artifact: Artifact) -> None:
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    from google.protobuf import text_format

    manifest = artifact.manifest
    config = text_format.Parse(configuration(artifact, "toy", 16, "/models/toy/1/lib.so"), schema.ModelConfig())
    assert config.model_operations.op_library_filename[:] == ["/models/toy/1/lib.so"]
    assert config.sequence_batching.oldest.max_candidate_sequences == 128 and config.max_batch_size == 16
    assert [(x.input_name, list(x.dims), x.initial_state[0].zero_data) for x in config.sequence_batching.state] == [
        (x.past, list(x.shape[1:]), not x.fill) for x in manifest.state
    ]
    past = {x.past for x in manifest.state}
    assert [x.name for x in config.input] == [x.name for x in manifest.graph.inputs if x.name not in past]
