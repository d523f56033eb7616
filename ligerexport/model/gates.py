"""The gates: how a layer's raw projections become the features and the decay of the gated linear recurrence.

A gate is data, one row of `GATES`; a row that combines rows of `FEATURE_MAPS` and `DECAYS` needs no other code. A new
map or decay is a row there and is written once in each dialect, which raises on a name that it does not know:

- torch: the tables of the same names in `kernels/linear_attention.py`
- reference: those in `kernels/reference.py`
- Triton, whole prompts: `features`, `decay_of_key` and their gradients in `kernels/fused/blocks.py`
- Triton, one token: `features` and `decay_of_key` in `kernels/fused/state_step.py`
- ONNX, for the lowerings `ort`, `portable` and `native`: the tables in `exporters/onnx/recurrence.py`

The lowering `native` has no operator for a gated recurrence, and the TensorRT plugin launches the Triton kernels, so
no C++ code has a map or a decay. A recurrence with another update is new arithmetic in all of these places.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from ligerexport.errors import UsageError, look_up

FeatureMap = Literal["softmax", "one_minus_sigmoid", "one_minus_decay"]
Decay = Literal["logsigmoid", "minus_exp", "head_logsigmoid", "head_minus_softplus"]

OPEN = 100.0
"""Raw key of padding, which opens a gate so that nothing is forgotten; a value of zero then adds nothing."""
STRONGEST = 20.0
"""Largest decay of `minus_exp` in nats per token; without it, sums of the decay would be infinite."""

FEATURE_MAPS: dict[str, str] = {
    "softmax": "softmax over the head dimension",
    "one_minus_sigmoid": "1 - sigmoid(x)",
    "one_minus_decay": "1 - the decay of the same channel; keys of keyed gates only",
}
"""Formula of each feature map."""
DECAYS: dict[str, str] = {
    "logsigmoid": "logsigmoid(x), for each key channel",
    "minus_exp": "-exp(x), for each key channel; after the division at least -STRONGEST",
    "head_logsigmoid": "logsigmoid(x), where x is the mean of a key's channels",
    "head_minus_softplus": "-softplus(x), where x is the mean of a key's channels",
}
"""Formula of each decay in nats per token, before the division by `Gate.decay_divisor`."""


@dataclass(frozen=True)
class Gate:
    """One gate without parameters of its own, made from the key projection.

    Attributes:
        query_map: Row of `FEATURE_MAPS` for the query; a keyed gate applies it to the logits of the rows.
        key_map: Row of `FEATURE_MAPS` for the key.
        decay_divisor: Divisor of the decay.
        source: Paper that defines the gate.
        keyed: Whether the rows of the recurrent state have keys, which a second recurrence holds. The products of the
            raw query with these keys are the logits by which rows are read.
        decay: Row of `DECAYS`, a function of the raw key.
        normalised: Whether what is read is divided by the sum of the weights of the tokens in it. The state then has
            one more column, which holds the decayed sum of the keys' features.
        number: Name of the field that a number after the name sets: `hgrn2:0.5` has a `floor` of 0.5, and `gsa:16` has
            16 `rows`.
        floor: Least share of a channel that is kept at each token: alpha = floor + (1 - floor) sigmoid(x). The feature
            of the key is then 1 - alpha. 0 is no bound.
        rows: Number of rows of the state of a keyed gate, which must divide the number of key channels. The gate of a
            row reads the mean of its share of neighbouring channels. 0 gives every channel a row.

    Raises:
        UsageError: A map or the decay is not in its table.
    """

    query_map: FeatureMap
    key_map: FeatureMap
    decay_divisor: float
    source: str
    keyed: bool = False
    decay: Decay = "logsigmoid"
    normalised: bool = False
    number: Literal["", "floor", "rows"] = ""
    floor: float = 0.0
    rows: int = 0

    def __post_init__(self) -> None:
        for name in (self.query_map, self.key_map):
            look_up("feature map", name, FEATURE_MAPS)
        look_up("decay", self.decay, DECAYS)

    @property
    def open_key(self) -> float:
        """Raw key of padding in every channel, `OPEN` with the sign that opens this gate."""
        return OPEN if self.decay.endswith("logsigmoid") else -OPEN

    @property
    def kernel_decay(self) -> tuple[str, float, float]:
        """The decay as kernels take it: row of `DECAYS`, divisor, floor."""
        return self.decay, self.decay_divisor, self.floor


_NUMBERS = {"": "no number", "floor": "a floor of at least 0 and less than 1", "rows": "a number of rows, at least 1"}
"""What may stand after the name of a gate and a colon, by `Gate.number`."""
_LIGER = "Liger, arXiv 2503.01496, Table 1"

GATES: dict[str, Gate] = {
    "gla": Gate("softmax", "softmax", 16.0, "Liger-GLA, arXiv 2503.01496, equations 6 and 7 and the authors' code"),
    "hgrn2": Gate(
        "softmax", "one_minus_sigmoid", 1.0, "Liger-HGRN2, arXiv 2503.01496, Table 1 and the authors' code; "
        "hgrn2:FLOOR keeps at least that share", number="floor",
    ),
    "gsa": Gate(
        "softmax", "one_minus_decay", 16.0, "Liger-GSA, arXiv 2503.01496, Table 1 and the authors' code; "
        "gsa:ROWS pools the key to fewer rows", keyed=True, number="rows",
    ),
    "mamba2": Gate("softmax", "softmax", 16.0, f"{_LIGER}; one decay a head", decay="head_minus_softplus"),
    "gated_retention": Gate("softmax", "softmax", 16.0, f"{_LIGER}; one decay a head", decay="head_logsigmoid"),
    "mlstm": Gate(
        "softmax", "softmax", 16.0, f"{_LIGER}; one decay a head, and a normaliser", decay="head_logsigmoid",
        normalised=True,
    ),
    "rwkv6": Gate("softmax", "softmax", 16.0, f"{_LIGER}; without the bonus of the current token", decay="minus_exp"),
}  # fmt: skip


def get_gate(name: str) -> Gate:
    """Return the row of `GATES` with this name, which may have a number after a colon.

    Raises:
        UsageError: There is no such gate, it takes no number, or the number is out of range.
    """
    stem, colon, number = name.partition(":")
    gate = look_up("gate", stem, GATES)
    if not colon:
        return gate
    try:
        value = float(number)
    except ValueError:
        value = math.nan
    if gate.number == "floor" and 0 <= value < 1:
        return replace(gate, floor=value)
    if gate.number == "rows" and value >= 1 and value.is_integer():
        return replace(gate, rows=int(value))
    raise UsageError(f"gate '{name:.60}'", hint=f"'{stem}' takes {_NUMBERS[gate.number]}")
