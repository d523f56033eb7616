"""Packed documents equal separate ones: mixers and Transformers of every family, forward and gradients."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening

from ligerexport.checkpoint.convert import load_model
from ligerexport.layers.mixer import CACHE
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES
from tests.checkpoints import FORESIGHT, MEMORY, SIZES, SOME_GATES, make_checkpoint
from tests.test_model import make_teacher
from tests.tolerances import MODEL_FP32

LENGTHS = (5, 1, 70, 23, 21)


def packed(lengths: tuple[int, ...]) -> dict[str, Any]:
    """Return documents as transformers' own collator packs them."""
    features = [{"input_ids": torch.randint(0, SIZES["vocab_size"], (n,)).tolist()} for n in lengths]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True)(features)
    batch.pop("labels")
    return dict(batch)


def gradients(model: Any, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_packed_equals_separate(model: Any) -> None:
    batch = packed(LENGTHS)
    bounds = batch["cu_seq_lens_q"].tolist()
    together = model(**batch, use_cache=False).logits[0]
    alone = [model(batch["input_ids"][:, a:b], use_cache=False).logits[0] for a, b in pairwise(bounds)]
    assert (together - torch.cat(alone)).abs().max() <= MODEL_FP32
    direction = torch.randn_like(together)
    found = gradients(model, (together * direction).sum())
    expected = gradients(model, (torch.cat(alone) * direction).sum())
    for name in expected:
        assert (found[name] - expected[name]).abs().max() <= MODEL_FP32 * expected[name].abs().max(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_mixers(tmp_path: Path, family: str) -> None:
    config = replace(MEMORY, recurrence_weight=0.5, keep_softmax=(1,))
    check_packed_equals_separate(load_model(make_checkpoint(tmp_path / "liger", config, family)).train())


@pytest.mark.parametrize(
    "config", [MEMORY, FORESIGHT, *(LigerConfig(window=9, gate=gate) for gate in SOME_GATES)], ids=str
)
def test_configurations(tmp_path: Path, config: LigerConfig) -> None:
    check_packed_equals_separate(load_model(make_checkpoint(tmp_path / "liger", config)).train())


@pytest.mark.parametrize("family", FAMILIES)
def test_teachers(tmp_path: Path, family: str) -> None:
    path = make_teacher(tmp_path / "teacher", family)
    check_packed_equals_separate(AutoModelForCausalLM.from_pretrained(path, attn_implementation="sdpa").train())


def test_rows_are_packed_like_one_long_row(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).train()
    batch = packed(LENGTHS)
    rows = {name: batch[name].unflatten(1, (2, -1))[0] for name in ("input_ids", "position_ids")}
    borders = {name: batch[name] for name in ("cu_seq_lens_q", "max_length_q")}
    borders["cu_seq_lens_q"] = torch.tensor([0, 5, 6, 60, 76, 99, 120], dtype=torch.int32)
    batch["cu_seq_lens_q"] = borders["cu_seq_lens_q"]
    positions = torch.cat([torch.arange(b - a) for a, b in pairwise(borders["cu_seq_lens_q"].tolist())])
    rows["position_ids"] = positions.view(2, 60)
    batch["position_ids"] = positions[None]
    with torch.no_grad():
        one, two = (model(**x, **borders, use_cache=False).logits for x in ({k: batch[k] for k in rows}, rows))
    assert (one - two.flatten(0, 1)[None]).abs().max() <= MODEL_FP32


def test_a_larger_longest_length_changes_nothing(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).train()
    batch = packed(LENGTHS)
    with torch.no_grad():
        first = model(**batch, use_cache=False).logits
        again = model(**batch | {"max_length_q": 128}, use_cache=False).logits
    assert (first - again).abs().max() <= MODEL_FP32


def test_packed_documents_keep_no_cache(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    assert model(**packed((4, 5))).get(CACHE) is None
    with pytest.raises(ValueError, match="use_cache=False"):
        model(**packed((4, 5)), use_cache=True)
