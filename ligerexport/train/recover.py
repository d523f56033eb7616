"""`recover`: train a converted checkpoint on text and write the recovered one.

Torch is imported only when there is something to train.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ligerexport.checkpoint.adapter import RECORD, check_student, model_id, write_adapter, write_merged
from ligerexport.checkpoint.checkpoint import CheckpointInfo
from ligerexport.console import ProgressFactory, say, silent, warn
from ligerexport.dtypes import BY_KERNEL
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.model.config import LigerConfig
from ligerexport.staging import check_destination, remove_directory, staged_directory
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.config import RecoverConfig, given
from ligerexport.train.estimate import Estimate, estimate
from ligerexport.train.model import load_student, load_teacher, target_shapes, teacher_config
from ligerexport.train.records import Record, read_records, reasoning_share
from ligerexport.train.report import phase_table, write_report
from ligerexport.train.state import load_state, state_directory
from ligerexport.versions import require, versions

if TYPE_CHECKING:
    from ligerexport.train.data import Documents
    from ligerexport.train.loop import OnStep, Step

_MANY_TIMES = 10
"""Number of times that the same data may be read without a warning."""
_MUCH_REASONING = 0.1
"""Share of records with chains of thought from which on there is a warning."""
_WARM = 5.0
"""Duration of a step in seconds above which one-time work hardly matters."""


def recover(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    against: str | Path | None = None,
    merge: bool = True,
    resume: Literal["auto", "never"] = "auto",
    shard: bool = False,
    force: bool = False,
    tensorboard: str | Path | None = None,
    progress: ProgressFactory | None = None,
    on_step: OnStep | None = None,
    **settings: Any,
) -> Path:
    """Train LoRA on a converted checkpoint and write the result.

    The run saves states in `OUTPUT.state`, continues from the newest one when it is called again with the same
    settings, and removes them with the complete result. Under `torchrun` or `accelerate launch` all processes call it.

    Args:
        model: Directory that `convert` wrote.
        data: Files, directories or data sets of the hub; see `ligerexport.train.records.FORMS`.
        output: Directory to write.
        against: The Transformer to follow; None takes the checkpoint's own weights with their softmax attention.
        merge: Whether to merge LoRA into the weights; if not, `output` is a PEFT adapter.
        resume: `auto` continues from a state, `never` starts again.
        shard: Whether the processes share the weights (FSDP2) instead of holding copies.
        force: Whether an older result in `output` may be replaced.
        tensorboard: Directory for TensorBoard's scalars.
        progress: Reports the phases; silent by default.
        on_step: Called on the main process after each step.
        **settings: Fields of `RecoverConfig`; None leaves the default.

    Returns:
        `output`.

    Raises:
        UsageError: A setting makes no sense for this model, or a path is in use.
        DataError: The data is damaged, empty or in another form.
        CheckpointError: A checkpoint is incomplete or damaged, or a state belongs to another run.
        MissingDependency: The `recover` extra is not installed.
        LigerError: The loss is not finite, or memory ran out; saved states stay.
    """
    return RecoverPlan(
        model, data, output, against=against, merge=merge, resume=resume, shard=shard, force=force,
        tensorboard=tensorboard, **settings,
    ).run(progress, on_step)  # fmt: skip


class RecoverPlan:
    """A recovery whose arguments, those of `recover`, are checked. No data is read and no weight is loaded.

    Attributes:
        info: The converted checkpoint.
        config: The settings.
        resumes: Whether to continue from a saved state.

    Raises:
        UsageError: A setting makes no sense for this model, or a path is in use.
        CheckpointError: A checkpoint is incomplete or damaged.
    """

    def __init__(
        self,
        model: str | Path,
        data: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        against: str | Path | None = None,
        merge: bool = True,
        resume: Literal["auto", "never"] = "auto",
        shard: bool = False,
        force: bool = False,
        tensorboard: str | Path | None = None,
        **settings: Any,
    ) -> None:
        require("recover")
        self.config, output = RecoverConfig(**given(settings)), Path(output)
        if resume not in ("auto", "never"):
            raise UsageError(f"resume '{resume}'", hint="choose from auto, never")
        if output.resolve() == Path(model).expanduser().resolve():
            raise UsageError(f"{output} is the model itself", hint="choose another place with -o")
        check_destination(output, force=force, marker=RECORD)
        self.data = [data] if isinstance(data, (str, Path)) else list(data)
        self.info = check_model(model, self.config, against)
        self.output, self.against, self.merge, self.resumes = output, against, merge, resume == "auto"
        self.shard, self.force, self.tensorboard = shard, force, tensorboard

    def estimate(self) -> Estimate:
        """Return an estimate of the run."""
        return estimate(self.info, self.config, _processes(), self.shard)

    def describe(self, progress: ProgressFactory | None = None) -> dict[str, Any]:
        """Return the cost of `run`. This reads the data, and trains on a few rows to measure the time."""
        documents = self._read(progress)
        seconds = measure_seconds(self.info, documents, self.config, self.against, _processes(), progress)
        data = {"documents": len(documents.lengths), "tokens": len(documents.ids), **documents.counts}
        return {"path": str(self.output), **self.estimate().to_dict(), "seconds": seconds, "data": data}

    def run(self, progress: ProgressFactory | None = None, on_step: OnStep | None = None) -> Path:
        """Train, write the result and return its directory. See `recover` for arguments and errors."""
        info, config, documents = self.info, self.config, self._read(progress)
        writer = _writer(self.tensorboard)

        from ligerexport.train.distributed import Group

        group = Group.join(self.shard)
        states, run = state_directory(self.output), identity(info, documents, config, self.against)
        if not self.resumes and group.main:
            remove_directory(states)
        group.wait()
        state = load_state(states, run)  # before the weights are loaded, so that a mistake shows at once
        trainer, lora = _trainer(info, documents, config, self.against, group, states, run)
        if state is not None:
            trainer.restore(state)
            if group.main:
                say(f"continuing after step {state.step} of {config.num_steps}")
        trainer.train(progress if group.main else None, _observers(writer, on_step) if group.main else None)

        tensors = trainer.tensors()
        if group.main:
            record = make_record(run, config, documents, trainer.history)
            with staged_directory(self.output, force=self.force, marker=RECORD) as stage:
                if self.merge:
                    write_merged(stage, info, tensors, config.alpha / config.rank, record, progress)
                else:
                    write_adapter(stage, tensors, lora, record | {"liger": info.config["liger"]})
                write_report(stage, record, trainer.history)
            remove_directory(states)
        group.wait()
        return self.output

    def _read(self, progress: ProgressFactory | None) -> Documents:
        documents = read_documents(self.info, self.data, self.config, progress)
        warn_of_repeats(documents, self.config)
        return documents


def _processes() -> int:
    """Return the number of processes that a launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_model(model: str | Path, config: RecoverConfig, against: str | Path | None) -> CheckpointInfo:
    """Check the model and its teacher against the settings.

    Raises:
        UsageError, CheckpointError: As for `recover`.
    """
    info = check_student(model)
    target_shapes(info, config.targets)
    context = info.config.get("max_position_embeddings")
    if context is not None and config.length > context:
        raise UsageError(f"length {config.length} is more than the {context} tokens that the model was trained on",
                         hint=f"--length {context}")  # fmt: skip
    if config.row.needs_teacher:
        teacher_config(info, against)
        kept = LigerConfig.from_dict(info.config["liger"]).unchanged
        if len(kept) == info.config["num_hidden_layers"]:
            raise UsageError(f"{model} has no converted layer", hint="convert it without --keep-softmax")
    elif against is not None:
        raise UsageError(
            f"the recipe {config.recipe} needs no teacher", hint="leave --against out, or --recipe distill"
        )
    return info


def read_documents(
    info: CheckpointInfo,
    data: Sequence[str | Path],
    config: RecoverConfig,
    progress: ProgressFactory | None = None,
) -> Documents:
    """Return the documents that a run reads: all of them, or the first that are enough."""
    from ligerexport.train.data import tokenize

    records = read_records(list(data))
    warn_of_reasoning(records)
    return tokenize(
        records, TextModel(info.path), length=config.length, vocab_size=info.config["vocab_size"],
        overlong=config.overlong, wanted=config.num_steps * config.batch_tokens, seed=config.seed, progress=progress,
    )  # fmt: skip


def warn_of_reasoning(records: Sequence[Record]) -> None:
    """Warn where the data look like chains of thought (QK-Restore, arXiv 2606.11052)."""
    if (share := reasoning_share(records)) >= _MUCH_REASONING:
        warn(f"{share:.0%} of the records hold chains of thought (such as <think>), and training on these can destroy "
             "recall of earlier text; mix in other data, and compare `ligerexport eval` before and after")  # fmt: skip


def warn_of_repeats(documents: Documents, config: RecoverConfig) -> None:
    """Warn where a run reads the same few texts many times."""
    from ligerexport.train.packing import pack

    if config.num_steps * config.batch_tokens <= _MANY_TIMES * len(documents.ids):
        return
    rows = len(pack(documents.lengths, config.length))  # short documents do not fill rows
    times, most = config.num_steps * config.rows / rows, _MANY_TIMES * rows // config.rows
    if times > _MANY_TIMES:
        less = f", or --tokens {most * config.batch_tokens}" if most else ""
        warn(f"the run reads the {len(documents.ids):,} tokens of the data {times:,.0f} times, and will memorise "
             f"them; give more data{less}")  # fmt: skip


def measure_seconds(
    info: CheckpointInfo,
    documents: Documents,
    config: RecoverConfig,
    against: str | Path | None,
    processes: int = 1,
    progress: ProgressFactory | None = None,
) -> float:
    """Estimate the seconds that a run will take, by training with the loss of each phase on part of a step.

    The part is one row on a CPU, where time grows with the number of rows, and one micro-batch on a GPU.

    Args:
        documents: Documents from `read_documents`.
        against: As for `recover`.
        processes: Number of processes that share the rows; only this one measures.
    """
    import torch

    from ligerexport.train.distributed import Group
    from ligerexport.train.loop import micro_rows

    group = Group(torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu"))
    rows = 1 if group.device.type == "cpu" else micro_rows(config, processes)
    part = replace(config, batch_tokens=rows * config.length, micro_batch_tokens=None, tokens=None,
                   steps=config.num_steps)  # fmt: skip
    steps = [config.row.phase_at(step, config.num_steps).loss for step in range(config.num_steps)]
    trainer, _ = _trainer(info, documents, part, against, group, Path(), {})
    total, losses = 0.0, dict.fromkeys(steps)
    with (progress or silent)("measuring a part of each phase", len(losses), "steps") as advance:
        for loss in losses:
            seconds = trainer.try_step(steps.index(loss)).seconds
            if seconds < _WARM:  # one-time work may dominate it
                seconds = trainer.try_step(steps.index(loss)).seconds
            total += seconds * steps.count(loss)
            advance(1)
    return total * config.rows / (rows * processes)


def identity(
    info: CheckpointInfo, documents: Documents, config: RecoverConfig, against: str | Path | None
) -> dict[str, Any]:
    """Return the identity of a run: model, data, settings."""
    teacher = (str(against) if against else "itself") if config.row.needs_teacher else None
    return {"model": model_id(info), "data": documents.sha256, "teacher": teacher, **config.identity()}


def make_record(
    run: dict[str, Any], config: RecoverConfig, documents: Documents, history: Sequence[Step]
) -> dict[str, Any]:
    """Return the record of how the result was made."""
    return run | {
        "tokens": sum(step.tokens for step in history),
        "final_loss": phase_table(history)[-1]["final_loss"],
        "phases": [asdict(phase) for phase in config.row.phases],
        "samples": documents.counts,
        "versions": versions("torch", "transformers", "peft", "accelerate"),
    }


def _trainer(
    info: CheckpointInfo, documents: Documents, config: RecoverConfig, against: Any, group: Any, states: Path, run: Any
) -> tuple[Any, Any]:
    """Load the models and return the trainer and PEFT's configuration."""
    from transformers import set_seed

    from ligerexport.train.distributed import place
    from ligerexport.train.loop import Trainer, micro_rows
    from ligerexport.train.packing import Rows, pack

    micro_rows(config, group.size)
    dtype = BY_KERNEL[config.dtype].torch
    set_seed(config.seed)
    student, lora = load_student(info, config, dtype)
    teacher = place(load_teacher(info, against, dtype), group) if config.row.needs_teacher else None
    rows = Rows(documents, pack(documents.lengths, config.length), config.length, config.seed)
    return Trainer(place(student, group), teacher, rows, config, group, states, run), lora


def _writer(directory: str | Path | None) -> Any:
    """Return TensorBoard's writer; None without a directory."""
    if directory is None:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingDependency("tensorboard", hint="pip install tensorboard, or leave --tensorboard out") from None
    return SummaryWriter(str(directory))


def _observers(writer: Any, on_step: OnStep | None) -> OnStep:
    def observe(step: Step) -> None:
        if on_step is not None:
            on_step(step)
        if writer is not None:
            values = {"loss": step.loss, "norm": step.norm, "rate": step.rate,
                      "tokens_per_second": step.tokens / step.seconds}  # fmt: skip
            for name, value in values.items():
                writer.add_scalar(f"{step.phase}/{name}" if name == "loss" else name, value, step.step)
            writer.flush()

    return observe
