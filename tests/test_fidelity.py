"""The comparison of a conversion with its source: no false alarm, and a conversion that differs is not written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import FORESIGHT, MEMORY, make_checkpoint, make_transformer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models

from ligerexport.checkpoint import fidelity
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import convert, load_model
from ligerexport.errors import CheckpointError, VerificationError
from ligerexport.exporters.build import build
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.verify.torch_model import check_reading
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES

ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
    "longrope": {
        "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.2, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0],
        "long_factor": [9.0] * 8, "original_max_position_embeddings": 32,
    },
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "memory": {"preset": "memory", "window": 12},
    "sinks": {"preset": "sinks", "keep_softmax": (1,)},
    "gla": {"preset": "liger", "window": 24},
    "hgrn2": {"preset": "liger", "gate": "hgrn2"},
    "gsa": {"preset": "liger", "gate": "gsa", "window": 1},
    "short": {"preset": "sinks", "max_distance": 60, "layer_memory": ((0, 8, ()),)},
}


@pytest.mark.parametrize("case", range(12))
def test_no_false_alarm(tmp_path: Path, case: int) -> None:
    """Every family in both dtypes, and every preset, at convert and again at build."""
    family, preset = ([*rows][case % len(rows)] for rows in (FAMILIES, PRESETS))
    source = make_transformer(tmp_path / "source", family, (torch.float32, torch.bfloat16)[case % 2])
    liger = convert(source, tmp_path / "liger", **PRESETS[preset])
    check_reading(read_spec(liger))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "head"])
@pytest.mark.parametrize("rope", ROPES)
def test_no_false_alarm_of_scaled_rotary_embeddings(tmp_path: Path, rope: str, tied: bool) -> None:
    sizes = {"rope_parameters": ROPES[rope], "tie_word_embeddings": tied, "attention_bias": True, "mlp_bias": True}
    convert(make_transformer(tmp_path / "source", **sizes), tmp_path / "liger", preset="memory")


def test_no_false_alarm_of_a_converted_checkpoint(tmp_path: Path) -> None:
    """Its own scores are kept, but not its own windows and mix; layers have memories from a file."""
    source = make_checkpoint(tmp_path / "source", FORESIGHT)
    (source / "tokenizer.json").write_text("{}")
    memory = {"window": 9, "slots": [["recent_use", 4], ["learned", 6]], "layer_memory": []}
    memory["layer_memory"] = [[1, 5, [["recent_use", 2], ["learned", 9]]]]
    (tmp_path / "memory.json").write_text(json.dumps(memory))
    liger = convert(source, tmp_path / "liger", preset="evicted", memory=tmp_path / "memory.json")
    assert len(fidelity.text_for(load_model(liger))) == 4 + 5 + 2 + 9
    check_reading(read_spec(liger))


def test_no_false_alarm_of_a_tokenizer_without_tokens(tmp_path: Path) -> None:
    """The tokenizer makes no tokens of the text that `build` compares on, so it compares on random ids."""
    liger = make_checkpoint(tmp_path / "liger", MEMORY)
    Tokenizer(models.BPE()).save(str(liger / "tokenizer.json"))
    result = json.loads((build(liger, tmp_path / "engine") / "manifest.json").read_text())["verification"]
    assert result["passed"] and result["tokens"] > 400


def test_no_false_alarm_of_windows_that_are_not_kept(tmp_path: Path) -> None:
    """The memory reaches further back than the Transformer's windows, so the text is as short as these."""
    source = make_transformer(tmp_path / "source", "gemma3_text")
    liger = convert(source, tmp_path / "liger", preset="memory", keep_window=())
    assert len(fidelity.text_for(load_model(liger))) == 24


def test_a_head_that_is_neither_stored_nor_said_to_be_tied_is_the_embedding(tmp_path: Path) -> None:
    """transformers would initialise one at random."""
    source = make_transformer(tmp_path / "source", "qwen2")
    weights = load_file(source / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    del config["tie_word_embeddings"]
    (source / "config.json").write_text(json.dumps(config))
    model = load_model(convert(source, tmp_path / "liger", preset="memory"))
    assert torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_a_conversion_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_transformer(tmp_path / "source")
    load = fidelity.load_model

    def other(*args: Any) -> Any:
        model = load(*args)
        model.model.layers[2].mlp.down_proj.weight.data[5] *= 1.01
        return model

    monkeypatch.setattr(fidelity, "load_model", other)
    with pytest.raises(VerificationError, match="layer 2 is the first that differs") as error:
        convert(source, tmp_path / "liger", preset="memory")
    assert error.value.hint and [path.name for path in tmp_path.iterdir()] == ["source"]


def test_what_transformers_cannot_run_is_said_to_be_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = check_checkpoint(make_transformer(tmp_path / "source"))
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", None)
    model = fidelity.load_source(info)
    with pytest.raises(CheckpointError, match="transformers cannot run"):
        fidelity.source_outputs(model, torch.tensor([1, 2]))


def test_one_layer_at_a_time_is_in_fp32(tmp_path: Path) -> None:
    """With weights in bf16, values from the configuration are in fp32 too: here the embedding's factor."""
    path = make_transformer(tmp_path / "source", "gemma3_text", torch.bfloat16, hidden_size=72)
    model = fidelity.load_source(check_checkpoint(path))
    seen: list[int] = []

    def count(*_: Any) -> None:
        seen.append(sum(weight.dtype == torch.float32 for weight in model.parameters()))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(count)
    streams = fidelity.outputs(model, torch.tensor([3, 4, 5]))
    assert seen == [len(list(layer.parameters())) for layer in model.model.layers]
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    rows = model.model.embed_tokens.weight[3:6].float()
    assert (streams[0] - 72**0.5 * rows).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("config", "length"),
    [
        (MEMORY, MEMORY.num_slots),
        (LigerConfig(), 64),
        (LigerConfig(window=50, max_distance=50, layer_memory=((1, 7, ()),)), 7),
        (LigerConfig(window=3, keep_softmax=(0, 1, 2)), fidelity.LONGEST),
    ],
)
def test_the_text_fits_into_every_memory(tmp_path: Path, config: LigerConfig, length: int) -> None:
    ids = fidelity.text_for(load_model(make_checkpoint(tmp_path / "liger", config)))
    assert len(ids) == length and len(set(ids.tolist())) > length / 2
