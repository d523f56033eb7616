"""The tables of parts, controls and tasks, and the checked settings of one evaluation.

Nothing here measures or loads torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ligerexport.errors import UsageError, look_up

PARTS = {
    "nll": "negative log likelihood of held-out text in nats per token, by position",
    "agreement": "share of equal first choices and KL(teacher || model) in nats per token, by position",
    "recall": "one key stated once or twice, several keys, associations, copies of a span: by distance",
    "reading": "answers to questions about a passage among others: by distance",
    "formats": "a key said once in one of many formats: by distance",
    "chats": "answers to questions about the first turn of a chat: by distance",
    "tasks": "tasks of lm-eval",
}

TEXT_PARTS = frozenset({"nll", "agreement", "recall", "formats"})
"""Parts that read the user's text."""
QUESTION_PARTS = frozenset({"reading", "chats"})
"""Parts that read the user's questions."""

CONTROLS = {
    "window": "all slots of the memory for sinks and window, no recurrence",
    "equal-window": "all bytes of the state for sinks and window, equal in all layers and heads, no recurrence",
    "no-recurrence": "the same memory without the recurrence",
    "random-judge": "the scored slots for random tokens",
}

TASKS = {
    "piqa": 0, "arc_easy": 0, "arc_challenge": 0, "hellaswag": 0, "winogrande": 0, "lambada_openai": 0, "mmlu": 5,
}  # fmt: skip
"""Tasks with their usual number of examples in the prompt; any other task of lm-eval runs without examples."""

DEFAULT_TASKS = ("piqa", "arc_easy", "arc_challenge", "hellaswag", "winogrande")

READING_DISTANCES = (0, 1000, 3000, 7000)
"""Numbers of tokens among which the paragraph with the answer stands; at 0 it stands alone."""
KEY_DISTANCES = (0, 1024, 4096)
"""Numbers of tokens of prose between a key in one of many formats and the question."""
HALVES = ("dev", "test")
"""Halves of the passages of questions."""

TASK_LENGTHS = (4096,)
"""Numbers of tokens of the prompts that a task makes itself."""

DTYPES = ("float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda", "mps")

DISTANCES = (128, 512, 1024, 2048, 4096)
"""Numbers of tokens of prose around a key, and between a span and its copy."""
KEYS = (4, 8)
"""Numbers of named keys in one prompt."""
PAIRS = (4, 8, 16, 32)
"""Numbers of associations in one prompt."""
PAIR_LENGTHS = (256, 512, 1024)
"""Number of tokens before the questions in a prompt with associations."""


@dataclass(frozen=True)
class Settings:
    """The settings of one evaluation.

    Attributes:
        parts: Rows of `PARTS`.
        tasks: Names of lm-eval's tasks.
        controls: Rows of `CONTROLS`.
        length: Number of tokens in a window of held-out text, and the largest distance of recall.
        windows: Largest number of windows, spread evenly over the text.
        trials: Number of prompts for each distance of recall, reading, formats and chats.
        half: Row of `HALVES`, the half of the questions' passages that is used; None takes all.
        answer_tokens: Largest number of tokens of an answer that a model writes; at 0 it writes none.
        limit: Largest number of questions per task; None takes all.
        task_lengths: Numbers of tokens of the prompts that a task makes itself, such as those of RULER.
        seed: Seed for everything that is random.
        batch: Number of sequences at a time on a GPU; a CPU takes one.
        device: Row of `DEVICES`.
        dtype: Row of `DTYPES`, the type of a torch model's weights.

    Raises:
        UsageError: A value makes no sense, or a name is in no table.
    """

    parts: tuple[str, ...] = ("nll", "recall")
    tasks: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    length: int = 8192
    windows: int = 16
    trials: int = 64
    half: str | None = None
    answer_tokens: int = 32
    limit: int | None = None
    task_lengths: tuple[int, ...] = TASK_LENGTHS
    seed: int = 0
    batch: int = 8
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for part in self.parts:
            look_up("part", part, PARTS)
        for control in self.controls:
            look_up("control", control, CONTROLS)
        if self.half is not None:
            look_up("half", self.half, dict.fromkeys(HALVES))
        look_up("device", self.device, dict.fromkeys(DEVICES))
        look_up("dtype", self.dtype, dict.fromkeys(DTYPES))
        if not self.parts:
            raise UsageError("nothing to measure", hint=f"choose parts from {', '.join(PARTS)}")
        for name in ("windows", "trials", "batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} {getattr(self, name)}", hint="give at least 1")
        if self.length < 2:
            raise UsageError(f"length {self.length}", hint="a window has at least 2 tokens")
        if self.answer_tokens < 0:
            raise UsageError(f"answer_tokens {self.answer_tokens}", hint="give 0 or more")
        if not self.task_lengths or min(self.task_lengths) < 1:
            raise UsageError(f"task_lengths {self.task_lengths}", hint="give lengths in tokens, such as 1024,4096")
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"limit {self.limit}", hint="give at least 1, or leave it out for all questions")

    @property
    def distances(self) -> tuple[int, ...]:
        """Distances of recall that fit into a window; the window itself if none does."""
        return self.fitting(DISTANCES) or (self.length,)

    def fitting(self, distances: Sequence[int]) -> tuple[int, ...]:
        """Return the distances that fit into a window."""
        return tuple(distance for distance in distances if distance <= self.length)

    @property
    def needs_text(self) -> bool:
        """Whether any part reads the user's text."""
        return bool(TEXT_PARTS & set(self.parts))

    @property
    def needs_questions(self) -> bool:
        """Whether any part reads the user's questions."""
        return bool(QUESTION_PARTS & set(self.parts))


def choose_parts(
    parts: Sequence[str] | None, tasks: Sequence[str] | None, *, text: bool, teacher: bool, questions: bool = False
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return parts and tasks: the requested ones, or those that the inputs allow.

    Args:
        parts: Rows of `PARTS`; None chooses them by the other arguments.
        tasks: Names of tasks; None takes `DEFAULT_TASKS` if the part is requested.
        text: Whether held-out text was given.
        teacher: Whether there is a model to compare with.
        questions: Whether a file of questions was given.

    Raises:
        UsageError: A part lacks an input that it needs.
    """
    if parts is None:
        chosen = ["nll", "recall"] if text or not (tasks or questions) else []
        chosen += ["agreement"] if teacher and chosen else []
        chosen += ["reading"] if questions else []
    else:
        chosen = list(dict.fromkeys(parts))
    if tasks and "tasks" not in chosen:
        chosen.append("tasks")
    for part in chosen:
        look_up("part", part, PARTS)
    if "agreement" in chosen and not teacher:
        raise UsageError("agreement needs a teacher", hint="give it: --against MODEL")
    for given, needing, what, hint in (
        (text, TEXT_PARTS, "text", "give plain text that no model was trained on: --text FILE_OR_DIRECTORY"),
        (questions, QUESTION_PARTS, "questions", "give rows with passage, question and answer: --questions FILE"),
    ):
        if not given and (without := [part for part in chosen if part in needing]):
            raise UsageError(f"no {what} for {', '.join(without)}", hint=hint)
    wanted = tuple(tasks or DEFAULT_TASKS) if "tasks" in chosen else ()
    return tuple(part for part in PARTS if part in chosen), wanted
