"""The settings of a recovery, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ligerexport.errors import UsageError
from ligerexport.train.recipes import DEFAULT_RECIPE, Recipe, get_recipe

TARGETS = ("q_proj", "k_proj", "v_proj")
DEFAULT_TOKENS = 3_000_000


def given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are not None; None means the default."""
    return {key: value for key, value in settings.items() if value is not None}


@dataclass(frozen=True)
class RecoverConfig:
    """The settings of `recover`, except model, data and paths.

    Attributes:
        recipe: Row of `RECIPES`.
        rank: LoRA rank.
        alpha: LoRA alpha; the product of LoRA's matrices is scaled by alpha / rank.
        targets: Names of the projections that get LoRA.
        tokens: Number of tokens to train on, `steps * batch_tokens`; None if `steps` is given.
        steps: Number of optimizer steps; None computes it from `tokens`.
        length: Number of tokens in a row; documents are packed into rows, and none is longer.
        batch_tokens: Number of tokens per optimizer step, over all processes: a multiple of `length`.
        micro_batch_tokens: Number of tokens in a process's memory at a time; None takes its whole share of the batch.
        rate: Largest learning rate; None takes the recipe's.
        warmup: Number of steps in which the rate rises; None takes the recipe's.
        overlong: Whether a sample longer than `length` is cut or dropped.
        dtype: Type of the frozen weights and of the arithmetic. LoRA, its optimizer and all losses are always fp32.
        gradient_checkpointing: Whether to recompute activations instead of keeping them.
        seed: Seed for the order of the data and for LoRA's initial values.
        save_every: Number of steps between two saved states.

    Raises:
        UsageError: A value makes no sense, or two values exclude each other.
    """

    recipe: str = DEFAULT_RECIPE
    rank: int = 8
    alpha: float = 8.0
    targets: tuple[str, ...] = TARGETS
    tokens: int | None = None
    steps: int | None = None
    length: int = 1024
    batch_tokens: int = 8192
    micro_batch_tokens: int | None = None
    rate: float | None = None
    warmup: int | None = None
    overlong: Literal["cut", "drop"] = "cut"
    dtype: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    seed: int = 0
    save_every: int = 100

    def __post_init__(self) -> None:
        object.__setattr__(self, "targets", tuple(self.targets))
        get_recipe(self.recipe)
        if self.tokens is not None and self.steps is not None:
            raise UsageError("both tokens and steps are given", hint="leave one of --tokens and --steps out")
        for name, options in (("dtype", ("bf16", "fp32")), ("overlong", ("cut", "drop"))):
            if getattr(self, name) not in options:
                raise UsageError(f"{name} '{getattr(self, name)}'", hint=f"choose from {', '.join(options)}")
        for name in ("rank", "alpha", "tokens", "steps", "batch_tokens", "micro_batch_tokens", "rate", "save_every"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{name} {value}", hint="give a number above 0")
        if self.warmup is not None and self.warmup < 0:
            raise UsageError(f"warmup {self.warmup}", hint="give a number of steps that is not negative")
        if self.length < 2:
            raise UsageError(f"length {self.length}", hint="a row holds at least 2 tokens: one to read, one to predict")
        if not self.targets:
            raise UsageError("no targets for LoRA", hint=f"--targets {','.join(TARGETS)}")
        for name in ("batch_tokens", "micro_batch_tokens"):
            value = getattr(self, name)
            if value is not None and value % self.length:
                below = max(1, value // self.length) * self.length
                raise UsageError(
                    f"{name} {value} is not a multiple of the length {self.length}",
                    hint=f"try --{name.replace('_', '-')} {below}",
                )

    @property
    def row(self) -> Recipe:
        """The recipe."""
        return get_recipe(self.recipe)

    @property
    def rows(self) -> int:
        """Number of rows per optimizer step, over all processes."""
        return self.batch_tokens // self.length

    @property
    def num_steps(self) -> int:
        """Optimizer steps."""
        return self.steps or max(1, round((self.tokens or DEFAULT_TOKENS) / self.batch_tokens))

    @property
    def max_rate(self) -> float:
        """Largest learning rate."""
        return self.row.rate if self.rate is None else self.rate

    @property
    def warmup_steps(self) -> int:
        """Number of steps in which the rate rises."""
        return round(self.row.warmup * self.num_steps) if self.warmup is None else self.warmup

    def identity(self) -> dict[str, Any]:
        """Return the settings that determine a run's numbers; only a run with equal settings continues its state.

        The size of micro-batches and the interval of saved states are left out: they change no more than rounding.
        """
        free = ("tokens", "micro_batch_tokens", "gradient_checkpointing", "save_every")
        resolved = {"steps": self.num_steps, "rate": self.max_rate, "warmup": self.warmup_steps}
        data = asdict(self) | resolved | {"targets": list(self.targets)}
        return {key: value for key, value in data.items() if key not in free}
