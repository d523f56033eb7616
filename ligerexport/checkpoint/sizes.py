"""Choose the sizes of a memory for a number of bytes: by a fit to a checkpoint, or the same for all heads."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ligerexport.checkpoint.checkpoint import CheckpointInfo
from ligerexport.checkpoint.loading import load_transformer
from ligerexport.checkpoint.passages import NO_FIT, Reader, builtin_texts, passages
from ligerexport.checkpoint.scores import Fitting, packaged_fit
from ligerexport.checkpoint.shares import OPTIONS, head_bytes, share_out, usual_bytes, words
from ligerexport.checkpoint.sources import Source
from ligerexport.console import ProgressFactory, format_bytes, say
from ligerexport.errors import CheckpointError, LigerError, UsageError
from ligerexport.model.config import LigerConfig
from ligerexport.text.corpus import read_texts
from ligerexport.text.tokenizer import TextModel

if TYPE_CHECKING:
    from ligerexport.checkpoint.calibrate import Costs, Scores
    from ligerexport.checkpoint.recall import Effort

_SEED = 0


class Heads(NamedTuple):
    """The KV heads that are converted.

    Attributes:
        layers: Their layers.
        number: Number of heads.
        width: Width of key and value together.
    """

    layers: tuple[int, ...]
    number: int
    width: int


def converted_heads(config: Mapping[str, Any], liger: LigerConfig) -> Heads:
    """Return the heads of the layers that `liger` converts."""
    from ligerexport.layers.mixer import read_config
    from ligerexport.model.families import head_dim

    layers = tuple(layer for layer in range(config["num_hidden_layers"]) if layer not in liger.unchanged)
    each = config.get("num_key_value_heads") or config["num_attention_heads"]
    return Heads(layers, each * len(layers), 2 * head_dim(read_config(dict(config))))


def equal_sizes(config: Mapping[str, Any], liger: LigerConfig, state_bytes: int | None) -> LigerConfig:
    """Return a conversion in which every head has the window that its share of the bytes holds, and no scored slots.

    Raises:
        UsageError: The bytes are too few for a window.
    """
    heads = converted_heads(config, liger)
    total = state_bytes or usual_bytes(heads.number, heads.width)
    window = total // max(1, heads.number) // head_bytes(0, 1, 0, heads.width) - liger.sinks
    if window < 1:
        needed = heads.number * head_bytes(liger.sinks, 1, 0, heads.width)
        raise UsageError(
            f"{total:,} bytes of state are too few for {heads.number} KV heads", hint=f"--state-bytes {needed}"
        )
    trained = config.get("max_position_embeddings") or window
    return replace(liger, window=min(window, trained), slots=())


def fitted_sizes(
    source: Source,
    info: CheckpointInfo,
    liger: LigerConfig,
    fitting: Fitting,
    texts: Sequence[Path],
    progress: ProgressFactory,
) -> tuple[LigerConfig, Scores]:
    """Return a conversion with sizes for each head, and its scores, from a fit to a checkpoint or from an earlier one.

    Args:
        source: The checkpoint.
        info: Its weights, in a form that can be loaded.
        liger: The conversion.
        fitting: Bytes to share out, and a file of an earlier fit.
        texts: Files with further text for the fit. Half of what is read comes from them.
        progress: Reports the phases.

    Raises:
        UsageError: The bytes are too few, or the model's texts are too short for a fit.
        LigerError: The device has too little memory for a fit.
    """
    from ligerexport.checkpoint.calibrate import digest, score_shapes

    heads = converted_heads(info.config, liger)
    total = fitting.state_bytes or usual_bytes(heads.number, heads.width)
    found = None if texts else _earlier_fit(source, info, liger, fitting)
    if found is None:
        found = _fit(source, info, liger, total, texts, progress)
    sized = replace(liger, heads=_words(found.costs or {}, heads, total, liger, info.config["num_hidden_layers"]))
    tensors = {name: found.tensors[name] for name in score_shapes(info.config, sized)}
    return sized, found._replace(tensors=tensors, facts=found.facts | {"bytes": total, "sha256": digest(tensors)})


def _earlier_fit(source: Source, info: CheckpointInfo, liger: LigerConfig, fitting: Fitting) -> Scores | None:
    """Return what an earlier fit found: that of a file, of the source, or the one that ships with a built-in model."""
    from ligerexport.checkpoint.calibrate import read_scores, score_shapes

    shapes, packaged = score_shapes(info.config, liger), packaged_fit(source)
    if fitting.scores is not None:
        found = read_scores(Path(fitting.scores), shapes, "file")
        if not found.costs:
            raise UsageError(f"{fitting.scores} holds no costs of sizes", hint="it is not from a fit of recall")
        return found
    held = {tensor.file for name, tensor in info.tensors.items() if name in shapes}
    if len(held) == 1 and all(name in info.tensors for name in shapes):  # the source was converted before
        found = read_scores(held.pop(), shapes, "source")
        if found.costs:
            return found
    return None if packaged is None else read_scores(packaged, shapes, "package")


def _words(costs: Costs, heads: Heads, total: int, liger: LigerConfig, layers: int) -> tuple[str, ...]:
    """Share out bytes, and return the sizes of the heads of every layer; no window reaches beyond `max_distance`.

    Raises:
        CheckpointError: The costs belong to another model, or to other sizes.
    """
    rows = [head for layer in heads.layers for head in costs.get(layer, ())]
    if len(rows) != heads.number or any(len(row) != len(OPTIONS) for row in rows):
        raise CheckpointError("the costs of sizes were measured for another model", hint="fit again: --calibrate TEXT")
    allowed, nbytes = _options(heads, liger)
    chosen = iter(share_out([[row[n] for n in allowed] for row in rows], nbytes, total))
    found = {layer: words([OPTIONS[allowed[next(chosen)]] for _ in costs[layer]]) for layer in heads.layers}
    return tuple(found.get(layer, "") for layer in range(layers))


def _options(heads: Heads, liger: LigerConfig) -> tuple[list[int], list[int]]:
    """Return which options have a window that the conversion allows, and the bytes of each."""
    allowed = [n for n, (window, _) in enumerate(OPTIONS) if window <= (liger.max_distance or math.inf)]
    return allowed, [head_bytes(liger.sinks, *OPTIONS[n], heads.width) for n in allowed]


def _fit(
    source: Source,
    info: CheckpointInfo,
    liger: LigerConfig,
    total: int,
    texts: Sequence[Path],
    progress: ProgressFactory,
) -> Scores:
    """Fit scores, and measure what sizes cost."""
    import torch

    from ligerexport.checkpoint.calibrate import Scores
    from ligerexport.checkpoint.recall import fit_memory

    facts = describe_sizes(info, liger, total)
    heads, effort = converted_heads(info.config, liger), _effort()
    given = [passages(read_texts(texts))] if texts else []
    reader = Reader(TextModel(source.path), [builtin_texts(), *filter(None, given)], _longest(info, effort), _SEED)
    gpu, needed, (there, where) = torch.cuda.is_available(), facts["fit_memory_bytes"], _room()
    if needed > there:
        raise LigerError(
            f"the fit of this model needs {format_bytes(needed)} of memory, and {format_bytes(there)} are {where}",
            hint=("fit on the CPU, with CUDA_VISIBLE_DEVICES= before the command, or " if gpu else "") + NO_FIT,
        )
    say(f"fitting {format_bytes(facts['state_bytes'])} of state for {heads.number} KV heads: the Transformer reads "
        f"{facts['fit']}, in about {_duration(facts['fit_seconds'])}; --no-fit goes without")  # fmt: skip
    with progress(f"loading {source.name}", info.bytes) as advance:
        model: Any = load_transformer(info.path, info.config, "auto" if gpu else torch.float32)
        if model.dtype == torch.float16:  # in which gradients overflow
            model.to(torch.bfloat16)
        model.to("cuda" if gpu else "cpu")
        advance(info.bytes)
    found = fit_memory(model, reader, heads.layers, sinks=liger.sinks, effort=effort, progress=progress)
    explained = round(math.fsum(found.fit.explained) / max(1, len(found.fit.explained)), 4)
    record = {"from": "fit", "texts": effort.texts, "tokens": found.tokens, "seed": _SEED, "explained": explained}
    return Scores(found.fit.tensors, record, found.costs)


def describe_sizes(info: CheckpointInfo, liger: LigerConfig, state_bytes: int | None) -> dict[str, Any]:
    """Return what a fit of sizes shares out, reads and needs.

    Raises:
        UsageError: The bytes are too few, which would otherwise be found after the fit.
    """
    import torch

    heads, effort = converted_heads(info.config, liger), _effort()
    total, (_, nbytes) = state_bytes or usual_bytes(heads.number, heads.width), _options(heads, liger)
    share_out([[0.0] * len(nbytes)] * heads.number, nbytes, total)
    weights = sum(math.prod(tensor.shape) for tensor in info.tensors.values())
    layers, hidden = info.config["num_hidden_layers"], info.config["hidden_size"]
    squares = 8 * len(heads.layers) * hidden**2
    # what a layer keeps of a token for the gradient: three times the width of the MLP, and about 14 of its own
    kept = 4 * layers * min(max(effort.prose_tokens, 2 * effort.asked_tokens), _longest(info, effort))
    kept *= 3 * info.config["intermediate_size"] + 14 * hidden
    tflop = 2e-12 * weights * effort.passes
    loaded = max(info.bytes, 2 * weights) if torch.cuda.is_available() else 4 * weights
    return {
        "state_bytes": total,
        "fit": f"{effort.texts} texts with {effort.read:,} tokens",
        "fit_tflop": round(tflop, 1),
        "fit_seconds": round(tflop / _tflops()),
        "fit_memory_bytes": loaded + squares + kept,
    }


def _longest(info: CheckpointInfo, effort: Effort) -> int:
    """Return the number of tokens in the longest text that a fit may read."""
    longest: int = info.config.get("max_position_embeddings") or 2 * effort.tokens
    return longest


def _effort() -> Effort:
    import torch

    from ligerexport.checkpoint.recall import FULL, SHORT

    return FULL if torch.cuda.is_available() else SHORT


def _tflops() -> float:
    """Return about how many products and sums a fit does each second on this machine, in 10^12.

    A product of matrices is timed. A fit gets to 0.6 of its rate, because attention, norms and sums cost time.
    """
    import torch

    gpu = torch.cuda.is_available()
    x = torch.ones(1024, 1024, dtype=torch.bfloat16 if gpu else torch.float32, device="cuda" if gpu else "cpu")
    (x @ x).sum().item()
    begin, count = time.perf_counter(), 8
    for _ in range(count):
        y = x @ x
    y.sum().item()
    return 0.6 * count * 2e-12 * 1024**3 / (time.perf_counter() - begin)


def _room() -> tuple[int, str]:
    """Return how many bytes of memory there are for a fit, and where."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0], "free on the GPU"
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "in this machine"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
