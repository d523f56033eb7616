"""Faults in checkpoints that are damaged, and in conversions that do not match their source."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from planting.table import AT, fault

ROPE: dict[str, Any] = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip

AT_CONVERT: dict[str, Any] = {"presets": ("memory", "liger"), "lowerings": ("ort",)}
HEAD = "lm_head.weight"


def of_layer(name: str, layer: int = AT) -> str:
    """Return the name of a weight of a layer."""
    return f"model.layers.{layer}.{name}.weight"


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply a function to the tensors of a checkpoint in one file, which is rewritten."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    file.unlink()  # it may be a link to the source's file
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, {"format": "pt"})


def change_config(directory: Path, **values: Any) -> None:
    """Set values in config.json."""
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def tensors(how: str, layer: int | None = AT, **where: Any) -> Callable[..., Any]:
    """Register a function that changes tensors as a fault."""

    def enter(change: Callable[[dict[str, Tensor]], Any]) -> Callable[..., Any]:
        def plant(directory: Path) -> None:
            change_tensors(directory, change)

        plant.__name__ = change.__name__
        fault(how, layer, **AT_CONVERT | where)(plant)
        return change

    return enter


@tensors("source")
def a_projection_is_missing(weights: dict[str, Tensor]) -> None:
    del weights[of_layer("self_attn.k_proj")]


@tensors("source")
def a_norm_is_missing(weights: dict[str, Tensor]) -> None:
    del weights[of_layer("post_attention_layernorm")]


@tensors("source")
def a_projection_has_another_name(weights: dict[str, Tensor]) -> None:
    weights[of_layer("self_attn.value_proj")] = weights.pop(of_layer("self_attn.v_proj"))


@tensors("source")
def a_value_is_no_number(weights: dict[str, Tensor]) -> None:
    weights[of_layer("mlp.up_proj")][3, 5] = torch.nan


@fault("source", None, **AT_CONVERT)
def quantised_by_a_method_without_a_way_back(directory: Path) -> None:
    change_config(directory, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 16})


@tensors("written")
def a_projection_is_drawn_anew(weights: dict[str, Tensor]) -> None:
    weights[of_layer("self_attn.o_proj")].normal_(std=0.2)


@tensors("written")
def a_projection_of_another_layer(weights: dict[str, Tensor]) -> None:
    weights[of_layer("mlp.down_proj")] = weights[of_layer("mlp.down_proj", AT + 1)].clone()


@tensors("written")
def a_norm_is_left_out(weights: dict[str, Tensor]) -> None:
    weights[of_layer("post_attention_layernorm")].fill_(1)


@tensors("written", None)
def the_last_norm_is_left_out(weights: dict[str, Tensor]) -> None:
    weights["model.norm.weight"].fill_(1)


@tensors("written")
def keys_and_values_exchanged_in_the_file(weights: dict[str, Tensor]) -> None:
    key, value = of_layer("self_attn.k_proj"), of_layer("self_attn.v_proj")
    weights[key], weights[value] = weights[value], weights[key]


@tensors("written", family="qwen2")
def biases_are_dropped(weights: dict[str, Tensor]) -> None:
    for kind in "qkv":
        weights[f"model.layers.{AT}.self_attn.{kind}_proj.bias"].zero_()


@tensors("written")
def heads_in_another_order(weights: dict[str, Tensor]) -> None:
    query = weights[of_layer("self_attn.q_proj")]
    query[:] = query.unflatten(0, (4, -1)).flip(0).flatten(0, 1)


@tensors("written")
def scales_of_quantised_rows_are_dropped(weights: dict[str, Tensor]) -> None:
    matrix = weights[of_layer("mlp.gate_proj")]
    matrix /= matrix.abs().amax(dim=1, keepdim=True) / 127


@tensors("written")
def a_layer_from_an_older_file(weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if f"layers.{AT}." in name:
            tensor.add_(0.01 * torch.randn_like(tensor))


@tensors("written", None)
def the_head_is_the_embedding(weights: dict[str, Tensor]) -> None:
    del weights[HEAD]


@tensors("written", None)
def the_head_is_drawn_at_random(weights: dict[str, Tensor]) -> None:
    weights[HEAD].normal_(std=0.2)


@tensors("written", None)
def a_row_of_the_embedding_is_off(weights: dict[str, Tensor]) -> None:
    weights["model.embed_tokens.weight"].copy_(weights["model.embed_tokens.weight"].roll(1, 0))


@fault("written", 0, **AT_CONVERT)
def rope_base_in_the_configuration(directory: Path) -> None:
    change_config(directory, rope_parameters={"rope_type": "default", "rope_theta": 9000.0})


@fault("written", 0, sizes=(("rope_parameters", ROPE),), **AT_CONVERT)
def rope_scaling_is_dropped(directory: Path) -> None:
    change_config(directory, rope_parameters={"rope_type": "default", "rope_theta": ROPE["rope_theta"]})


@fault("written", 0, **AT_CONVERT)
def epsilon_in_the_configuration(directory: Path) -> None:
    change_config(directory, rms_norm_eps=1e-2)


@fault("written", 0, **AT_CONVERT)
def activation_in_the_configuration(directory: Path) -> None:
    change_config(directory, hidden_act="gelu_pytorch_tanh")


@fault("written", 0, family="granite", **AT_CONVERT)
def residual_multiplier_in_the_configuration(directory: Path) -> None:
    change_config(directory, residual_multiplier=1.0)


@fault("after", None, **AT_CONVERT)
def weights_changed_after_the_conversion(directory: Path) -> None:
    change_tensors(directory, lambda weights: weights[of_layer("self_attn.v_proj")].mul_(1.01))
