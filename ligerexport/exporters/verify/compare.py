"""Compare two states: the tolerances, which slots differ, and whether tied scores explain the difference."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import TypeAlias

import numpy as np
import torch

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.targets import precision_of
from ligerexport.exporters.tensorrt.evaluation import PluginSession
from ligerexport.exporters.verify.slots import by_head, encode, of_layer, unscaled
from ligerexport.exporters.verify.torch_model import Answer, State
from ligerexport.kernels.memories import route
from ligerexport.model.scores import FAINTEST, get_score
from ligerexport.model.state import MixerSpec

Engine: TypeAlias = OnnxSession | PluginSession


@dataclass(frozen=True)
class Tolerance:
    """How much a graph may differ from the torch model.

    Attributes:
        logits: Largest absolute difference.
        state: Largest difference, relative to the largest element of the tensor if that is over 1.
        tie: Largest relative difference of two scores that may be ranked either way.
        weights: The same as `Precision.error`.
    """

    logits: float
    state: float
    tie: float
    weights: float


def tolerance_of(dtype: str) -> Tolerance:
    """Return the tolerance for a graph with weights of a dtype; all of them compute in fp32."""
    return Tolerance(logits=2e-4, state=2e-4, tie=1e-4, weights=precision_of(dtype).error)


@dataclass
class Result:
    """Counts and largest errors of a comparison; its `to_dict` is the manifest's `verification`."""

    passed: bool = False
    tokens: int = 0
    checks: int = 0
    near_ties: int = 0
    max_logit_error: float = 0.0
    max_state_error: float = 0.0
    greedy_tokens: int = 0
    greedy_tokens_equal: int = 0
    tolerance: dict[str, float] = field(default_factory=dict)


class Mismatch(Exception):
    """A tensor of a layer differs, or, if the layer is None, the logits."""

    def __init__(self, layer: int | None, what: str) -> None:
        super().__init__(what)
        self.layer, self.what = layer, what

    @classmethod
    def of_failure(cls, error: Exception) -> Mismatch:
        """Return a mismatch for a call that failed; the error names the node, whose name begins with its layer.

        Raises:
            Exception: The same error, if memory ran out, which is not the graph's fault.
        """
        if "alloc" in str(error):
            raise error
        layer = re.search(r"Name:'layers\.(\d+)/", str(error))
        return cls(int(layer[1]) if layer else None, str(error))


class Comparison:
    """Compares state and logits after calls with torch's, and collects the differences.

    Args:
        spec: The checkpoint.
        tolerance: How much may differ.
    """

    def __init__(self, spec: ModelSpec, tolerance: Tolerance) -> None:
        self.spec, self.tolerance = spec, tolerance
        self.result = Result(tolerance=asdict(tolerance))
        self.adrift = False

    def agrees(
        self, snapshot: Snapshot, answer: Answer, logits: np.ndarray, before: State | None = None, start: int = 0
    ) -> bool:
        """Compare state and logits after a call; return False if the first difference is a near tie.

        Args:
            snapshot: The state after the call.
            answer: Torch's state and logits after the call.
            logits: Logits after the call `[V]`.
            before: State before the call, after `start` tokens, with at least the positions of slots.

        Raises:
            Mismatch: The first difference is no near tie.
        """
        result = self.result
        for layer, mixer in enumerate(self.spec.mixers):
            found, expected = (of_layer(state, layer) for state in (snapshot.tensors, answer.state))
            if name := unscaled(found):
                raise Mismatch(layer, f"{name} is not the largest element divided by the largest code")
            sides = zip(by_head(found, mixer), by_head(expected, mixer), strict=True)
            for head, ((where, theirs), (_, ours)) in enumerate(sides):
                if mixer is not None and not np.array_equal(theirs["slot_position"], ours["slot_position"]):
                    then = before and by_head(of_layer(before, layer), mixer)[head][1]
                    if then and came_back(then, theirs, start):
                        raise Mismatch(layer, f"slot_position{where}: a token that had lost its slot is back")
                    if not is_near_tie(ours, theirs, mixer.config.slots, self.tolerance.tie):
                        raise Mismatch(layer, f"slot_position{where}: other tokens keep a slot")
                    return False
                for name, tensor in ours.items():
                    error = state_error(tensor, theirs[name])
                    if not error <= self.tolerance.state:
                        if mixer is not None and is_other_memory(ours, theirs, mixer, self.tolerance):
                            return False
                        raise Mismatch(layer, f"{name}{where} is off by {error:.1e} of its size")
                    result.max_state_error = max(result.max_state_error, error)
        error = float(np.abs(logits - answer.logits).max())
        if not error <= self.tolerance.logits:
            raise Mismatch(None, f"logits are off by {error:.1e}")
        result.max_logit_error = max(result.max_logit_error, error)
        return True

    def resume(self, session: Engine, snapshot: Snapshot, answer: Answer) -> None:
        """Go on from torch's state after a near tie, as soon as there is a complete state."""
        self.adrift = not answer.whole
        if answer.whole:
            session.restore(replace(snapshot, tensors=encode(answer.state, snapshot.tensors)))


def state_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference, relative to the largest element if that is over 1."""
    if expected.size == 0:
        return 0.0
    difference = np.abs(expected.astype(np.float64) - found).max()
    return float(difference / max(1.0, np.abs(expected).max()))


def is_near_tie(expected: State, found: State, pools: tuple[tuple[str, int], ...], tie: float) -> bool:
    """Return whether two kept sets differ only by tokens whose ranks are nearly equal.

    Args:
        expected: State of one mixer, sorted.
        found: State to compare it with, sorted.
        pools: The mixer's pools.
        tie: Largest relative difference of the scores of such tokens.
    """
    if "slot_score" not in expected:
        return False
    for index in np.ndindex(expected["slot_position"].shape[:2]):
        ours, theirs = expected["slot_position"][index], found["slot_position"][index]
        lost, gained = ~np.isin(ours, theirs), ~np.isin(theirs, ours)
        if lost.sum() != gained.sum():
            return False
        left = get_ranks(expected["slot_score"][index][:, lost], ours[lost], pools)  # [P, changed]
        came = get_ranks(found["slot_score"][index][:, gained], theirs[gained], pools)
        near = np.abs(left[:, :, None] - came[:, None]) <= tie
        if not near.any(axis=0).any(axis=1).all():
            return False
    return True


def is_other_memory(expected: State, found: State, mixer: MixerSpec, tolerance: Tolerance) -> bool:
    """Return whether states of memories differ only in heads whose last token could as well use another memory.

    Args:
        expected: State of one mixer or of some of its KV heads, sorted, with the keys of its slots.
        found: State to compare it with, sorted.
        mixer: The layer.
        tolerance: How much may differ.
    """
    if "memory_state" not in expected:
        return False
    states, others = expected["memory_state"], found["memory_state"]
    axes = tuple(range(2, states.ndim))
    off = np.abs(states - others).max(axis=axes) > tolerance.state * np.maximum(1.0, np.abs(states).max(axis=axes))
    logits = route(torch.from_numpy(expected["slot_key"][:, :, -1]), mixer.config.memories)
    ranked = np.append(np.sort(logits.numpy())[..., ::-1], np.full((*logits.shape[:2], 1), -np.inf), axis=-1)
    gap = ranked[..., mixer.config.active - 1] - ranked[..., mixer.config.active]
    near = gap <= tolerance.tie * np.maximum(1.0, np.abs(ranked[..., 0]))
    return bool(off.any() and near[off].all())


def came_back(before: State, found: State, start: int) -> bool:
    """Return whether a mixer holds a token after a call that it no longer held before the call, after `start` tokens.

    No tied scores explain this. Both states are sorted.
    """
    for index in np.ndindex(found["slot_position"].shape[:2]):
        now, then = found["slot_position"][index], before["slot_position"][index]
        if not np.isin(now[now < start], [-1, *then]).all():
            return True
    return False


def get_ranks(scores: np.ndarray, positions: np.ndarray, pools: tuple[tuple[str, int], ...]) -> np.ndarray:
    """Return ranks `[P, n]` on a logarithmic scale, on which a relative difference of scores is a distance."""
    ranks = np.log(np.maximum(scores, FAINTEST, dtype=np.float64))
    for i, score in enumerate(get_score(name) for name, _ in pools):
        if score.signal == "learned":  # already a logarithm
            ranks[i] = scores[i]
        if score.horizon is not None:
            ranks[i] += positions / score.horizon
    return ranks
