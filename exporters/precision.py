"""What storing weights in less than fp32 does: the torch model with the weights as stored, and what that costs."""

from __future__ import annotations

from typing import Any

import numpy as np

from ligerexport.artifact import Artifact
from ligerexport.console import ProgressFactory
from ligerexport.errors import VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import DATA_FILE, WeightFormat, read_matrix, weight_names


def reference_model(
    spec: ModelSpec, artifact: Artifact | None = None, form: WeightFormat | None = None, tolerance: float = 0.0
) -> Any:
    """Return the torch model of a checkpoint in fp32, with the weights that an artifact stores where it rounds them.

    Args:
        spec: The checkpoint.
        artifact: Whose weights to take; None keeps the checkpoint's.
        form: How they are stored.
        tolerance: Largest root mean square difference of a row to the checkpoint's, relative to the row's own.

    Raises:
        VerificationError: A row differs by more.
    """
    import torch

    from ligerexport.convert import load_model

    model = load_model(spec.path, dtype=torch.float32).eval()
    if artifact is None or form is None or form.precision.bits == 32:
        return model
    parameters = dict(model.named_parameters(remove_duplicate=False))
    data = np.memmap(artifact.directory / DATA_FILE, mode="r")
    for name in weight_names(spec):
        if form.bits(spec, name) == 32:
            continue
        own, stored = parameters[name].data, torch.from_numpy(read_matrix(spec, form, data, name))
        apart = (stored - own).norm(dim=1) / own.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        row = int(torch.nan_to_num(apart, nan=torch.inf).argmax())
        if not apart[row] <= tolerance:
            raise VerificationError(
                f"{name} as it is stored is not the checkpoint's: row {row} is off by {apart[row]:.1e} of its size, "
                f"at most {tolerance:.1e} was expected of {form.precision.dtype}",
                hint="nothing was written; build with --weights fp32, and please report this with the model's name",
            )
        own.copy_(stored)
    return model


def cost_of_precision(
    spec: ModelSpec, artifact: Artifact, ids: np.ndarray, progress: ProgressFactory
) -> dict[str, Any] | None:
    """Return the loss of an artifact on a text beside that of fp32, as it runs: activations rounded as well.

    Args:
        spec: The checkpoint.
        artifact: What was built from it.
        ids: The text `[T]`.
        progress: Opens a phase.

    Returns:
        Nats a token of both and the divergence of the artifact's predictions; None where nothing is rounded.

    Raises:
        VerificationError: The logits are not finite.
    """
    import torch

    from ligerexport.exporters.onnx.session import OnnxSession

    if artifact.manifest.precision == "float32":
        return None
    totals, done = np.zeros(3), 0
    with progress("measuring the precision", len(ids) - 1, "steps") as advance:
        with torch.inference_mode():
            before = reference_model(spec)(torch.from_numpy(ids)[None]).logits[0].float().numpy()
        for logits in OnnxSession(artifact, prepack=False, scoring=True).every(ids[:-1]):
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
    return {"text": "built-in", "tokens": done, "nll_float32": nll_fp32, "nll": nll, "kl": divergence}


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
