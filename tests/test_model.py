"""Level 2: converted models of every family, with tiny random weights, against transformers and against themselves."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

from ligerexport.checkpoint.convert import convert, convert_in_memory, load_model
from ligerexport.errors import LigerError, UsageError
from ligerexport.layers import mixer
from ligerexport.layers.mixer import CACHE, LigerCache, LigerMixer, layer_specs, shared_table
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import FAMILIES, get_family, output_head
from tests.checkpoints import FORESIGHT, MEMORY, OF_FAMILY, SIZES, SOME_GATES, make_checkpoint
from tests.tolerances import MODEL_FP32

EVERYTHING = LigerConfig(window=200, attention_weight=1.0, recurrence_weight=0.0, max_distance=200)
ROPES: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    "llama3": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16},
}  # fmt: skip


def make_teacher(
    path: Path, family: str = "llama", shard: str = "1GB", dtype: torch.dtype = torch.float32, **sizes: Any
) -> Path:
    """Write a random checkpoint as transformers' own `save_pretrained` does, with a tokenizer file."""
    row = get_family(family)
    model = row.attribute("ForCausalLM")(row.attribute("Config")(**SIZES | OF_FAMILY.get(family, {}) | sizes)).to(dtype)
    model.save_pretrained(path, max_shard_size=shard)
    (path / "tokenizer.json").write_text("{}")
    return path


def converted(teacher: Path, config: LigerConfig, **kwargs: Any) -> PreTrainedModel:
    """Convert through the public function and load."""
    changes = config.to_dict() | {"slots": config.slots}
    return load_model(convert(teacher, teacher.with_name("liger"), **changes), **kwargs).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_everything_is_the_teacher(tmp_path: Path, family: str) -> None:
    path = make_teacher(tmp_path / "teacher", family)
    teacher, model = AutoModelForCausalLM.from_pretrained(path).eval(), converted(path, EVERYTHING)
    assert sum(isinstance(module, LigerMixer) for module in model.modules()) == SIZES["num_hidden_layers"]
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in teacher.named_parameters()}
    ids = torch.randint(0, SIZES["vocab_size"], (2, 150))
    with torch.no_grad():
        logits = model(ids).logits
        assert (logits - teacher(ids).logits).abs().max() <= MODEL_FP32
        hidden = model.model(ids, use_cache=False).last_hidden_state
        assert (output_head(model)(hidden) - logits).abs().max() <= MODEL_FP32
        assert torch.equal(convert_in_memory(teacher, EVERYTHING)(ids).logits, logits)


@pytest.mark.parametrize("kind", ROPES)
def test_scaled_rotary_embeddings(tmp_path: Path, kind: str) -> None:
    path = make_teacher(tmp_path / "teacher", rope_parameters=ROPES[kind])
    teacher, model = AutoModelForCausalLM.from_pretrained(path).eval(), converted(path, EVERYTHING)
    ids = torch.randint(0, SIZES["vocab_size"], (1, 60))
    with torch.no_grad():
        assert (model(ids).logits - teacher(ids).logits).abs().max() <= MODEL_FP32


@pytest.mark.parametrize("tied", [True, False])
def test_shards_of_bf16_with_either_head(tmp_path: Path, tied: bool) -> None:
    path = make_teacher(tmp_path / "teacher", shard="40KB", dtype=torch.bfloat16, tie_word_embeddings=tied)
    assert len(list(path.glob("*.safetensors"))) > 1
    teacher = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    model = converted(path, EVERYTHING)
    ids = torch.randint(0, SIZES["vocab_size"], (1, 40))
    with torch.no_grad():
        assert (model(ids).logits - teacher(ids).logits).abs().max() <= MODEL_FP32


@pytest.mark.parametrize("config", [MEMORY, *(LigerConfig(window=9, gate=gate) for gate in SOME_GATES)], ids=str)
def test_prefill_equals_steps_equals_any_cut(tmp_path: Path, config: LigerConfig) -> None:
    model = converted(make_teacher(tmp_path / "teacher"), config)
    ids = torch.randint(0, SIZES["vocab_size"], (2, 100))
    with torch.no_grad():
        expected = model(ids).logits
        for cuts in ([*range(101)], [0, 1, 66, 67, 100]):
            cache = LigerCache(model.config)
            pieces = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairwise(cuts)]
            assert (torch.cat(pieces, dim=1) - expected).abs().max() <= MODEL_FP32
            assert cache.get_seq_length() == 100


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_of_the_hidden_state(tmp_path: Path, family: str) -> None:
    """Any cut and left padding give the same logits, and the scores decide what is kept."""
    model = load_model(make_checkpoint(tmp_path / "liger", FORESIGHT, family)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (2, 100))
    with torch.no_grad():
        expected = model(ids).logits
        for cuts in ([*range(101)], [0, 1, 66, 67, 100]):
            cache = LigerCache(model.config)
            pieces = [model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in pairwise(cuts)]
            assert (torch.cat(pieces, dim=1) - expected).abs().max() <= MODEL_FP32
        mask = torch.ones_like(ids)
        mask[1, :30] = 0
        padded = model(ids, attention_mask=mask).logits
        assert (padded[0] - expected[0]).abs().max() <= MODEL_FP32
        assert (padded[1:, 30:] - model(ids[1:, 30:]).logits).abs().max() <= MODEL_FP32
        model.model.layers[1].self_attn.score_proj.weight.neg_()
        assert (model(ids).logits - expected).abs().max() > 0.01


def test_scores_stay_in_fp32(tmp_path: Path) -> None:
    """In a bf16 model and under autocast they equal the scores of the file's fp32 weights."""
    path = make_checkpoint(tmp_path / "liger", FORESIGHT, dtype=torch.bfloat16)
    model = load_model(path, torch.bfloat16)
    mixer, weights = model.model.layers[1].self_attn, load_model(path).model.layers[1].self_attn.score_proj
    assert mixer.score_proj.weight.dtype == torch.float32
    hidden = torch.randn(2, 7, SIZES["hidden_size"]).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        score = mixer.learned_score(hidden, torch.arange(7)[None])
    assert score.dtype == torch.float32 and not score.requires_grad
    assert torch.equal(score, weights(hidden.float()))
    model.save_pretrained(tmp_path / "again")
    again = load_model(tmp_path / "again").model.layers[1].self_attn.score_proj
    assert torch.equal(again.weight, weights.weight) and torch.equal(again.bias, weights.bias)


def test_state_does_not_grow(tmp_path: Path) -> None:
    model = converted(make_teacher(tmp_path / "teacher"), MEMORY)
    cache, shapes = LigerCache(model.config), set()
    with torch.no_grad():
        for _ in range(4):
            model(torch.randint(0, SIZES["vocab_size"], (1, 40)), past_key_values=cache, use_cache=True)
            shapes.add(tuple(tuple(t.shape) for layer in cache.layers for t in layer.state.values()))
    assert len(shapes) == 1


def test_a_layer_with_a_memory_of_its_own(tmp_path: Path) -> None:
    """A large memory changes nothing in its layer, so only the other layers matter; cuts do not."""
    path = make_teacher(tmp_path / "sized" / "teacher")
    other = Path(shutil.copytree(path, tmp_path / "kept" / "teacher"))
    large = (48, tuple((name, 100) for name, _ in MEMORY.slots))
    sized = converted(path, replace(MEMORY, layer_memory=((0, *large), (2, *large))))
    assert [spec.config.window for spec in layer_specs(sized.config)] == [48, MEMORY.window, 48]
    ids = torch.randint(0, SIZES["vocab_size"], (1, 60))
    with torch.no_grad():
        cache = LigerCache(sized.config)
        pieces = [sized(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in [(0, 40), (40, 60)]]
        expected = converted(other, replace(MEMORY, keep_softmax=(0, 2)))(ids).logits
        assert (torch.cat(pieces, dim=1) - expected).abs().max() <= MODEL_FP32


@pytest.mark.parametrize("family", ["llama", "smollm3", "gemma3_text"])
def test_layers_kept_as_softmax(tmp_path: Path, family: str) -> None:
    path = make_teacher(tmp_path / "teacher", family)
    teacher = AutoModelForCausalLM.from_pretrained(path).eval()
    hybrid = converted(path, replace(MEMORY, keep_softmax=(0, 2)))
    assert [isinstance(layer.self_attn, LigerMixer) for layer in hybrid.model.layers] == [False, True, False]
    ids = torch.randint(0, SIZES["vocab_size"], (1, 90))
    with torch.no_grad():
        cache = LigerCache(hybrid.config)
        pieces = [hybrid(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in [(0, 50), (50, 90)]]
        assert (torch.cat(pieces, dim=1) - hybrid(ids).logits).abs().max() <= MODEL_FP32
        assert (hybrid(ids).logits - teacher(ids).logits).abs().max() > MODEL_FP32
        kept = convert(path, tmp_path / "kept", preset="memory", keep_softmax=(0, 1, 2))
        assert (load_model(kept)(ids).logits - teacher(ids).logits).abs().max() <= MODEL_FP32


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_with_padding_equals_each_alone(tmp_path: Path, family: str) -> None:
    model = converted(make_teacher(tmp_path / "teacher", family, eos_token_id=None), MEMORY)
    long, short = torch.randint(3, SIZES["vocab_size"], (1, 40)), torch.randint(3, SIZES["vocab_size"], (1, 23))
    settings = {"max_new_tokens": 30, "do_sample": False, "pad_token_id": 0}
    alone = [model.generate(ids, **settings)[0, ids.shape[1] :] for ids in (long, short)]
    padded = torch.cat([torch.zeros(1, 17, dtype=torch.long), short], dim=1)
    mask = torch.cat([torch.ones_like(long), (torch.arange(40) >= 17).long()[None]])
    lengths: list[int] = []
    model.model.embed_tokens.register_forward_hook(lambda module, args, output: lengths.append(output.shape[1]))
    together = model.generate(torch.cat([long, padded]), attention_mask=mask, **settings)[:, 40:]
    assert lengths == [40, *[1] * 29]
    for found, expected in zip(together, alone, strict=True):
        assert torch.equal(found, expected)


def test_beam_search_reorders_the_state(tmp_path: Path) -> None:
    model = converted(make_teacher(tmp_path / "teacher", eos_token_id=None), MEMORY)
    ids = torch.randint(3, SIZES["vocab_size"], (1, 40))
    settings = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids, **settings), model.generate(ids, use_cache=False, **settings))


def test_save_load_and_a_copied_cache(tmp_path: Path) -> None:
    model = converted(make_teacher(tmp_path / "teacher"), MEMORY)
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 60))
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
        cache = LigerCache(model.config)
        model(ids, past_key_values=cache, use_cache=True)
        copied = copy.deepcopy(cache)
        first = model(ids[:, :5], past_key_values=cache, use_cache=True).logits
        assert torch.equal(model(ids[:, :5], past_key_values=copied, use_cache=True).logits, first)
    with pytest.raises(NotImplementedError, match="deepcopy"):
        cache.crop(1)


def test_training_reaches_every_projection(tmp_path: Path) -> None:
    model = converted(make_teacher(tmp_path / "teacher"), replace(MEMORY, recurrence_weight=0.5)).train()
    ids = torch.randint(0, SIZES["vocab_size"], (2, 80))
    shared_table.cache_clear()
    with torch.inference_mode():
        model(ids)
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(
    ("name", "value"),
    [("state", 1), ("is_causal", False), ("cu_seq_lens_k", torch.tensor([0, 9])), ("seq_idx", torch.zeros(1, 9))],
)
def test_an_argument_that_would_be_dropped_is_named(tmp_path: Path, name: str, value: Any) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 9))
    with pytest.raises(TypeError, match=name):
        model(ids, **{name: value})
    model(ids, **{name: None})


@torch.no_grad()
def test_a_cache_is_known_by_both_names_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 40))
    whole = model(ids).logits[:, 30:]
    for name in ("cache", "past_key_values"):
        cache = model(ids[:, :30], use_cache=True)[CACHE]
        assert (model(ids[:, 30:], **{name: cache}).logits - whole).abs().max() <= MODEL_FP32
        answer = model.generate(
            ids, max_new_tokens=3, do_sample=False, eos_token_id=None, **{name: LigerCache(model.config)}
        )
        assert torch.equal(answer, model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None))
    with pytest.raises(ValueError, match="two names"):
        model(ids, cache=cache, past_key_values=cache)
    monkeypatch.setattr(mixer, "CACHE", "memory")
    with pytest.raises(TypeError, match="memory"):
        model(ids, use_cache=True)


@torch.no_grad()
def test_a_mask_says_what_is_padding_and_nothing_else(tmp_path: Path) -> None:
    """Padding after a text changes nothing before it, but a state that has read it is useless."""
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 40))
    mask = torch.ones(1, 40)
    mask[:, 30:] = 0
    after = model(ids, attention_mask=mask)
    assert (after.logits[:, :30] - model(ids[:, :30]).logits).abs().max() <= MODEL_FP32
    mask[:, 35:] = 1
    for seen in (torch.ones(1, 1, 40, 40), torch.ones(1, 39), mask):
        with pytest.raises(UsageError, match="attention mask"):
            model(ids, attention_mask=seen)
    with pytest.raises(UsageError, match="attention mask"):
        model(ids[:, -1:], attention_mask=mask[:, :36], **{CACHE: after[CACHE]})


@torch.no_grad()
def test_the_layers_alone_are_the_same_model(tmp_path: Path) -> None:
    """Without the output projection: a cache of the right kind, padding, and refusal of other caches."""
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    ids = torch.randint(0, SIZES["vocab_size"], (1, 40))
    whole = model(ids, output_hidden_states=True).hidden_states[-1]
    first = model.model(ids[:, :30], use_cache=True)
    then = model.model(ids[:, 30:], **{CACHE: first[CACHE]}).last_hidden_state
    assert (torch.cat([first.last_hidden_state, then], 1) - whole).abs().max() <= MODEL_FP32
    padded = torch.cat([ids[:, :7], ids], 1), torch.ones(1, 47).index_fill(1, torch.arange(7), 0)
    assert (model.model(*padded).last_hidden_state[:, 7:] - whole).abs().max() <= MODEL_FP32
    with pytest.raises(UsageError, match="DynamicCache cannot hold"):
        model.model(ids, **{CACHE: DynamicCache()})


@torch.no_grad()
def test_positions_that_jump_are_refused(tmp_path: Path) -> None:
    """Documents in one row would be read as one text; padding may have any position."""
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    ids, row = torch.randint(0, SIZES["vocab_size"], (2, 20)), torch.arange(20)
    for positions in (row % 10, row.flip(0), torch.zeros(2, 20, dtype=torch.long)):
        with pytest.raises(UsageError, match="not consecutive"):
            model(ids, position_ids=positions.expand(2, -1))
    mask = torch.ones(2, 20).index_fill(1, torch.arange(5), 0)
    assert torch.equal(model(ids, mask, (row - 5).clamp_min(0)[None]).logits, model(ids, mask).logits)


def test_a_cache_that_a_layer_never_sees_is_an_error(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY)).eval()
    model.model.layers[-1].register_forward_pre_hook(
        lambda layer, args, given: (args, given | {CACHE: None}), with_kwargs=True
    )
    ids = torch.randint(0, SIZES["vocab_size"], (1, 9))
    with pytest.raises(LigerError, match="only some layers"):
        model(ids, use_cache=True)
    assert model(ids, use_cache=False).logits.isfinite().all()
