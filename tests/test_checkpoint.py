"""Checks of a checkpoint directory: every kind of damage gives one line and a hint."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ligerexport.checkpoint.checkpoint import check_checkpoint, checkpoint_files
from ligerexport.errors import CheckpointError

CONFIG = {"model_type": "llama", "vocab_size": 12, "hidden_size": 8, "intermediate_size": 4, "num_hidden_layers": 2,
          "num_attention_heads": 2, "max_position_embeddings": 16}  # fmt: skip
LAYER = {
    **{f"self_attn.{kind}_proj": (8, 8) for kind in "qkvo"},
    **{"mlp.gate_proj": (4, 8), "mlp.up_proj": (4, 8), "mlp.down_proj": (8, 4)},
    **{"input_layernorm": (8,), "post_attention_layernorm": (8,)},
}
TENSORS = {
    "model.embed_tokens.weight": (12, 8),
    "model.norm.weight": (8,),
    **{f"model.layers.{i}.{name}.weight": shape for i in range(2) for name, shape in LAYER.items()},
    "lm_head.weight": (12, 8),
}
INDEX = "model.safetensors.index.json"


def write_config(path: Path, **changes: object) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))


def write_weights(path: Path, names: list[str], file: str = "model.safetensors") -> None:
    save_file({name: torch.full(TENSORS[name], len(name), dtype=torch.bfloat16) for name in names}, path / file)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    """A complete checkpoint in one file, with an output projection that is not tied."""
    write_config(tmp_path, tie_word_embeddings=False)
    write_weights(tmp_path, list(TENSORS))
    (tmp_path / "tokenizer.json").write_text("{}")
    return tmp_path


@pytest.fixture
def sharded(single: Path) -> Path:
    """The same checkpoint in two shards with an index."""
    (single / "model.safetensors").unlink()
    names = list(TENSORS)
    weight_map = {}
    for shard, part in (
        ("model-00001-of-00002.safetensors", names[:2]),
        ("model-00002-of-00002.safetensors", names[2:]),
    ):
        write_weights(single, part, shard)
        weight_map |= dict.fromkeys(part, shard)
    (single / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return single


def test_single(single: Path) -> None:
    info = check_checkpoint(single)
    assert info.files == (single / "model.safetensors",)
    assert info.bytes == info.files[0].stat().st_size
    assert info.dtypes == ("BF16",)
    assert not info.tied
    assert {name: tensor.shape for name, tensor in info.tensors.items()} == TENSORS


def test_sharded(sharded: Path) -> None:
    info = check_checkpoint(sharded)
    assert [file.name[:11] for file in info.files] == ["model-00001", "model-00002"]
    assert checkpoint_files(sharded) == list(info.files)
    assert info.tensors["lm_head.weight"].file == info.files[1]
    assert set(info.tensors) == set(TENSORS)


def test_tied_without_a_head(single: Path) -> None:
    write_config(single)
    write_weights(single, list(TENSORS)[:-1])
    assert check_checkpoint(single).tied


def test_tokenizer_can_be_left_out(single: Path) -> None:
    (single / "tokenizer.json").unlink()
    check_checkpoint(single, tokenizer=False)
    with pytest.raises(CheckpointError, match="no tokenizer"):
        check_checkpoint(single)


def cut(file: str, size: int) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        content = (path / file).read_bytes()
        (path / file).write_bytes(content[:size])

    return damage


def longer(path: Path) -> None:
    with (path / "model.safetensors").open("ab") as file:
        file.write(b"x")


def write(file: str, content: bytes) -> Callable[[Path], None]:
    return lambda path: (path / file).write_bytes(content) and None


def pickle_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def adapter_only(path: Path) -> None:
    (path / "model.safetensors").rename(path / "adapter_model.safetensors")


SINGLE_DAMAGE = {
    "no config": (lambda path: (path / "config.json").unlink(), "no config.json", "holds config.json"),
    "config not JSON": (write("config.json", b"{"), "is not JSON", "copy or download"),
    "config without type": (write("config.json", b"{}"), "names no model_type", "config.json"),
    "no weights": (lambda path: (path / "model.safetensors").unlink(), "no weights in", "copy or download"),
    "pickle": (pickle_only, "pickle weights only .pytorch_model.bin.", "save_pretrained"),
    "adapter": (adapter_only, "LoRA adapter", "--merge"),
    "cut in the weights": (cut("model.safetensors", -8), "bytes, its header announces", "cut off"),
    "cut in the header": (cut("model.safetensors", 60), "too few for its header", "cut off"),
    "empty": (cut("model.safetensors", 0), "has 0 bytes", "cut off"),
    "longer": (longer, "bytes, its header announces", "damaged"),
    "no header": (write("model.safetensors", b"\x04" + bytes(7) + b"abcd"), "cannot be read", "damaged"),
    "LFS": (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid"), "pointer", "lfs pull"),
    "layers": (lambda path: write_config(path, num_hidden_layers=3), "3 layers, layer 2 has no weights", "different"),
    "more layers": (lambda path: write_config(path, num_hidden_layers=1), "1 layers, the weights have 2", "different"),
    "shape": (lambda path: write_config(path, hidden_size=9), r"is \[12, 8\], config.json says \[12, 9\]", "different"),
    "no embedding": (lambda path: write_weights(path, list(TENSORS)[1:]), "no embed_tokens.weight", "different"),
}


@pytest.mark.parametrize(("damage", "message", "hint"), SINGLE_DAMAGE.values(), ids=list(SINGLE_DAMAGE))
def test_damage(single: Path, damage: Callable[[Path], None], message: str, hint: str) -> None:
    damage(single)
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(single)
    assert caught.value.hint is not None
    assert hint in caught.value.hint
    assert "\n" not in caught.value.message + caught.value.hint


@pytest.mark.parametrize(
    ("shape", "message"),
    [(None, "score_proj.weight is missing"), ((2, 9), r"is \[2, 9\], config.json says \[2, 8\]"), ((2, 8), None)],
)
def test_learned_scores(single: Path, shape: tuple[int, ...] | None, message: str | None) -> None:
    liger = {"slots": [["recent_use", 2], ["learned", 3]], "keep_softmax": [0]}
    write_config(single, tie_word_embeddings=False, num_key_value_heads=2, liger=liger)
    name = "model.layers.1.self_attn.score_proj"
    tensors = {key: torch.zeros(size) for key, size in TENSORS.items()}
    if shape is not None:
        tensors |= {f"{name}.weight": torch.zeros(shape), f"{name}.bias": torch.zeros(2)}
    save_file(tensors, single / "model.safetensors")
    if message is None:
        assert check_checkpoint(single).tensors[f"{name}.bias"].shape == (2,)
        return
    with pytest.raises(CheckpointError, match=message) as caught:
        check_checkpoint(single)
    assert caught.value.hint is not None and "--calibrate" in caught.value.hint


def move_tensor(path: Path) -> None:
    write_weights(path, list(TENSORS)[3:4], "model-00002-of-00002.safetensors")


SHARDED_DAMAGE = {
    "missing shard": (
        lambda path: (path / "model-00002-of-00002.safetensors").unlink(),
        r"model-00002-of-00002.safetensors is missing .*1 of 2 files",
    ),
    "cut shard": (cut("model-00001-of-00002.safetensors", 300), "bytes, its header announces"),
    "other content": (
        move_tensor,
        r"places model.layers.\d.* in model-00002-of-00002.safetensors, which does not hold it",
    ),
    "index not JSON": (write(INDEX, b"["), "is not JSON"),
    "index empty": (write(INDEX, b"{}"), "has no weight_map"),
    "index leaves": (write(INDEX, b'{"weight_map": {"a": "../a.safetensors"}}'), "outside its directory"),
}


@pytest.mark.parametrize(("damage", "message"), SHARDED_DAMAGE.values(), ids=list(SHARDED_DAMAGE))
def test_sharded_damage(sharded: Path, damage: Callable[[Path], None], message: str) -> None:
    damage(sharded)
    with pytest.raises(CheckpointError, match=message):
        check_checkpoint(sharded)


def test_the_directory_itself(single: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(CheckpointError, match="no directory"):
        check_checkpoint(single / "absent")
    above = tmp_path_factory.mktemp("above")
    single.rename(above / "inner")
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(above)
    assert caught.value.hint == f"did you mean {above / 'inner'}?"
    for name in ("manifest.json", "config.json"):
        (above / name).write_text("{}")
        with pytest.raises(CheckpointError, match="is a built artifact") as caught:
            check_checkpoint(above)
        assert caught.value.hint.endswith(f"ligerexport run {above}")
