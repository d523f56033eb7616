"""The gates: how a layer's raw projections become the features and the decay of the gated linear recurrence.

A gate is data, one row of `GATES`, so that the torch side, the reference and the ONNX lowering read the same table.
What the recurrence does with features and decay is in `ligerexport.kernels`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ligerexport.errors import look_up

FeatureMap = Literal["softmax", "one_minus_sigmoid", "one_minus_decay"]


@dataclass(frozen=True)
class Gate:
    """One parameter-free gate made from the key projection.

    Attributes:
        query_map: Feature map of the query, over the head dimension; of a keyed gate, of the logits of the rows.
        key_map: Feature map of the key, over the head dimension; `one_minus_decay` is what a row forgets of itself.
        decay_divisor: The decay is `logsigmoid(key) / decay_divisor`, per key channel, in nats a token.
        source: Where the gate is defined.
        keyed: Whether the rows of the recurrent state have keys, which a second recurrence holds: the raw query's
            products with them are the logits by which rows are read.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    decay_divisor: float
    source: str
    keyed: bool = False


GATES: dict[str, Gate] = {
    "gla": Gate("softmax", "softmax", 16.0, "Liger-GLA, arXiv 2503.01496, equations 6 and 7 and the authors' code"),
    "hgrn2": Gate("softmax", "one_minus_sigmoid", 1.0, "Liger-HGRN2, arXiv 2503.01496, Table 1 and the authors' code"),
    "gsa": Gate(
        "softmax", "one_minus_decay", 16.0, "Liger-GSA, arXiv 2503.01496, Table 1 and the authors' code", keyed=True
    ),
}


def get_gate(name: str) -> Gate:
    """Return the row of `GATES` with this name.

    Raises:
        UsageError: No such gate; the hint names close matches.
    """
    return look_up("gate", name, GATES)
