"""The state of a mixer: names, shapes, types and initial values, from one place for torch, ONNX and engines.

`MixerSpec` is all that the op needs to know about a layer; nothing in it names a family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, TypeVar

from ligerexport.model.config import LigerConfig

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

MixerState = dict[str, "torch.Tensor"]
"""A layer's state by the names of `MixerSpec.state`, each tensor with its leading batch axis."""

FADE = 1 << 20
"""Tokens of a text after which sums without a decay are halved, again and again: they are of 2 * FADE tokens at most.
In fp32 a count ends at 2^24, and what is added to a sum of so many tokens is lost."""


def fade(state: dict[str, Array], times: int) -> dict[str, Array]:
    """Return a state with its sums without a decay halved so many times, which in fp32 is exact.

    All that is read from them is one divided by another, so it stays; only the number of evicted tokens is less.

    Args:
        state: By the names of `MixerSpec.state`, or those with the same beginnings.
        times: How many.
    """
    sums = {name.replace("recurrent_mass", "recurrent_state") for name in state if name.endswith("recurrent_mass")}
    sums |= {name for name in state if name.endswith(("recurrent_mass", "judge_state"))}
    return {name: tensor * 0.5**times if name in sums else tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer's state, without its leading batch axis.

    Attributes:
        name: Name in `past.LAYER.NAME` and `present.LAYER.NAME`.
        shape: Sizes after `B`.
        dtype: `float32`, `int64`, or `activation` for the dtype of the model's activations.
        fill: Initial value of every element.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0

    def nbytes(self, activation_bytes: int = 4) -> int:
        """Return the bytes of one sequence."""
        count = 1
        for size in self.shape:
            count *= size
        return count * {"float32": 4, "int64": 8, "activation": activation_bytes}[self.dtype]


@dataclass(frozen=True)
class MixerSpec:
    """One layer as the op sees it.

    Attributes:
        config: The conversion.
        q_heads: H_q, a multiple of H_kv.
        kv_heads: H_kv.
        d_k: Width of query and key heads.
        d_v: Width of value heads.
        scale: Softmax scale of the slots, usually d_k ** -0.5; YaRN's factor on cosine and sine is squared into it.
        max_distance: Largest rotary distance in tokens.
        text: The layer as JSON, for operators whose arguments are tensors and plain values.
    """

    config: LigerConfig
    q_heads: int
    kv_heads: int
    d_k: int
    d_v: int
    scale: float
    max_distance: int
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # written once: a compiler that traces the model reads a constant
        object.__setattr__(self, "text", json.dumps({**vars(self), "config": self.config.to_dict()}))

    @classmethod
    @lru_cache(maxsize=256)
    def from_text(cls, text: str) -> MixerSpec:
        """Read `text`."""
        fields = json.loads(text)
        return cls(**fields | {"config": LigerConfig.from_dict(fields["config"])})

    def state(self) -> tuple[TensorSpec, ...]:
        """Return the tensors that carry this layer from one call to the next, in order.

        `recurrent_state` `[B, H_kv, d_k, d_v]` is the recurrence, `recurrent_key` `[B, H_kv, d_k, d_k]` the keys of its
        rows where the gate is keyed, `recurrent_mass` `[B, H_kv, d_k]` the sum of the features of evicted tokens, the
        first of which counts them; `judge_state` `[B, H_kv, d_k, d_v + 1]` the linear state without decay that judges
        novelty, its last column the sum of the keys' features; the slots hold keys before rotary embedding, values,
        positions (-1 is an empty slot) and one score a pool, ordered by position.
        """
        c, heads = self.config, self.kv_heads
        tensors = [
            TensorSpec("slot_key", (heads, c.num_slots, self.d_k), "activation"),
            TensorSpec("slot_value", (heads, c.num_slots, self.d_v), "activation"),
            TensorSpec("slot_position", (heads, c.num_slots), "int64", -1),
        ]
        if c.slots:
            tensors.append(TensorSpec("slot_score", (heads, len(c.slots), c.num_slots), "float32"))
        if c.recurrent:
            tensors.append(TensorSpec("recurrent_state", (heads, self.d_k, self.d_v), "float32"))
        if c.keyed:
            tensors.append(TensorSpec("recurrent_key", (heads, self.d_k, self.d_k), "float32"))
        if c.evicts:
            tensors.append(TensorSpec("recurrent_mass", (heads, self.d_k), "float32"))
        if c.judged:
            tensors.append(TensorSpec("judge_state", (heads, self.d_k, self.d_v + 1), "float32"))
        return tuple(tensors)

    def initial_state(self, batch: int, dtype: torch.dtype, device: torch.device | str | None = None) -> MixerState:
        """Return the state of `batch` sequences that have seen nothing."""
        import torch

        types = {"activation": dtype, "float32": torch.promote_types(dtype, torch.float32), "int64": torch.int64}
        return {
            t.name: torch.full((batch, *t.shape), t.fill, dtype=types[t.dtype], device=device) for t in self.state()
        }
