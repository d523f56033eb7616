"""Read the text of a long run with torch in fp64, and measure the drift of fp32; `endurance.py` explains this."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import ligerexport as lx
from ligerexport.exporters.verify.compare import is_near_tie, state_error, tolerance_of
from ligerexport.exporters.verify.slots import of_layer, sort_slots
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.layers.mixer import LigerCache, LigerMixer

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


def sums(state: Arrays, mixer: LigerMixer) -> tuple[np.ndarray, np.ndarray]:
    """Return mass `[H, d_k]` and state `[H, d_k, d_v]` of a layer in fp64 as if all held tokens were evicted too."""
    spec = mixer.spec
    _, slow = slow_rotation(rotary_table(torch.tensor(mixer.inv_freq), spec.max_distance, 1), spec)
    there = (state["slot_position"][0] >= 0)[..., None]
    features = state["slot_key"][0].astype(np.float64) * np.concatenate([slow, slow])
    features[..., 0] = 1
    features *= there
    held = np.einsum("hnk,hnv->hkv", features, np.where(there, state["slot_value"][0], 0.0))
    return features.sum(axis=1) + state["recurrent_mass"][0], held + state["recurrent_state"][0]


def compare(found: Arrays, expected: Arrays, mixers: list[LigerMixer]) -> dict[str, Any]:
    """Return the distance of a state and logits from those in fp64.

    Raises:
        ValueError: The first layer holds other tokens, and the difference is no near tie.
    """
    rows: dict[str, Any] = {"sums": [], "same": []}
    for i, mixer in enumerate(mixers):
        ours, truth = of_layer(found, i), of_layer(expected, i)
        pairs = zip(sums(ours, mixer), sums(truth, mixer), strict=True)
        rows["sums"].append(max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in pairs))
        ours, truth = sort_slots(ours), sort_slots(truth)
        same = np.array_equal(ours["slot_position"], truth["slot_position"])
        if not (same or i or is_near_tie(truth, ours, mixer.spec.config.slots, tolerance_of("float32").tie)):
            raise ValueError(f"after {found['position']} tokens the first layer holds others, and it is no near tie")
        rows["same"].append(same)
        if all(rows["same"]):
            rows["state"] = max(rows.get("state", 0.0), *(state_error(truth[name], ours[name]) for name in truth))
    rows["logits"] = float(np.abs(found["logits"] - expected["logits"]).max())
    return rows
