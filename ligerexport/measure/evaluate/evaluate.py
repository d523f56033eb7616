"""`evaluate`: open the models, measure all of them in the same way, and make a report.

Torch is imported only when something is measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import is_artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError
from ligerexport.measure.evaluate.estimate import Table
from ligerexport.measure.evaluate.questions import Question, questions_file, read_questions
from ligerexport.measure.evaluate.report import REPORT, Report
from ligerexport.measure.evaluate.settings import (
    KEY_DISTANCES,
    KEYS,
    PAIR_LENGTHS,
    PAIRS,
    QUESTION_PARTS,
    READING_DISTANCES,
    Settings,
    choose_parts,
)
from ligerexport.measure.opened import Opened, TorchModel, check_same_tokenizer, open_model
from ligerexport.staging import check_destination
from ligerexport.text.corpus import cut_windows, read_tokens, text_files
from ligerexport.versions import require, versions

TEACHER, MODEL, EQUAL_WINDOW = "teacher", "model", "equal-window"


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    parts: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    task_data: str | Path | None = None,
    questions: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: ProgressFactory | None = None,
    **settings: Any,
) -> Report:
    """Measure a model: held-out loss by position, agreement with its teacher, recall, reading, tasks, controls.

    Args:
        model: A converted checkpoint, a Transformer (directory, hub id or built-in model), or a built artifact.
        against: The Transformer to compare with, which is measured too.
        text: Plain text that no model was trained on: files, or directories with `.txt` files.
        parts: Rows of `PARTS`; None takes those that the inputs allow: `nll` and `recall` with text, `agreement` with a
            teacher, `reading` with questions, `tasks` with names of tasks.
        tasks: Names of lm-eval's tasks.
        task_data: Directory with the tasks' data sets, for machines without a network.
        questions: File with rows that have a passage, a question about it, the answer and optionally a title.
        output: Directory for `report.json`, `report.md` and plots; None writes nothing.
        force: Whether an older report in `output` may be replaced.
        progress: Opens a phase of long work; see `ligerexport.console.progress`.
        **settings: Fields of `Settings`.

    Returns:
        The measurements with their standard errors; `to_dict()` and `markdown()` render them.

    Raises:
        UsageError: Inputs are missing, make no sense, or do not fit each other.
        SourceError: There is no such model.
        CheckpointError: A checkpoint is damaged, or controls are requested for a model that is not converted.
        ArtifactError: An artifact is damaged or for another runtime.
        MissingDependency: lm-eval, a runtime or a device is not available.
    """
    plan = EvaluatePlan(
        model, against=against, text=text, parts=parts, tasks=tasks, task_data=task_data, questions=questions,
        output=output, force=force, **settings,
    )  # fmt: skip
    report = plan.run(progress)
    plan.save(report)
    return report


class EvaluatePlan:
    """An evaluation whose arguments, those of `evaluate`, are checked. No model is opened.

    Attributes:
        files: The files of the held-out text.
        questions: The questions about passages.
        settings: The settings.

    Raises:
        UsageError: Inputs are missing, make no sense, or do not fit each other.
        CheckpointError: A control is asked of an artifact.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        against: str | Path | None = None,
        text: Sequence[str | Path] = (),
        parts: Sequence[str] | None = None,
        tasks: Sequence[str] | None = None,
        task_data: str | Path | None = None,
        questions: str | Path | None = None,
        output: str | Path | None = None,
        force: bool = False,
        **settings: Any,
    ) -> None:
        require("build")
        chosen, names = choose_parts(
            parts, tasks, text=bool(text), teacher=against is not None, questions=questions is not None
        )
        controls = tuple(settings.pop("controls", None) or ())
        self.settings = Settings(parts=chosen, tasks=names, controls=controls, **settings)
        self.files = text_files(text) if self.settings.needs_text else []
        self.questions: list[Question] = []
        if questions is not None and self.settings.needs_questions:
            self.questions = read_questions(questions_file(questions), self.settings.half)
        if output is not None:
            check_destination(output, force=force, marker=REPORT)
        if controls and is_artifact(model):
            raise _no_controls(str(model))
        self.model, self.against, self.text, self.output, self.force = model, against, text, output, force
        self.asked = questions
        self.task_data = None if task_data is None else Path(task_data).expanduser().resolve()

    def describe(self) -> dict[str, Any]:
        """Return facts about what `run` would measure, without loading or fetching anything."""
        from ligerexport.checkpoint.loading import check_loadable

        for path in (Path(name).expanduser() for name in (self.model, self.against) if name and not is_artifact(name)):
            if path.is_dir():  # other models may need a download
                check_loadable(path)
        wanted = {"lm_eval": "eval"} if self.settings.tasks else {}
        return {
            "model": str(self.model),
            "rows": [*([TEACHER] if self.against else []), MODEL, *self.settings.controls],
            "text_files": len(self.files),
            "questions": len(self.questions),
            "text_bytes": sum(file.stat().st_size for file in self.files),
            "tokens_each": tokens_to_read(self.settings),
            "missing_extras": [extra for module, extra in wanted.items() if not find_spec(module)],
        }

    def run(self, progress: ProgressFactory | None = None) -> Report:
        """Measure. Only `save` writes files, so that a full disk does not lose the measurements."""
        start, progress = time.perf_counter(), progress or silent
        settings = self.settings
        if settings.tasks:
            from ligerexport.measure.evaluate.tasks import check_tasks

            check_tasks(settings.tasks, self.task_data)
        models = _open(self.model, self.against, settings, progress)
        tables: dict[str, Table] = {name: {} for name in models}
        ids = read_tokens(self.files, models[MODEL].text)
        left_out = _ask(models, self.questions, settings, tables, progress)
        if "formats" in settings.parts:
            _ask_keys(models, ids, settings, tables, progress)
        if {"nll", "agreement"} & set(settings.parts):
            _read_by_position(models, ids, settings, tables, progress)
        if "recall" in settings.parts:
            _recall(models, ids, settings, tables, progress)
        if settings.tasks:
            _run_tasks(models, settings, self.task_data, tables, progress)
        asked = {
            "model": str(self.model),
            "against": None if self.against is None else str(self.against),
            "text": list(map(str, self.text)),
            "questions": None if self.asked is None else str(self.asked),
        }
        return Report(
            asked | asdict(settings),
            tables,
            {name: model.sequence_bytes for name, model in models.items()},
            _environment(models[MODEL])
            | {"text_tokens": len(ids), "seconds": round(time.perf_counter() - start, 1)}
            | _left_out(settings, tables[MODEL], left_out),
        )

    def save(self, report: Report) -> None:
        """Write the report, if `output` was given."""
        if self.output is not None:
            report.save(self.output, force=self.force)


def tokens_to_read(settings: Settings) -> int:
    """Return the approximate number of tokens that each model reads, without tasks."""
    total = settings.windows * settings.length if {"nll", "agreement"} & set(settings.parts) else 0
    if "recall" in settings.parts:
        pairs = sum(n for n in PAIR_LENGTHS if n <= max(settings.distances)) * len(PAIRS)
        total += settings.trials * (sum(settings.distances) * (3 + len(KEYS)) + pairs)
    if "formats" in settings.parts:
        total += 2 * settings.trials * sum(settings.fitting(KEY_DISTANCES))
    for part in QUESTION_PARTS & set(settings.parts):
        passes = 2 if settings.answer_tokens and part == "reading" else 1
        total += passes * settings.trials * sum(settings.fitting(READING_DISTANCES))
    return total


def _open(
    model: str | Path, against: str | Path | None, settings: Settings, progress: ProgressFactory
) -> dict[str, Opened]:
    """Open teacher, model and controls, in the order of the report's rows."""

    def opened(name: str | Path) -> Opened:
        return open_model(name, scoring=True, batch=settings.batch, device=settings.device, dtype=settings.dtype,
                          progress=progress)  # fmt: skip

    measured = opened(model)
    models = {MODEL: measured}
    if against is not None:
        teacher = opened(against)
        check_same_tokenizer(measured, teacher)
        models = {TEACHER: teacher, MODEL: measured}
    if settings.controls:
        if not isinstance(measured, TorchModel) or measured.kind != "converted":
            raise _no_controls(measured.name)
        from ligerexport.measure.evaluate.controls import make_control

        for name in settings.controls:
            control = make_control(name, measured.model, settings.seed)
            models[name] = TorchModel(control, measured.batch, name, measured.path)
    return models


def _no_controls(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a converted checkpoint, which controls need",
        hint="give the directory that convert or recover wrote",
    )


def _read_by_position(
    models: dict[str, Opened], ids: list[int], settings: Settings, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.nll import by_position

    windows = cut_windows(ids, settings.length, settings.windows, models[MODEL].prefix)
    teacher = TEACHER if "agreement" in settings.parts else None
    total = len(models) * len(windows) * (settings.length - 1)
    with progress("reading held-out text", total, "steps") as advance:
        batch = min(model.batch for model in models.values())
        measured = by_position(models, windows, teacher=teacher, batch=batch, advance=advance)
    for name, table in measured.items():
        tables[name] |= table if "nll" in settings.parts else {key: row for key, row in table.items() if key != "nll"}


def _recall(
    models: dict[str, Opened], ids: list[int], settings: Settings, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.recall import PlainTokenizer, recall, word_ids

    tokenizer = PlainTokenizer(models[MODEL].text)
    words = word_ids(tokenizer, len(models[MODEL].text.vocabulary))
    total = tokens_to_read(replace(settings, parts=("recall",)))
    for name, model in models.items():
        with progress(f"recall of the {name}", total, "steps") as advance:
            tables[name] |= recall(
                model, tokenizer, ids, distances=settings.distances, trials=settings.trials, seed=settings.seed,
                prefix=model.prefix, words=words, advance=advance,
            )  # fmt: skip


def _ask(
    models: dict[str, Opened],
    questions: list[Question],
    settings: Settings,
    tables: dict[str, Table],
    progress: ProgressFactory,
) -> list[str]:
    """Ask about passages and about the first turn of chats; return what could not be asked, and why."""
    from ligerexport.measure.evaluate.answers import ask, summarise
    from ligerexport.measure.evaluate.reading import chat_prompts, reading_prompts

    text, left_out = models[MODEL].text, []
    for part, make in (("reading", reading_prompts), ("chats", chat_prompts)):
        if part not in settings.parts:
            continue
        if part == "chats" and not text.chat_template:
            left_out.append("chats: the model has no chat template")
            continue
        distances = settings.fitting(READING_DISTANCES)
        prompts = {str(d): make(text, questions, d, settings.trials, settings.seed) for d in distances}
        tokens = settings.answer_tokens if part == "reading" else 0
        total = sum(len(p.context) + len(p.question) for asked in prompts.values() for p in asked) * (1 + bool(tokens))
        samples = {}
        for name, model in models.items():
            with progress(f"{part} of the {name}", total, "steps") as advance:
                samples[name] = ask(model, part, prompts, tokens, advance)
        present = {key: key if key in models else None for key in (TEACHER, EQUAL_WINDOW)}
        found = summarise(samples, part, teacher=present[TEACHER], control=present[EQUAL_WINDOW])
        for name, table in found.items():
            tables[name] |= table
    return left_out


def _ask_keys(
    models: dict[str, Opened], ids: list[int], settings: Settings, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.answers import ask_keys
    from ligerexport.measure.evaluate.reading import key_prompts

    text, trials, seed = models[MODEL].text, settings.trials, settings.seed
    prompts = {
        str(d): (
            key_prompts(text, ids, d, trials, seed),
            key_prompts(text, ids, d, trials, seed, said=False),
        )
        for d in settings.fitting(KEY_DISTANCES)
    }
    total = sum(len(p.context) + len(p.question) for pair in prompts.values() for asked in pair for p in asked)
    for name, model in models.items():
        with progress(f"keys of the {name}", total, "steps") as advance:
            tables[name] |= ask_keys(model, prompts, advance)


def _run_tasks(
    models: dict[str, Opened],
    settings: Settings,
    data: Path | None,
    tables: dict[str, Table],
    progress: ProgressFactory,
) -> None:
    from ligerexport.measure.evaluate.tasks import run_tasks

    length = min(model.trained_length for model in models.values())
    for name, model in models.items():
        with progress(f"tasks of the {name}", None, "steps") as advance:
            scores = run_tasks(
                model, model.text, settings.tasks, max_length=length, limit=settings.limit, seed=settings.seed,
                data=data, lengths=settings.task_lengths, advance=advance,
            )  # fmt: skip
        tables[name]["tasks"] = scores


def _left_out(settings: Settings, table: Table, others: list[str]) -> dict[str, str]:
    """Return the measurements that could not be made, and why."""
    if "recall" in settings.parts and not any(name.startswith("pairs") for name in table):
        others = ["pairs of words: the vocabulary has too few words, or the length is too small", *others]
    return {"left_out": "; ".join(others)} if others else {}


def _environment(model: Opened) -> dict[str, Any]:
    names = ("torch", "transformers", *(["onnxruntime"] if model.kind == "artifact" else []))
    where = platform.machine()
    if model.device == "cuda":
        import torch

        where = torch.cuda.get_device_name()
    return versions(*names) | {"machine": where}
