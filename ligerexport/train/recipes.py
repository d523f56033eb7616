"""`RECIPES`: which loss is minimised on which share of the tokens, and the settings of each recipe.

A phase names a row of `PHASES` (`ligerexport.train.phases`), which has the arithmetic. Nothing here imports torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ligerexport.errors import UsageError, look_up


@dataclass(frozen=True)
class Phase:
    """A part of the training.

    Attributes:
        loss: Row of `PHASES`.
        share: Share of all steps, between 0 and 1.
        answers: Whether only the tokens of answers count, instead of all tokens.
        weight: Weight of the tokens of answers where all tokens count; the others have 1.
        after: First position of a document that counts: earlier positions have nothing beyond the window to learn from.

    Raises:
        UsageError: A number makes no sense.
    """

    loss: str
    share: float = 1.0
    answers: bool = True
    weight: float = 1.0
    after: int = 0

    @property
    def name(self) -> str:
        """Name in reports."""
        return f"{self.loss}-answers" if self.answers else self.loss

    def __post_init__(self) -> None:
        if not (0 < self.share <= 1 and self.weight > 0 and self.after >= 0):
            raise UsageError(f"phase {self.loss}: share {self.share}, weight {self.weight}, after {self.after}",
                             hint="give a share up to 1, a weight above 0, a position of at least 0")  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """A sequence of phases and its tested settings.

    Attributes:
        phases: Phases in order; their shares sum to 1.
        doc: Description in one line, for tables.
        rate: Largest learning rate of AdamW.
        schedule: Schedule of the learning rate after the warm-up.
        warmup: Share of all steps in which the rate rises.
        decay: Weight decay.
        clip: Largest norm of the gradient; None does not clip.

    Raises:
        UsageError: The shares do not sum to 1.
    """

    phases: tuple[Phase, ...]
    doc: str
    rate: float = 1e-3
    schedule: Literal["constant", "cosine"] = "cosine"
    warmup: float = 0.03
    decay: float = 0.0
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        total = sum(phase.share for phase in self.phases)
        if not math.isclose(total, 1.0, abs_tol=1e-9):
            raise UsageError(f"the shares of the phases sum to {total:g}", hint="make them sum to 1")

    @property
    def needs_teacher(self) -> bool:
        """Whether a phase reads the Transformer that the checkpoint came from."""
        return any(phase.loss != "next_token" for phase in self.phases)

    def phase_at(self, step: int, steps: int) -> Phase:
        """Return the phase of step `step` of `steps`, counted from 0."""
        done = 0.0
        for phase in self.phases[:-1]:
            done += phase.share
            if step < round(done * steps):
                return phase
        return self.phases[-1]


RECIPES: dict[str, Recipe] = {
    "distill": Recipe(
        (
            Phase("align", share=0.35, answers=False),
            Phase("follow", share=0.55, answers=False),
            Phase("follow", share=0.10),
        ),
        "align each layer's attention output with the Transformer's, then follow its predictions",
    ),
    "blend": Recipe(
        (
            Phase("align", share=0.25, answers=False),
            Phase("follow", share=0.25, answers=False),
            Phase("next_token", share=0.50),
        ),
        "align, follow, then next-token prediction on the answers",
    ),
    "recall": Recipe(
        (
            Phase("align", share=0.2, answers=False),
            Phase("follow", share=0.8, answers=False, weight=4.0),
        ),
        "align, then follow the Transformer's predictions, those of answers with four times the weight",
    ),
    "paper": Recipe(
        (Phase("next_token"),),
        "the paper: next-token prediction on the answers, constant rate",
        schedule="constant",
        warmup=0.0,
        decay=0.01,
        clip=None,
    ),
}

DEFAULT_RECIPE = "blend"


def get_recipe(name: str) -> Recipe:
    """Return the row of `RECIPES` with this name."""
    return look_up("recipe", name, RECIPES)


def rate_at(step: int, steps: int, rate: float, warmup: int, schedule: str) -> float:
    """Return the learning rate of step `step` of `steps`: a pure function, so that nothing needs to be stored."""
    if step < warmup:
        return rate * (step + 1) / warmup
    if schedule == "constant":
        return rate
    return rate * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
