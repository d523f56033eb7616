"""Faults in code that reads a checkpoint: for the torch model, for the graph, or for both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from ligerexport.checkpoint import checkpoint, fidelity
from ligerexport.exporters.onnx import weights
from ligerexport.exporters.verify import torch_model as reference
from ligerexport.layers import mixer
from ligerexport.model.families import FAMILIES, Attention, Family, Scaling
from planting.lowered import call
from planting.table import AT, fault
from planting.written import AT_CONVERT, change_tensors, of_layer

Context = AbstractContextManager[Any]
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
SLIDING: dict[str, Any] = AT_CONVERT | {"presets": ("memory",), "family": "gemma3_text"}


def attention(change: Callable[[Attention], Attention], layer: int | None = AT) -> Context:
    """Change the softmax of a layer, or of all layers, as it is read."""
    read = Family.attention

    def other(self: Family, config: Any) -> tuple[Attention, ...]:
        return tuple(change(x) if layer in (None, i) else x for i, x in enumerate(read(self, config)))

    return patch.object(Family, "attention", other)


@fault("reading", **AT_CONVERT)
def rope_base_of_a_layer_is_misread(source: Path) -> Context:
    return attention(lambda x: x._replace(inv_freq=tuple(f**0.99 for f in x.inv_freq)))


@fault("reading", 0, sizes=(("rope_parameters", YARN),), **AT_CONVERT)
def factor_of_yarn_is_not_read(source: Path) -> Context:
    return attention(lambda x: x._replace(scale=16**-0.5), None)


@fault("reading", **AT_CONVERT)
def softmax_scale_is_misread(source: Path) -> Context:
    return attention(lambda x: x._replace(scale=x.scale * 1.1))


@fault("reading", family="smollm3", **AT_CONVERT)
def rotary_embedding_where_there_is_none(source: Path) -> Context:
    return attention(lambda x: x._replace(inv_freq=tuple(10000.0 ** (-i / 8) for i in range(8))))


@fault("reading", 0, **SLIDING)
def a_sliding_window_one_too_short(source: Path) -> Context:
    return attention(lambda x: x if x.window is None else x._replace(window=x.window - 1), None)


@fault("reading", **SLIDING)
def rotary_embedding_of_the_other_kind_of_layer(source: Path) -> Context:
    local = tuple(100.0 ** (-i / 8) for i in range(8))
    return attention(lambda x: x._replace(inv_freq=local))


def mixed(number: int | None, change: Callable[..., tuple[Any, Any, Any]]) -> Context:
    """Give a mixer changed queries, keys and values."""

    def other(function: Any, query: Any, key: Any, value: Any, *rest: Any) -> Any:
        return function(*change(query, key, value), *rest)

    return call(mixer, "liger_mixer", number, other)


@fault("reading", **AT_CONVERT)
def queries_of_two_heads_exchanged(source: Path) -> Context:
    return mixed(AT, lambda query, key, value: (query.flip(2), key, value))


@fault("reading", **AT_CONVERT)
def keys_and_values_exchanged(source: Path) -> Context:
    return mixed(AT, lambda query, key, value: (query, value, key))


@fault("reading", 0, family="qwen3", **AT_CONVERT)
def norm_of_queries_and_keys_is_skipped(source: Path) -> Context:
    return call(mixer, "_normed", None, lambda function, norm, x: x)


@contextmanager
def slabs(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Iterator[None]:
    """Change a weight as it is read, both for the torch model of `verify` and for the artifact."""
    read = weights.weight_slabs

    def other(spec: Any, wanted: str) -> Iterator[np.ndarray]:
        return map(change, read(spec, wanted)) if wanted == name else read(spec, wanted)

    with patch.object(weights, "weight_slabs", other), patch.object(reference, "weight_slabs", other):
        yield


@fault("reading", **AT_CONVERT)
def a_norm_is_read_as_ones(source: Path) -> Context:
    return slabs(of_layer("input_layernorm"), np.ones_like)


@fault("reading", family="qwen2", **AT_CONVERT)
def a_bias_is_not_read(source: Path) -> Context:
    return slabs(f"model.layers.{AT}.self_attn.q_proj.bias", np.zeros_like)


@fault("reading", **AT_CONVERT)
def a_square_matrix_is_read_transposed(source: Path) -> Context:
    return slabs(of_layer("self_attn.o_proj"), lambda x: np.ascontiguousarray(x.T))


@fault("reading", **AT_CONVERT)
def heads_are_read_in_another_order(source: Path) -> Context:
    return slabs(of_layer("self_attn.k_proj"), lambda x: x[::-1].copy())


@fault("reading", None, **AT_CONVERT)
def tied_though_a_head_is_stored(source: Path) -> Context:
    return patch.object(checkpoint, "_is_tied", lambda *anything: True)


@fault("reading", None, **AT_CONVERT)
def a_stored_head_is_drawn_at_random(source: Path) -> Context:
    def other(function: Any, *args: Any) -> Any:
        model = function(*args)
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
        return model

    return call(fidelity, "load_model", None, other)


@fault("reading", None, family="granite", **AT_CONVERT)
def factor_of_the_logits_is_not_read(source: Path) -> Context:
    return scaling("granite", logits=1.0)


@fault("reading", None, **SLIDING)
def cap_of_the_logits_is_not_read(source: Path) -> Context:
    return scaling("gemma3_text", logit_cap=None)


def scaling(family: str, **values: Any) -> Context:
    """Change a family's factors as they are read."""
    row = FAMILIES[family]

    def other(config: Any) -> Scaling:
        return replace(row.scaling(config), **values)

    return patch.dict(FAMILIES, {family: replace(row, scaling=other)})


@contextmanager
def converted_instead(change: Callable[[Path], None]) -> Iterator[None]:
    """Let `convert` change the weights that it wrote."""
    module = sys.modules["ligerexport.checkpoint.convert"]
    write = module.write_weights  # type: ignore[attr-defined]

    def other(place: Path, *rest: Any) -> None:
        write(place, *rest)
        change(place)

    with patch.object(module, "write_weights", other):
        yield


@fault("reading", **AT_CONVERT)
def an_adapter_beside_the_weights_is_dropped(source: Path) -> Context:
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    base = load_file(source / "model.safetensors")
    settings = LoraConfig(r=2, target_modules=["v_proj"], layers_to_transform=[AT], init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(source), settings).save_pretrained(source)  # type: ignore[arg-type]
    return converted_instead(lambda place: change_tensors(place, lambda found: found.update(base)))


@contextmanager
def _shards_first() -> Iterator[None]:
    def other(function: Any, path: Path) -> list[Path]:
        return sorted(Path(path).glob("model-*.safetensors")) or function(path)

    with call(checkpoint, "checkpoint_files", None, other):
        yield


@fault("reading", **AT_CONVERT)
def shards_of_an_older_model_are_taken(source: Path) -> Context:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    with torch.no_grad():
        model.model.layers[AT].mlp.up_proj.weight.mul_(0.9)
    newer = (source / "model.safetensors").read_bytes()
    model.save_pretrained(source, max_shard_size="40KB")
    (source / "model.safetensors").write_bytes(newer)
    return _shards_first()
