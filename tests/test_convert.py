"""Conversion: no weight byte changes, provenance is kept, and what cannot work is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open

from ligerexport.config import PRESETS, LigerConfig, get_preset
from ligerexport.convert import convert, load_model
from ligerexport.errors import CheckpointError, LigerError, UsageError
from tests.test_model import make_teacher


def test_weights_are_the_same_files(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher", shard="40KB")
    output = convert(teacher, tmp_path / "liger")
    for file in teacher.glob("*.safetensors*"):
        assert (output / file.name).read_bytes() == file.read_bytes()
    shard = next(teacher.glob("*.safetensors"))
    assert (output / shard.name).stat().st_ino == shard.stat().st_ino
    config = json.loads((output / "config.json").read_text())
    assert config["model_type"] == "liger_llama"
    assert config["liger_source"]["model"] == "teacher"
    assert LigerConfig.from_dict(config["liger"]) == PRESETS["memory"].config
    with safe_open(output / shard.name, "pt") as weights:
        assert list(weights.keys())


def test_a_converted_checkpoint_converts_to_another_preset(tmp_path: Path) -> None:
    first = convert(make_teacher(tmp_path / "teacher"), tmp_path / "memory")
    second = convert(first, tmp_path / "sinks", preset="sinks")
    assert load_model(second).config.liger["slots"] == []


def test_a_source_is_never_replaced(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    before = sorted(path.name for path in teacher.iterdir())
    with pytest.raises(UsageError, match="not converted"):
        convert(teacher, teacher, force=True)
    assert sorted(path.name for path in teacher.iterdir()) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "lama"}, "unknown family 'lama'"),
        ({"model_type": None}, "model_type"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "changes with the length"),
    ],
)
def test_unsupported_checkpoints(tmp_path: Path, change: dict[str, object], message: str) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text()) | change
    config = {key: value for key, value in config.items() if value is not None}
    (teacher / "config.json").write_text(json.dumps(config))
    with pytest.raises(LigerError, match=message) as error:
        convert(teacher, tmp_path / "liger")
    assert error.value.hint
    assert not (tmp_path / "liger").exists()


def test_an_unknown_family_names_the_close_one(tmp_path: Path) -> None:
    teacher = make_teacher(tmp_path / "teacher")
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps(config | {"model_type": "lama"}))
    with pytest.raises(CheckpointError) as error:
        convert(teacher, tmp_path / "liger")
    assert "llama" in str(error.value.hint)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate": "glaa"}, "unknown gate"),
        ({"slots": (("peak", 3),)}, "unknown score"),
        ({"slots": (("use", 0),)}, "0 slots"),
        ({"slots": (("use", 1), ("use", 2))}, "twice"),
        ({"window": 0}, "window"),
        ({"recurrence_weight": -1.0}, "mix weights"),
        ({"max_distance": 3}, "smaller than the window"),
        ({"keep_softmax": (99,)}, "keep_softmax"),
    ],
)
def test_settings_that_make_no_sense(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        convert(make_teacher(tmp_path / "teacher"), tmp_path / "liger", **changes)
    assert error.value.hint


def test_unknown_preset_and_setting() -> None:
    with pytest.raises(UsageError, match="unknown preset") as error:
        get_preset("memry")
    assert "memory" in str(error.value.hint)
    with pytest.raises(UsageError, match="unknown setting"):
        LigerConfig.from_dict({"windw": 3})
