"""The checked settings of a sweep of `bench`. Nothing here loads torch or a runtime."""

from __future__ import annotations

from dataclasses import dataclass

from ligerexport.errors import UsageError, look_up

DEVICES = {"auto": "a GPU if the model runs on one", "cpu": "the processor", "cuda": "an NVIDIA GPU"}
DTYPES = {"auto": "float32 on a CPU, bfloat16 on a GPU", "float32": "", "bfloat16": "", "float16": ""}
"""Types of the weights of torch models."""
READ_UP_TO = 8192
"""Longest context in tokens that a Transformer reads; a longer cache is filled, which takes no time."""


@dataclass(frozen=True)
class Settings:
    """The settings of one sweep.

    Attributes:
        contexts: Numbers of tokens read before the timed ones.
        batches: Numbers of sequences at a time.
        blocks: Number of turns of each model at a context.
        tokens: Number of tokens per block.
        threads: Number of threads of one operator; None takes the physical cores.
        device: Row of `DEVICES`.
        dtype: Row of `DTYPES`.
        read_up_to: Longest context in tokens that a Transformer reads.

    Raises:
        UsageError: A number makes no sense.
    """

    contexts: tuple[int, ...] = (128, 1024, 4096, 8192)
    batches: tuple[int, ...] = (1,)
    blocks: int = 12
    tokens: int = 8
    threads: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    read_up_to: int = READ_UP_TO

    def __post_init__(self) -> None:
        counts = (*self.contexts, *self.batches, self.blocks, self.tokens, 1 if self.threads is None else self.threads)
        if min(counts) < 1 or not self.contexts or not self.batches:
            raise UsageError(f"contexts {self.contexts}, batches {self.batches}, blocks {self.blocks}, tokens "
                             f"{self.tokens}", hint="give at least 1 for each")  # fmt: skip
        look_up("device", self.device, DEVICES)
        look_up("dtype", self.dtype, DTYPES)
