"""Measure the loss from storing weights and state in less than fp32."""

from __future__ import annotations

from typing import Any

import numpy as np

from ligerexport.artifact.artifact import Artifact
from ligerexport.console import ProgressFactory
from ligerexport.errors import VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.verify.slots import is_rounded, unrounded
from ligerexport.exporters.verify.torch_model import Reference


def cost_of_precision(
    spec: ModelSpec, artifact: Artifact, ids: np.ndarray, progress: ProgressFactory
) -> dict[str, Any] | None:
    """Return the loss on a text of an artifact as it runs, with activations rounded too, and of fp32.

    Args:
        spec: The checkpoint.
        artifact: The artifact built from it.
        ids: The text `[T]`.

    Returns:
        NLL in nats per token of both, and the divergence of the artifact's predictions; None if nothing is rounded. If
        the state is rounded too, `nll_state` is the loss with weights in fp32, so that it shows what the state costs.

    Raises:
        VerificationError: The logits are not finite.
    """
    from ligerexport.exporters.onnx.session import OnnxSession

    if artifact.manifest.precision == "float32" and not is_rounded(spec):
        return None
    totals, done = np.zeros(3), 0
    prepack = artifact.manifest.block is not None  # without it, products do not round activations and take far longer
    with progress("measuring the precision", len(ids) - 1, "steps") as advance:
        before = Reference(unrounded(spec)).every(ids)
        for logits in OnnxSession(artifact, prepack=prepack, scoring=True).every(ids[:-1]):
            part = slice(done, done + logits.shape[1])
            ours, theirs = _log_softmax(logits[0]), _log_softmax(before[part])
            losses = (-np.take_along_axis(x, ids[1:][part, None], 1).sum() for x in (theirs, ours))
            totals += [*losses, (np.exp(theirs) * (theirs - ours)).sum()]
            done = part.stop
            advance(logits.shape[1])
    if not np.isfinite(totals).all():
        raise VerificationError(
            f"logits with {artifact.manifest.precision} weights are not finite", hint="build with --weights fp32"
        )
    nll_fp32, nll, divergence = (totals / done).tolist()
    cost = {"text": "built-in", "tokens": done, "nll_float32": nll_fp32, "nll": nll, "kl": divergence}
    if is_rounded(spec):
        alone = nll if artifact.manifest.precision == "float32" else _loss(Reference(spec).every(ids[:-1]), ids)
        cost["nll_state"] = alone
    return cost


def _loss(logits: np.ndarray, ids: np.ndarray) -> float:
    """Return the mean NLL of the tokens after the first, from the logits `[T - 1, V]` before each."""
    return float(-np.take_along_axis(_log_softmax(logits), ids[1:, None], 1).mean())


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
