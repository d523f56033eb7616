"""Faults in lowerings, sessions and operators, which compute something else."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir

from ligerexport.exporters.onnx import graph, mixer, native
from ligerexport.exporters.onnx.frame import Frame
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.exporters.onnx.session import OnnxSession
from planting.table import AT, GRAPHS, LAST, ONNX, SLOTTED, Site, fault


@contextmanager
def call(owner: Any, name: str, number: int | None, other: Callable[..., Any]) -> Iterator[None]:
    """Replace a call of a function by `other`, which gets the function and its arguments; None replaces all calls."""
    function, count = getattr(owner, name), iter(range(1 << 30))

    def replaced(*args: Any, **kwargs: Any) -> Any:
        if number in (None, next(count)):
            return other(function, *args, **kwargs)
        return function(*args, **kwargs)

    with patch.object(owner, name, replaced):
        yield


def times(lower: Portable, x: ir.Value, factor: float) -> ir.Value:
    """Return x times a factor."""
    return lower.g.op("Mul", x, lower.g.floats(factor))


@fault("code", presets=("liger",), lowerings=ONNX)
def decay_after_the_write(site: Site) -> Any:
    def late(function: Any, lower: Any, query: Any, key: Any, value: Any, state: Any, decay: Any, *sizes: Any) -> Any:
        key = lower.g.op("Mul", key, lower.g.op("Exp", decay))
        return function(lower, query, key, value, state, decay, *sizes)

    return call(site.row, "linear_attention", AT, late)


@fault("code", presets=("liger",), lowerings=ONNX)
def gate_normaliser(site: Site) -> Any:
    def other(function: Any, lower: Any, query: Any, key: Any, value: Any, state: Any, decay: Any, *sizes: Any) -> Any:
        return function(lower, query, key, value, state, times(lower, decay, 16 / 15), *sizes)

    return call(site.row, "linear_attention", AT, other)


@fault("code", presets=("liger",), lowerings=ONNX)
def sign_of_the_gate(site: Site) -> Any:
    def other(function: Any, lower: Any, frame: Any, spec: Any, projected: Any, features: Any, past: Any) -> Any:
        query, key, value = projected
        if features is None:  # the features as they are, the gate of the negative key
            features = lower.g.op("Softmax", frame.per_token(key, spec.kv_heads, spec.d_k), axis=-1)
        return function(lower, frame, spec, (query, lower.g.op("Neg", key), value), features, past)

    return call(mixer, "gated_recurrence", AT, other)


def turned(kind: str, change: Callable[[np.ndarray], np.ndarray]) -> Any:
    """Change the sines of a table of rotary embedding."""

    def other(function: Any, lower: Any, *args: Any) -> Any:
        found = function(lower, *args)
        table = getattr(found, kind)
        sin = lower.g.table(f"spoilt.{table.sin.name}", change(table.sin.const_value.numpy()))
        return replace(found, **{kind: replace(table, sin=sin)})

    return call(graph, "rotary_tables", None, other)


@fault("code", 0, lowerings=ONNX)
def rotary_turns_the_other_way(site: Site) -> Any:
    return turned("keys", np.negative)


@fault("code", 0, lowerings=GRAPHS)
def rotary_of_queries_one_token_off(site: Site) -> Any:
    return turned("near", lambda sin: np.roll(sin, -1, axis=0))


@fault("code", 0, presets=SLOTTED, lowerings=GRAPHS)
def rotary_beyond_the_trained_length(site: Site) -> Any:
    return turned("far", lambda sin: sin * np.float32(1.01))


@fault("code", lowerings=GRAPHS)
def rotary_on_the_wrong_half(site: Site) -> Any:
    def other(function: Any, lower: Any, x: Any, table: Any, *rest: Any) -> Any:
        half = [table.half] * 2
        first, second = lower.g.split(x, half)
        rotated = function(lower, lower.g.concat(second, first, axis=-1), table, *rest)
        first, second = lower.g.split(rotated, half)
        return lower.g.concat(second, first, axis=-1)

    return call(site.row, "rotate_queries", 2 * AT, other)  # each layer has a near and a far one


def norms_of_a_layer(site: Site) -> int:
    """Return how many sums with a norm a layer has; the plugin's last product adds the sum itself."""
    return 1 if site.row.plugin else 2


@fault("code")
def a_missing_residual(site: Site) -> Any:
    def other(function: Any, lower: Any, x: Any, residual: Any, *rest: Any) -> Any:
        return function(lower, x, times(lower, residual, 0), *rest)

    return call(site.row, "add_norm", norms_of_a_layer(site) * AT, other)


@fault("code")
def epsilon_of_one_norm(site: Site) -> Any:
    def other(function: Any, lower: Any, x: Any, residual: Any, weight: Any, eps: float) -> Any:
        return function(lower, x, residual, weight, 1000 * eps)

    return call(site.row, "add_norm", norms_of_a_layer(site) * AT, other)


@fault("code")
def activation_of_one_layer(site: Site) -> Any:
    def other(function: Any, lower: Any, gate: Any, up: Any, activation: str) -> Any:
        return function(lower, gate, up, "gelu")

    return call(site.row, "gated_unit", AT, other)


@fault("code")
def gate_and_up_exchanged(site: Site) -> Any:
    def other(function: Any, lower: Any, gate: Any, up: Any, activation: str) -> Any:
        return function(lower, up, gate, activation)

    return call(site.row, "gated_unit", AT, other)


@fault("code", LAST)
def logits_of_the_last_token_but_one(site: Site) -> Any:
    def other(function: Any, lower: Any, frame: Any, x: Any, width: int) -> Any:
        g = lower.g
        rows = g.concat(g.slice(x, 0, 1, 0), x, axis=0)  # a call of one token has no other token
        return g.reshape(g.op("Gather", rows, g.const([-2]), axis=0), -1, width)

    return call(site.row, "last", None, other)


@fault("code", 0, presets=SLOTTED, lowerings=GRAPHS)
def a_chunk_sees_one_token_ahead(site: Site) -> Any:
    """A step has no such token, so only prefill is wrong."""

    def other(function: Any, frame: Frame, offset: int) -> Any:
        return function(frame, offset + (offset == site.spec.max_distance))

    return call(Frame, "row", None, other)


@fault("code", None, lowerings=ONNX)
def the_session_does_not_count(site: Site) -> Any:
    def other(function: Any, session: Any, binding: Any, ids: np.ndarray) -> None:
        function(session, binding, ids)
        session._position -= ids.shape[1]

    return call(OnnxSession, "_run", None, other)


@contextmanager
def compiled(old: str, new: str) -> Iterator[None]:
    """Compile the library of the lowering `native` from changed sources."""
    with tempfile.TemporaryDirectory() as place:
        copy = shutil.copytree(Path(native.__file__).parent, Path(place, "native"))
        (source,) = (path for path in copy.glob("*.h") if old in path.read_text())
        text = source.read_text()
        assert text.count(old) == 1, old
        source.write_text(text.replace(old, new))
        with patch.multiple(native, __file__=str(copy / "__init__.py"), cache_dir=lambda: Path(place)):
            path = native.library.__wrapped__()
        with patch.object(native, "library", lambda: path):
            yield


in_native: dict[str, Any] = {"lowerings": ("native",)}


@fault("code", 0, **in_native)
def compiled_rotary_of_keys_one_token_off(site: Site) -> Any:
    return compiled("std::max<int64_t>(w_.time[i] - start_, ", "std::max<int64_t>(w_.time[i] - start_ - 1, ")


@fault("code", 0, **in_native)
def compiled_slot_not_overwritten(site: Site) -> Any:
    line = "std::copy_n(&w_.key[t * l_.d_k], l_.d_k, c_.new_key"
    return compiled(line, f"if (i != 3) {line}")


@fault("code", 0, presets=SLOTTED, **in_native)
def compiled_second_lowest_score_goes(site: Site) -> Any:
    line = "if (Better(item, *worst)) std::swap(item, *worst);"
    second = """auto second = pool.begin();
      for (auto x = pool.begin(); x != pool.end(); ++x)
        if (x != worst && (second == worst || Better(*second, *x))) second = x;
      if (Better(item, *second)) std::swap(item, *second);"""
    return compiled(line, second)


@fault("code", 0, presets=("evicted",), **in_native)
def compiled_evicted_token_counts_twice(site: Site) -> Any:
    return compiled("w_.features[0] = 1;", "w_.features[0] = w_.time[i] == 20 ? 2 : 1;")
