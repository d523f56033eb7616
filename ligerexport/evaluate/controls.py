"""Controls: the same weights under another memory, to tell what each part of a conversion is worth.

Each answers one question: is the memory better than the same number of slots spent on a longer window, does the
recurrence add anything, do the scores choose better than chance.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ligerexport.config import LigerConfig
from ligerexport.convert import convert_in_memory
from ligerexport.errors import UsageError, look_up
from ligerexport.evaluate.settings import CONTROLS
from ligerexport.kernels.library.linear_attention import linear_attention
from ligerexport.kernels.library.memory_attention import memory_attention
from ligerexport.mixer import LigerMixer, _shared_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SINKS = 4


def control_config(name: str, config: LigerConfig) -> LigerConfig:
    """Return the conversion that a control compares `config` with.

    Args:
        name: Row of `CONTROLS`.
        config: The conversion under test.

    Raises:
        UsageError: No such control, or the conversion has nothing that it could be compared in.
    """
    look_up("control", name, CONTROLS)
    if name == "no-recurrence":
        if not config.recurrent:
            raise UsageError("this conversion has no recurrence to leave out", hint="leave no-recurrence out")
        return replace(config, recurrence_weight=0.0)
    if name == "window":
        if config.num_slots <= SINKS:
            raise UsageError(f"{config.num_slots} slots are too few for {SINKS} sinks and a window")
        return replace(
            config, window=config.num_slots - SINKS, sinks=SINKS, slots=(), attention_weight=1.0, recurrence_weight=0.0
        )
    if not config.slots:
        raise UsageError("this conversion has no scored slots to choose at random", hint="leave random-judge out")
    return replace(config, slots=(("novelty", sum(count for _, count in config.slots)),))


def make_control(name: str, model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Return a control of a converted model; it shares the model's weights.

    Raises:
        UsageError: See `control_config`.
    """
    control = convert_in_memory(model, control_config(name, LigerConfig.from_dict(model.config.liger)))
    if name == "random-judge":
        for layer in control.model.layers:
            if isinstance(layer.self_attn, LigerMixer):
                layer.self_attn = RandomJudge(layer.self_attn, seed)
    return control


class RandomJudge(LigerMixer):
    """A mixer whose one pool is kept by a number drawn for each token, layer and head instead of novelty.

    The number depends on the token's position alone, so that a prompt can be cut anywhere. Without padding, for
    measuring only.
    """

    def __init__(self, mixer: LigerMixer, seed: int):
        super().__init__(mixer, mixer.spec, mixer.inv_freq)
        self.seed = seed

    def forward(
        self, hidden_states: Tensor, position_ids: Tensor, past_key_values: Any = None, *unused: Any, **ignored: Any
    ) -> tuple[Tensor, None]:
        """Mix as `LigerMixer.forward`."""
        batch, length, _ = hidden_states.shape
        spec, device = self.spec, hidden_states.device
        query = self.q_proj(hidden_states).unflatten(-1, (spec.q_heads, spec.d_k))
        key = self.k_proj(hidden_states).unflatten(-1, (spec.kv_heads, spec.d_k))
        value = self.v_proj(hidden_states).unflatten(-1, (spec.kv_heads, spec.d_v))
        if hasattr(self, "q_norm"):
            query, key = self.q_norm(query), self.k_norm(key)
        layer = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        state = None if layer is None else layer.state
        if state is None:
            state = spec.initial_state(batch, hidden_states.dtype, device)
        position = position_ids[:, 0].expand(batch)
        rotary = _shared_table(self.inv_freq, spec.max_distance, device)
        places = position[:, None] + torch.arange(length, device=device)
        score = random_scores(places, spec.kv_heads, self.seed * 1_000_003 + self.layer_idx)
        mixed, present = memory_attention(query, key, value, score, position, state, spec, rotary)
        mixed = spec.config.attention_weight * mixed
        if spec.config.recurrent:
            recurred, present["recurrent_state"] = linear_attention(
                query, key, value, gate=spec.config.gate, initial_state=state["recurrent_state"]
            )
            mixed = mixed + spec.config.recurrence_weight * recurred
        if layer is not None:
            layer.advance(state | present, length)
        return self.o_proj(mixed.flatten(2)), None


def random_scores(position: Tensor, heads: int, seed: int) -> Tensor:
    """Return numbers in (0, 1] for positions `[B, T]` as `[B, T, heads]` fp32, the same on every device."""
    x = position[..., None] * heads + torch.arange(heads, device=position.device)
    x = (x + seed * 0x9E37_79B9 % (1 << 32)) & 0xFFFF_FFFF
    for factor in (0x7FEB_352D, 0x846C_A68B):  # the mixing steps of lowbias32; products stay below 2^63
        x = (x ^ (x >> 16)) & 0xFFFF_FFFF
        x = ((x & 0xFFFF) * factor + ((((x >> 16) * factor) & 0xFFFF) << 16)) & 0xFFFF_FFFF
    x = (x ^ (x >> 16)) >> 8
    return (x.float() + 1) / (1 << 24)
