"""`eval`: measure a model, and print tables to stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.bench import counts
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import card, data, format_bytes, progress
from ligerexport.errors import UsageError
from ligerexport.measure.evaluate.settings import CONTROLS, DEVICES, DTYPES, HALVES, PARTS, TASKS


@verb(computes=True)
def eval_(
    model: Annotated[str, typer.Argument(help="A converted checkpoint, a Transformer, or an artifact.")],
    against: Annotated[
        str | None, typer.Option(help="The Transformer that it was converted from; it is measured too.")
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(metavar="PATH", help="Held-out plain text: a file, or a directory of .txt; may be repeated."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(help="Rows with a passage, a question about it, the answer and, if you like, a title."),
    ] = None,
    half: Annotated[
        str | None,
        typer.Option("--half", metavar="HALF", help=f"Ask only about passages of one half: {' or '.join(HALVES)}."),
    ] = None,
    parts: Annotated[
        str | None,
        typer.Option(metavar="PART,...", help=f"Any of: {', '.join(PARTS)}. Default: what the inputs allow."),
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="TASK,...", help=f"Tasks of lm-eval, such as {', '.join(TASKS)}.")
    ] = None,
    task_data: Annotated[
        Path | None, typer.Option(help="Directory with the tasks' data sets, for machines without a network.")
    ] = None,
    controls: Annotated[
        str | None, typer.Option(metavar="CONTROL,...", help=f"Controls to compare with: {', '.join(CONTROLS)}.")
    ] = None,
    length: Annotated[
        int, typer.Option(help="Tokens in a window of text, and the largest distance of recall and reading.")
    ] = 8192,
    windows: Annotated[int, typer.Option(help="Largest number of windows of text.")] = 16,
    trials: Annotated[int, typer.Option(help="Number of prompts for each distance of recall and reading.")] = 64,
    answer_tokens: Annotated[
        int, typer.Option(help="Largest number of tokens of a written answer to a question; 0 writes none.")
    ] = 32,
    limit: Annotated[int | None, typer.Option(help="Largest number of questions per task.")] = None,
    task_lengths: Annotated[
        str | None,
        typer.Option(metavar="N,...", help="Tokens in prompts that a task makes itself, as RULER's do. Default: 4096."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for everything that is random.")] = 0,
    batch: Annotated[int, typer.Option(help="Number of sequences at a time on a GPU.")] = 8,
    device: Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Type of the weights: {', '.join(DTYPES)}.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for report.json, report.md and plots.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Measure a model: loss by position, recall, reading, tasks.

    Checkpoints and artifacts are measured in the same way. The tables have standard errors.
    """
    from ligerexport.measure.evaluate.evaluate import EvaluatePlan

    others = {} if task_lengths is None else {"task_lengths": counts(task_lengths, "--task-lengths")}
    plan = EvaluatePlan(
        model, against=against, text=text or [], parts=split(parts), tasks=split(tasks), task_data=task_data,
        questions=questions, output=output, force=force, controls=split(controls), length=length, windows=windows,
        trials=trials, half=half, answer_tokens=answer_tokens, limit=limit, seed=seed, batch=batch, device=device,
        dtype=dtype, **others,
    )  # fmt: skip
    options.announce("eval", model=model, against=against, text=text, questions=questions, task_data=task_data,
                     output=output, threads=threads, **vars(plan.settings))  # fmt: skip
    if dry_run:
        return _say_plan(plan.describe(), json)
    report = plan.run(progress)
    options.finish_json(json, report.to_dict())
    if not json:
        data(report.markdown(), end="")
    plan.save(report)  # last, so that a full disk does not lose the measurements
    rows = [("where", str(output))] if output else []
    for name, table in report.rows.items():
        if "nll" in table:
            rows.append((name, f"{table['nll']['mean'].mean:.3f} nats per token"))
    state = report.state_bytes["model"]
    rows.append(("state", "grows with the text" if state is None else f"{format_bytes(state)} per sequence"))
    card(f"measured in {report.environment['seconds']:.0f} s", rows)


def split(text: str | None) -> list[str] | None:
    """Read `a,b`.

    Raises:
        UsageError: A name is empty.
    """
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise UsageError(f"there is an empty name in '{text}'", hint="write NAME,NAME")
    return names


def _say_plan(plan: dict[str, Any], json: bool) -> None:
    """Print the plan of a measurement."""
    options.finish_json(json, plan)
    card("would measure", [
        ("models", ", ".join(plan["rows"])),
        ("text", f"{plan['text_files']} files, {format_bytes(plan['text_bytes'])}"),
        *([("questions", f"{plan['questions']:,}")] if plan["questions"] else []),
        ("tokens to read", f"about {plan['tokens_each']:,} by each model, without tasks"),
        *(("missing", f"pip install 'ligerexport[{extra}]'") for extra in plan["missing_extras"]),
    ])  # fmt: skip
