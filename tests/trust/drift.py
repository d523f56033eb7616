"""Read the text of a long run with torch in fp64, and measure the drift of fp32; `endurance.py` explains this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ligerexport as lx
from ligerexport.exporters.verify.compare import is_near_tie, state_error, tolerance_of
from ligerexport.exporters.verify.slots import by_head, of_layer
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.layers.mixer import LigerCache, LigerMixer
from ligerexport.model.state import CELLS

if TYPE_CHECKING:
    from pathlib import Path

    from endurance import Clock, Pieces

Arrays = dict[str, np.ndarray]


class Exact:
    """A checkpoint in fp64."""

    def __init__(self, checkpoint: Path) -> None:
        self.model = lx.load_model(checkpoint, dtype=torch.float64).eval()
        self.mixers = [layer.self_attn for layer in self.model.model.layers]
        self.cache = LigerCache(self.model.config)

    @torch.inference_mode()
    def read(self, ids: np.ndarray) -> np.ndarray:
        """Read ids `[T]`; return the logits after the last, `[V]`."""
        call = self.model(torch.from_numpy(ids)[None], past_key_values=self.cache, logits_to_keep=1)
        return call.logits[0, -1].numpy()

    def state(self) -> Arrays:
        """Return the state by the names of the graph."""
        return {
            f"past.{i}.{name}": tensor.numpy()
            for i, layer in enumerate(self.cache.layers)
            for name, tensor in layer.state.items()
        }

    def restore(self, state: Arrays, seen: int) -> None:
        """Set the state."""
        for i, layer in enumerate(self.cache.layers):
            layer.reset()
            layer.advance({name: torch.from_numpy(array) for name, array in of_layer(state, i).items()}, seen)


def exact(reference: Exact, steps: Pieces, pieces: Pieces, clock: Clock) -> None:
    """Read the written text in fp64, and keep state and logits of each piece."""
    if len(pieces):
        last = pieces.read(-1)
        seen = len(pieces) * len(steps.read(0)["tokens"])
        reference.restore({name: array for name, array in last.items() if name.startswith("past.")}, seen)
    while len(pieces) < len(steps):
        clock.check()
        logits = reference.read(steps.read(len(pieces))["tokens"])
        pieces.write({"logits": logits, **reference.state()})


def sums(state: Arrays, mixer: LigerMixer) -> list[np.ndarray]:
    """Return sums over all tokens in fp64, as if all held tokens were evicted too; none if evicted tokens are dropped.

    Args:
        state: State of a layer or of one of its KV heads, from `by_head`.
        mixer: The layer.
    """
    key, value = (state[name].astype(np.float64) for name in ("slot_key", "slot_value"))  # 0 in empty slots
    there = (state["slot_position"] >= 0).astype(np.float64)
    if "cell_count" in state:
        held = [there.sum(axis=2), key.sum(axis=2), value.sum(axis=2)]
        return [x + state[name].sum(axis=2) for x, name in zip(held, CELLS, strict=True)]
    if "recurrent_mass" not in state:
        return []
    _, slow = slow_rotation(rotary_table(torch.tensor(mixer.inv_freq), mixer.spec.max_distance, 1), mixer.spec)
    features = key * np.concatenate([slow, slow])
    features[..., 0] = there
    products = np.einsum("bhnk,bhnv->bhkv", features, value)
    return [features.sum(axis=2) + state["recurrent_mass"], products + state["recurrent_state"]]


def compare(found: Arrays, expected: Arrays, mixers: list[LigerMixer]) -> dict[str, Any]:
    """Return the distance of a state and logits from those in fp64.

    Raises:
        ValueError: The first layer holds other tokens, and the difference is no near tie.
    """
    rows: dict[str, Any] = {"sums": [], "same": []}
    for i, mixer in enumerate(mixers):
        pools, same, apart = mixer.spec.config.slots, True, list[float]()
        heads = list(zip(*(by_head(of_layer(side, i), mixer.spec) for side in (found, expected)), strict=True))
        for (_, ours), (_, truth) in heads:
            pairs = zip(sums(ours, mixer), sums(truth, mixer), strict=True)
            apart += [float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs]
            if not np.array_equal(ours["slot_position"], truth["slot_position"]):
                same = False
                if not i and not is_near_tie(truth, ours, pools, tolerance_of("float32").tie):
                    seen = found["position"]
                    raise ValueError(f"after {seen} tokens the first layer holds others, and it is no near tie")
        rows["sums"] += [max(apart)] if apart else []
        rows["same"].append(same)
        if all(rows["same"]):
            errors = [state_error(truth[name], ours[name]) for (_, ours), (_, truth) in heads for name in truth]
            rows["state"] = max(rows.get("state", 0.0), *errors)
    rows["logits"] = float(np.abs(found["logits"] - expected["logits"]).max())
    return rows
