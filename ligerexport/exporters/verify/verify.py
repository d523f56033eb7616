"""Compare a built graph with the torch model: logits and state on real text, for prompts cut anywhere and for steps.

Weights are first compared with the checkpoint's, element by element. Then torch computes with the weights that the
artifact stores, so that no error of the graph is mistaken for rounding. The cost of rounding is measured separately.

Torch runs first and only its answers are kept, so the weights are in memory once. Tokens keep their slots and choose
their memories by comparing fp32 numbers, so two correct answers can differ when these tie. Such ties are told apart
from errors, counted, and resolved by copying torch's state. `replay` searches for ties inside a call.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from ligerexport.artifact.artifact import Artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import LigerError, VerificationError
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import WeightStorage
from ligerexport.exporters.tensorrt.evaluation import PluginSession
from ligerexport.exporters.verify.compare import Comparison, Engine, Mismatch, Tolerance, tolerance_of
from ligerexport.exporters.verify.locate import first_difference
from ligerexport.exporters.verify.precision import cost_of_precision
from ligerexport.exporters.verify.slots import is_rounded, unrounded
from ligerexport.exporters.verify.text import PROMPT
from ligerexport.exporters.verify.ties import replay
from ligerexport.exporters.verify.torch_model import Answer, Reference, check_reading

PIECES = 6
"""Number of pieces that the prompt is cut into, at random places."""
STEPS = 24
"""Number of tokens, from the text's beginning, that are fed one by one; each greedy choice after them is compared."""
REJECTED = 3
"""Number of tokens that are taken back again in every eighth of these steps."""
WHOLE = 8
"""The whole state is compared after every eighth step, or after each if a step may use another memory by a tie."""


def verify_artifact(
    spec: ModelSpec, artifact: Artifact, storage: WeightStorage, *, seed: int = 0, progress: ProgressFactory = silent
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Compare an unfinished artifact with its checkpoint's torch model, which is first compared with transformers'.

    Args:
        spec: The checkpoint.
        artifact: Graph, weights and a manifest without files; its second graph is compared too.
        storage: How the weights are stored.
        seed: Seed of the places where the prompt is cut.

    Returns:
        The numbers for the manifest, from the comparison and from `cost_of_precision`. Those of a second graph's
        comparison are under `fallback`.

    Raises:
        VerificationError: A layer differs, or ONNX Runtime fails in it; the message names the first such layer.
        CheckpointError: transformers cannot run the checkpoint.
        LigerError: Memory ran out.
    """
    check_reading(spec, progress)
    tolerance, ids = tolerance_of(storage.precision.dtype), prompt_ids(spec)
    reference = Reference(unrounded(spec), artifact, storage, storage.error)
    cuts = np.sort(np.random.default_rng(seed).choice(np.arange(1, len(ids)), PIECES - 1, replace=False))
    pieces = [*np.split(ids, cuts), *ids[:STEPS, None]]
    often = 1 if any(mixer is not None and mixer.config.routed for mixer in spec.mixers) else WHOLE
    whole = {i for i in range(len(pieces)) if i < PIECES or (len(pieces) - 1 - i) % often == 0}
    with progress("running the torch model", len(spec.mixers), "steps") as advance:
        answers = reference.answers(pieces, whole=whole, advance=advance)

    def compare(graph: Artifact) -> dict[str, Any]:
        comparison = Verification(spec, tolerance, reference, progress)
        mismatch = _compare(comparison, graph, answers, progress)
        if mismatch is None:
            return asdict(comparison.result)
        try:
            found = first_difference(spec, graph, pieces, reference)
        except Mismatch as failure:
            found = failure
        raise _explain(graph, found, mismatch) from mismatch

    checked = compare(artifact)
    if artifact.manifest.fallback is not None:
        checked["fallback"] = compare(artifact.on_fallback())
    plugin = artifact.manifest.lowering == "plugin"  # ONNX Runtime cannot run it
    return checked, None if plugin else cost_of_precision(spec, artifact, ids, progress)


def _compare(
    comparison: Verification, artifact: Artifact, answers: list[Answer], progress: ProgressFactory
) -> Mismatch | None:
    """Compare the artifact's graph with torch's answers; return the first difference."""
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
        return PluginSession(artifact, spec, wide=True)
    exact = artifact.manifest.block is not None or is_rounded(spec)
    return OnnxSession(artifact, chunk=artifact.manifest.graph.max_chunk, prepack=False, exact=exact)


def prompt_ids(spec: ModelSpec) -> np.ndarray:
    """Return the ids of `PROMPT`, or random ids if no tokenizer makes enough tokens of it to cut."""
    file, ids = spec.path / "tokenizer.json", list[int]()
    if file.is_file():
        ids = Tokenizer.from_file(str(file)).encode(PROMPT).ids
    return np.array(ids) if len(ids) >= PIECES else np.random.default_rng(0).integers(0, spec.vocab_size, 400)


class Verification(Comparison):
    """Runs a session and compares it with torch's answers.

    Args:
        spec: The checkpoint.
        tolerance: How much the graph may differ.
        reference: The torch model, to search a call for tied scores; without it every difference is an error.
    """

    def __init__(
        self,
        spec: ModelSpec,
        tolerance: Tolerance,
        reference: Reference | None = None,
        progress: ProgressFactory = silent,
    ) -> None:
        super().__init__(spec, tolerance)
        configs = [mixer.config for mixer in spec.mixers if mixer is not None]
        ties = any(config.slots or config.routed for config in configs)  # only slots and memories are chosen
        self._reference, self._progress = reference if ties else None, progress

    def run(self, session: Engine, answers: list[Answer], advance: Any, prompt: int = PIECES) -> None:
        """Feed the prompt (the first `prompt` answers) in torch's pieces, then single steps, then the prompt at once.

        Raises:
            Mismatch: A result differs by more than the tolerance.
        """
        last, start = None, 0
        for i, answer in enumerate(answers):
            choice = self._call(session, answer, last, start)
            last, start = answer, start + len(answer.ids)
            if choice is not None and i >= prompt - 1:
                self._check_choice(answer.logits, choice)
            advance(1)
        session.reset()
        self.adrift = False
        self._call(session, replace(answers[prompt - 1], ids=np.concatenate([x.ids for x in answers[:prompt]])))
        advance(1)
        if self.result.near_ties * 2 > self.result.checks:
            raise Mismatch(None, f"{self.result.near_ties} of {self.result.checks} comparisons ended in tied scores")
        self.result.passed = True

    def _call(self, session: Engine, answer: Answer, last: Answer | None = None, start: int = 0) -> np.ndarray | None:
        """Feed and compare one call after `start` tokens; return its logits, or None after a near tie.

        `last` is torch's answer to the call before, None if nothing was seen.
        """
        self.result.checks += 1
        self.result.tokens += len(answer.ids)
        single = len(answer.ids) == 1
        before = None if single else session.snapshot()
        logits = (_step(session, answer.ids, start) if single else session.prefill(answer.ids))[0]
        after = session.snapshot()
        if not self.adrift:
            agreed = False
            try:
                agreed = self.agrees(after, answer, logits, last.state if last else None, start)
            except Mismatch:
                if before is None or self._reference is None:
                    raise
                session.restore(before)
                past = (last and last.cache) or self._reference.new_cache()
                with self._progress(f"tied scores after {start} tokens", len(answer.ids), "steps") as advance:
                    replay(self, session, self._reference, past, answer.ids, start, advance)
            if agreed:
                self._check_forgotten(session, answer)
                return logits
            self.result.near_ties += 1
        self.resume(session, after, answer)
        return None

    def _check_forgotten(self, session: Engine, answer: Answer) -> None:
        """Compare the share of attention on forgotten tokens, if the graph returns it."""
        if answer.forgotten is None:
            return
        assert isinstance(session, OnnxSession) and session.forgotten is not None
        errors = np.abs(session.forgotten[0] - answer.forgotten)
        if not (errors <= self.tolerance.state).all():
            layer = int(errors.argmax())
            raise Mismatch(layer, f"the share of attention on forgotten tokens is off by {errors[layer]:.1e}")

    def _check_choice(self, expected: np.ndarray, found: np.ndarray) -> None:
        """Compare the greedy choice, unless two logits are closer than the tolerance."""
        self.result.greedy_tokens += 1
        if expected.argmax() == found.argmax() or expected.max() - expected[found.argmax()] < 2 * self.tolerance.logits:
            self.result.greedy_tokens_equal += 1
        else:
            raise Mismatch(None, "the greedy choice is another token")


def _step(session: Engine, ids: np.ndarray, start: int) -> np.ndarray:
    """Advance by one token, in every eighth step as the first of a draft whose other tokens are taken back."""
    if start % WHOLE or not isinstance(session, OnnxSession):
        return session.step(int(ids[0]))
    session.propose(np.arange(REJECTED))
    session.commit(0)
    logits = session.propose(np.append(ids, np.arange(REJECTED)))[:, 0].copy()
    session.commit(1)
    return logits


def _explain(artifact: Artifact, found: Mismatch | None, mismatch: Mismatch) -> VerificationError:
    """Return an error that names the first layer that differs, if one was found."""
    where = "no layer was found that differs by itself"
    if found is not None and found.layer is not None:
        where = f"layer {found.layer} is the first that differs ({found.what})"
    seen = mismatch.what if mismatch.layer is None else f"layer {mismatch.layer}: {mismatch.what}"
    return VerificationError(
        f"the {artifact.manifest.lowering} graph does not compute what torch computes: {where}; noticed by: {seen}",
        hint="nothing was written; please report this with the model's config.json and the version of onnxruntime",
    )
