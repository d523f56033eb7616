"""The claims of a manifest that can be checked before any other file is read."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING

from ligerexport.dtypes import BY_KERNEL

if TYPE_CHECKING:
    from ligerexport.artifact.artifact import Manifest

METER = "forgotten"
"""Output of a graph that was built with a meter, `[B, layers]`: the share of the last token's attention that fell on
forgotten tokens."""


def check_claims(manifest: Manifest) -> None:
    """Check that a manifest is consistent, and that a session takes no more memory than the files can account for.

    Raises:
        ValueError: A check fails.
    """
    graph, ids, vocabulary = manifest.graph, ("input_ids", "position"), manifest.model.vocab_size
    if not 1 <= graph.max_chunk <= 1 << 16 or not 1 <= vocabulary < 1 << 31:
        raise ValueError(f"calls of {graph.max_chunk} tokens with a vocabulary of {vocabulary}")
    first = [(x.name, x.dtype, x.shape) for x in graph.outputs[:1]]
    if tuple(x.name for x in graph.inputs[:2]) != ids or first != [("logits", "float32", ("B", vocabulary))]:
        raise ValueError(f"inputs do not begin with {' and '.join(ids)}, or outputs with logits")
    state = manifest.state
    inputs = [x.bound(x.past, manifest.lowering) for x in state]
    outputs = [x.bound(x.present, manifest.lowering) for x in state]
    if inputs != list(graph.inputs[2 : 2 + len(state)]):
        raise ValueError("the state differs from the graph's inputs")
    adapters = graph.inputs[2 + len(state) :]
    if bool(adapters) != (manifest.lora > 0) or any(
        x.dtype != "float32" or x.shape != ("B", *x.sizes) or len(x.sizes) != 2 or min(x.sizes) < 1 for x in adapters
    ):
        raise ValueError("inputs for adapters are not matrices for each sequence")
    if [(x.name, x.dtype, len(x.shape)) for x in outputs] != [
        (x.name, x.dtype, len(x.shape)) for x in graph.outputs[1 : 1 + len(state)]
    ]:
        raise ValueError("the state differs from the graph's outputs")
    measured = [(x.name, x.dtype, x.shape) for x in graph.outputs[1 + len(state) :]]
    if measured not in ([], [(METER, "float32", ("B", manifest.model.layers))]):
        raise ValueError(f"the graph has the outputs {measured} after the state")
    names = [x.past for x in state] + [x.present for x in state] + [x.name for x in adapters] + [*ids, "logits", METER]
    if len(set(names)) != len(names):
        raise ValueError("two tensors have the same name")
    types = {row.name for row in BY_KERNEL.values()}
    for tensor in state:
        sizes = ["P" if tensor.grows and axis == 2 else 1 for axis in range(len(tensor.shape))]
        fits = (
            x > 0 if isinstance(x, int) and size == 1 else x == size
            for x, size in zip(tensor.shape[1:], sizes[1:], strict=True)
        )
        if tensor.dtype not in types or tensor.shape[:1] != ("B",) or not all(fits):
            raise ValueError(f"the state {tensor.past} is {list(tensor.shape)} of {tensor.dtype}")
    taken = sum(4 * prod(x.sizes) for x in adapters)
    held = sum(x.nbytes for x in state if not x.grows)
    if held != manifest.bytes.state_per_sequence:
        raise ValueError(f"a state of {manifest.bytes.state_per_sequence} bytes has tensors of {held}")
    delivered = sum(entry.bytes for entry in manifest.files.values())
    if held + taken + 4 * vocabulary > max(1 << 30, 4 * delivered):
        raise ValueError(f"a state of {held} bytes for a model of {delivered}")
