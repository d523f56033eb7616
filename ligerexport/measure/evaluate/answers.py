"""Measure answers about what was read: their loss, and what a model writes by itself, from `reading`'s prompts.

Samples of all models belong to the same prompts in the same order, so that differences between models are paired.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from ligerexport.measure.evaluate.estimate import Estimate, Table
from ligerexport.measure.evaluate.reading import ReadingPrompt
from ligerexport.measure.opened import BUDGET, Opened

Advance = Callable[[float], None]
Samples = dict[str, dict[str, list[float]]]
"""A number for each prompt by measurement, then by column."""


def score(
    scorer: Opened, prompts: Sequence[ReadingPrompt], advance: Advance = lambda amount: None
) -> list[tuple[float, float]]:
    """Return, for each prompt, the NLL of the answer in nats per token and its share of first choices.

    The right answer is fed, so a wrong token does not affect the next.
    """
    found = [(0.0, 0.0)] * len(prompts)
    for members in _batches(prompts, scorer):
        lines = [(*p.context, *p.question, *p.answer) for p in (prompts[i] for i in members)]
        width = max(map(len, lines))
        first = min(len(line) - len(prompts[i].answer) for i, line in zip(members, lines, strict=True))
        ids = torch.tensor([(*line, *[0] * (width - len(line))) for line in lines])  # later tokens change nothing
        logits = scorer.forced(ids[:, :-1], width - first)
        for row, (index, line) in enumerate(zip(members, lines, strict=True)):
            target = torch.tensor(prompts[index].answer, device=logits.device)
            own = logits[row, len(line) - len(target) - first : len(line) - first]
            loss = torch.nn.functional.cross_entropy(own, target)
            found[index] = (loss.item(), (own.argmax(dim=-1) == target).double().mean().item())
        advance(ids.numel())
    return found


def _batches(prompts: Sequence[ReadingPrompt], scorer: Opened) -> Iterator[list[int]]:
    """Yield indices of prompts of similar length, whose logits together stay within the budget if they are several."""
    lengths = [len(p.context) + len(p.question) + len(p.answer) for p in prompts]
    batch: list[int] = []
    for index in sorted(range(len(prompts)), key=lambda i: lengths[i]):
        first = min(lengths[i] - len(prompts[i].answer) for i in [*batch, index])
        needed = (lengths[index] - first) * (len(batch) + 1) * scorer.vocab_size
        if batch and (len(batch) == scorer.batch or needed > BUDGET):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def write(
    scorer: Opened, prompts: Sequence[ReadingPrompt], tokens: int, advance: Advance = lambda amount: None
) -> list[str]:
    """Return the greedy answer to each prompt, up to a line end, the end of a turn, or a number of tokens."""
    text, written = scorer.text, [""] * len(prompts)
    groups: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        groups.setdefault(len(prompt.context) + len(prompt.question), []).append(index)
    for length, members in groups.items():
        for start in range(0, len(members), scorer.batch):
            batch = members[start : start + scorer.batch]
            lines: list[list[int]] = [[] for _ in batch]
            waiting = set(range(len(batch)))
            for step, chosen in enumerate(scorer.greedy([(*prompts[i].context, *prompts[i].question) for i in batch])):
                for row in list(waiting):
                    if chosen[row] not in text.turn_ends:
                        lines[row].append(chosen[row])
                    if chosen[row] in text.turn_ends or "\n" in text.decode(lines[row]):
                        waiting.remove(row)
                if not waiting or step + 1 == tokens:
                    break
            for index, line in zip(batch, lines, strict=True):
                written[index] = text.decode(line).partition("\n")[0].strip()
            advance(length * len(batch))
    return written


def normalised(answer: str) -> list[str]:
    """Return the words of an answer as SQuAD (arXiv 1606.05250) compares them.

    They are in lower case, without punctuation and articles.
    """
    plain = "".join(sign for sign in answer.lower() if sign not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(answer: str, gold: str) -> float:
    """Return 1 if two answers have the same words in the same order, else 0."""
    return float(normalised(answer) == normalised(gold))


def f1(answer: str, gold: str) -> float:
    """Return the harmonic mean of precision and recall of an answer's words."""
    found, wanted = normalised(answer), normalised(gold)
    same = sum((Counter(found) & Counter(wanted)).values())
    return 2 * same / (len(found) + len(wanted)) if same else float(found == wanted)


def ask(
    scorer: Opened,
    part: str,
    prompts: Mapping[str, Sequence[ReadingPrompt]],
    tokens: int = 0,
    advance: Advance = lambda amount: None,
) -> Samples:
    """Measure the answers of a model to the prompts of each column.

    Args:
        part: First word of the measurements' names: `reading` or `chats`.
        prompts: Prompts by column.
        tokens: Largest number of tokens of a written answer; at 0 none is written.

    Returns:
        `PART_nll`, and with written answers `PART_exact` and `PART_f1`.
    """
    samples: Samples = {f"{part}_nll": {}}
    for column, asked in prompts.items():
        samples[f"{part}_nll"][column] = [loss for loss, _ in score(scorer, asked, advance)]
        if tokens:
            answers = list(zip(write(scorer, asked, tokens, advance), (prompt.gold for prompt in asked), strict=True))
            for name, measure in (("exact", exact_match), ("f1", f1)):
                samples.setdefault(f"{part}_{name}", {})[column] = [measure(*pair) for pair in answers]
    return samples


def summarise(
    samples: Mapping[str, Samples], part: str, *, teacher: str | None = None, control: str | None = None
) -> dict[str, Table]:
    """Return the estimates of each model.

    Args:
        samples: What `ask` returned for each model.
        part: The same as there.
        teacher: Name of the model whose loss the others are compared with.
        control: Name of the model whose distance to the teacher is the whole gap.

    Returns:
        The means. With a teacher, also for the others `PART_above`, the loss above the teacher's; with a control, also
        `PART_closed`, the share of the gap between control and teacher that a model closes. Standard errors of both are
        of paired differences.
    """
    tables: dict[str, Table] = {}
    for name, measured in samples.items():
        tables[name] = {key: {c: Estimate.of(x) for c, x in columns.items()} for key, columns in measured.items()}
        if teacher is not None and name != teacher:
            gaps = _above(measured, samples[teacher], part)
            tables[name][f"{part}_above"] = {column: Estimate.of(gap) for column, gap in gaps.items()}
            if control is not None and name != control:
                whole = _above(samples[control], samples[teacher], part)
                shares = {column: Estimate.closed(gap, whole[column]) for column, gap in gaps.items()}
                tables[name][f"{part}_closed"] = {column: x for column, x in shares.items() if x is not None}
    return tables


def _above(model: Samples, teacher: Samples, part: str) -> dict[str, list[float]]:
    """Return the loss of each answer above the teacher's."""
    key = f"{part}_nll"
    return {
        column: [a - b for a, b in zip(losses, teacher[key][column], strict=True)]
        for column, losses in model[key].items()
    }


def ask_keys(
    scorer: Opened,
    prompts: Mapping[str, tuple[Sequence[ReadingPrompt], Sequence[ReadingPrompt]]],
    advance: Advance = lambda amount: None,
) -> Table:
    """Measure the recall of keys.

    Args:
        prompts: By column: prompts, and the same without the statement.

    Returns:
        `formats_COLUMN` and `formats_floor_COLUMN`, the shares of the keys' tokens that are the first choice, with and
        without the statement; their columns are the formats and `mean`. `formats`, by the columns of `prompts`, is the
        share of what the floor leaves: (share - floor) / (1 - floor), over all formats.
    """
    table: Table = {"formats": {}}
    for column, pair in prompts.items():
        missed = []
        for key, asked in zip((f"formats_{column}", f"formats_floor_{column}"), pair, strict=True):
            shares: dict[str, list[float]] = {}
            for prompt, (_, share) in zip(asked, score(scorer, asked, advance), strict=True):
                shares.setdefault(prompt.format, []).append(share)
            everything = [share for of_format in shares.values() for share in of_format]
            table[key] = {name: Estimate.of(x) for name, x in [*shares.items(), ("mean", everything)]}
            missed.append([1 - share for share in everything])
        if above := Estimate.closed(*missed):
            table["formats"][column] = above
    return table
