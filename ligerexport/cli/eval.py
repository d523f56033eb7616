"""`eval`: measure a model. Its tables are data, on stdout."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import card, data, format_bytes, progress
from ligerexport.errors import UsageError
from ligerexport.measure.evaluate.settings import CONTROLS, DEVICES, DTYPES, PARTS, TASKS


@verb(computes=True)
def eval_(
    model: Annotated[str, typer.Argument(help="A converted checkpoint, a Transformer, or an artifact.")],
    against: Annotated[str | None, typer.Option(help="The Transformer it was converted from; measured too.")] = None,
    text: Annotated[
        list[Path] | None, typer.Option(help="Held-out plain text: a file, or a directory of .txt; may be repeated.")
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
        str | None, typer.Option(metavar="CONTROL,...", help=f"Compare with: {', '.join(CONTROLS)}.")
    ] = None,
    length: Annotated[int, typer.Option(help="Tokens of a window of text, and largest distance of recall.")] = 8192,
    windows: Annotated[int, typer.Option(help="Most windows of text.")] = 16,
    trials: Annotated[int, typer.Option(help="Prompts for each distance of recall.")] = 64,
    limit: Annotated[int | None, typer.Option(help="Most questions of a task.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
    batch: Annotated[int, typer.Option(help="Sequences at a time on a GPU.")] = 8,
    device: Annotated[str, typer.Option(help=f"One of: {', '.join(DEVICES)}.")] = "auto",
    dtype: Annotated[str, typer.Option(help=f"Of the weights: {', '.join(DTYPES)}.")] = "float32",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for report.json, report.md and plots.")
    ] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Measure a model: loss by position, recall, tasks.

    Works on a checkpoint and on the artifact built from it alike. Tables go to stdout, with standard errors.
    """
    from ligerexport.measure.evaluate.run import resolve_settings, tokens_to_read

    inputs: dict[str, Any] = {"against": against, "text": text or [], "parts": split(parts), "tasks": split(tasks)}
    settings: dict[str, Any] = {
        "controls": split(controls), "length": length, "windows": windows, "trials": trials, "limit": limit,
        "seed": seed, "batch": batch, "device": device, "dtype": dtype,
    }  # fmt: skip
    plan = resolve_settings(**inputs, **settings)
    options.announce("eval", model=model, against=against, text=text, task_data=task_data, output=output,
                    threads=threads, **vars(plan))  # fmt: skip
    if dry_run:
        return _plan(json, model, inputs, plan.controls, tokens_to_read(plan))
    from ligerexport.measure.evaluate import evaluate

    report = evaluate(model, **inputs, **settings, task_data=task_data, output=output, force=force, progress=progress)
    if json:
        options.finish_json(True, report.to_dict())
    else:
        data(report.markdown(), end="")
    rows = [("where", str(output))] if output else []
    for name, table in report.rows.items():
        if "nll" in table:
            rows.append((name, f"{table['nll']['mean'].mean:.3f} nats a token"))
    state = report.state_bytes["model"]
    rows.append(("state", "grows with the text" if state is None else f"{format_bytes(state)} a sequence"))
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
        raise UsageError(f"an empty name in '{text}'", hint="write NAME,NAME")
    return names


def _plan(json: bool, model: str, inputs: dict[str, Any], controls: tuple[str, ...], tokens: int) -> None:
    """Say what would be measured, without loading anything."""
    from importlib.util import find_spec

    from ligerexport.artifact.artifact import is_artifact
    from ligerexport.checkpoint.loading import check_loadable
    from ligerexport.text.corpus import text_files

    files = text_files(inputs["text"])
    for path in (Path(name).expanduser() for name in (model, inputs["against"]) if name and not is_artifact(name)):
        if path.is_dir():  # other models would have to be fetched
            check_loadable(path)
    rows = [*(["teacher"] if inputs["against"] else []), "model", *controls]
    wanted = {"lm_eval": "eval"} if inputs["tasks"] or "tasks" in (inputs["parts"] or ()) else {}
    plan: dict[str, Any] = {
        "model": model, "rows": rows, "text_files": len(files), "text_bytes": sum(f.stat().st_size for f in files),
        "tokens_each": tokens, "missing_extras": [extra for module, extra in wanted.items() if not find_spec(module)],
    }  # fmt: skip
    options.finish_json(json, plan)
    card(
        "would measure",
        [
            ("models", ", ".join(rows)),
            ("text", f"{len(files)} files, {format_bytes(plan['text_bytes'])}"),
            ("tokens to read", f"about {tokens:,} by each, tasks left out"),
            *(("missing", f"pip install 'ligerexport[{extra}]'") for extra in plan["missing_extras"]),
        ],
    )
