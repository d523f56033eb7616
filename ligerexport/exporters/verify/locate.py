"""Find the first layer whose graph and torch results differ, for the message of a failed verification."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from ligerexport.artifact.artifact import Artifact
from ligerexport.exporters.onnx.native import register
from ligerexport.exporters.onnx.session import EXACT, FOLDER
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.variants import exact_graph
from ligerexport.exporters.tensorrt.evaluation import evaluator
from ligerexport.exporters.verify.compare import (
    Mismatch,
    came_back,
    is_near_tie,
    is_other_memory,
    state_error,
    tolerance_of,
)
from ligerexport.exporters.verify.slots import by_head, encode, of_layer, unscaled
from ligerexport.exporters.verify.ties import narrow
from ligerexport.exporters.verify.torch_model import Answer, Reference, State

APART = 2e-5
"""Relative distance from torch's tensor above which a layer may count as different; rounding stays below it."""
GROWTH = 8.0
"""The distance must also be this many times that of earlier layers: an error continues in all later layers."""
Run = Callable[[list[str], dict[str, np.ndarray]], list[np.ndarray]]


def first_difference(
    spec: ModelSpec, artifact: Artifact, pieces: list[np.ndarray], reference: Reference
) -> Mismatch | None:
    """Repeat the calls that showed a difference, and compare state and residual stream layer by layer.

    The graph starts each call in torch's state, so that only errors of that call count. A call that differs is repeated
    with fewer tokens, because scores may tie in it: a difference that a tie explains does not count.

    Args:
        spec: The checkpoint.
        artifact: The graph at fault.
        pieces: Tokens of each call; afterwards all of them are tried in the largest calls.
        reference: The torch model to compare with.

    Returns:
        The layer and what differs in it, or None when they agree.

    Raises:
        Mismatch: ONNX Runtime fails; it names the layer of the failing node.
    """
    graph, chunk = _Graph(spec, artifact), artifact.manifest.graph.max_chunk
    for text in (pieces, [np.concatenate(pieces)]):
        past, state, position = reference.new_cache(), graph.initial_state(), 0
        calls = [call for piece in text for call in np.split(piece, range(chunk, len(piece), chunk))]
        while calls:
            call, compare = calls.pop(0), partial(_compare, spec, graph, state, position)
            answers = reference.answers([call], copy.deepcopy(past), hidden=True)
            if compare(answers):
                answers = narrow(reference, past, call, compare, hidden=True)
                difference = compare(answers)
                if difference is not None and not difference.tied:
                    return Mismatch(difference.layer, difference.what)
            ids = _ids(answers)
            found, past = graph.run(state, position, ids), answers[-1].after()
            like = {name: found[name] for name in state}
            expected = {name: x for name, x in answers[-1].state.items() if name in state}
            state = encode(expected, like)
            position += len(ids)
            calls = [call[len(ids) :], *calls] if len(ids) < len(call) else calls
    return None


class _Difference(NamedTuple):
    layer: int
    what: str
    tied: bool = False


def _ids(answers: list[Answer]) -> np.ndarray:
    return np.concatenate([answer.ids for answer in answers])


def _compare(spec: ModelSpec, graph: _Graph, state: State, position: int, answers: list[Answer]) -> _Difference | None:
    """Make one call with the tokens of torch's answers; compare the final state and the whole residual stream."""
    found, streams = graph.run(state, position, _ids(answers)), [f"past.{i}.hidden" for i in range(len(spec.mixers))]
    hidden = {name: np.concatenate([answer.state[name] for answer in answers]) for name in streams}
    return _first_layer(spec, answers[-1].state | hidden, found, state, position)


def _first_layer(spec: ModelSpec, expected: State, found: State, state: State, position: int) -> _Difference | None:
    """Return the first layer that differs after one call, or in which scores tied.

    The call began in `state`, after `position` tokens.
    """
    before = APART / GROWTH
    for layer, mixer in enumerate(spec.mixers):
        sides = of_layer(expected, layer), of_layer(found, layer)
        streams = [side.pop("hidden") for side in sides]
        errors = dict[str, float]()
        heads = (by_head(side, mixer) for side in (*sides, of_layer(state, layer)))
        for (where, ours), (_, theirs), (_, then) in zip(*heads, strict=True):
            if mixer is not None and not np.array_equal(ours["slot_position"], theirs["slot_position"]):
                tied = is_near_tie(ours, theirs, mixer.config.slots, tolerance_of("float32").tie)
                tied = tied and not came_back(then, theirs, position)
                return _Difference(layer, f"its slot_position{where}", tied)
            if mixer is not None and is_other_memory(ours, theirs, mixer, tolerance_of("float32")):
                return _Difference(layer, f"its memory_state{where}", tied=True)
            errors |= {f"its {name}{where}": state_error(tensor, theirs[name]) for name, tensor in ours.items()}
        if (scale := unscaled(sides[1])) is not None:
            return _Difference(layer, f"its {scale}")
        errors["its output"] = _apart(*streams)
        for what, error in errors.items():
            if not error <= GROWTH * before:
                return _Difference(layer, f"{what}, by {error:.1e} of its size")
        before = max(before, *errors.values())
    return None


def _apart(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest distance of two residual streams `[T, D]`, relative to torch's."""
    rows = min(len(ours), len(theirs))  # the graph has only one row of the last layer
    tensor, other = ours[-rows:], theirs[-rows:]
    return float((np.linalg.norm(tensor - other, axis=-1) / np.linalg.norm(tensor, axis=-1)).max())


class _Graph:
    """The graph, called in any state; it also returns the residual stream after each layer."""

    def __init__(self, spec: ModelSpec, artifact: Artifact) -> None:
        self._manifest = artifact.manifest
        self._integer = self._manifest.graph.inputs[0].dtype
        self._hidden = [f"hidden.{i}" for i in range(len(spec.mixers))]
        plugin = self._manifest.lowering == "plugin"
        self._run: Run = evaluator(artifact, spec, wide=True).run if plugin else _variant(artifact, self._hidden)  # type: ignore[assignment]

    def initial_state(self) -> State:
        """Return the state before the first token."""
        letters: dict[int | str, int] = {"B": 1, "P": 0}
        return {
            t.past: np.full(
                [letters[n] if isinstance(n, str) else n for n in t.shape],
                t.fill,
                t.dtype if t.dtype in ("int64", "int32") else np.float32,
            )
            for t in self._manifest.state
        }

    def run(self, state: State, position: int, ids: np.ndarray) -> State:
        """Return the state after more tokens, with `past.LAYER.hidden` as in `Reference.answers`."""
        feeds = {"input_ids": ids[None].astype(self._integer), "position": np.array([position], self._integer)}
        names = [name.replace("past.", "present.", 1) for name in state] + self._hidden
        keys = [*state, *(f"past.{i}.hidden" for i in range(len(self._hidden)))]
        return dict(zip(keys, self._run(names, feeds | state), strict=True))


def _variant(artifact: Artifact, outputs: list[str]) -> Run:
    """Open the graph with exact products and additional outputs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry(*EXACT)
    options.add_session_config_entry(FOLDER, str(artifact.directory))
    options.enable_mem_reuse = False  # planning reuse is quadratic in the nodes
    if artifact.manifest.lowering == "native":
        register(options)
    variant = exact_graph(artifact.graph, outputs)
    session = onnxruntime.InferenceSession(variant, options, providers=["CPUExecutionProvider"])
    wanted = {entry.name for entry in session.get_inputs()}

    def run(names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        try:
            return session.run(names, {name: feed for name, feed in feeds.items() if name in wanted})
        except Exception as error:  # ONNX Runtime's own classes have no common base
            raise Mismatch.of_failure(error) from error

    return run
