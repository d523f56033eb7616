"""`recover`: train LoRA to recover most of a conversion's loss."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.cli.prompting import build_command
from ligerexport.console import card, format_bytes, progress, say, set_quiet
from ligerexport.errors import UsageError
from ligerexport.train.config import DEFAULT_TOKENS, TARGETS, RecoverConfig
from ligerexport.train.recipes import DEFAULT_RECIPE, RECIPES
from ligerexport.train.recover import RecoverPlan

if TYPE_CHECKING:
    from ligerexport.train.loop import OnStep

_EVERY = 10
"""Number of steps between two lines about the loss."""


@verb(computes=True)
def recover(
    model: Annotated[Path, typer.Argument(help="A converted checkpoint.")],
    data: Annotated[
        list[str],
        typer.Option(
            "--data", metavar="DATA", help="JSONL chats or pairs, text, a directory, a hub data set; may be repeated."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    recipe: Annotated[str, typer.Option(help=f"One of: {', '.join(RECIPES)}.")] = DEFAULT_RECIPE,
    against: Annotated[
        str | None, typer.Option(help="The Transformer to imitate; default: the checkpoint's own weights.")
    ] = None,
    rank: Annotated[int, typer.Option(help="LoRA rank.")] = 8,
    alpha: Annotated[float, typer.Option(help="LoRA alpha.")] = 8.0,
    targets: Annotated[str, typer.Option(metavar="NAME,...", help="Projections that get LoRA.")] = ",".join(TARGETS),
    tokens: Annotated[
        str | None, typer.Option(metavar="N", help=f"Tokens to train on (500k, 3M); default: {DEFAULT_TOKENS:,}.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, instead of --tokens.")] = None,
    length: Annotated[int, typer.Option(help="Tokens in a packed row, and in the longest document.")] = 1024,
    batch_tokens: Annotated[int, typer.Option(help="Number of tokens per optimizer step.")] = 8192,
    micro_batch_tokens: Annotated[
        int | None, typer.Option(help="Tokens in memory at a time; default: all of a step.")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="Largest learning rate; default: the recipe's.")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Warm-up steps of the learning rate; default: the recipe's.")
    ] = None,
    overlong: Annotated[str, typer.Option(help="What to do with a longer chat: cut or drop it.")] = "cut",
    dtype: Annotated[
        str, typer.Option(help="Type of the frozen weights and of the arithmetic: bf16 or fp32.")
    ] = "bf16",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory and about a third more time.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", help="Split the weights among the processes (FSDP2).")] = False,
    seed: Annotated[int, typer.Option(help="Seed for the order of the data and for LoRA's initial values.")] = 0,
    save_every: Annotated[int, typer.Option(help="Number of steps between two saved states.")] = 100,
    resume: Annotated[
        str, typer.Option(help="auto continues from OUTPUT.state, never starts from the beginning.")
    ] = "auto",
    merge: Annotated[
        bool, typer.Option("--merge/--adapter", help="Write merged weights, or the LoRA adapter alone.")
    ] = True,
    tensorboard: Annotated[Path | None, typer.Option(help="Directory for TensorBoard's scalars.")] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Train LoRA on a converted checkpoint.

    To continue a run that was stopped, give the same command again.
    """
    if not (main := os.environ.get("RANK", "0") == "0"):  # only one of several processes prints
        set_quiet()
    settings: dict[str, Any] = {
        "recipe": recipe, "rank": rank, "alpha": alpha, "targets": tuple(filter(None, targets.split(","))),
        "tokens": parse_count(tokens), "steps": steps, "length": length, "batch_tokens": batch_tokens,
        "micro_batch_tokens": micro_batch_tokens, "rate": lr, "warmup": warmup, "overlong": overlong, "dtype": dtype,
        "gradient_checkpointing": gradient_checkpointing, "seed": seed, "save_every": save_every,
    }  # fmt: skip

    plan = RecoverPlan(model, data, output, against=against, merge=merge, resume=resume, shard=shard,  # type: ignore[arg-type]
                        force=force, tensorboard=tensorboard, **settings)  # fmt: skip
    options.announce("recover", model=model, data=data, output=output, threads=threads,
                     **plan.config.identity())  # fmt: skip
    takes = plan.estimate()
    share, memory = takes.trainable_parameters / takes.parameters, format_bytes(takes.memory_bytes)
    say(f"{takes.trainable_parameters:,} trainable parameters ({share:.2%}), {takes.steps:,} steps, "
        f"{takes.tokens:,} tokens, about {memory} of memory")  # fmt: skip
    if dry_run:
        return _say_plan(plan.describe(progress), plan.config, json) if main else None
    path = plan.run(progress, _teller(plan.config))
    if main:
        _finish(path, merge, json)


def parse_count(text: str | None) -> int | None:
    """Read `3000000`, `500k` or `3M`.

    Raises:
        UsageError: The text does not have this form.
    """
    if text is None:
        return None
    factor = {"k": 10**3, "m": 10**6, "b": 10**9}.get(text[-1:].lower(), 1)
    try:
        return round(float(text[:-1] if factor > 1 else text) * factor)
    except ValueError:
        raise UsageError(f"--tokens {text}", hint="write a number such as 3000000, 500k or 3M") from None


def _say_plan(plan: dict[str, Any], config: RecoverConfig, json: bool) -> None:
    """Print the cost of a run."""
    from ligerexport.threads import default_threads

    options.finish_json(json, plan)
    card(f"would write {plan['path']}", [
        ("parameters", f"{plan['trainable_parameters']:,} of {plan['parameters']:,} are trained"),
        ("steps", f"{plan['steps']:,} of {config.batch_tokens:,} tokens"),
        ("time", f"about {duration(plan['seconds'])}, measured on a part of each phase (threads: {default_threads()})"),
        ("memory", f"about {format_bytes(plan['memory_bytes'])}: " + ", ".join(
            f"{name} {format_bytes(plan[f'{name}_bytes'])}" for name in ("weight", "lora", "activation", "logit"))),
        ("data", ", ".join(f"{count:,} {what}" for what, count in plan["data"].items())),
    ])  # fmt: skip


def duration(seconds: float) -> str:
    """Return a duration as text: the largest unit and the next one."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} days {hours % 24} h"


def _teller(config: RecoverConfig) -> OnStep:
    """Return a function that prints a line every few steps."""
    from ligerexport.train.loop import Step

    done: list[Step] = []

    def tell(step: Step) -> None:
        done.append(step)
        if len(done) % _EVERY and step.step != config.num_steps:
            return
        last = done[-_EVERY:]
        seconds = sum(row.seconds for row in last)
        left = (config.num_steps - step.step) * seconds / len(last)
        speed = sum(row.tokens for row in last) / seconds
        say(
            f"step {step.step} of {config.num_steps}  {step.phase}  loss {step.loss:.4f}  rate {step.rate:.1e}  "
            f"{speed:,.0f} tokens/s  {int(left) // 60}:{int(left) % 60:02d} left"
        )

    return tell


def _finish(path: Path, merge: bool, json: bool) -> None:
    import json as library

    report = library.loads((path / "report.json").read_text(encoding="utf-8"))
    record, phases = report["record"], report["phases"]
    options.finish_json(json, {"path": str(path), "merged": merge, "record": record, "phases": phases})
    card("recovered", [
        ("where", str(path)),
        *((row["phase"], f"{row['steps']} steps, loss {row['first_loss']:.4f} to {row['final_loss']:.4f}")
          for row in phases),
        ("tokens", f"{record['tokens']:,}"),
        ("report", str(path / "report.md")),
    ], next_command=build_command(path) if merge else None)  # fmt: skip
