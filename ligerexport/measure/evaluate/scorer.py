"""One face for what is measured: a torch model, converted or not, and the session of an artifact.

The state goes from chunk to chunk, so that a window of any length is read in constant memory beside the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ligerexport.run.runtime import Session

CHUNK = 1024
"""Most tokens of a call."""
BUDGET = 1 << 27
"""Most logits of a call; half a gigabyte in fp32."""


class Scorer(Protocol):
    """What the measurements ask of a model.

    Attributes:
        vocab_size: V.
        batch: Sequences that are best read at a time.
    """

    vocab_size: int
    batch: int

    def logits(self, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Read `[B, T]` and yield the logits after each token, `[B, chunk, V]` fp32; the last may be shorter."""
        ...

    def forced(self, ids: Tensor, last: int) -> Tensor:
        """Read `[B, T]` and return the logits after the last tokens, `[B, last, V]` fp32."""
        ...

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """Read one prompt and yield the most likely next token, again and again."""
        ...


def chunk_size(batch: int, vocab_size: int) -> int:
    """Return tokens of a call whose logits `[batch, chunk, V]` stay within the budget."""
    return max(64, min(CHUNK, BUDGET // (batch * vocab_size) // 64 * 64))


class TorchScorer:
    """A transformers model with its own cache: growing for a Transformer, constant for a converted one.

    Args:
        model: In evaluation mode, on its device.
        batch: Sequences at a time.
    """

    def __init__(self, model: PreTrainedModel, batch: int = 1) -> None:
        from ligerexport.layers.mixer import CACHE  # here, so that an artifact is measured without transformers

        self.model: Any = model
        self._cache = CACHE
        self.batch = batch
        self.vocab_size: int = model.config.get_text_config().vocab_size

    @torch.no_grad()
    def logits(self, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Yield as `Scorer.logits`."""
        cache = None
        for part in ids.to(self.model.device).split(chunk, dim=1):
            out = self.model(part, **{self._cache: cache}, use_cache=True)
            cache = out[self._cache]
            yield out.logits.float()

    @torch.no_grad()
    def forced(self, ids: Tensor, last: int) -> Tensor:
        """Return as `Scorer.forced`."""
        ids, cache = ids.to(self.model.device), None
        tail = min(ids.shape[1], max(last, CHUNK))
        head = ids[:, : ids.shape[1] - tail]
        for part in head.split(CHUNK, dim=1) if head.shape[1] else ():
            cache = self.model(part, **{self._cache: cache}, use_cache=True, logits_to_keep=1)[self._cache]
        out = self.model(ids[:, -tail:], **{self._cache: cache}, use_cache=cache is not None, logits_to_keep=last)
        return out.logits.float()

    @torch.no_grad()
    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield as `Scorer.greedy`."""
        cache = None
        parts = torch.tensor([list(ids)], device=self.model.device).split(CHUNK, dim=1)
        while True:
            for part in parts:
                out = self.model(part, **{self._cache: cache}, use_cache=True, logits_to_keep=1)
                cache = out[self._cache]
            token = out.logits[:, -1].argmax(dim=-1, keepdim=True)
            yield int(token)
            parts = (token,)


class SessionScorer:
    """The session of an artifact, one sequence at a time.

    Args:
        session: From `ligerexport.run.runtime.load(..., scoring=True)`, with a batch of 1.
    """

    batch = 1

    def __init__(self, session: Session) -> None:
        self.session = session
        self.vocab_size = session.artifact.manifest.model.vocab_size

    def logits(self, ids: Tensor, chunk: int = CHUNK) -> Iterator[Tensor]:
        """Yield as `Scorer.logits`."""
        self._one(ids)
        self.session.reset()
        for part in ids.split(chunk, dim=1):
            yield self._every(part)

    def forced(self, ids: Tensor, last: int) -> Tensor:
        """Return as `Scorer.forced`."""
        self._one(ids)
        self.session.reset()
        head = ids.shape[1] - last
        if head:
            self.session.prefill(ids[:, :head].numpy())
        return self._every(ids[:, head:])

    def greedy(self, ids: Sequence[int]) -> Iterator[int]:
        """Yield as `Scorer.greedy`."""
        self.session.reset()
        logits = self.session.prefill(list(ids))
        while True:
            token = int(logits[0].argmax())
            yield token
            logits = self.session.step(token)

    def _every(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate(list(self.session.every(ids.numpy())), axis=1))

    def _one(self, ids: Tensor) -> None:
        if len(ids) != 1:
            raise ValueError(f"{len(ids)} sequences, a session scorer reads one at a time")
