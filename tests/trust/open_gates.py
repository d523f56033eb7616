"""Gates that never close: the recurrences of a tiny model whose keys are all 100, or 100 and -100 by chance.

`endurance.py` runs it. The decay is then 1 in fp32 where the sign of the key opens the gate, and no input is ever
forgotten. With v the largest value of the vocabulary, the state of `hgrn2` and `gsa` is a mean of values, at most v. A
column of the state of the other gates grows by at most v per token over all its rows, because their keys' features add
up to 1: at most v T, and T for the sum of weights. In fp32 growth also ends by itself: above 2^25 v an added v is less
than half a unit in the last place.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import ligerexport as lx
from ligerexport.checkpoint.convert import converted_config
from ligerexport.layers.mixer import model_classes
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import get_family
from ligerexport.model.gates import GATES, get_gate

VOCABULARY, OUTLIER, SLACK = 131, 100.0, 1e-3
KEYS = ("open", "signs")


def checkpoint(target: Path, gate: str, keys: str) -> tuple[Path, float]:
    """Write one layer of a random Qwen2, whose keys have a bias; return it and its largest value."""
    torch.manual_seed(0)
    config_class, model_class = model_classes(get_family("qwen2"))
    config = config_class(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.2, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    liger = LigerConfig(gate=gate, window=9)
    model = model_class(config_class.from_dict(converted_config(config.to_dict(), liger)))
    layer = model.model.layers[0]
    with torch.no_grad():
        bias = layer.self_attn.k_proj.bias.fill_(OUTLIER)
        if keys == "signs":
            bias *= torch.randint(0, 2, bias.shape) * 2 - 1
        values = layer.self_attn.v_proj(layer.input_layernorm(model.model.embed_tokens.weight))
    model.save_pretrained(target)
    return target, float(values.abs().max())


def drive(place: Path, gate: str, keys: str, tokens: int) -> dict[str, Any]:
    """Read a random text of this many tokens and return how large the state became.

    Raises:
        ValueError: A number is not finite, or the state is beyond its bound.
    """
    path, value = checkpoint(place / f"{gate}-{keys}", gate, keys)
    session = lx.load(lx.build(path, max_chunk=128), threads=1, chunk=128)
    name = "past.0.recurrent_state"
    rows, random, seen = [], np.random.default_rng(0), 0

    def largest(text: np.ndarray) -> float:
        logits = session.prefill(text)
        state = session.snapshot().tensors
        if not all(np.isfinite(x).all() for x in (logits, *state.values())):
            raise ValueError(f"{gate}, {keys}: not finite after {session.position} tokens")
        return float(np.abs(state[name]).max())

    for end in np.unique(np.geomspace(100, tokens, 9).astype(int)).tolist():
        found = largest(random.integers(0, VOCABULARY, end - seen))
        largest_value = max(value, 1.0) if get_gate(gate).normalised else value
        bound = largest_value * (end if get_gate(gate).key_map == "softmax" else 1) * (1 + SLACK)
        if found > bound:
            raise ValueError(f"{gate}, {keys}: {found} after {end} tokens, at most {bound} was expected")
        rows.append({"tokens": end, "largest": found, "bound": bound})
        seen = end
    result = {"gate": gate, "keys": keys, "largest_value": value, "rows": rows}
    if gate == "gla":
        snapshot, limit = session.snapshot(), np.float32(2**25 * value)
        snapshot.tensors[name][:] = np.sign(snapshot.tensors[name] + np.float32(1e-30)) * limit
        session.restore(snapshot)
        if (found := largest(random.integers(0, VOCABULARY, 1000))) > limit:
            raise ValueError(f"{gate}, {keys}: a state of {limit} grew to {found}")
        result |= {"limit": float(limit), "beyond_the_limit": found}
    return result


def drive_all(place: Path, tokens: int) -> list[dict[str, Any]]:
    """Drive every gate with all kinds of keys."""
    return [drive(place, gate, keys, tokens) for gate in GATES for keys in KEYS]
