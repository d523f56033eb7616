"""Run lm-eval's tasks on an `Opened` model, with standard errors, from the hub or a directory of data sets."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import lru_cache
from pathlib import Path
from typing import Any

from ligerexport.console import no_bars
from ligerexport.errors import LigerError, MissingDependency, UsageError, close_matches
from ligerexport.measure.evaluate.estimate import Estimate
from ligerexport.measure.evaluate.settings import TASK_LENGTHS, TASKS
from ligerexport.measure.opened import Opened
from ligerexport.text.tokenizer import TextModel

_ABSENT = -1
"""Value that RULER's metrics have for a length that was not measured."""
BOOTSTRAP = 1000
"""Number of bootstrap resamples for the standard error of a perplexity; for shares it has a formula."""


def check_tasks(names: Sequence[str], data: Path | None = None) -> Any:
    """Return lm-eval's task manager, after checking that it has these tasks.

    Args:
        names: Names of tasks or groups of tasks.
        data: Directory with further tasks as YAML files.

    Raises:
        UsageError: A task is unknown, or `data` is not a directory.
        MissingDependency: lm-eval is not installed.
    """
    if data is not None and not data.is_dir():
        raise UsageError(f"no directory {data}", hint="--task-data takes the directory of the data sets")
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"lm-eval ({error.name})", extra="eval") from error
    if data is not None and all(name in _manager(data, False).all_tasks for name in names):
        return _manager(data, False)  # reading all of lm-eval's own tasks takes many seconds
    manager = _manager(data, True)
    for name in names:
        if name not in manager.all_tasks:
            hint = close_matches(name, manager.all_tasks)
            usual = f"usual ones: {', '.join(TASKS)}; all of them: lm_eval ls tasks"
            raise UsageError(f"unknown task '{name}'", hint=hint if hint.startswith("did") else usual)
    return manager


@lru_cache(maxsize=4)
def _manager(data: Path | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    metadata: dict[str, Any] = {"max_seq_lengths": list(TASK_LENGTHS)}  # `_load` changes it for each load
    return TaskManager(None, None if data is None else str(data), defaults, metadata)


def run_tasks(
    scorer: Opened,
    text: TextModel,
    names: Sequence[str],
    *,
    max_length: int,
    limit: int | None = None,
    seed: int = 0,
    data: Path | None = None,
    lengths: Sequence[int] = TASK_LENGTHS,
    advance: Callable[[float], None] = lambda amount: None,
) -> dict[str, Estimate]:
    """Run tasks and return every metric that has a number, as `TASK METRIC`.

    Args:
        names: Names of tasks or groups of tasks.
        max_length: Largest number of tokens of a prompt.
        limit: Number of questions to take from the beginning of each task; None takes all.
        seed: Seed for the choice of examples in the prompt.
        data: Directory with the data sets under their names on the hub, to run without a network.
        lengths: Lengths in tokens at which tasks that make their own prompts, such as those of RULER, are run.
        advance: Called with the number of requests that are done.

    Raises:
        LigerError: The data of a task is missing.
        MissingDependency: lm-eval is not installed.
        UsageError: A task is unknown.
    """
    manager = check_tasks(names, data)
    from lm_eval import evaluate

    from ligerexport.measure.evaluate.harness import HarnessLM

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    model = HarnessLM(scorer, text, max_length, advance)
    scores: dict[str, Estimate] = {}
    with no_bars(), _offline(data), redirect_stdout(sys.stderr):  # some tasks print while they make their prompts
        for name in names:
            try:
                for length in lengths:
                    loaded, makes = _load(manager, name, directory=scorer.path, length=length, seed=seed)
                    found = evaluate(
                        lm=model, task_dict=loaded, limit=limit, bootstrap_iters=BOOTSTRAP, log_samples=False
                    )
                    scores |= _scores(name, found)
                    if not makes:
                        break
            except (ImportError, OSError, ValueError, RuntimeError) as error:
                if isinstance(error, LigerError):
                    raise
                raise LigerError(
                    f"task {name} could not run: {str(error).strip().partition(chr(10))[0]}",
                    hint=None
                    if isinstance(error, ImportError)  # whose message says what to install
                    else "its data may be missing: see the guide on evaluation for --task-data",
                ) from error
    return scores


def _load(manager: Any, name: str, *, directory: Path, length: int, seed: int) -> tuple[Any, bool]:
    """Return a task or a group of tasks, and whether it makes its own prompts, which have at most `length` tokens.

    Args:
        directory: Directory with the tokenizer that counts them.
    """
    manager.metadata.update(tokenizer=str(directory), max_seq_lengths=[length])
    loaded = manager.load([name])
    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None or name in TASKS:
            task.set_config(key="num_fewshot", value=TASKS.get(name, 0))
        task.set_fewshot_seed(seed=seed)
    return loaded, any(task.get_config("custom_dataset") is not None for task in loaded["tasks"].values())


def _scores(name: str, found: Any) -> dict[str, Estimate]:
    """Return the metrics of a task or a group of tasks."""
    measured = found["results"].get(name) or found.get("groups", {}).get(name) or {}
    sizes = found.get("n-samples", {})
    members = sizes.values() if name not in sizes else [sizes[name]]
    count = sum(size["effective"] for size in members)
    scores = {}
    for key, value in measured.items():
        metric, found_filter, filtered = key.partition(",")
        number = isinstance(value, (int, float)) and not (metric.isdigit() and value == _ABSENT)
        if not found_filter or metric.endswith("_stderr") or not number:
            continue
        stderr = measured.get(f"{metric}_stderr,{filtered}")
        label = f"{name} {metric}" if filtered == "none" else f"{name} {metric} {filtered}"
        scores[label] = Estimate(float(value), float(stderr) if isinstance(stderr, (int, float)) else None, count)
    return scores


@contextmanager
def _offline(directory: Path | None) -> Iterator[None]:
    """If a directory is given, work in it without the hub, and restore everything afterwards."""
    if directory is None:
        yield
        return
    import datasets
    import huggingface_hub.constants as hub

    # Both libraries read the environment only when they are imported, so their own switches are set too.
    switches = [(hub, "HF_HUB_OFFLINE"), (datasets.config, "HF_HUB_OFFLINE"), (datasets.config, "HF_DATASETS_OFFLINE")]
    kept = [(module, name, getattr(module, name)) for module, name in switches if hasattr(module, name)]
    environment, before = dict(os.environ), Path.cwd()
    try:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        for module, name, _ in kept:
            setattr(module, name, True)
        os.chdir(directory)
        yield
    finally:
        os.chdir(before)
        for module, name, value in kept:
            setattr(module, name, value)
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
            os.environ.pop(name, None)
            if name in environment:
                os.environ[name] = environment[name]
