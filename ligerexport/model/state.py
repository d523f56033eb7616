"""The state of a mixer: names, order, shapes, types and initial values of its tensors, for torch, ONNX and engines.

`TENSORS` is the only place that defines them; `tests/headers.py` writes the headers of the C++ operators from it.
`MixerSpec` is all that the op needs to know about a layer; it does not depend on a family.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from ligerexport.dtypes import DTYPES
from ligerexport.errors import UsageError
from ligerexport.model.config import LigerConfig
from ligerexport.model.gates import get_gate
from ligerexport.model.scores import Pool, pack

if TYPE_CHECKING:
    import numpy as np
    import torch

    Array = TypeVar("Array", np.ndarray, torch.Tensor)

MixerState = dict[str, "torch.Tensor"]
"""A layer's state by the names of `MixerSpec.state`, each tensor with its leading batch axis."""

FADE = 1 << 20
"""Number of tokens after which sums without a decay are halved repeatedly, so a sum never covers more than 2 * FADE
tokens. In fp32, counting ends at 2^24, and a number added to a sum of that many tokens is lost."""


class _Row(NamedTuple):
    """One tensor of the state.

    Attributes:
        name: Name in `past.LAYER.NAME` and `present.LAYER.NAME`.
        axes: Axes after `B, H_kv`.
        dtype: Type, as in `TensorSpec`, or `stored` for that of keys and values in the state.
        needs: Attribute of `LigerConfig` that is true if the tensor exists; empty if it always does.
    """

    name: str
    axes: tuple[str, ...]
    dtype: str
    needs: str = ""
    fill: float = 0.0


TENSORS = (
    _Row("slot_key", ("slots", "d_k"), "activation"),
    _Row("slot_value", ("slots", "d_v"), "activation"),
    _Row("slot_position", ("slots",), "int64", fill=-1),
    _Row("slot_score", ("pools", "slots"), "float32", "slots"),
    _Row("recurrent_state", ("rows", "columns"), "float32", "linear"),
    _Row("memory_state", ("memories", "d_k", "d_v"), "float32", "routed"),
    _Row("recurrent_key", ("rows", "d_k"), "float32", "keyed"),
    _Row("recurrent_mass", ("d_k",), "float32", "expands"),
    _Row("judge_state", ("d_k", "d_v + 1"), "float32", "judged"),
    _Row("cell_count", ("cells",), "float32", "celled"),
    _Row("cell_key", ("cells", "d_k"), "float32", "celled"),
    _Row("cell_value", ("cells", "d_v"), "float32", "celled"),
)
"""All tensors that a layer can carry from one call to the next, in the order in which they are passed.

`slot_*` hold keys before rotary embedding, values, positions (-1 is an empty slot) and one score per pool. Filled slots
are in the order of their positions, and empty ones may be anywhere between them. Only the fused step and the TensorRT
plugin accept and return them in any order, so states are sorted before they are compared. `recurrent_state` is the
recurrence. It has a row for each key channel, or fewer if the gate is keyed, and a last column with the sum of the
keys' features if the gate is normalised. `memory_state` is a recurrence for each memory, the shared one last.
`recurrent_key` holds the keys of the rows of a keyed gate, and `recurrent_mass` is the sum of the features of evicted
tokens, the first of which counts them. `judge_state` is the linear state without decay that judges novelty; its last
column is the sum of the keys' features. `cell_*` are the number of evicted tokens in each cell and the sums of their
keys, before rotary embedding, and of their values.
"""

RAGGED = (
    _Row("slot_key", ("slots", "d_k"), "stored"),
    _Row("slot_value", ("slots", "d_v"), "stored"),
    _Row("slot_key_scale", ("slots",), "float16", "scaled"),
    _Row("slot_value_scale", ("slots",), "float16", "scaled"),
    _Row("slot_position", ("slots",), "int32", fill=-1),
    _Row("slot_score", ("pools", "scored slots"), "float32", "slots"),
    *(row for row in TENSORS if not row.name.startswith("slot_")),
)
"""The same for a layer whose KV heads have memories of their own sizes, or whose slots are kept in a smaller type.

The slots of all heads lie on one axis, head after head, so `slot_*` have no axis `H_kv`. `slot_score` has the slots of
those heads only that keep tokens by a score. A key or value in `int8` is its code times its scale.
"""

MOST = 127
"""Largest code of a key or value in 8 bits; codes are symmetric around 0."""

SLOTS = tuple(row.name for row in TENSORS if row.name.startswith("slot_"))
"""Tensors of the exact memory."""
FUSED = tuple(row.name for row in TENSORS if row.needs not in ("celled", "routed"))
"""Tensors that a layer without cells or memories can carry; fused kernels and the TensorRT plugin support no others."""
EVICTED = tuple(row.name for row in TENSORS if row.needs in ("linear", "expands"))
"""Tensors of the linear attention over evicted tokens."""
CELLS = tuple(row.name for row in TENSORS if row.needs == "celled")
"""Tensors of the cells of evicted tokens."""
FORGOTTEN = "forgotten"
"""Key that asks for a measurement. If the state of a layer that evicts has it, the state after a call has the share of
the last token's attention that fell on evicted tokens, `[B, H_kv, G]` fp32. No later call reads it."""


def fade(state: dict[str, Array], times: int) -> dict[str, Array]:
    """Return a state whose sums without a decay are halved `times` times, which is exact in fp32.

    Readers use only ratios of these sums, so halving all of them changes only the evicted count.

    Args:
        state: Tensors by the names of `TENSORS`, with any prefix.
        times: Number of halvings.
    """
    sums = {name.replace("recurrent_mass", "recurrent_state") for name in state if name.endswith("recurrent_mass")}
    sums |= {name for name in state if name.endswith(("recurrent_mass", "judge_state", *CELLS))}
    return {name: tensor * 0.5**times if name in sums else tensor for name, tensor in state.items()}


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a layer's state, without its leading batch axis.

    Attributes:
        name: Name in `past.LAYER.NAME` and `present.LAYER.NAME`.
        shape: Sizes after `B`.
        dtype: Name of a type in `DTYPES`, or `activation` for the dtype of the model's activations.
        fill: Initial value of every element.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    fill: float = 0.0

    def nbytes(self, activation_bytes: int = 4) -> int:
        """Return the bytes of one sequence."""
        return prod(self.shape) * (activation_bytes if self.dtype == "activation" else DTYPES[self.dtype].nbytes)


def _room(count: int, least: int) -> int:
    """Return the smallest of `least`, 4 `least`, 16 `least`, ... that is at least `count`."""
    while least < count:
        least *= 4
    return least


@dataclass(frozen=True)
class MixerSpec:
    """The parts of a layer that the op needs.

    Attributes:
        config: The conversion.
        q_heads: H_q, a multiple of H_kv.
        kv_heads: H_kv.
        d_k: Width of query and key heads.
        d_v: Width of value heads.
        scale: Softmax scale of the slots, usually d_k ** -0.5; it contains the square of YaRN's factor on cosine and
            sine.
        max_distance: Largest rotary distance in tokens.
        sizes: Window and scored slots of each KV head, for kernels that read them; `config` then has room for the
            largest. Empty if all heads have the sizes in `config`.
        text: The layer as JSON, for operators whose arguments are tensors and plain values.
    """

    config: LigerConfig
    q_heads: int
    kv_heads: int
    d_k: int
    d_v: int
    scale: float
    max_distance: int
    sizes: tuple[tuple[int, int], ...] = ()
    text: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.config.memories > self.d_k:
            raise UsageError(f"{self.config.memories} memories", hint=f"a key has {self.d_k} channels to choose by")
        if self.config.heads and (words := len(self.config.heads[0].split())) != self.kv_heads:
            raise UsageError(
                f"a layer has sizes for {words} KV heads: '{self.config.heads[0]:.60}'", hint=f"give {self.kv_heads}"
            )
        if self.config.keyed and self.d_k % self.rows:
            raise UsageError(
                f"gate '{self.config.gate}' for {self.d_k} key channels", hint=f"give a divisor of {self.d_k}"
            )
        # written once, so that a compiler that traces the model reads a constant
        object.__setattr__(self, "text", json.dumps(self.to_dict()))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON, without `sizes` if there are none."""
        given = {x.name: getattr(self, x.name) for x in fields(self) if x.init}
        if not self.sizes:
            del given["sizes"]
        return given | {"config": self.config.to_dict()}

    @classmethod
    @lru_cache(maxsize=256)
    def from_text(cls, text: str) -> MixerSpec:
        """Read `text`."""
        data = json.loads(text)
        sizes = tuple((window, slots) for window, slots in data.get("sizes", ()))
        return cls(**data | {"config": LigerConfig.from_dict(data["config"]), "sizes": sizes})

    @property
    def rows(self) -> int:
        """Number of rows of the recurrent state."""
        return (self.config.keyed and get_gate(self.config.gate).rows) or self.d_k

    @property
    def columns(self) -> int:
        """Number of columns of the recurrent state."""
        return self.d_v + self.config.normalised

    @cached_property
    def pools(self) -> tuple[Pool, ...]:
        """The pools of slots in plain values."""
        return pack(self.config.slots, self.config.window)

    @cached_property
    def heads(self) -> tuple[MixerSpec, ...]:
        """The layer of each KV head alone, with its group of query heads and slots in the type of the activations."""
        plain = replace(self.config, state_dtype="activation")
        configs = self.config.for_heads() if self.config.heads else (plain,) * self.kv_heads
        return tuple(replace(self, config=c, q_heads=self.q_heads // self.kv_heads, kv_heads=1) for c in configs)

    @cached_property
    def groups(self) -> tuple[tuple[tuple[int, ...], MixerSpec], ...]:
        """KV heads whose memories have the same sizes, and the layer of each group, for a ragged layer."""
        groups: dict[MixerSpec, list[int]] = {}
        for head, spec in enumerate(self.heads):
            groups.setdefault(spec, []).append(head)
        return tuple(
            (tuple(heads), replace(spec, q_heads=spec.q_heads * len(heads), kv_heads=len(heads)))
            for spec, heads in groups.items()
        )

    @cached_property
    def roomy(self) -> MixerSpec | None:
        """All KV heads with room for the largest one, for kernels that read the sizes of each head.

        Rooms come in few sizes, so that few kernels are compiled. None if the kernels do not support the memory: they
        rank by at most one score, which is known on arrival, and keep no evicted tokens.
        """
        pools, c = self.pools, self.config
        if not c.heads or c.evicts or len(pools) > 1 or not all(pool.on_arrival for pool in pools):
            return None
        sizes = tuple((head.config.window, sum(n for _, n in head.config.slots)) for head in self.heads)
        window, count = (max(column) for column in zip(*sizes, strict=True))
        slots = ((c.slots[0][0], _room(count, 128)),) if count else ()
        config = replace(c, window=_room(window, 256), slots=slots, heads=(), state_dtype="activation")
        return replace(self, config=config, sizes=sizes)

    @cached_property
    def splits(self) -> bool:
        """Whether fused kernels can compute a step over ragged slots: with one learned score or none, no recurrence."""
        c = self.config
        return c.ragged and not c.recurrent and not c.judged and all(pool.on_arrival for pool in self.pools)

    @cached_property
    def slots_per_head(self) -> tuple[int, ...]:
        """Number of all exact slots of each KV head."""
        return tuple(spec.config.num_slots for spec in self.heads)

    def state(self) -> tuple[TensorSpec, ...]:
        """Return the rows of `TENSORS` or, for a ragged layer, of `RAGGED` that this layer has, in order."""
        c = self.config
        sizes = {"slots": c.num_slots, "pools": len(c.slots), "cells": c.cells, "memories": c.memories + 1}
        sizes |= {"d_k": self.d_k, "d_v": self.d_v, "d_v + 1": self.d_v + 1, "rows": self.rows, "columns": self.columns}
        if c.ragged:
            sizes["slots"] = sum(self.slots_per_head)
            sizes["scored slots"] = sum(spec.config.num_slots for spec in self.heads if spec.config.slots)
        found = []
        for row in RAGGED if c.ragged else TENSORS:
            if (not row.needs or getattr(c, row.needs)) and all(sizes[axis] for axis in row.axes):
                heads = () if c.ragged and row.name.startswith("slot_") else (self.kv_heads,)
                dtype = c.state_dtype if row.dtype == "stored" else row.dtype
                found.append(TensorSpec(row.name, (*heads, *(sizes[axis] for axis in row.axes)), dtype, row.fill))
        return tuple(found)

    def initial_state(
        self, batch: int, dtype: torch.dtype, device: torch.device | str | None = None, *, meter: bool = False
    ) -> MixerState:
        """Return the state of `batch` sequences that have seen nothing; `meter` asks for `FORGOTTEN` if it is known."""
        import torch

        types = {"activation": dtype, "float32": torch.promote_types(dtype, torch.float32)}
        state = {
            t.name: torch.full(
                (batch, *t.shape), t.fill, dtype=types.get(t.dtype) or DTYPES[t.dtype].torch, device=device
            )
            for t in self.state()
        }
        if meter and self.config.evicts:
            state[FORGOTTEN] = torch.zeros(batch, self.kv_heads, self.q_heads // self.kv_heads, device=device)
        return state
