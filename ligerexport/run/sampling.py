"""Choose the next token: penalties, temperature, cut-offs, and the settings that a model recommends for chat."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ligerexport.errors import ArtifactError, LigerError, UsageError
from ligerexport.reading import read_json

_RANGES: dict[str, tuple[Callable[[float], bool], str]] = {
    "temperature": (lambda x: 0 <= x < math.inf, "a number of at least 0"),
    "top_k": (lambda x: x >= 0 and x % 1 == 0, "a whole number of at least 0"),
    "top_p": (lambda x: 0 < x <= 1, "a number above 0 and at most 1"),
    "min_p": (lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (lambda x: 1e-6 <= x <= 1e6, "a number from 1e-6 to 1e6"),
    "presence_penalty": (lambda x: abs(x) <= 1e6, "a number from -1e6 to 1e6"),
    "frequency_penalty": (lambda x: abs(x) <= 1e6, "a number from -1e6 to 1e6"),
    "seed": (lambda x: x >= 0, "a number of at least 0"),
}
"""Range of each setting, as a test and in words."""

CHAT: dict[str, float] = {"temperature": 0.7, "top_p": 0.95, "min_p": 0.05}
"""Settings of `chat` for a model whose files have none."""
_COLDEST = 1e-30
"""Smallest useful temperature: below it, quotients of different logits overflow fp32, and decoding is greedy."""
_SAMPLED: dict[str, float] = {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
"""Defaults of transformers for settings that a generation_config.json with sampling leaves out."""


class Sampler:
    """Chooses tokens from logits. The same seed and logits give the same tokens.

    The order is that of transformers' processors: repetition penalty, temperature, top_k, top_p, min_p. The two
    additive penalties follow the repetition penalty, as in vLLM.

    Args:
        temperature: Divisor of the logits; 0 takes the most likely token, after the penalties.
        top_k: Number of most likely tokens to keep (and ties with the last); 0 keeps all.
        top_p: Probability that the most likely tokens must reach together to be enough; 1 keeps all.
        seed: Seed for the random numbers; None takes one from the system.
        min_p: Smallest probability to keep, as a share of the largest; 0 keeps all.
        repetition_penalty: Divisor of positive logits, and factor of negative logits, for every token that was read or
            written so far; 1 has no effect.
        presence_penalty: Value subtracted from the logits of tokens that this answer already has. As in OpenAI's API
            and vLLM, the prompt does not count.
        frequency_penalty: Value subtracted for each time that this answer already has the token.

    Raises:
        UsageError: A value makes no sense.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
        *,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        presence_penalty: float = 0.0,
        frequency_penalty: float = 0.0,
    ) -> None:
        given = {
            "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "seed": seed,
            "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
            "frequency_penalty": frequency_penalty,
        }  # fmt: skip
        for name, value in given.items():
            fits, words = _RANGES[name]
            if value is not None and not fits(value):
                raise UsageError(f"{name} {value}", hint=f"give {words}")
        self.temperature = temperature if temperature > _COLDEST else 0.0
        self.top_k, self.top_p, self.min_p = int(top_k), top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.presence_penalty, self.frequency_penalty = presence_penalty, frequency_penalty
        self._penalises = repetition_penalty != 1 or presence_penalty != 0 or frequency_penalty != 0
        self._seed = seed
        self._known: set[int] = set()  # read or written
        self._written: Counter[int] = Counter()  # in this answer

    @property
    def repeatable(self) -> bool:
        """Whether it writes the same text each time."""
        return self.temperature == 0 or self._seed is not None

    def read(self, ids: Iterable[int]) -> None:
        """Record the ids that the model reads before an answer, in addition to all earlier ones."""
        self._written.clear()
        if self._penalises:
            self._known.update(ids)

    def forget(self) -> None:
        """Remove all recorded ids, after the model's state was reset."""
        self._written.clear()
        self._known.clear()

    def __call__(self, logits: np.ndarray) -> int:
        """Return an id for logits `[V]`, and record it.

        Raises:
            LigerError: The logits are not numbers.
        """
        best = int(logits.argmax())  # the first NaN, if there is one
        if not np.isfinite(logits[best]):
            raise LigerError(
                f"the model returned {logits[best]} instead of logits",
                hint="reset the session, or build the artifact again",
            )
        if self._penalises:
            logits = self.penalised(logits)
            best = int(logits.argmax())
        token = best if self.temperature == 0 else self._draw(logits)
        if self._penalises:
            self._known.add(token)
            self._written[token] += 1
        return token

    def penalised(self, logits: np.ndarray) -> np.ndarray:
        """Return a copy of logits `[V]` with the penalties for recorded ids."""
        logits = logits.copy()
        if self.repetition_penalty != 1:
            ids = np.fromiter(self._known, np.int64, len(self._known))
            found = logits[ids]
            logits[ids] = np.where(found < 0, found * self.repetition_penalty, found / self.repetition_penalty)
        ids = np.fromiter(self._written, np.int64, len(self._written))
        counts = np.fromiter(self._written.values(), np.float32, len(self._written))
        logits[ids] -= self.presence_penalty + self.frequency_penalty * counts
        return logits

    @cached_property
    def _random(self) -> np.random.Generator:  # whose module takes memory that a greedy answer does not need
        return np.random.default_rng(self._seed)

    def _draw(self, logits: np.ndarray) -> int:
        ids, weights = self.distribution(logits)
        return int(ids[np.searchsorted(weights.cumsum(), self._random.random(), side="right").clip(max=len(ids) - 1)])

    def distribution(self, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the ids that may be drawn `[N]` and their probabilities `[N]` fp64, for a temperature above 0.

        Args:
            logits: Logits after the penalties, `[V]`.
        """
        logits = logits.astype(np.result_type(logits, np.float32), copy=False)
        ids = np.arange(len(logits))
        if 0 < self.top_k < len(logits):
            ids = np.flatnonzero(logits >= np.partition(logits, -self.top_k)[-self.top_k])
            logits = logits[ids]
        with np.errstate(over="ignore"):  # for temperatures close to 0
            weights = np.exp((logits - logits.max()) / self.temperature)  # 1 for the most likely token
        total = weights.sum(dtype=np.float64)
        # Tokens below (1 - top_p) / V sum to less than 1 - top_p, so top_p needs none of them, and min_p drops the
        # end of the sorted tokens. Sorting only the rest is much faster.
        likely = np.flatnonzero(weights >= max(self.min_p, (1 - self.top_p) / len(weights) * total))
        ids, weights = ids[likely], weights[likely].astype(np.float64)
        if self.top_p < 1:
            order = np.argsort(-weights, kind="stable")
            count = int(np.searchsorted(weights[order].cumsum(), self.top_p * total)) + 1
            ids, weights = ids[order[:count]], weights[order[:count]]
        return ids, weights / weights.sum()


def chat_settings(directory: Path) -> tuple[dict[str, Any], str]:
    """Return a model's sampling settings for a chat, and their origin in words.

    They come from its generation_config.json, read as in transformers: `do_sample: false` is greedy, and a file with
    some settings for sampling gets transformers' defaults for the others. A file without any gets `CHAT`.

    Args:
        directory: Artifact or checkpoint.

    Raises:
        ArtifactError: A value in the file makes no sense.
    """
    file, hint = directory / "generation_config.json", "correct the file, or copy the model's own there again"
    config = read_json(file, ArtifactError, hint) if file.is_file() else {}
    said = {name: config[name] for name in _RANGES if name != "seed" and config.get(name) is not None}
    for name, value in said.items():
        fits, words = _RANGES[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or not fits(value):
            raise ArtifactError(f"{file} has the {name} {value!r:.60}, expected {words}", hint=hint)
    origin = f"from the model's {file.name}"
    if config.get("do_sample") is False:
        return said | {"temperature": 0.0}, origin
    if config.get("do_sample") or said.keys() & {*_SAMPLED, "min_p"}:
        return _SAMPLED | said, origin
    return CHAT | said, f"ours: the model's {file.name} names none"


def describe(settings: Mapping[str, Any], origin: str) -> str:
    """Return one line about the result of `chat_settings`."""
    return "  ".join(f"{name}={value:g}" for name, value in settings.items()) + f"  ({origin})"
