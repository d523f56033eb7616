"""Controls: the same weights with another memory, to measure the value of each part of a conversion.

Each answers one question: is the memory better than a longer window of the same size, does the recurrence help, do the
scores choose better than chance.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ligerexport.checkpoint.convert import convert_in_memory
from ligerexport.errors import UsageError, look_up
from ligerexport.layers.mixer import LigerMixer, layer_specs
from ligerexport.measure.evaluate.settings import CONTROLS
from ligerexport.model.config import LigerConfig

SINKS = 4
_OF_MODEL = ("keep_softmax", "keep_window", "max_distance", "state_dtype")
"""Settings of a conversion that `equal-window` shares."""


def control_config(name: str, config: LigerConfig) -> LigerConfig:
    """Return the conversion with which a control is compared to `config`.

    Args:
        name: Row of `CONTROLS`, except `equal-window`, which depends on the model's sizes: see `equal_window`.
        config: The conversion under test.

    Raises:
        UsageError: There is no such control, or the conversion lacks the part that the control changes.
    """
    look_up("control", name, CONTROLS)
    if name == "no-recurrence":
        if not config.recurrent:
            raise UsageError("this conversion has no recurrence to leave out", hint="leave no-recurrence out")
        return replace(config, recurrence_weight=0.0)
    if name == "window" and config.heads:
        raise UsageError("KV heads have sizes of their own, so no window has as many slots", hint="take equal-window")
    return config.in_all_layers({"window": _window, "random-judge": _random}[name])


def _window(config: LigerConfig) -> LigerConfig:
    if config.num_slots <= SINKS:
        raise UsageError(f"{config.num_slots} slots are too few for {SINKS} sinks and a window")
    window = config.num_slots - SINKS
    return replace(config, window=window, sinks=SINKS, slots=(), attention_weight=1.0, recurrence_weight=0.0)


def _random(config: LigerConfig) -> LigerConfig:
    if not config.slots:
        raise UsageError("this conversion has no scored slots to choose at random", hint="leave random-judge out")
    return replace(config, slots=(("learned", sum(count for _, count in config.slots)),))


def equal_window(config: PreTrainedConfig, width: int) -> LigerConfig:
    """Return the longest window, the same in every layer and head, whose state is no larger than a conversion's.

    Layers that the conversion does not change stay as they are.

    Args:
        config: Configuration of the converted model.
        width: Bytes of a number in the model's activations.

    Raises:
        UsageError: The state is too small for `SINKS` sinks and a window.
    """
    liger = LigerConfig.from_dict(config.liger)
    shared = {name: value for name, value in vars(liger).items() if name in _OF_MODEL}
    least = LigerConfig(window=1, sinks=SINKS, attention_weight=1.0, recurrence_weight=0.0, **shared)
    specs = [spec for layer, spec in enumerate(layer_specs(config)) if spec and layer not in liger.unchanged]

    def nbytes(window: int | None = None) -> int:
        sizes = specs
        if window is not None:
            sizes = [replace(spec, config=replace(least.for_layer(0), window=window)) for spec in specs]
        return sum(tensor.nbytes(width) for spec in sizes for tensor in spec.state())

    smallest = nbytes(1)
    window = 1 + (nbytes() - smallest) // (nbytes(2) - smallest) if specs else 0
    if window < 1:
        raise UsageError("this state is too small for sinks and a window", hint="leave equal-window out")
    return replace(least, window=min(window, least.max_distance or window))


def make_control(name: str, model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a control of a converted model; it shares the model's weights."""
    if name == "equal-window":
        return convert_in_memory(model, equal_window(model.config, model.dtype.itemsize))
    config = control_config(name, LigerConfig.from_dict(model.config.liger))
    if name != "random-judge":
        return convert_in_memory(model, config)
    bare = replace(config, slots=(), layer_memory=(), heads=())  # scored slots would need weights
    control = convert_in_memory(model, bare)
    for i, layer in enumerate(control.model.layers):
        if i not in config.unchanged:
            layer.self_attn = RandomJudge(layer.self_attn, config.for_layer(i), seed)
    control.config.liger = config.to_dict()
    return control


class RandomJudge(LigerMixer):
    """A mixer whose learned score is a random number for each token, layer and head, for measurements only.

    The number depends only on the token's position, so that a prompt can be cut anywhere.
    """

    def __init__(self, mixer: LigerMixer, config: LigerConfig, seed: int):
        super().__init__(mixer, replace(mixer.spec, config=config), mixer.inv_freq)
        self._modules.pop("score_proj", None)  # a layer whose heads have no scored slots has none
        self.seed = seed

    def learned_score(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """Return the numbers for positions `[B or 1, T]` as `[B, T, H_kv]`."""
        position = position_ids.expand(hidden_states.shape[:2])
        return random_scores(position, self.spec.kv_heads, self.seed * 1_000_003 + self.layer_idx)


def random_scores(position: Tensor, heads: int, seed: int) -> Tensor:
    """Return numbers in (0, 1] for positions `[B, T]` as `[B, T, heads]` fp32, the same on every device."""
    x = position[..., None] * heads + torch.arange(heads, device=position.device)
    x = (x + seed * 0x9E37_79B9 % (1 << 32)) & 0xFFFF_FFFF
    for factor in (0x7FEB_352D, 0x846C_A68B):  # the mixing steps of lowbias32; products stay below 2^63
        x = (x ^ (x >> 16)) & 0xFFFF_FFFF
        x = ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & 0xFFFF_FFFF
    x = (x ^ (x >> 16)) >> 8
    return (x.float() + 1) / (1 << 24)
