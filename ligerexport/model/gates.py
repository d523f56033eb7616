"""The gates: how a layer's raw projections become the features and the decay of the gated linear recurrence.

A gate is data, one row of `GATES`; a row that combines the maps of `FEATURE_MAPS` needs no other code. A new map is a
row of `FEATURE_MAPS` and is written once in each dialect, which raises on a map that it does not know:

- torch: `FEATURE_MAPS` in `kernels/linear_attention.py`
- reference: `FEATURE_MAPS` in `kernels/reference.py`
- Triton, whole prompts: `features` and `features_gradient` in `kernels/fused/blocks.py`
- Triton, one token: `features` in `kernels/fused/state_step.py`
- ONNX, for the lowerings `ort`, `portable` and `native`: `FEATURE_MAPS` in `exporters/onnx/recurrence.py`

The lowering `native` has no operator for a gated recurrence, and the TensorRT plugin launches the Triton kernels, so
no C++ code has a map. A new decay, or a recurrence with another update, is new arithmetic in all of these places.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ligerexport.errors import look_up

FeatureMap = Literal["softmax", "one_minus_sigmoid", "one_minus_decay"]

OPEN = 100.0
"""Raw key of padding, which opens the gate so that nothing is forgotten; a value of zero then adds nothing."""

FEATURE_MAPS: dict[str, str] = {
    "softmax": "softmax over the head dimension",
    "one_minus_sigmoid": "1 - sigmoid(x)",
    "one_minus_decay": "1 - the decay of the same channel; keys of keyed gates only",
}
"""Formula of each feature map."""


@dataclass(frozen=True)
class Gate:
    """One gate without parameters of its own, made from the key projection.

    Attributes:
        query_map: Row of `FEATURE_MAPS` for the query; a keyed gate applies it to the logits of the rows.
        key_map: Row of `FEATURE_MAPS` for the key.
        decay_divisor: The decay is `logsigmoid(key) / decay_divisor`, per key channel, in nats per token.
        source: Paper that defines the gate.
        keyed: Whether the rows of the recurrent state have keys, which a second recurrence holds. The products of the
            raw query with these keys are the logits by which rows are read.

    Raises:
        UsageError: A map is not in its table.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    decay_divisor: float
    source: str
    keyed: bool = False

    def __post_init__(self) -> None:
        for name in (self.query_map, self.key_map):
            look_up("feature map", name, FEATURE_MAPS)


GATES: dict[str, Gate] = {
    "gla": Gate("softmax", "softmax", 16.0, "Liger-GLA, arXiv 2503.01496, equations 6 and 7 and the authors' code"),
    "hgrn2": Gate("softmax", "one_minus_sigmoid", 1.0, "Liger-HGRN2, arXiv 2503.01496, Table 1 and the authors' code"),
    "gsa": Gate(
        "softmax", "one_minus_decay", 16.0, "Liger-GSA, arXiv 2503.01496, Table 1 and the authors' code", keyed=True
    ),
}


def get_gate(name: str) -> Gate:
    """Return the row of `GATES` with this name."""
    return look_up("gate", name, GATES)
