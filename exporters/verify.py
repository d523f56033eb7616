"""Parity of a built graph with the torch model: logits and state on real text, for prompts cut anywhere and steps.

Weights are first compared with the checkpoint's, element by element. Then torch gets what the artifact stores, so that
no error of the graph passes for one of rounding. What rounding costs is measured by itself, not judged.

Torch runs first and only its answers are kept, so the weights are in memory once. A token keeps a slot by comparing
fp32 scores, so two right answers can differ when scores tie; such ties are told apart from errors, counted, and
resolved by copying torch's state. Those inside a call are searched for by `replay`.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.artifact import Artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import LigerError, VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import WeightFormat
from ligerexport.exporters.precision import cost_of_precision
from ligerexport.exporters.reference import Answer, Reference, State, check_reading
from ligerexport.exporters.text import PROMPT
from ligerexport.memory import get_score

if TYPE_CHECKING:
    from ligerexport.exporters.onnx.evaluation import PluginSession
    from ligerexport.exporters.onnx.session import OnnxSession
    from ligerexport.mixer import LigerCache
    from ligerexport.snapshot import Snapshot

    Engine = OnnxSession | PluginSession


@dataclass(frozen=True)
class Tolerance:
    """What a graph may be off.

    Attributes:
        logits: Largest absolute difference.
        state: Largest difference, relative to the largest element of the tensor, or absolute below 1.
        tie: Scores as near as this, relative, may be taken in either order.
        weights: Largest root mean square difference of a stored row to the checkpoint's, relative to the row's own.
    """

    logits: float
    state: float
    tie: float
    weights: float


TOLERANCES = {
    dtype: Tolerance(logits=2e-4, state=2e-4, tie=1e-4, weights=weights)
    for dtype, weights in {"float32": 0.0, "float16": 1e-3, "bfloat16": 8e-3, "int8": 0.05, "int4": 0.5}.items()
}
"""The arithmetic is fp32 in all of them. Of rows, a few large elements may leave little precision to the others."""

PIECES = 6
"""Pieces that the prompt is cut into, at random places."""
STEPS = 24
"""Tokens, the text's first once more, that are fed one by one; the greedy choice after each is compared."""
WHOLE = 8
"""Of so many steps one is compared with the whole state."""


@dataclass
class Result:
    """What was compared; `to_dict` of it is the manifest's `verification`."""

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
    """A layer's tensor, or with layer None the logits, are off."""

    def __init__(self, layer: int | None, what: str) -> None:
        super().__init__(what)
        self.layer, self.what = layer, what

    @classmethod
    def of_failure(cls, error: Exception) -> Mismatch:
        """Return what ONNX Runtime says of a call that fails: it names the node, whose name begins with its layer.

        Raises:
            Exception: The error, where it says that memory ran out, for which no graph is to blame.
        """
        if "alloc" in str(error):
            raise error
        layer = re.search(r"Name:'layers\.(\d+)/", str(error))
        return cls(int(layer[1]) if layer else None, str(error))


def verify_artifact(
    spec: ModelSpec, artifact: Artifact, form: WeightFormat, *, seed: int = 0, progress: ProgressFactory = silent
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Compare an unfinished artifact with the torch model of its checkpoint, and that with transformers' own first.

    Args:
        spec: The checkpoint.
        artifact: Graph, weights and a manifest without files.
        form: How the weights are stored.
        seed: Of the places where the prompt is cut.
        progress: Opens a phase.

    Returns:
        The numbers for the manifest: of the comparison, and from `cost_of_precision`.

    Raises:
        VerificationError: They differ, or ONNX Runtime fails; names the first layer that does.
        CheckpointError: transformers cannot run the checkpoint.
        LigerError: Memory ran out.
    """
    from ligerexport.exporters.locate import first_difference

    check_reading(spec, progress)
    tolerance, ids = TOLERANCES[form.precision.dtype], prompt_ids(spec)
    reference = Reference(spec, artifact, form, tolerance.weights)
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, len(ids)), PIECES - 1, replace=False))
    pieces = [*np.split(ids, cuts), *ids[:STEPS, None]]
    whole = {i for i in range(len(pieces)) if i < PIECES or (len(pieces) - 1 - i) % WHOLE == 0}
    with progress("running the torch model", len(spec.mixers), "steps") as advance:
        answers = reference.answers(pieces, whole=whole, advance=advance)
    comparison = Comparison(spec, tolerance, reference, progress)
    mismatch = _compare(comparison, artifact, answers, progress)
    plugin = artifact.manifest.lowering == "plugin"  # which ONNX Runtime cannot run
    if mismatch is not None:
        try:
            found = first_difference(spec, artifact, pieces, reference)
        except Mismatch as failure:
            found = failure
        raise _explain(artifact, found, mismatch) from mismatch
    return asdict(comparison.result), None if plugin else cost_of_precision(spec, artifact, ids, progress)


def _compare(
    comparison: Comparison, artifact: Artifact, answers: list[Answer], progress: ProgressFactory
) -> Mismatch | None:
    """Run the artifact against torch's answers; return what is off."""
    with progress("comparing", len(answers) + 1, "steps") as advance:
        session = _open(comparison.spec, artifact)
        try:
            comparison.run(session, answers, advance)
        except Mismatch as mismatch:
            return mismatch
        except LigerError as error:
            return Mismatch.of_failure(error)
    return None


def _open(spec: ModelSpec, artifact: Artifact) -> Engine:
    if artifact.manifest.lowering == "plugin":
        from ligerexport.exporters.onnx.evaluation import PluginSession

        return PluginSession(artifact, spec, wide=True)
    from ligerexport.exporters.onnx.session import OnnxSession

    exact = artifact.manifest.block is not None
    return OnnxSession(artifact, chunk=artifact.manifest.graph.max_chunk, prepack=False, exact=exact)


def prompt_ids(spec: ModelSpec) -> np.ndarray:
    """Return the ids of `PROMPT`, or ids at random where the checkpoint has no tokenizer."""
    file = spec.path / "tokenizer.json"
    if not file.is_file():
        return np.random.default_rng(0).integers(0, spec.vocab_size, 400)
    from tokenizers import Tokenizer

    return np.array(Tokenizer.from_file(str(file)).encode(PROMPT).ids)


class Comparison:
    """Runs a session against torch's answers and gathers the differences.

    Args:
        spec: The checkpoint.
        tolerance: What may be off.
        reference: The torch model, to search a call for tied scores; None takes a difference for an error.
        progress: Opens a phase for each search.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tolerance: Tolerance,
        reference: Reference | None = None,
        progress: ProgressFactory = silent,
    ) -> None:
        self.spec, self.tolerance = spec, tolerance
        self.result = Result(tolerance=asdict(tolerance))
        scored = any(mixer is not None and mixer.config.slots for mixer in spec.mixers)  # nothing else can tie
        self._reference, self._progress = reference if scored else None, progress
        self._adrift = False

    def run(self, session: Engine, answers: list[Answer], advance: Any, prompt: int = PIECES) -> None:
        """Feed the prompt, the first `prompt` answers, in torch's pieces and then step; then all of it at once.

        Raises:
            Mismatch: Something is off.
        """
        past, start = None, 0
        for i, answer in enumerate(answers):
            choice = self._call(session, answer, past, start)
            past, start = answer.cache, start + len(answer.ids)
            if choice is not None and i >= prompt - 1:
                self._check_choice(answer.logits, choice)
            advance(1)
        session.reset()
        self._adrift = False
        self._call(session, replace(answers[prompt - 1], ids=np.concatenate([x.ids for x in answers[:prompt]])))
        advance(1)
        if self.result.near_ties * 2 > self.result.checks:
            raise Mismatch(None, f"{self.result.near_ties} of {self.result.checks} comparisons ended in tied scores")
        self.result.passed = True

    def _call(
        self, session: Engine, answer: Answer, past: LigerCache | None = None, start: int = 0
    ) -> np.ndarray | None:
        """Feed and compare one call after `start` tokens; return its logits, None where a near tie left it open.

        `past` is torch's state before it, None where nothing was seen.
        """
        self.result.checks += 1
        self.result.tokens += len(answer.ids)
        single = len(answer.ids) == 1
        before = None if single else session.snapshot()
        logits = (session.step(int(answer.ids[0])) if single else session.prefill(answer.ids))[0]
        after = session.snapshot()
        if not self._adrift:
            try:
                if self.agrees(after, answer, logits):
                    return logits
            except Mismatch:
                if before is None or self._reference is None:
                    raise
                from ligerexport.exporters.replay import replay

                session.restore(before)
                past = past or self._reference.new_cache()
                with self._progress(f"tied scores after {start} tokens", len(answer.ids), "steps") as advance:
                    replay(self, session, self._reference, past, answer.ids, start, advance)
            self.result.near_ties += 1
        self.resume(session, after, answer)
        return None

    def agrees(self, snapshot: Snapshot, answer: Answer, logits: np.ndarray) -> bool:
        """Compare state and logits after a call; return False where the first difference is a near tie.

        Raises:
            Mismatch: It is another one.
        """
        result = self.result
        for layer, mixer in enumerate(self.spec.mixers):
            found, expected = (of_layer(state, layer) for state in (snapshot.tensors, answer.state))
            if mixer is not None:
                found, expected = sort_slots(found), sort_slots(expected)
                if not np.array_equal(found["slot_position"], expected["slot_position"]):
                    if not is_near_tie(expected, found, mixer.config.slots, self.tolerance.tie):
                        raise Mismatch(layer, "slot_position: other tokens keep a slot")
                    return False
            for name, tensor in expected.items():
                error = state_error(tensor, found[name])
                if not error <= self.tolerance.state:
                    raise Mismatch(layer, f"{name} is off by {error:.1e} of its size")
                result.max_state_error = max(result.max_state_error, error)
        error = float(np.abs(logits - answer.logits).max())
        if not error <= self.tolerance.logits:
            raise Mismatch(None, f"logits are off by {error:.1e}")
        result.max_logit_error = max(result.max_logit_error, error)
        return True

    def resume(self, session: Engine, snapshot: Snapshot, answer: Answer) -> None:
        """Go on from torch's state after a near tie, as soon as there is a whole one."""
        self._adrift = not answer.whole
        if answer.whole:
            session.restore(replace(snapshot, tensors=snapshot.tensors | answer.state))

    def _check_choice(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Compare the greedy choice, unless two logits are as near as the tolerance."""
        self.result.greedy_tokens += 1
        if expected.argmax() == found.argmax() or expected.max() - expected[found.argmax()] < 2 * self.tolerance.logits:
            self.result.greedy_tokens_equal += 1
        else:
            raise Mismatch(None, "the greedy choice is another token")


def of_layer(state: State, layer: int) -> State:
    prefix = f"past.{layer}."
    return {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}


def sort_slots(state: State) -> State:
    """Return a mixer's state with its slots in the order of their positions and empty ones zeroed."""
    position = state["slot_position"]
    order = position.argsort(axis=-1, kind="stable")
    position = np.take_along_axis(position, order, -1)
    full = position >= 0
    result = dict(state) | {"slot_position": position}
    for name in {"slot_key", "slot_value"} & state.keys():
        result[name] = np.take_along_axis(state[name], order[..., None], 2) * full[..., None]
    if "slot_score" in state:
        result["slot_score"] = np.take_along_axis(state["slot_score"], order[:, :, None], 3) * full[:, :, None]
    return result


def state_error(expected: np.ndarray, found: np.ndarray) -> float:
    """Return the largest difference, relative to the largest element where that is over 1."""
    if expected.size == 0:
        return 0.0
    difference = np.abs(expected.astype(np.float64) - found).max()
    return float(difference / max(1.0, np.abs(expected).max()))


def is_near_tie(expected: State, found: State, pools: tuple[tuple[str, int], ...], tie: float) -> bool:
    """Return whether two kept sets differ only by tokens that rank nearly equal.

    Args:
        expected: Of one mixer, sorted.
        found: Likewise.
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


def get_ranks(scores: np.ndarray, positions: np.ndarray, pools: tuple[tuple[str, int], ...]) -> np.ndarray:
    """Return ranks `[P, n]` on a logarithmic scale, on which a relative difference of scores is a distance."""
    ranks = np.log(np.maximum(scores, 1e-30, dtype=np.float64))
    for i, score in enumerate(get_score(name) for name, _ in pools):
        if score.signal == "given":  # a logarithm already
            ranks[i] = scores[i]
        if score.horizon is not None:
            ranks[i] += positions / score.horizon
    return ranks


def _explain(artifact: Artifact, found: Mismatch | None, mismatch: Mismatch) -> VerificationError:
    """Say which layer is the first that differs, where one was found."""
    where = "no layer was found that differs by itself"
    if found is not None and found.layer is not None:
        where = f"layer {found.layer} is the first that differs ({found.what})"
    seen = mismatch.what if mismatch.layer is None else f"layer {mismatch.layer}: {mismatch.what}"
    return VerificationError(
        f"the {artifact.manifest.lowering} graph does not compute what torch computes: {where}; noticed by: {seen}",
        hint="nothing was written; please report this with the model's config.json and the version of onnxruntime",
    )
