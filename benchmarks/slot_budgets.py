"""Measure what a memory with its own window and slots in each KV head would keep, before any kernel is written for it.

    python benchmarks/slot_budgets.py MODEL DATA -o benchmarks/results/slot_budgets.json

DATA holds `fit/qa.txt` (passages, a blank line between them, each group followed by lines `Question: ...` and
`Answer: ...`), `reading.json` (other passages: rows with title, passage, question, answer) and `prose.txt`.

1. A linear map of what enters a layer's attention is fitted to the largest attention that a token gets while the model
   repeats the text: the score of slots.
2. For each KV head and each pair of a window and a number of slots, the change of the head's output is weighted by the
   gradient of the loss and squared: the cost of prose, and of repeating a text.
3. A total of bytes is shared out greedily: each head moves to the next pair that lowers the cost most per byte.
4. Every row of a stream then sees the first tokens, the window of its head, and the best-scored tokens that have left
   the window, in 8 bits if a plan says so. Loss is in nats per token, keys are the share of digits that are right.

Plain torch and transformers, with attention as masked matrices: for a CUDA device, and for numbers only.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SINKS = 4
WINDOWS, SLOTS = (16, 64, 128, 256, 512, 1024), (0, 64, 128, 256, 512, 1024, 2048)
OPTIONS = [(window, slots) for window in WINDOWS for slots in SLOTS]
FIT_TEXTS, FIT_TOKENS, COST_TEXTS, COST_TOKENS = 48, 1500, 16, 2400
PROSE = 0.3
"""Share of prose in the cost; the rest is repeating."""
MEGABYTES = (2, 4, 8, 24)
DISTANCES = {1000: 32, 3000: 24, 7000: 10}
"""Questions for each number of tokens among which the answer stands."""
KEYS = (
    ("The locker of {n} opens with {d}.", "The locker of {n} opens with"),
    ("Note to self: {n}'s code is {d}", "Note to self: {n}'s code is"),
    ('{{"user": "{n}", "pin": "{d}"}}', '{{"user": "{n}", "pin": "'),
    ("| {n} | {d} |", "| {n} |"),
    ("PIN_{n} = {d}", "PIN_{n} ="),
    ("{n} was born in room {d}, they say.", "{n} was born in room"),
    ("ship {n} carries {d} crates", "ship {n} carries"),
)
NAMES = ("Albrecht", "Moira", "Tanaka", "Oyelaran", "Svenson", "Delgado", "Petrova", "Kimura")
KEY_DISTANCES, KEY_TRIALS = (1024, 4096), 4
Sizes = list[list[tuple[int, int]]]
"""Window and slots of each KV head of each layer."""


@dataclass
class Plan:
    """A memory: the sizes of its heads, the bytes of its state, and the bits of keys and values."""

    sizes: Sizes
    nbytes: int
    bits: int


@dataclass
class Asked:
    """What the attention below does in the current call.

    Attributes:
        plan: Memory that every row sees; None is full attention.
        context: Tokens whose largest attention is recorded, if any.
        first: Row from which it is recorded.
        peaks: What was recorded, `[H_kv, context]` by layer.
        record: Whether `kept` gets query, key, value and output of each layer.
        kept: What was recorded.
    """

    plan: Plan | None = None
    context: int = 0
    first: int = 0
    peaks: dict[int, Tensor] = field(default_factory=dict)
    record: bool = False
    kept: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = field(default_factory=dict)


class Probe:
    """A Transformer whose attention can be bounded."""

    def __init__(self, directory: str, device: str) -> None:
        ALL_ATTENTION_FUNCTIONS["probe"] = self._attend
        self.device, self.asked = device, Asked()
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).to(device).eval()
        self.model.requires_grad_(False)
        self.model.config._attn_implementation = "probe"
        self.inputs: dict[int, Tensor] = {}
        for layer in self.model.model.layers:
            layer.self_attn.register_forward_pre_hook(self._keep_input, with_kwargs=True)
        self.layers, self.heads = len(self.model.model.layers), self.model.config.num_key_value_heads
        self.maps: dict[int, Tensor] = {}

    def _keep_input(self, module: Any, args: Any, kwargs: Any) -> None:
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self.inputs[module.layer_idx] = hidden[0].detach().float()

    def encode(self, text: str) -> list[int]:
        """Return ids without special tokens."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def logits(self, ids: list[int], count: int) -> Tensor:
        """Return the logits before each of the last `count` tokens, `[count, V]`."""
        x = torch.tensor([ids], device=self.device)
        return self.model(x, use_cache=False, logits_to_keep=count + 1).logits[0, :-1].float()

    @torch.no_grad()
    def loss(self, ids: list[int], count: int, plan: Plan | None = None) -> float:
        """Return the mean loss of the last `count` tokens."""
        self.asked = Asked(plan)
        target = torch.tensor(ids[-count:], device=self.device)
        return torch.nn.functional.cross_entropy(self.logits(ids, count), target).item()

    def scores(self, layer: int) -> Tensor:
        """Return the scores of the tokens of the current call, `[H_kv, T]`."""
        return (_with_one(self.inputs[layer]) @ self.maps[layer]).T

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **unused: Any
    ) -> tuple[Tensor, None]:
        layer, (_, heads, length, width) = module.layer_idx, query.shape
        kv, plan, asked = key.shape[1], self.asked.plan, self.asked
        q = query[0].float().view(kv, heads // kv, length, width) * scaling
        k, v = (_rounded(x[0].float(), plan.bits if plan else 32) for x in (key, value))
        weights = torch.einsum("kgtd,ksd->kgts", q, k)
        if plan is not None:
            scores, out = self.scores(layer), torch.empty_like(q)
            for head, (window, slots) in enumerate(plan.sizes[layer]):
                seen = visible(rank(scores[head]) if slots else None, window, slots, length, self.device)
                out[head] = weights[head].masked_fill(~seen, -1e30).softmax(-1) @ v[head]
            return out.permute(2, 0, 1, 3).reshape(1, length, heads, width).to(value.dtype), None
        causal = torch.ones(length, length, dtype=torch.bool, device=self.device).tril()
        weights = weights.masked_fill(~causal, -1e30).softmax(-1)
        if asked.context:
            asked.peaks[layer] = weights[:, :, asked.first :, : asked.context].amax((1, 2))
        mixed = torch.einsum("kgts,ksd->tkgd", weights, v).reshape(1, length, heads, width)
        if asked.record:
            asked.kept[layer] = (q.detach(), k.detach(), v.detach(), mixed)
        return mixed.to(value.dtype), None


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, device=x.device, dtype=x.dtype)], 1)


def _rounded(x: Tensor, bits: int) -> Tensor:
    """Round to integers of 8 bits with one scale for each token and head, or of 4 with one for each 16 channels."""
    if bits == 32:
        return x
    most, blocks = (127, x.unsqueeze(-2)) if bits == 8 else (7, x.unflatten(-1, (-1, 16)))
    scale = blocks.abs().amax(-1, keepdim=True).clamp_min(1e-8) / most
    return ((blocks / scale).round().clamp(-most, most) * scale).flatten(-2)


def rank(score: Tensor) -> Tensor:
    """Return `[T, T]`: at row t and column s the number of tokens up to t, without sinks, that score more than s."""
    counted = score.clone()
    counted[:SINKS] = -1e30
    return (counted[:, None] > counted[None]).to(torch.int16).cumsum(0, dtype=torch.int16)


def visible(ranks: Tensor | None, window: int, slots: int, length: int, device: str) -> Tensor:
    """Return which columns each row sees, `[T, T]`."""
    row, column = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)[None]
    seen = (row - column < window) | (column < SINKS)
    if ranks is not None and length > window:
        held = torch.zeros(length, length, dtype=torch.bool, device=device)
        held[window:] = ranks[: length - window] < slots
        seen |= held & (row - column >= window)
    return seen & (column <= row)


def read_groups(text: str) -> list[str]:
    """Return the passages of each group that questions follow."""
    groups, waiting = [], []
    for part in text.split("\n\n"):
        if part.startswith("Question: "):
            groups += ["\n\n".join(waiting)] if waiting else []
            waiting = []
        else:
            waiting.append(part)
    return groups


@torch.no_grad()
def fit(probe: Probe, groups: list[str]) -> None:
    """Fit the maps of `probe` by least squares to the logarithm of the attention that a repetition pays."""
    rng, sums = random.Random(1), {}
    repeat = probe.encode("Repeat the text above.\n\n")
    for _ in range(FIT_TEXTS):
        context: list[int] = []
        while len(context) < FIT_TOKENS:
            context += probe.encode(rng.choice(groups) + "\n\n")
        context = context[: FIT_TOKENS + 300]
        probe.asked = Asked(context=len(context), first=len(context) + len(repeat))
        probe.logits(context + repeat + context, 1)
        for i in range(probe.layers):
            x = _with_one(probe.inputs[i][8 : len(context)]).double()
            y = (probe.asked.peaks[i][:, 8:] + 1e-3).log().T.double()
            xx, xy = sums.get(i, (0, 0))
            sums[i] = xx + x.T @ x, xy + x.T @ y
    for i, (xx, xy) in sums.items():
        ridge = 1e-4 * xx.diagonal().mean() * torch.eye(len(xx), device=probe.device, dtype=xx.dtype)
        probe.maps[i] = torch.linalg.solve(xx + ridge, xy).float()


def costs(probe: Probe, groups: list[str]) -> Tensor:
    """Return the cost of each option in each head, `[layers, H_kv, options]`; the smallest memory costs 1 in all."""
    rng, repeat = random.Random(2), probe.encode("Repeat the text above.\n\n")
    found = {kind: torch.zeros(probe.layers, probe.heads, len(OPTIONS)).double() for kind in ("prose", "repeat")}
    for text in range(COST_TEXTS):
        again = text % 4 == 3
        context: list[int] = []
        while len(context) < (COST_TOKENS // 2 if again else COST_TOKENS):
            context += probe.encode(rng.choice(groups) + "\n\n")
        ids = torch.tensor([context + repeat + context if again else context], device=probe.device)
        probe.asked = Asked(record=True)
        embedded = probe.model.get_input_embeddings()(ids).requires_grad_(True)
        logits = probe.model(inputs_embeds=embedded, use_cache=False).logits[0, :-1].float()
        losses = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        parts = {"prose": losses[: len(context) - 1].sum()}
        if again:
            parts["repeat"] = losses[-len(context) :].sum()
        outputs = [probe.asked.kept[i][3] for i in range(probe.layers)]
        for kind, loss in parts.items():
            gradients = torch.autograd.grad(loss, outputs, retain_graph=True)
            for layer, gradient in enumerate(gradients):
                found[kind][layer] += _layer_cost(probe, layer, gradient).cpu()
    return sum(
        share * found[kind] / found[kind][..., 0].sum() for kind, share in (("prose", PROSE), ("repeat", 1 - PROSE))
    )


@torch.no_grad()
def _layer_cost(probe: Probe, layer: int, gradient: Tensor) -> Tensor:
    """Return the squared change of the loss, to first order, for every option of every head of a layer."""
    q, k, v, mixed = (x.detach() for x in probe.asked.kept[layer])
    kv, group, length, width = q.shape
    out, slope = (x[0].view(length, kv, group, width) for x in (mixed, gradient))
    scores, cost = probe.scores(layer), torch.zeros(kv, len(OPTIONS), device=probe.device).double()
    causal = torch.ones(length, length, dtype=torch.bool, device=probe.device).tril()
    for head in range(kv):
        weights = torch.einsum("gtd,sd->gts", q[head], k[head]).masked_fill_(~causal, -1e30).softmax(-1)
        ranks = rank(scores[head])
        for option, (window, slots) in enumerate(OPTIONS):
            left = weights * visible(ranks, window, slots, length, probe.device)
            bounded = (left @ v[head]) / left.sum(-1).clamp_min(1e-20)[..., None]
            change = bounded.permute(1, 0, 2) - out[:, head]
            cost[head, option] = (slope[:, head] * change).sum((1, 2)).square().sum()
    return cost


def state_bytes(window: int, slots: int, width: int, bits: int) -> int:
    """Return the bytes of a head: keys, values, scales, a position of 4 bytes, and a score of 4 for scored slots."""
    token = 2 * width * bits // 8 + {8: 4, 4: 2 * width // 16, 32: 0}[bits] + 4
    return (window + SINKS) * token + slots * (token + 4)


def share_out(cost: Tensor, total: float, width: int, bits: int) -> Plan:
    """Share out a total of bytes over heads, each step to the option with the largest gain per byte."""
    nbytes = [state_bytes(window, slots, width, bits) for window, slots in OPTIONS]
    least = min(range(len(OPTIONS)), key=nbytes.__getitem__)
    chosen = {(i, h): least for i in range(cost.shape[0]) for h in range(cost.shape[1])}
    spent, rows = len(chosen) * nbytes[least], cost.tolist()

    def offer(i: int, h: int) -> tuple[float, int, int, int] | None:
        now = chosen[i, h]
        steps = [
            ((rows[i][h][new] - rows[i][h][now]) / (nbytes[new] - nbytes[now]), i, h, new)
            for new in range(len(OPTIONS))
            if nbytes[new] > nbytes[now]
        ]
        best = min(steps, default=None)
        return best if best and best[0] < 0 else None

    waiting = [step for key in chosen if (step := offer(*key))]
    heapq.heapify(waiting)
    while waiting:
        _, i, h, new = heapq.heappop(waiting)
        if spent + nbytes[new] - nbytes[chosen[i, h]] <= total:
            spent += nbytes[new] - nbytes[chosen[i, h]]
            chosen[i, h] = new
            if step := offer(i, h):
                heapq.heappush(waiting, step)
    sizes = [[OPTIONS[chosen[i, h]] for h in range(cost.shape[1])] for i in range(cost.shape[0])]
    return Plan(sizes, spent, bits)


def equal_windows(probe: Probe, total: float, width: int) -> Plan:
    """Return a plain window of 8 bits in every head."""
    window = int(total / probe.layers / probe.heads / state_bytes(1 - SINKS, 0, width, 8)) - SINKS
    return Plan([[(window, 0)] * probe.heads] * probe.layers, int(total), 8)


def reading(probe: Probe, rows: list[dict[str, str]], distance: int, count: int, plans: dict[str, Any]) -> Any:
    """Return the loss of answers whose paragraph stands among `distance` tokens of others."""
    rng, found = random.Random(distance), {name: [] for name in plans}
    for row in rng.sample(rows, count):
        parts, length = [], 0
        while length < distance:
            other = rng.choice(rows)
            if other["passage"] != row["passage"]:
                parts.append(f"{other['title']}\n{other['passage']}\n\n")
                length += len(probe.encode(parts[-1]))
        parts.insert(rng.randrange(len(parts) + 1), f"{row['title']}\n{row['passage']}\n\n")
        answer = probe.encode(" " + row["answer"])
        ids = probe.encode("".join(parts) + f"Question: {row['question']}\nAnswer:") + answer
        for name, plan in plans.items():
            found[name].append(probe.loss(ids, len(answer), plan))
    return {name: sum(values) / len(values) for name, values in found.items()}


def keys(probe: Probe, prose: list[int], distance: int, plans: dict[str, Any]) -> Any:
    """Return the share of digits of keys that the greedy choice gets right, each said once before prose."""
    rng, found = random.Random(distance), {name: [] for name in plans}
    for f, (said, asked) in enumerate(KEYS):
        for trial in range(KEY_TRIALS):
            name, digits = NAMES[(f + trial) % len(NAMES)], "".join(rng.choice("0123456789") for _ in range(5))
            start = rng.randrange(len(prose) - distance - 200)
            answer = probe.encode(digits if asked.endswith('"') else " " + digits)
            ids = prose[start : start + 120] + probe.encode("\n" + said.format(n=name, d=digits) + "\n")
            ids += prose[start + 120 : start + 120 + distance] + probe.encode("\n\n" + asked.format(n=name)) + answer
            for plan_name, plan in plans.items():
                probe.asked = Asked(plan)
                with torch.no_grad():
                    right = probe.logits(ids, len(answer)).argmax(-1).cpu() == torch.tensor(answer)
                found[plan_name].append(right[-5:].float().mean().item())
    return {name: sum(values) / len(values) for name, values in found.items()}


def main() -> None:
    """Fit, share out, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    args = parser.parse_args()
    probe = Probe(args.model, args.device)
    groups = read_groups((args.data / "fit" / "qa.txt").read_text())
    fit(probe, groups)
    cost, width = costs(probe, groups), probe.model.config.head_dim
    plans: dict[str, Plan | None] = {"Transformer": None}
    plans |= {f"{mb} MB": share_out(cost, mb * 1e6, width, 8) for mb in MEGABYTES}
    plans["8 MB in 4 bits"] = share_out(cost, 8e6, width, 4)
    plans |= {f"{mb} MB of window": equal_windows(probe, mb * 1e6, width) for mb in (8, 24)}
    rows = json.loads((args.data / "reading.json").read_text())
    prose = probe.encode(re.sub(r"\s+", " ", (args.data / "prose.txt").read_text()[:200_000]))
    result: dict[str, Any] = {"command": "python " + " ".join(sys.argv), "torch": torch.__version__}
    result["device"] = torch.cuda.get_device_name() if args.device == "cuda" else args.device
    result["sizes"] = {  # of each layer, window+slots of each head
        name: vars(plan) | {"sizes": [" ".join(f"{w}+{s}" for w, s in layer) for layer in plan.sizes]}
        for name, plan in plans.items()
        if plan
    }
    result["reading"] = {d: reading(probe, rows, d, count, plans) for d, count in DISTANCES.items()}
    pieces = [prose[i : i + 8192] for i in (0, 8192, 16384)]
    result["prose"] = {
        name: sum(probe.loss(piece, 6144, plan) for piece in pieces) / len(pieces) for name, plan in plans.items()
    }
    result["keys"] = {distance: keys(probe, prose, distance, plans) for distance in KEY_DISTANCES}
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    for name in plans:
        figures = [f"{d}: {found[name] - found['Transformer']:+.3f}" for d, found in result["reading"].items()]
        figures.append(f"prose: {result['prose'][name] - result['prose']['Transformer']:+.3f}")
        figures += [f"keys {d}: {found[name]:.3f}" for d, found in result["keys"].items()]
        print(f"{name:20s} {'  '.join(figures)}")


if __name__ == "__main__":
    main()
