"""`evaluate`: opens the models, runs the parts in one order for all of them, and gathers a report.

Heavy imports wait until something is measured.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.artifact.artifact import is_artifact
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError
from ligerexport.measure.evaluate.settings import KEYS, PAIR_LENGTHS, PAIRS, Settings, choose_parts
from ligerexport.measure.evaluate.subject import Subject, check_same_tokenizer, open_subject, state_bytes
from ligerexport.text.corpus import cut_windows, read_tokens, text_files

if TYPE_CHECKING:
    from ligerexport.measure.evaluate.estimate import Table
    from ligerexport.measure.evaluate.report import Report

TEACHER, MODEL = "teacher", "model"


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    parts: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    task_data: str | Path | None = None,
    output: str | Path | None = None,
    force: bool = False,
    progress: ProgressFactory | None = None,
    **settings: Any,
) -> Report:
    """Measure a model: held-out loss by position, agreement with its teacher, recall, tasks, controls.

    Args:
        model: A converted checkpoint, a Transformer (directory, hub id or built-in model), or a built artifact.
        against: The Transformer to compare with; it is measured too.
        text: Plain text that no model was trained on: files, or directories with `.txt` files.
        parts: Rows of `PARTS`; None takes what the inputs allow: `nll` and `recall`, `agreement` with a teacher,
            `tasks` where tasks are named.
        tasks: Names of lm-eval's tasks.
        task_data: Directory with their data sets, for machines without a network.
        output: Directory for `report.json`, `report.md` and plots; None writes nothing.
        force: Whether an older report there may be replaced.
        progress: Opens a phase of long work; see `ligerexport.console.progress`.
        **settings: Fields of `Settings`.

    Returns:
        The numbers with their standard errors; `to_dict()` and `markdown()` render them.

    Raises:
        UsageError: Inputs are missing, make no sense, or do not fit each other.
        SourceError: There is no such model.
        CheckpointError: A checkpoint is damaged, or a control is asked of what was not converted.
        ArtifactError: An artifact is damaged or for another runtime.
        MissingDependency: lm-eval, a runtime or a device is not there.
    """
    start = time.perf_counter()
    progress = progress or silent
    plan = resolve_settings(against=against, text=text, parts=parts, tasks=tasks, **settings)
    data = None if task_data is None else Path(task_data).expanduser().resolve()
    files = text_files(Path(path).expanduser() for path in text) if plan.needs_text else []
    if output is not None:
        from ligerexport.measure.evaluate.report import REPORT
        from ligerexport.staging import check_destination

        check_destination(output, force=force, marker=REPORT)
    if plan.tasks:
        from ligerexport.measure.evaluate.tasks import check_tasks

        check_tasks(plan.tasks, data)
    if plan.controls and is_artifact(model):
        raise _no_controls(str(model))
    subjects = _open(model, against, plan, progress)
    tables: dict[str, Table] = {name: {} for name in subjects}
    ids = read_tokens(files, subjects[MODEL].text)
    if {"nll", "agreement"} & set(plan.parts):
        _read_by_position(subjects, ids, plan, tables, progress)
    if "recall" in plan.parts:
        _recall(subjects, ids, plan, tables, progress)
    if plan.tasks:
        _run_tasks(subjects, plan, data, tables, progress)

    from ligerexport.measure.evaluate.report import Report

    report = Report(
        {"model": str(model), "against": None if against is None else str(against)}
        | {"text": [str(path) for path in text]}
        | asdict(plan),
        tables,
        {name: subject.state_bytes for name, subject in subjects.items()},
        _environment(subjects[MODEL])
        | {"text_tokens": len(ids), "seconds": round(time.perf_counter() - start, 1)}
        | _left_out(plan, tables[MODEL]),
    )
    if output is not None:
        report.save(output, force=force)
    return report


def resolve_settings(
    *,
    against: str | Path | None = None,
    text: Sequence[str | Path] = (),
    parts: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    **settings: Any,
) -> Settings:
    """Return the settings of an evaluation, checked against what it was given.

    Raises:
        UsageError: A part lacks its input, a value makes no sense, or a name is in no table.
    """
    chosen, names = choose_parts(parts, tasks, text=bool(text), teacher=against is not None)
    controls = tuple(settings.pop("controls", None) or ())
    return Settings(parts=chosen, tasks=names, controls=controls, **settings)


def tokens_to_read(plan: Settings) -> int:
    """Return about how many tokens each model reads, tasks left out."""
    total = plan.windows * plan.length if {"nll", "agreement"} & set(plan.parts) else 0
    if "recall" in plan.parts:
        pairs = sum(n for n in PAIR_LENGTHS if n <= max(plan.distances)) * len(PAIRS)
        total += plan.trials * (sum(plan.distances) * (3 + len(KEYS)) + pairs)
    return total


def _open(
    model: str | Path, against: str | Path | None, plan: Settings, progress: ProgressFactory
) -> dict[str, Subject]:
    """Open teacher, model and controls, in the order of the report's rows."""
    subject = open_subject(model, plan, progress)
    subjects = {MODEL: subject}
    if against is not None:
        teacher = open_subject(against, plan, progress)
        check_same_tokenizer(subject, teacher)
        subjects = {TEACHER: teacher, MODEL: subject}
    if plan.controls:
        if not subject.converted:
            raise _no_controls(subject.name)
        from ligerexport.measure.evaluate.controls import make_control
        from ligerexport.measure.evaluate.scorer import TorchScorer

        for name in plan.controls:
            assert subject.model is not None
            control = make_control(name, subject.model, plan.seed)
            scorer = TorchScorer(control, subject.scorer.batch)
            subjects[name] = replace(subject, name=name, scorer=scorer, model=control, state_bytes=state_bytes(control))
    return subjects


def _no_controls(name: str) -> CheckpointError:
    return CheckpointError(
        f"{name} is not a converted checkpoint, controls need one",
        hint="give the directory that convert or recover wrote",
    )


def _read_by_position(
    subjects: dict[str, Subject], ids: list[int], plan: Settings, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.nll import by_position

    windows = cut_windows(ids, plan.length, plan.windows, subjects[MODEL].prefix)
    teacher = TEACHER if "agreement" in plan.parts else None
    scorers = {name: subject.scorer for name, subject in subjects.items()}
    total = len(scorers) * len(windows) * (plan.length - 1)
    with progress("reading held-out text", total, "steps") as advance:
        batch = min(scorer.batch for scorer in scorers.values())
        measured = by_position(scorers, windows, teacher=teacher, batch=batch, advance=advance)
    for name, table in measured.items():
        tables[name] |= table if "nll" in plan.parts else {key: row for key, row in table.items() if key != "nll"}


def _recall(
    subjects: dict[str, Subject], ids: list[int], plan: Settings, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.recall import PlainTokenizer, recall, word_ids

    tokenizer = PlainTokenizer(subjects[MODEL].text)
    words = word_ids(tokenizer, len(subjects[MODEL].text.vocabulary))
    total = tokens_to_read(replace(plan, parts=("recall",)))
    for name, subject in subjects.items():
        with progress(f"recall of the {name}", total, "steps") as advance:
            tables[name] |= recall(
                subject.scorer, tokenizer, ids, distances=plan.distances, trials=plan.trials, seed=plan.seed,
                prefix=subject.prefix, words=words, advance=advance,
            )  # fmt: skip


def _run_tasks(
    subjects: dict[str, Subject], plan: Settings, data: Path | None, tables: dict[str, Table], progress: ProgressFactory
) -> None:
    from ligerexport.measure.evaluate.tasks import run_tasks

    length = min(subject.trained_length for subject in subjects.values())
    for name, subject in subjects.items():
        with progress(f"tasks of the {name}", None, "steps") as advance:
            scores = run_tasks(
                subject.scorer, subject.text, plan.tasks, max_length=length, limit=plan.limit, seed=plan.seed,
                data=data, advance=advance,
            )  # fmt: skip
        tables[name]["tasks"] = scores


def _left_out(plan: Settings, table: Table) -> dict[str, str]:
    """Say which measurement could not be made."""
    if "recall" not in plan.parts or any(name.startswith("pairs") for name in table):
        return {}
    return {"left_out": "pairs of words: the vocabulary has few words, or the length is short"}


def _environment(subject: Subject) -> dict[str, Any]:
    import torch
    import transformers

    from ligerexport import __version__

    versions = {"ligerexport": __version__, "torch": torch.__version__, "transformers": transformers.__version__}
    if subject.model is None:
        import onnxruntime

        return versions | {"onnxruntime": onnxruntime.__version__, "machine": platform.machine()}
    on_gpu = subject.model.device.type == "cuda"
    return versions | {"machine": torch.cuda.get_device_name() if on_gpu else platform.machine()}
