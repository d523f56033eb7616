"""The estimate of a recovery: exact parameters, and the guide's table from the same formula."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

pytest.importorskip("peft")

from ligerexport.checkpoint.checkpoint import CheckpointInfo, TensorInfo, check_checkpoint
from ligerexport.cli.recover import duration
from ligerexport.train.config import RecoverConfig
from ligerexport.train.data import Documents
from ligerexport.train.distributed import trainable
from ligerexport.train.estimate import estimate
from ligerexport.train.model import load_student
from ligerexport.train.recover import warn_of_repeats
from tests.checkpoints import MEMORY, make_checkpoint

GUIDE = Path(__file__).parents[1] / "benchmarks" / "results" / "recovery.md"
LLAMA_70B = {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip


def info_70b() -> CheckpointInfo:
    """Return the header of a 70B Llama, with the shapes of its config.json."""
    c = LLAMA_70B
    width, kv = c["hidden_size"], c["num_key_value_heads"] * 128
    shapes = {"model.embed_tokens.weight": (c["vocab_size"], width), "lm_head.weight": (c["vocab_size"], width)}
    for layer in range(c["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (width, width) for x in "qo"}
        shapes |= {f"{name}.self_attn.{x}_proj.weight": (kv, width) for x in "kv"}
        shapes |= {f"{name}.mlp.{x}_proj.weight": (c["intermediate_size"], width) for x in ("gate", "up")}
        shapes |= {f"{name}.mlp.down_proj.weight": (width, c["intermediate_size"])}
    file = Path("model.safetensors")
    tensors = {name: TensorInfo("BF16", shape, file) for name, shape in shapes.items()}
    return CheckpointInfo(Path(), c | {"model_type": "liger_llama"}, (file,), 0, ("BF16",), False, tensors)


def row_70b(processes: int, **settings: Any) -> str:
    """Return a row of the guide's table."""
    config = RecoverConfig(batch_tokens=1024 * processes, **settings)
    plan = estimate(info_70b(), config, processes, shard=True)
    checkpointed = "yes" if config.gradient_checkpointing else "no"
    parts = (plan.weight_bytes, plan.lora_bytes, plan.activation_bytes, plan.logit_bytes, plan.memory_bytes)
    numbers = " | ".join(f"{part / 1e9:.1f}" for part in parts)
    return f"| {config.recipe} | {processes} | {checkpointed} | {numbers} |"


@pytest.mark.parametrize("recipe", ["distill", "paper"])
@pytest.mark.parametrize("processes", [8, 16])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_the_guide_has_the_plan_for_70b(recipe: str, processes: int, checkpointing: bool) -> None:
    assert row_70b(processes, recipe=recipe, gradient_checkpointing=checkpointing) in GUIDE.read_text()


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_trainable_parameters_are_exact(tmp_path: Path, family: str) -> None:
    path = make_checkpoint(tmp_path / "liger", MEMORY, family, vocab_size=toy.VOCAB)
    info = check_checkpoint(path, tokenizer=False)
    for config in (RecoverConfig(), RecoverConfig(rank=3, targets=("q_proj", "down_proj"))):
        student, _ = load_student(info, config, torch.float32)
        plan = estimate(info, config)
        assert plan.trainable_parameters == sum(parameter.numel() for parameter in trainable(student).values())
        assert plan.steps == round(3_000_000 / 8192) and plan.tokens == plan.steps * 8192


def test_checkpointing_and_smaller_pieces_take_less(tmp_path: Path) -> None:
    info = info_70b()
    plain = estimate(info, RecoverConfig())
    assert estimate(info, RecoverConfig(gradient_checkpointing=True)).activation_bytes < plain.activation_bytes / 10
    assert estimate(info, RecoverConfig(micro_batch_tokens=1024)).activation_bytes == plain.activation_bytes // 8
    assert estimate(info, RecoverConfig(recipe="paper")).weight_bytes == plain.weight_bytes // 2


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.42, "0.42 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (3599, "59 min 59 s"), (86_400, "24 h 0 min"),
     (200_000, "2 days 7 h")],
)  # fmt: skip
def test_a_duration_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_few_data_read_many_times_are_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    ids = np.arange(500, dtype=np.int32)
    few = Documents(ids, np.ones(500, bool), np.array([0, 500]))
    warn_of_repeats(few, RecoverConfig(tokens=1_024_000, length=512, batch_tokens=1024))
    said = capsys.readouterr().err
    assert "reads the 500 tokens of the data 2,000 times" in said and said.endswith(
        "give more data, or --tokens 5120\n"
    )
    warn_of_repeats(few, RecoverConfig(steps=1, length=512))  # one step is too much already
    assert "16 times" in (said := capsys.readouterr().err) and said.endswith("give more data\n")
    for quiet in ({"steps": 1}, {"tokens": 5120}):
        warn_of_repeats(few, RecoverConfig(length=512, batch_tokens=1024, **quiet))
    assert not capsys.readouterr().err


def test_rows_that_short_documents_do_not_fill_are_not_counted_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    bounds = np.array([0, 300, 600])  # a row each
    few = Documents(np.arange(600, dtype=np.int32), np.ones(600, bool), bounds)
    warn_of_repeats(few, RecoverConfig(steps=10, length=512, batch_tokens=1024))
    assert not capsys.readouterr().err
