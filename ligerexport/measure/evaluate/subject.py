"""What is measured: a Transformer, a converted checkpoint or an artifact, opened as a scorer with its tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ligerexport.artifact.artifact import is_artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, MissingDependency, UsageError
from ligerexport.measure.evaluate.settings import Settings
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from ligerexport.measure.evaluate.scorer import Scorer


@dataclass(frozen=True)
class Subject:
    """An opened model.

    Attributes:
        name: As the user named it.
        scorer: What the measurements read it through.
        text: Its tokenizer.
        trained_length: In tokens.
        state_bytes: Of one sequence; None where the state grows with the text.
        model: The torch model; None for an artifact.
    """

    name: str
    scorer: Scorer
    text: TextModel
    trained_length: int
    state_bytes: int | None = None
    model: PreTrainedModel | None = None

    @property
    def converted(self) -> bool:
        """Whether it is a torch model that was converted."""
        return self.model is not None and hasattr(self.model.config, "liger")

    @property
    def prefix(self) -> list[int]:
        """Ids that the tokenizer puts before every text."""
        return self.text.encode("")


def open_subject(model: str | Path, settings: Settings, progress: ProgressFactory = silent) -> Subject:
    """Open a model for measuring.

    Args:
        model: An artifact, a checkpoint directory, converted or not, a hub id, or a built-in model.
        settings: Device, dtype and batch; an artifact has its own.
        progress: Opens a phase.

    Raises:
        SourceError: There is no such model.
        CheckpointError: It is incomplete or damaged.
        ArtifactError: The artifact is damaged or for another runtime.
        MissingDependency: A runtime or a device is not there.
    """
    return _artifact(Path(model).expanduser()) if is_artifact(model) else _checkpoint(model, settings, progress)


def _artifact(path: Path) -> Subject:
    from ligerexport.measure.evaluate.scorer import SessionScorer
    from ligerexport.run.runtime import load

    scorer = SessionScorer(load(path, scoring=True))
    manifest = scorer.session.artifact.manifest
    state = None if manifest.growth else manifest.bytes.state_per_sequence
    return Subject(path.name, scorer, TextModel(path), manifest.model.trained_length, state)


def _checkpoint(model: str | Path, settings: Settings, progress: ProgressFactory) -> Subject:
    import torch

    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.checkpoint.loading import load_any
    from ligerexport.checkpoint.sources import resolve
    from ligerexport.measure.evaluate.scorer import TorchScorer

    device = pick_device(settings.device)
    source = resolve(model, progress=progress)
    info = check_checkpoint(source.path)
    if not (source.path / "tokenizer.json").is_file():
        raise CheckpointError(
            f"no tokenizer.json in {source.path}",
            hint="save the tokenizer with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)",
        )
    dtype: torch.dtype = getattr(torch, settings.dtype)
    with progress(f"loading {source.name}", info.bytes) as advance:
        loaded = load_any(info, dtype)
        loaded.to(device)  # type: ignore[arg-type]
        advance(info.bytes)
    batch = 1 if device.type == "cpu" else settings.batch
    length = loaded.config.get_text_config().max_position_embeddings
    return Subject(source.name, TorchScorer(loaded, batch), TextModel(source.path), length, state_bytes(loaded), loaded)


def state_bytes(model: PreTrainedModel) -> int | None:
    """Return the bytes of one sequence's state as the model keeps it; None where it grows with the text."""
    from ligerexport.layers.mixer import layer_specs

    if not hasattr(model.config, "liger"):
        return None
    specs = layer_specs(model.config)
    width = model.dtype.itemsize
    return None if None in specs else sum(t.nbytes(width) for spec in specs if spec for t in spec.state())


def pick_device(name: str) -> torch.device:
    """Return a device; `auto` takes a GPU where there is one.

    Raises:
        MissingDependency: It is not there.
    """
    import torch

    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        name = "cuda" if there["cuda"] else "cpu"
    if not there[name]:
        raise MissingDependency(f"a {name} device", hint="leave --device out, or: --device cpu")
    return torch.device(name)


def check_same_tokenizer(model: Subject, teacher: Subject) -> None:
    """Refuse to compare models whose tokens mean different things.

    Raises:
        UsageError: Their vocabularies differ.
    """
    ours, theirs = model.text.vocabulary, teacher.text.vocabulary
    if ours != theirs:
        differing = {token for token, _ in ours.items() ^ theirs.items()}
        raise UsageError(
            f"{model.name} and {teacher.name} have different tokenizers ({len(differing):,} tokens differ)",
            hint="compare a model with the Transformer that it was converted from",
        )
    if model.scorer.vocab_size != teacher.scorer.vocab_size:
        raise UsageError(
            f"{model.name} has {model.scorer.vocab_size:,} logits, {teacher.name} {teacher.scorer.vocab_size:,}",
            hint="compare a model with the Transformer that it was converted from",
        )
