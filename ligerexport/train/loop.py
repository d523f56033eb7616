"""The training loop: batches in a fixed order, the loss of the phase, AdamW on LoRA, states to resume from.

Each process takes its share of a batch's rows, and losses are divided by the weight of all counted positions in the
batch. The result does not depend on the number of processes or on the size of micro-batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import LigerError, UsageError
from ligerexport.train.config import RecoverConfig
from ligerexport.train.distributed import Group, Root, as_part, fill, gradients, trainable, whole
from ligerexport.train.packing import Batch, Rows
from ligerexport.train.phases import PHASES, balance
from ligerexport.train.recipes import rate_at
from ligerexport.train.state import Resumed, save_state


@dataclass(frozen=True)
class Step:
    """The measurements of one step; all but the time are equal in every run with the same settings.

    Attributes:
        step: Number of the step, from 1.
        phase: Name of the phase.
        loss: Mean loss over the counted positions.
        norm: Norm of the gradient before clipping.
        rate: Learning rate.
        tokens: Number of document tokens, without padding.
        seconds: Duration in seconds.
    """

    step: int
    phase: str
    loss: float
    norm: float
    rate: float
    tokens: int
    seconds: float


OnStep = Callable[[Step], None]


class Trainer:
    """One training run.

    Args:
        student: The model with LoRA.
        teacher: The Transformer to follow; None if the recipe needs none.
        rows: Training data.
        group: The processes.
        states: Directory of the states.
        run: Identity of this run, which is written into the states.

    Attributes:
        history: All steps so far, those before a resumption included.

    Raises:
        UsageError: The batch cannot be shared by these processes.
    """

    def __init__(
        self,
        student: Root,
        teacher: Root | None,
        rows: Rows,
        config: RecoverConfig,
        group: Group,
        states: Path,
        run: dict[str, Any],
    ) -> None:
        self.student, self.teacher, self.rows, self.config, self.group = student, teacher, rows, config, group
        self.states, self.run = states, run
        self.micro_rows = micro_rows(config, group.size)
        self.parameters = trainable(student)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=config.max_rate, weight_decay=config.row.decay)
        self.history: list[Step] = []

    def restore(self, state: Resumed) -> None:
        """Continue from a state."""
        for name, parameter in self.parameters.items():
            fill(parameter, state.tensors[name])
            moments = {kind: state.optimizer[f"{name}.{kind}"] for kind in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {
                "step": state.optimizer[f"{name}.step"],
                **{kind: as_part(parameter, value) for kind, value in moments.items()},
            }
        self.history = [Step(**row) for row in state.history]

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return LoRA's complete tensors on the CPU; all processes call this together."""
        return whole({name.removeprefix("model."): parameter for name, parameter in self.parameters.items()})

    def save(self) -> None:
        """Write a state; all processes call this together."""
        moments = {
            f"{name}.{kind}": value
            for name, parameter in self.parameters.items()
            for kind, value in self.optimizer.state[parameter].items()
        }
        tensors, optimizer = whole(self.parameters), whole(moments)
        if self.group.main:
            rows = [asdict(row) for row in self.history]
            save_state(self.states, len(self.history), tensors, optimizer, rows, self.run)
        self.group.wait()

    def train(self, progress: ProgressFactory | None = None, on_step: OnStep | None = None) -> None:
        """Run all remaining steps."""
        config = self.config
        with (progress or silent)("training", config.num_steps, "steps") as advance:
            advance(len(self.history))
            while len(self.history) < config.num_steps:
                row = self.try_step(len(self.history))
                self.history.append(row)
                advance(1)
                if on_step is not None:
                    on_step(row)
                if len(self.history) % config.save_every == 0 or len(self.history) == config.num_steps:
                    self.save()  # also the last one: the disk may be full when the result is written

    def try_step(self, step: int) -> Step:
        """Train on the batch of a step, counted from 0."""
        with self._explained():
            return self._step(step)

    def _step(self, step: int) -> Step:
        begin, config, group = time.perf_counter(), self.config, self.group

        set_seed(config.seed * 1_000_003 + step)  # a resumed run draws the same numbers
        phase = config.row.phase_at(step, config.num_steps)
        chosen = self.rows.at(step * config.rows, config.rows)
        size = self.micro_rows
        batches = [self.rows.collate(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        batches = [batch.count(answers=phase.answers, after=phase.after, weight=phase.weight) for batch in batches]
        count = max(1.0, sum(float(batch.weights.sum()) for batch in batches if batch.weights is not None))
        lengths = self.rows.documents.lengths
        tokens = int(sum(lengths[document] for row in chosen for document in self.rows.rows[row]))

        total = torch.zeros((), device=group.device)
        for batch in batches[group.rank :: group.size]:
            with torch.autocast(group.device.type, torch.bfloat16, enabled=config.dtype == "bf16"):
                loss = self.student(self._loss(phase.loss), batch.to(group.device)) / count
            # FSDP2 computes the mean of all processes' gradients, the loss needs their sum
            (loss * group.size if group.sharded else loss).backward()
            total += loss.detach()
        found = gradients(self.parameters.values())
        if not group.sharded:
            group.sum(found)
        group.sum([total])
        norm = torch.nn.utils.get_total_norm(found)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        loss_value, norm_value = float(total), float(norm)
        if not (math.isfinite(loss_value) and math.isfinite(norm_value)):
            raise self._not_finite(step, loss_value, norm_value)
        if config.row.clip is not None and norm_value > config.row.clip:
            for gradient in found:
                gradient.mul_(config.row.clip / norm_value)
        rate = rate_at(step, config.num_steps, config.max_rate, config.warmup_steps, config.row.schedule)
        for part in self.optimizer.param_groups:
            part["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = time.perf_counter() - begin
        return Step(step + 1, phase.name, loss_value, norm_value, rate, tokens, seconds)

    def _loss(self, name: str) -> Callable[..., torch.Tensor]:
        """Return the phase as a function of student and batch that gathers the teacher's weights."""
        phase, teacher = PHASES[name], self.teacher

        def function(student: Any, theirs: Any, batch: Batch) -> torch.Tensor:
            return phase(student, theirs, batch) + balance(student, batch)

        if teacher is None:
            return lambda student, batch: function(student, None, batch)
        return lambda student, batch: teacher(lambda theirs: function(student, theirs, batch))

    def _not_finite(self, step: int, loss: float, norm: float) -> LigerError:
        kept = f"the last good state is in {self.states}" if self.states.is_dir() else "no state was saved yet"
        rate = self.config.max_rate
        return LigerError(
            f"the loss of step {step + 1} is {loss}, the norm of its gradient {norm}; {kept}",
            hint=f"go on with a lower rate (--lr {rate / 3:.0e}), start again with --resume never, or try --dtype fp32",
        )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Add a hint to the error when memory runs out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            tokens = self.micro_rows * self.config.length
            less = max(self.config.length, tokens // 2 // self.config.length * self.config.length)
            options = [f"--micro-batch-tokens {less}"] if less < tokens else []
            options += [] if self.config.gradient_checkpointing else ["--gradient-checkpointing"]
            raise LigerError(
                f"{self.group.device} has too little memory for {tokens:,} tokens at a time",
                hint=f"try {' or '.join(options) or 'a smaller --length'}; the run then continues from its last state",
            ) from error


def micro_rows(config: RecoverConfig, processes: int) -> int:
    """Return the number of rows that a process has in memory at a time.

    Raises:
        UsageError: The rows of a batch cannot be shared evenly.
    """
    rows = config.rows // processes
    if config.micro_batch_tokens is not None:
        rows = min(rows, config.micro_batch_tokens // config.length)
    if rows == 0 or config.rows % (rows * processes):
        raise UsageError(
            f"{config.rows} rows of {config.length} tokens cannot be shared by {processes} processes, "
            f"{max(1, rows)} at a time",
            hint=f"try --batch-tokens {max(1, rows) * processes * config.length}",
        )
    return rows
