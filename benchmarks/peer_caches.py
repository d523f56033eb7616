"""Caches that are cut down by the scores of kvpress, for `memory_peers_kvpress.py`, which states what they are.

kvpress 0.5.5 needs transformers below 5.3, so this has an environment of its own and imports nothing of ligerexport.
Scores of kvpress are taken as they are, with two changes for streams: kept tokens stay in order, since some scores take
the first of them for sinks, and expected attention gets the position in the stream. H2O is our own reading of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from kvpress import (
    AdaKVPress,
    ExpectedAttentionPress,
    KeyDiffPress,
    KnormPress,
    KVzipPress,
    ScorerPress,
    SnapKVPress,
    TOVAPress,
)
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SINKS = 4
CHUNK = 256
"""Number of tokens that a stream reads between two evictions."""
LARGEST = 1 << 28
"""Largest number of attention weights at a time."""


@dataclass(frozen=True)
class Budget:
    """A size of memory: bytes, bits of a number, and the number of tokens for each KV head."""

    nbytes: int
    bits: int
    tokens: int


class StreamedExpectedAttention(ExpectedAttentionPress):
    """Expected attention of the tokens that follow a position of the stream.

    Attributes:
        position: Number of tokens that were read.
    """

    position = 0

    def apply_avg_rope(self, module: Any, mu: Tensor, cov: Tensor, q_len: int) -> tuple[Tensor, Tensor]:
        """Rotate by the positions after `position` instead of those after `q_len`."""
        return super().apply_avg_rope(module, mu, cov, self.position)


class ZipScores(KVzipPress):
    """KVzip that hands over its scores, `[layers, H_kv, T]`, instead of cutting a cache down."""

    def compress_post(self, model: Any) -> None:
        """Keep the scores; the first tokens are kept in any case."""
        self.found = self.score_val[:, 0].clone()
        self.found[..., : self.n_sink] = torch.inf


@dataclass
class Given(ScorerPress):
    """A press with scores from elsewhere."""

    scores: Tensor = field(default_factory=lambda: torch.empty(0))

    def score(self, *unused: Any) -> Tensor:
        """Return the scores, which the caller may change."""
        return self.scores[None].clone()


PRESSES: dict[str, Callable[[], ScorerPress]] = {
    "SnapKV": SnapKVPress,
    "TOVA": TOVAPress,
    "expected attention": StreamedExpectedAttention,
    "KeyDiff": KeyDiffPress,
    "Knorm": KnormPress,
}
SHARED = ("SnapKV", "expected attention")
"""Scores with which the heads of a layer also share a budget, as AdaKV does."""
STREAMS = ("SnapKV", "expected attention", "KeyDiff", "H2O")


@dataclass
class Stored:
    """What a layer kept of a context; `R` is 1 where all rows of a batch share it.

    Attributes:
        keys: `[R, H_kv, T, d]`, rotated.
        values: `[R, H_kv, T, d]`.
        received: Attention that tokens got, `[R, H_kv, T]`, as the mean over the query heads of a group.
        kept: Which tokens each row sees, `[R, H_kv, T]`; None is all.
    """

    keys: Tensor
    values: Tensor
    received: Tensor
    kept: Tensor | None = None

    def take(self, index: Tensor) -> Stored:
        """Return the tokens at an index `[R, H_kv, n]`."""
        wide = index[..., None].expand(*index.shape, self.keys.shape[-1])
        return Stored(self.keys.gather(2, wide), self.values.gather(2, wide), self.received.gather(2, index))

    def recent(self, count: int) -> Stored:
        """Return the first tokens and the most recent ones, `count` in all."""
        length = self.keys.shape[2]
        index = torch.arange(min(count, length), device=self.keys.device)
        index[SINKS:] += length - len(index)
        return self.take(index.expand(*self.keys.shape[:2], -1))


Item = dict[str, Any]
"""A prompt: token ids of context, question and answer."""
Scored = list[Any]
"""Mean loss of an answer's tokens, the share of them that is the greedy choice, and what the model writes, if asked."""
Visit = Callable[[int, Any, Tensor, Any], None]
"""Called after the attention of a layer, with its number, module, input and named arguments."""


class Reader:
    """A Transformer whose attention reads from `stored` and can be bounded by a window.

    Attributes:
        stored: What each layer kept of what was read before.
        new: Keys and values of the current call, by layer.
        watched: Whether `new` gets the attention that all tokens get, too.
        window: Number of tokens that each token sees, sinks included; None is all.
        bits: Number of bits of keys and values that are written.
        visit: What is called after the attention of each layer.
        writes: Number of tokens that the model writes as its own answer.
    """

    def __init__(self, directory: str, device: str, dtype: str) -> None:
        ALL_ATTENTION_FUNCTIONS["stored"] = self._attend
        self.model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).to(device).eval()
        self.model.requires_grad_(False)
        self.model.config._attn_implementation = "stored"
        self.device, self.tokenizer = device, AutoTokenizer.from_pretrained(directory)
        config = self.model.config
        self.layers, self.heads = config.num_hidden_layers, config.num_key_value_heads
        self.width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.stored: dict[int, Stored] = {}
        self.new: dict[int, Stored] = {}
        self.window: int | None = None
        self.visit: Visit | None = None
        self.bits, self.watched, self.writes = 16, False, 0
        ends = self.model.generation_config.eos_token_id
        self.ends = ends if isinstance(ends, list) else [ends]
        for layer in self.model.model.layers:
            layer.self_attn.rotary_emb = self.model.model.rotary_emb
            layer.self_attn.register_forward_hook(self._visit, with_kwargs=True)

    def token_bytes(self, bits: int) -> int:
        """Return the bytes of a token's keys and values in all heads."""
        return self.layers * self.heads * 2 * (self.width * bits // 8 + (2 if bits == 8 else 0))

    def read(self, ids: Tensor, start: int = 0, visit: Visit | None = None) -> Tensor:
        """Read tokens `[R, T]` from a position on and return what enters the output projection, `[R, T, D]`."""
        positions = torch.arange(start, start + ids.shape[1], device=ids.device).expand_as(ids)
        self.visit, self.new = visit, {}
        return self.model.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state

    def ask(self, start: int, prompts: list[Item]) -> list[Scored]:
        """Read question and answer of each row, after a context of `start` tokens."""
        hidden = self._rows(start, [[*prompt["question"], *prompt["answer"]] for prompt in prompts])
        scored = [
            self.score(one[len(prompt["question"]) - 1 :], prompt["answer"])
            for one, prompt in zip(hidden, prompts, strict=True)
        ]
        rows = [list(prompt["question"]) for prompt in prompts]
        for _ in range(self.writes):
            hidden = self._rows(start, rows)
            last = torch.stack([one[len(row) - 1] for one, row in zip(hidden, rows, strict=True)])
            for row, token in zip(rows, self.model.lm_head(last).argmax(-1).tolist(), strict=True):
                row.append(token)
        for one, row, prompt in zip(scored, rows, prompts, strict=True):
            written = row[len(prompt["question"]) :]
            ends = [i for i, token in enumerate(written) if token in self.ends]
            text = self.tokenizer.decode(written[: ends[0]] if ends else written)
            one += [text.partition("\n")[0].strip()] if self.writes else []
        return scored

    def _rows(self, start: int, rows: list[list[int]]) -> Tensor:
        ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long, device=self.device)
        for padded, row in zip(ids, rows, strict=True):  # behind the row, where nothing sees it
            padded[: len(row)] = torch.tensor(row)
        return self.read(ids, start)

    def score(self, hidden: Tensor, targets: list[int]) -> Scored:
        """Return loss and share of right tokens of `n` targets, from the `[>= n, D]` before them."""
        losses, right, target = [], [], torch.tensor(targets, device=self.device)
        for part, wanted in zip(hidden[: len(targets)].split(1024), target.split(1024), strict=True):
            logits = self.model.lm_head(part).float()
            losses.append(torch.nn.functional.cross_entropy(logits, wanted, reduction="none"))
            right.append(logits.argmax(-1) == wanted)
        return [round(torch.cat(x).float().mean().item(), 5) for x in (losses, right)]

    def _visit(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        if self.visit is not None:
            self.visit(module.layer_idx, module, kwargs["hidden_states"], kwargs)

    def _attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **unused: Any
    ) -> tuple[Tensor, None]:
        rows, heads, length, width = query.shape
        kv, past = key.shape[1], self.stored.get(module.layer_idx)
        key, value = rounded(key, self.bits), rounded(value, self.bits)
        q = query.view(rows, kv, heads // kv, length, width) * scaling
        before = past.keys.shape[2] if past else 0
        total = before + key.shape[2]
        seen = torch.ones(length, total, dtype=torch.bool, device=q.device).tril(total - length)
        if self.window is not None:
            recent = torch.ones_like(seen).triu(total - length - (self.window - SINKS) + 1)
            recent[:, :SINKS] = True
            seen &= recent
        self.new[module.layer_idx] = Stored(key, value, key.new_zeros(rows, kv, total, dtype=torch.float32))
        if not self.watched and not (past and past.kept is not None):
            keys, values = (
                (torch.cat([past.keys, key], 2), torch.cat([past.values, value], 2)) if past else (key, value)
            )
            keys, values = (x.repeat_interleave(heads // kv, 1) for x in (keys, values))
            mixed = torch.nn.functional.scaled_dot_product_attention(query, keys, values, seen, scale=scaling)
            return mixed.transpose(1, 2), None
        out, received = torch.empty_like(q), self.new[module.layer_idx].received
        step = max(1, min(kv, LARGEST // (rows * heads // kv * length * total)))
        for part in range(0, kv, step):
            h = slice(part, part + step)
            keys, values = key[:, h], value[:, h]
            if past:
                keys = torch.cat([past.keys[:, h].expand(rows, -1, -1, -1), keys], 2)
                values = torch.cat([past.values[:, h].expand(rows, -1, -1, -1), values], 2)
            weights = torch.einsum("rkgtd,rksd->rkgts", q[:, h], keys).float().masked_fill_(~seen, -torch.inf)
            if past and past.kept is not None:
                weights[..., :before].masked_fill_(~past.kept[:, h, None, None], -torch.inf)
            weights = weights.softmax(-1)
            received[:, h] = weights.sum(-2).mean(2)
            out[:, h] = torch.einsum("rkgts,rksd->rkgtd", weights.to(value.dtype), values)
        return out.permute(0, 3, 1, 2, 4).reshape(rows, length, heads, width), None


def rounded(x: Tensor, bits: int) -> Tensor:
    """Round to integers of 8 bits with one scale for each token and head."""
    if bits == 16:
        return x
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().clamp_min(1e-7).to(x.dtype)
    return (x / scale).round().clamp(-127, 127) * scale


def best(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` best in each row of `[..., T]`."""
    kept = torch.zeros_like(scores, dtype=torch.bool)
    return kept.scatter_(-1, scores.topk(min(count, scores.shape[-1]), dim=-1).indices, True)


class Prompt:
    """A context that was read once with full attention, and the scores of its tokens by all peers."""

    def __init__(self, reader: Reader, context: list[int]) -> None:
        self.reader, self.length = reader, len(context)
        self.presses = {name: make() for name, make in PRESSES.items()}
        found: dict[str, list[Tensor]] = {name: [] for name in (*PRESSES, "H2O")}
        self.presses["expected attention"].position = len(context)
        reader.stored, reader.bits, reader.watched = {}, 16, True
        ids = torch.tensor([context], device=reader.device)

        def visit(layer: int, module: Any, hidden: Tensor, kwargs: Any) -> None:
            new = reader.new[layer]
            for name, press in self.presses.items():
                found[name].append(press.score(module, hidden, new.keys, new.values, None, kwargs)[0].float())
            rows = torch.arange(self.length, 0, -1, device=ids.device)  # that could see a token
            found["H2O"].append(new.received[0] / rows)

        reader.read(ids, visit=visit)
        self.read, reader.watched = dict(reader.new), False
        self.scores = {name: torch.stack(layers) for name, layers in found.items()}
        self.scores["KVzip"] = self._zip(ids)
        recent = torch.arange(self.length, device=ids.device).float()
        recent[:SINKS] = torch.inf
        self.scores["StreamingLLM"] = recent.expand_as(self.scores["KVzip"])

    def _zip(self, ids: Tensor) -> Tensor:
        """Return KVzip's scores, from reading the context again; it has no frame of a chat here."""
        reader, press = self.reader, ZipScores(0.5)
        reader.visit = None
        with press(reader.model):
            press.prefix_length, press._suffix_ids = 0, reader.tokenizer("\n", return_tensors="pt")["input_ids"]
            reader.model.model(input_ids=ids, past_key_values=DynamicCache())
        return press.found

    def kept(self, peer: str, budget: Budget) -> Tensor:
        """Return what each layer keeps, `[layers, H_kv, T]`."""
        count, scores = budget.tokens, self.scores.get(peer.removeprefix("AdaKV, "), self.scores["StreamingLLM"])
        if count >= self.length or peer == "Transformer":
            return torch.ones_like(scores, dtype=torch.bool)
        if peer == "KVzip":  # all heads of all layers share
            return best(scores.flatten(), count * scores[..., 0].numel()).view_as(scores)
        if peer in self.scores:
            return best(scores, count)
        return torch.stack([self._adaptive(layer, of_layer, count) for layer, of_layer in enumerate(scores)])

    def _adaptive(self, layer: int, scores: Tensor, count: int) -> Tensor:
        press = AdaKVPress(Given(1 - (count + 0.5) / self.length, scores))
        module, read = self.reader.model.model.layers[layer].self_attn, self.read[layer]
        press.compress(module, None, read.keys, read.values, None, {})
        kept = torch.ones_like(scores, dtype=torch.bool)
        kept[module.masked_key_indices[1:]] = False
        module.masked_key_indices = None
        return kept

    def ask(self, prompt: Item, rows: list[tuple[str, Budget]], bits: int) -> list[Scored]:
        """Read question and answer with each row's peer and budget."""
        kept = torch.stack([self.kept(*row) for row in rows], 1)
        self.reader.stored = {
            i: Stored(rounded(read.keys, bits), rounded(read.values, bits), read.received, kept[i])
            for i, read in self.read.items()
        }
        return self.reader.ask(self.length, [prompt] * len(rows))


class Stream:
    """Reads without end, and cuts what is stored down to a budget after every chunk."""

    def __init__(self, reader: Reader, peer: str, budget: Budget) -> None:
        self.reader, self.budget = reader, budget
        self.press = PRESSES[peer]() if peer in PRESSES else None  # of H2O
        reader.stored, reader.bits = {}, budget.bits

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        """Read `[R, T]` from the beginning and yield what enters the output projection, chunk by chunk.

        The first chunk is as long as the budget and what the others, of `CHUNK` tokens each, leave over.
        """
        length = ids.shape[1]
        first = length - max(0, length - self.budget.tokens) // CHUNK * CHUNK
        for start, end in [(0, first), *((i, i + CHUNK) for i in range(first, length, CHUNK))]:
            if isinstance(self.press, StreamedExpectedAttention):
                self.press.position = end
            self.reader.watched = self.press is None
            hidden = self.reader.read(ids[:, start:end], start, self._store)
            self.reader.watched = False
            yield hidden

    def _store(self, layer: int, module: Any, hidden: Tensor, kwargs: Any) -> None:
        new, past = self.reader.new[layer], self.reader.stored.get(layer)
        if past:
            new.received[..., : past.received.shape[2]] += past.received
            new = Stored(torch.cat([past.keys, new.keys], 2), torch.cat([past.values, new.values], 2), new.received)
        count, length = self.budget.tokens, new.keys.shape[2]
        if length > count:
            if self.press is None:
                scores = new.received.clone()
                scores[..., length - count // 2 :] = torch.inf
            else:
                scores = self.press.score(module, hidden, new.keys, new.values, None, kwargs).float()
            new = new.take(scores.topk(count, dim=-1).indices.sort(dim=-1).values)
        self.reader.stored[layer] = new
