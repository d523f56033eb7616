"""What linear maps read: the products of their inputs on a text say where rounding a weight costs most."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import nn

from ligerexport.checkpoint.passages import builtin_texts
from ligerexport.exporters.onnx.quantise import CHUNK, Moments
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.verify.text import PROMPT
from ligerexport.exporters.verify.torch_model import Reference

TEXTS = 16
"""Number of texts."""
LENGTH = 256
"""Number of tokens of a text, or of the longest text that the model was trained on."""
MOST = 500_000_000
"""Weights of a model up to which products of inputs are computed, since larger models take many minutes."""
FEW = 2
"""Number of texts for larger models, of which only the squares of inputs are used."""
PASSAGES = 60
"""Number of passages that are joined to texts, more than enough for most tokenizers."""
LARGEST = 2.0
"""Largest square of an input that counts in full, relative to the median; the first token of a text has far more."""


def second_moments(spec: ModelSpec) -> Iterator[dict[str, Moments]]:
    """Yield the moments of the inputs of every linear map of a layer, by the names of its weights, layer after layer.

    The model runs in fp32, with one layer in memory, on the text that ships for the fit of memories. For a model of
    more than `MOST` weights these are the mean squares alone.
    """
    small = sum(prod(spec.weights[name].shape) for name in spec.used) <= MOST
    found: dict[str, Moments] = {}
    last: list[Any] = [None, None]

    def note(name: str, module: nn.Module, given: tuple[Any, ...]) -> None:
        if given[0] is not last[0]:  # some maps have the same input
            last[:] = given[0], moments_of(given[0].flatten(0, -2))
        found[f"{name}.weight"] = last[1]

    def moments_of(rows: torch.Tensor) -> Moments:
        squares = rows.square().sum(1, keepdim=True)
        rows = rows * (LARGEST * squares.median() / squares).clamp(max=1).sqrt()
        parts = rows.split(CHUNK, dim=1)
        return [(x.T @ x / len(x) if small else x.square().mean(0)).numpy() for x in parts]

    reference = Reference(spec)
    hooks = [module.register_forward_pre_hook(partial(note, name)) for name, module in reference.linear_maps()]
    for _ in reference.layer_by_layer(_texts(spec)[: TEXTS if small else FEW]):
        yield found
        found.clear()
    for hook in hooks:
        hook.remove()


def _texts(spec: ModelSpec) -> np.ndarray:
    """Return texts `[N, T]`, the built-in one first; random ids if no tokenizer makes enough of them."""
    file, length = spec.path / "tokenizer.json", min(LENGTH, spec.trained_length)
    ids = list[int]()
    if file.is_file():
        passages = random.Random(0).sample(builtin_texts(), PASSAGES)
        ids = Tokenizer.from_file(str(file)).encode("\n\n".join([PROMPT, *passages])).ids
    if len(ids) < TEXTS * length:
        return np.random.default_rng(0).integers(0, spec.vocab_size, (TEXTS, length))
    return np.array(ids[: TEXTS * length]).reshape(TEXTS, length)
