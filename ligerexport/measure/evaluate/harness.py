"""Adapt an `Opened` model to lm-eval, whose tasks then run on the same models as the other measurements.

It is imported only if lm-eval is installed. `ligerexport.measure.evaluate.tasks` chooses and runs the tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ligerexport.errors import UsageError
from ligerexport.measure.opened import Opened
from ligerexport.text.tokenizer import TextModel

MAX_GEN_TOKENS = 256
"""Number of tokens of an answer if a task does not set it."""
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens")
"""Names under which tasks set that number."""

Scored = tuple[float, bool]
"""Log probability of a continuation in nats, and whether greedy decoding writes it."""


class HarnessLM(TemplateLM):
    """An lm-eval model from a scorer and a tokenizer.

    Args:
        max_length: Largest number of tokens of prompt and continuation; longer requests lose their beginning.
        advance: Called with the number of requests that are done.
    """

    def __init__(
        self, scorer: Opened, text: TextModel, max_length: int, advance: Callable[[float], None] = lambda amount: None
    ) -> None:
        super().__init__()
        self.scorer, self.text, self.max_length, self._advance = scorer, text, max_length, advance

    @property
    def eot_token_id(self) -> int:
        """Id that ends a text."""
        return self.text.eos_id or 0

    @property
    def prefix_token_id(self) -> int:
        """Id that serves as the context of a text without context."""
        return self.eot_token_id if self.text.bos_id is None else self.text.bos_id

    @property
    def tokenizer_name(self) -> str:
        """Name that distinguishes this model's prompts in lm-eval's cache."""
        return f"ligerexport-{len(self.text.vocabulary)}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Return ids; by default with the tokenizer's prefix, unless the text already has it."""
        ids = self.text.encode(string, special=add_special_tokens is not False)
        doubled = add_special_tokens is None and len(ids) > 1 and ids[0] == ids[1] == self.text.bos_id
        return ids[1:] if doubled else ids

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation rendered by the model's chat template."""
        return self.text.render(chat_history, answer=add_generation_prompt)

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False
    ) -> list[Scored]:
        """Score continuations. Prompts of equal length share a batch, and equal prompts are read once."""
        waiting: dict[int, dict[tuple[int, ...], list[int]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            if len(continuation) > self.max_length:
                raise UsageError(
                    f"an answer has {len(continuation):,} tokens, the context has {self.max_length:,}",
                    hint="leave this task out",
                )
            ids = tuple([*context, *continuation][-(self.max_length + 1) :][:-1])
            waiting.setdefault(len(ids), {}).setdefault(ids, []).append(index)
        answers: list[Scored] = [(0.0, False)] * len(requests)
        for rows in waiting.values():
            prompts = list(rows)
            for start in range(0, len(prompts), self.scorer.batch):
                group = prompts[start : start + self.scorer.batch]
                last = max(1, *(len(requests[index][2]) for ids in group for index in rows[ids]))
                log_p = self.scorer.forced(torch.tensor(group), last).log_softmax(dim=-1)
                for row, ids in zip(log_p, group, strict=True):
                    for index in rows[ids]:
                        answers[index] = _score(row, requests[index][2])
                        self._advance(1)
        return answers

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[Scored]:
        """Score continuations of contexts."""
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[float]:
        """Return log probabilities of whole texts in nats, read in windows of `max_length`."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            ids = self.tok_encode(request.args[0])
            found = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            for context, continuation in map(make_disjoint_window, found):
                windows.append((None, context, continuation))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log_p, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log_p
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = True) -> list[str]:
        """Return greedy continuations up to a stop string, the end of the text, or the largest number of tokens."""
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        if settings.get("do_sample") or settings.get("temperature"):
            raise UsageError("this task samples its answers", hint="only tasks with greedy answers are run")
        until = settings.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        count = next((int(settings[name]) for name in LIMITS if settings.get(name)), MAX_GEN_TOKENS)
        prompt = self.tok_encode(context)[-max(1, self.max_length - count) :]
        answer: list[int] = []
        for (token,) in islice(self.scorer.greedy([prompt]), count):
            if token in self.text.eos_ids:
                break
            answer.append(token)
            if any(stop in self.text.decode(answer) for stop in stops):
                break
        self._advance(1)
        text = self.text.decode(answer)
        for stop in stops:
            text = text.partition(stop)[0]
        return text


def _score(log_p: torch.Tensor, continuation: list[int]) -> Scored:
    """Return a continuation's score from log probabilities `[last, V]` that end with its last token."""
    if not continuation:
        return 0.0, True
    rows = log_p[-len(continuation) :]
    target = torch.tensor(continuation, device=rows.device)
    greedy = bool((rows.argmax(dim=-1) == target).all())
    return float(rows.gather(1, target[:, None]).sum()), greedy
