"""Bring a state into the form that an artifact has: its types, its layout, and the order of its slots.

Artifacts of one model differ in the type of slots, and in whether the slots of all KV heads lie on one axis (see
`RAGGED` of `ligerexport.model.state`). Codes of 8 bits that stay in 8 bits are not computed again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ligerexport.artifact.artifact import Manifest, StateTensor
from ligerexport.artifact.snapshot import Snapshot, widened
from ligerexport.errors import UsageError
from ligerexport.model.state import MOST

State = dict[str, np.ndarray]

ANY_ORDER = ("native", "plugin")
"""Lowerings that accept and return slots in any order."""
_FAR = 1 << 50
"""More than the largest position, to keep the slots of heads apart."""
_HALF = np.finfo(np.float16)
_FLOATS = ("float32", "float16", "uint16")
"""Types of floating-point numbers in a state, as numpy has them."""


def dtype_of(tensor: StateTensor) -> np.dtype:
    """Return numpy's type of a state tensor; numpy has no bfloat16, so its bits are kept as uint16."""
    return np.dtype("uint16" if tensor.dtype == "bfloat16" else tensor.dtype)


def adapt(tensors: Mapping[str, np.ndarray], manifest: Manifest) -> State:
    """Return a state of the same model with the names, types and layout in a manifest.

    A tensor that cannot be brought into this form stays as it is. Keys and values change by at most a part in 2^11 in
    fp16, and by half a scale in 8 bits.

    Args:
        tensors: State by the names of the graph's `past.*` inputs, batch axis first.
        manifest: The manifest.
    """
    wanted: dict[str, dict[str, StateTensor]] = {}
    given: dict[str, State] = {}
    for tensor in manifest.state:
        prefix, _, kind = tensor.past.rpartition(".")
        wanted.setdefault(prefix, {})[kind] = tensor
    for name, array in tensors.items():
        prefix, _, kind = name.rpartition(".")
        given.setdefault(prefix, {})[kind] = array
    made: State = {}
    for prefix, layer in given.items():
        targets = wanted.get(prefix, {})
        if "slot_position" in targets and layer.keys() >= {"slot_position", "slot_key", "slot_value"}:
            heads = _heads(manifest, prefix, targets["slot_position"])
            layer = _adapt_slots(layer, targets, heads, manifest.lowering not in ANY_ORDER)
        for kind, array in layer.items():
            name = f"{prefix}.{kind}".removeprefix(".")
            made[name] = _cast(array, dtype_of(targets[kind])) if kind in targets else array
    return made


def held_positions(manifest: Manifest, snapshot: Snapshot) -> list[list[np.ndarray]]:
    """Return the positions that a state of one sequence holds, in order, by layer and KV head; see `Session.held`."""
    described, found = {tensor.past: tensor for tensor in manifest.state}, []
    for layer in range(manifest.model.layers):
        name = f"past.{layer}.slot_position"
        if name in described:
            sizes = _heads(manifest, f"past.{layer}", described[name]).sizes
            heads = np.split(snapshot.tensors[name].astype(np.int64).ravel(), np.cumsum(sizes)[:-1])
        else:  # kept as softmax
            heads = [np.arange(snapshot.position[0])] * manifest.model.kv_heads
        found.append([np.sort(head[head >= 0]) for head in heads])
    return found


class Heads(NamedTuple):
    """Number of slots of each KV head of a layer, and whether each head keeps scores."""

    sizes: list[int]
    scored: list[bool]


def _heads(manifest: Manifest, prefix: str, position: StateTensor) -> Heads:
    """Return the memories of a layer's KV heads.

    Raises:
        UsageError: The manifest has sizes that are not those of its state.
    """
    count, layers = manifest.model.kv_heads, manifest.liger.get("heads")
    slots = int(np.prod([size for size in position.shape[1:] if isinstance(size, int)]))
    try:
        words = layers[int(prefix.rpartition(".")[2])].split() if layers else []
        sinks = manifest.liger["sinks"] if words else 0
        sizes = [sinks + sum(map(int, word.split("+"))) for word in words] or [slots // count] * count
        heads = Heads(sizes, ["+" in word for word in words] or [True] * count)
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise UsageError(f"the manifest has no sizes of KV heads ({error})", hint="copy the artifact again") from error
    if min(sizes) < 0 or sum(sizes) != slots:
        raise UsageError(f"{prefix} has {slots} slots, but its KV heads have {sizes}", hint="copy the artifact again")
    return heads


def _adapt_slots(layer: State, wanted: Mapping[str, StateTensor], heads: Heads, ordered: bool) -> State:
    """Return a layer in the types and the layout in `wanted`, with slots in order if asked."""
    slots, many, position = sum(heads.sizes), len(heads.sizes), layer["slot_position"]
    equal = position.ndim == 3
    if position.dtype.kind != "i" or position.shape[1:] != ((many, slots // many) if equal else (slots,)):
        return layer
    made = {kind: _join(kind, x) if equal and kind.startswith("slot_") else x for kind, x in layer.items()}
    batch, scored = len(made["slot_position"]), sum(n for n, has in zip(*heads, strict=True) if has)
    for kind, x in made.items():
        length = scored if kind == "slot_score" else slots
        if kind.startswith("slot_") and (x.ndim < 2 or x.shape[:1] != (batch,) or x.shape[_axis(kind, x)] != length):
            return layer
    if ordered:
        _sort(made, heads)
    for kind in ("slot_key", "slot_value"):
        scale = f"{kind}_scale"
        coded = made[kind].dtype == np.int8 and scale in made
        if made[kind].ndim != 3 or kind not in wanted or not (coded or made[kind].dtype in _FLOATS):
            return layer
        same = (scale in made) == (scale in wanted) and made[kind].dtype == dtype_of(wanted[kind])
        if not same:
            vectors, scales = _floats(made[kind]), made.pop(scale, None)
            vectors = vectors if scales is None else vectors * _floats(scales)[..., None]
            if scale in wanted:
                made[kind], made[scale] = encode(vectors)
            else:
                made[kind] = vectors
    if len(wanted["slot_position"].shape) == 3:
        made = {kind: _split(kind, x, many) if kind.startswith("slot_") else x for kind, x in made.items()}
    return made


def encode(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return codes of 8 bits and scales in fp16 of vectors `[..., d]`, as `ligerexport.kernels.ragged.store` does."""
    largest = np.abs(vectors).max(axis=-1) / np.float32(MOST)
    scale = np.clip(largest, _HALF.tiny, _HALF.max).astype(np.float16)
    with np.errstate(invalid="ignore"):  # a damaged state may hold anything
        codes = np.rint(vectors / scale[..., None].astype(np.float32))
        return np.clip(codes, -MOST, MOST).astype(np.int8), scale


def _axis(kind: str, x: np.ndarray) -> int:
    """Return the axis of slots if those of all heads lie on one axis."""
    return x.ndim - 1 if kind == "slot_score" else 1


def _join(kind: str, x: np.ndarray) -> np.ndarray:
    """Put the slots of all heads, `[B, H, N, ...]` or scores `[B, H, pools, N]`, on one axis."""
    if x.ndim < 3:
        return x
    if kind == "slot_score":
        return x.swapaxes(1, 2).reshape(*x.shape[:1], *x.shape[2:3], -1)
    return x.reshape(len(x), -1, *x.shape[3:])


def _split(kind: str, x: np.ndarray, heads: int) -> np.ndarray:
    """Give each head its slots, from `[B, H * N, ...]` or scores `[B, pools, H * N]`."""
    if kind == "slot_score":
        return np.ascontiguousarray(x.reshape(*x.shape[:2], heads, -1).swapaxes(1, 2))
    return x.reshape(len(x), heads, -1, *x.shape[2:])


def _sort(layer: State, heads: Heads) -> None:
    """Put the slots of each head in the order of their positions; empty ones may be anywhere between them."""
    sizes, scored = heads
    position = layer["slot_position"]
    rank = position.astype(np.int64) + np.repeat(np.arange(len(sizes)) * _FAR, sizes)
    newest = np.maximum.accumulate(np.where(position < 0, -1, rank), axis=1)
    if ((rank >= newest) | (position < 0)).all():
        return
    order = rank.argsort(axis=1, kind="stable")
    keeps = np.repeat(scored, sizes)
    for kind, x in layer.items():
        if kind == "slot_score":
            index = (np.cumsum(keeps) - 1)[order[:, keeps]]
            layer[kind] = np.take_along_axis(x, index[:, None], axis=2)
        elif kind.startswith("slot_"):
            layer[kind] = np.take_along_axis(x, order[..., None] if x.ndim == 3 else order, axis=1)


def _floats(x: np.ndarray) -> np.ndarray:
    return widened(x).astype(np.float32, copy=False)


def _cast(x: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return an array in a type of the same kind: integers that fit, or floating-point numbers."""
    if x.dtype == dtype:
        return x
    if dtype.kind == x.dtype.kind == "i":
        fits = x.size == 0 or (x.max() <= np.iinfo(dtype).max and x.min() >= np.iinfo(dtype).min)
        return x.astype(dtype) if fits else x
    if x.dtype not in _FLOATS or dtype not in _FLOATS:
        return x
    floats = _floats(x)
    if dtype == np.float16:
        return np.clip(floats, _HALF.min, _HALF.max).astype(np.float16)
    if dtype == np.uint16:  # to the nearest, and of two equally near to the even one
        bits = floats.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return floats


def check_origin(snapshot: Snapshot, manifest: Manifest) -> None:
    """Check that a state belongs to a model.

    Raises:
        UsageError: It does not.
    """
    if manifest.fingerprint == snapshot.model or manifest.identity == snapshot.identity:
        return
    if snapshot.identity is None:
        raise UsageError(
            "this state belongs to another model, or to other weights of this one",
            hint="load the artifact that it was saved with",
        )
    (weights, _), (ours, _) = (x.partition("-")[::2] for x in (snapshot.identity, manifest.identity))
    what = "another conversion of this model" if weights == ours else "another model"
    raise UsageError(
        f"this state belongs to {what}", hint="states fit what was built from the same converted checkpoint"
    )
