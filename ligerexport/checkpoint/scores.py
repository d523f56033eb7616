"""Find the learned scores of a conversion, and write them into its checkpoint."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ligerexport.checkpoint.checkpoint import INDEX, SINGLE, CheckpointInfo
from ligerexport.checkpoint.fitted import is_fitted
from ligerexport.checkpoint.loading import load_transformer
from ligerexport.checkpoint.sources import BUILTIN_MODELS, Source
from ligerexport.console import ProgressFactory
from ligerexport.errors import CheckpointError, UsageError
from ligerexport.model.config import LigerConfig
from ligerexport.text.corpus import read_tokens
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    from torch import Tensor

    from ligerexport.checkpoint.calibrate import Scores

DATA = Path(__file__).parents[1] / "data"
"""Directory of files that ship with the package."""
WINDOWS = 64
"""Default number of windows of text that a learned score is fitted on."""


@dataclass(frozen=True)
class Fitting:
    """Where learned scores and sizes of memories come from.

    Attributes:
        calibrate: Text files, or directories of them, to fit on.
        scores: File of scores from an earlier fit.
        windows: Number of windows of text that a fit of scores alone reads.
        state_bytes: Bytes that the preset `recall` shares out; None takes its default.
        fit: Whether `recall` fits scores and sizes.
    """

    calibrate: Sequence[str | Path] | None = None
    scores: str | Path | None = None
    windows: int = WINDOWS
    state_bytes: int | None = None
    fit: bool = True


def packaged_scores(source: Source) -> Path | None:
    """Return the scores that ship with this package for a built-in model; None if there are none."""
    return packaged(source, DATA / "scores" / f"{source.name}.safetensors")


def packaged_fit(source: Source) -> Path | None:
    """Return the scores and costs for `recall` that ship for a built-in model; None if there are none."""
    return packaged(source, DATA / "scores" / f"{source.name}.recall.safetensors")


def packaged(source: Source, path: Path) -> Path | None:
    """Return a file or directory that ships with the package, if it exists and the model is the built-in one."""
    builtin = BUILTIN_MODELS.get(source.name)
    if builtin is None or source.revision != builtin.requirement:  # a directory may have the same name
        return None
    return path if path.exists() else None


def find_scores(
    source: Source,
    info: CheckpointInfo,
    liger: LigerConfig,
    texts: Sequence[Path],
    fitting: Fitting,
    progress: ProgressFactory,
) -> Scores:
    """Return the learned scores of a conversion, from the first source that has them.

    Raises:
        UsageError: No source has them.
        CheckpointError: The scores belong to another model.
    """
    from ligerexport.checkpoint.calibrate import Scores, digest, load_scores, read_scores, score_shapes

    shapes = score_shapes(info.config, liger)
    if texts:
        return _fit(source, info, liger, texts, fitting.windows, progress)
    if fitting.scores is not None:
        return read_scores(Path(fitting.scores), shapes, "file")
    if all(name in info.tensors for name in shapes):  # the source was converted before
        tensors = load_scores(info.files, shapes)
        return Scores(tensors, dict(info.config.get("liger_scores") or {}) | {"sha256": digest(tensors)})
    found = packaged_fit(source) if liger.ragged else packaged_scores(source)
    if found is not None and not liger.celled:
        return read_scores(found, shapes, "package")
    raise UsageError(
        f"{'the router of cells' if liger.celled else 'the learned score'} of {source.name} has to be fitted first",
        hint="give some plain text: --calibrate FILE_OR_DIRECTORY, or scores from an earlier fit: --scores FILE",
    )


def _fit(
    source: Source,
    info: CheckpointInfo,
    liger: LigerConfig,
    texts: Sequence[Path],
    windows: int,
    progress: ProgressFactory,
) -> Scores:
    import torch

    from ligerexport.checkpoint.calibrate import Scores, digest, drills, fit_scores, score_shapes, window_length
    from ligerexport.checkpoint.cells import fit_cells

    seed, text = 0, TextModel(source.path)
    rows = drills(text, read_tokens(texts, text), windows, window_length(info.config), seed)
    gpu = torch.cuda.is_available()
    with progress(f"loading {source.name}", info.bytes) as advance:
        model = load_transformer(info.path, info.config, "auto" if gpu else torch.float32)
        model.to("cuda" if gpu else "cpu")  # type: ignore[arg-type]
        advance(info.bytes)
    batch, tensors, explained = 4 if gpu else 1, {}, None
    if liger.foresees:
        fit = fit_scores(model, rows, liger.window, batch=batch, progress=progress)
        shares = [share for layer, share in enumerate(fit.explained) if layer not in liger.unchanged]
        explained, tensors = round(sum(shares) / max(1, len(shares)), 4), dict(fit.tensors)
    if liger.celled:
        tensors |= fit_cells(model, rows, liger, batch=batch, progress=progress)
    tensors = {name: tensors[name] for name in score_shapes(info.config, liger)}
    facts = {"from": "fit", "windows": windows, "tokens": rows.numel(), "seed": seed,
             "explained": explained, "sha256": digest(tensors)}  # fmt: skip
    return Scores(tensors, facts)


def write_weights(stage: Path, info: CheckpointInfo, scores: Scores | None, progress: ProgressFactory) -> None:
    """Put the weights of a conversion in place: the source's files, with only the scores that the conversion needs.

    Raises:
        CheckpointError: Scores to be left out are in a file with other weights.
    """
    from ligerexport.checkpoint.calibrate import digest, load_scores, write_scores

    old = {name for name in info.tensors if is_fitted(name)}
    new: Mapping[str, Tensor] = {} if scores is None else scores.tensors
    if old == set(new) and digest(load_scores(info.files, old)) == digest(new):
        if info.index is not None:
            shutil.copyfile(info.index, stage / INDEX)
        with progress("weights", info.bytes, "bytes") as advance:
            for file in info.files:
                _link(file, stage / file.name)
                advance(file.stat().st_size)
        return
    held = {file: {name for name, tensor in info.tensors.items() if tensor.file == file} for file in info.files}
    if mixed := [file for file, names in held.items() if names & old and names - old]:
        raise CheckpointError(
            f"{mixed[0]} holds a learned score among other weights, so it cannot be left out",
            hint="convert the Transformer that this checkpoint came from",
        )
    kept = [file for file in info.files if not held[file] & old]
    count = len(kept) + bool(new)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)] if count > 1 else [SINGLE]
    places = dict(zip(kept, names[: len(kept)], strict=True))
    with progress("weights", sum(file.stat().st_size for file in kept), "bytes") as advance:
        for file, name in places.items():
            _link(file, stage / name)
            advance(file.stat().st_size)
    if scores is not None and new:
        write_scores(stage / names[-1], scores)
    if count > 1:
        tensors = {tensor: name for file, name in places.items() for tensor in sorted(held[file])}
        tensors |= dict.fromkeys(sorted(new), names[-1])
        size = sum((stage / name).stat().st_size for name in names)
        index = {"metadata": {"total_size": size}, "weight_map": tensors}
        (stage / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _link(source: Path, target: Path) -> None:
    """Put a weight file in place, without copying it if possible."""
    try:
        os.link(source.resolve(), target)
    except OSError:  # the target is on another file system, or that has no links
        shutil.copyfile(source, target)
