"""The settings of a conversion: gate, window, sinks, scored slots and mix. `PRESETS` has named settings.

`ligerexport.model.state` lists the tensors that a configuration needs, and
`ligerexport.kernels` computes with them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, Literal

from ligerexport.errors import UsageError, close_matches, look_up
from ligerexport.model.gates import get_gate
from ligerexport.model.scores import get_score

RECURRENCES = ("parallel", "evicted", "cells")

Slots = tuple[tuple[str, int], ...]
"""Pools of exact slots: (score, count), in order."""

MEMORY = ("window", "slots", "layer_memory")
"""Fields of `LigerConfig` that `allocate` chooses."""

STATE_DTYPES = ("activation", "float16", "int8")
"""Types in which the keys and values of slots may be kept; `activation` is the type of the model's activations."""


def _pools(slots: Slots) -> Slots:
    return tuple((str(name), _whole("slots", count)) for name, count in slots)


def _whole(name: str, value: Any) -> int:
    """Return a value from JSON or a caller if it is a whole number.

    Raises:
        UsageError: The value is not a whole number.
    """
    if type(value) is not int:
        raise UsageError(f"{name} {value!r:.60}", hint="a whole number was expected")
    return value


@dataclass(frozen=True)
class LigerConfig:
    """The memory that replaces the attention of a checkpoint: which tokens it keeps exactly, and its recurrence.

    Attributes:
        gate: Row of `GATES`, with a number after a colon if it takes one.
        window: Number of most recent tokens that are kept exactly, including the current one.
        sinks: Number of first tokens of a sequence that are kept exactly forever.
        slots: Pools of further exact slots per KV head: (score, count), in order. Tokens that one pool drops compete
            for the next one.
        attention_weight: Weight of the softmax over the slots in the mixed output.
        recurrence_weight: Weight of the recurrence; at 0 it is neither computed nor kept.
        recurrence: `parallel` reads every token through the gate and is added to the softmax, as in the paper.
            `evicted` reads the evicted tokens and shares the softmax's denominator: it stands for the part of the
            softmax over these tokens. Its weight is 1, and it has no gate. `cells` does the same from the means of
            clusters of these tokens.
        recurrence_distance: Distance in tokens at which `evicted` and `cells` read their tokens.
        cells: Number of clusters per KV head, for `cells`.
        memories: Number of further states per KV head, for `parallel`. A token changes and reads only those that a
            router chooses by its key, beside the state that every token shares.
        active: Number of these memories that the router chooses for a token.
        layer_memory: Layers whose memory has another size: (layer, window, slots), with pools of the same scores.
        heads: Sizes of the memory of each KV head, which then replace `window` and the counts of `slots`: a string for
            each layer, with a word for each head, such as `16 256+64`. A word has the window and, for a head with
            scored slots, the slots of each pool. Empty for a layer that is not converted, or if all heads are equal.
        state_dtype: Type of the keys and values of slots, from `STATE_DTYPES`. `int8` adds two scales for each token
            and head.
        keep_softmax: Layers that stay as they are, with a growing key-value cache.
        keep_window: Layers that keep the checkpoint's own sliding window, which bounds their memory already. None
            takes the layers that the family keeps.
        max_distance: Largest rotary distance in tokens; slots that are farther away are read as if they were at this
            distance. None takes the checkpoint's trained length.

    Raises:
        UsageError: A value is out of range, or a name is in no table.
    """

    gate: str = "gla"
    window: int = 64
    sinks: int = 0
    slots: Slots = ()
    attention_weight: float = 0.5
    recurrence_weight: float = 0.5
    recurrence: Literal["parallel", "evicted", "cells"] = "parallel"
    recurrence_distance: int = 512
    cells: int = 8
    memories: int = 0
    active: int = 2
    layer_memory: tuple[tuple[int, int, Slots], ...] = ()
    heads: tuple[str, ...] = ()
    state_dtype: Literal["activation", "float16", "int8"] = "activation"
    keep_softmax: tuple[int, ...] = ()
    keep_window: tuple[int, ...] | None = None
    max_distance: int | None = None

    def __post_init__(self) -> None:
        for name in ("window", "sinks", "recurrence_distance", "cells", "memories", "active"):
            _whole(name, getattr(self, name))
        object.__setattr__(self, "slots", _pools(self.slots))
        memory = sorted(
            (_whole("layer", layer), _whole("window", window), _pools(slots))
            for layer, window, slots in self.layer_memory
        )
        object.__setattr__(self, "layer_memory", tuple(memory))
        for name, layers in (("keep_softmax", self.keep_softmax), ("keep_window", self.keep_window)):
            if layers is not None:
                object.__setattr__(self, name, tuple(sorted({_whole(name, layer) for layer in layers})))
        get_gate(self.gate)
        for name, count in self.slots:
            get_score(name)
            if count < 1:
                raise UsageError(f"pool '{name}' has {count} slots", hint="give it at least one or leave it out")
        names = [name for name, _ in self.slots]
        if len(set(names)) != len(names):
            raise UsageError(f"a score appears twice in slots: {', '.join(names)}", hint="add the counts up")
        arriving = [name for name in names if get_score(name).on_arrival]
        if len(arriving) > 1:
            raise UsageError(
                f"{' and '.join(arriving)} together: a token can carry only one score", hint="keep one of these pools"
            )
        if self.window < 1 or self.sinks < 0:
            raise UsageError(
                f"window {self.window}, sinks {self.sinks}", hint="window is at least 1 (the current token), sinks 0"
            )
        if not (0 <= self.attention_weight < inf and 0 <= self.recurrence_weight < inf):
            raise UsageError(
                f"mix weights {self.attention_weight} and {self.recurrence_weight}", hint="both must be at least 0"
            )
        look_up("state_dtype", self.state_dtype, dict.fromkeys(STATE_DTYPES))
        if self.max_distance is not None and _whole("max_distance", self.max_distance) < self.window:
            raise UsageError(
                f"max_distance {self.max_distance} is smaller than the window {self.window}",
                hint="give at least the window, or leave it out for the checkpoint's trained length",
            )
        self._check_recurrence()
        self._check_layers()
        self._check_heads()

    def _check_recurrence(self) -> None:
        look_up("recurrence", self.recurrence, dict.fromkeys(RECURRENCES))
        if self.evicts and self.attention_weight != 1:
            raise UsageError(
                f"attention weight {self.attention_weight:g} with a recurrence over evicted tokens",
                hint="it shares the softmax's denominator: --attention-weight 1",
            )
        if self.evicts and self.gate != LigerConfig.gate:
            raise UsageError(
                f"gate '{self.gate}' with a recurrence over evicted tokens", hint="it has no gate: leave --gate out"
            )
        if self.recurrence_distance < 1:
            raise UsageError(f"recurrence distance {self.recurrence_distance}", hint="give at least one token")
        if self.cells < 1:
            raise UsageError(f"{self.cells} cells", hint="give at least one, or another recurrence")
        if self.cells != LigerConfig.cells and self.recurrence != "cells":
            raise UsageError(
                f"{self.cells} cells, but the recurrence is '{self.recurrence}'", hint="add --recurrence cells"
            )
        self._check_memories()

    def _check_memories(self) -> None:
        if self.memories < 0 or (self.memories and not 1 <= self.active <= self.memories):
            raise UsageError(
                f"{self.active} active of {self.memories} memories", hint="at least one is active, and at most all"
            )
        if self.memories and self.recurrence != "parallel":
            raise UsageError(
                f"{self.memories} memories, but the recurrence is '{self.recurrence}'", hint="--recurrence parallel"
            )
        gate = get_gate(self.gate)
        if self.memories and (gate.keyed or gate.normalised):
            what = "whose rows have keys" if gate.keyed else "which has a normaliser"
            raise UsageError(f"{self.memories} memories with the gate '{self.gate}', {what}", hint="--gate gla")

    def _check_heads(self) -> None:
        layers: Any = self.heads
        if not isinstance(layers, (list, tuple)) or not all(isinstance(layer, str) for layer in layers):
            raise UsageError(f"heads {layers!r:.60}", hint="a list with one string for each layer was expected")
        object.__setattr__(self, "heads", tuple(layers))
        if self.heads and self.layer_memory:
            raise UsageError("both heads and layer_memory", hint="sizes for each KV head replace those for layers")
        for word in {word for layer in self.heads for word in layer.split()}:
            numbers = word.split("+")
            if not all(number.isdecimal() and 0 < int(number) < 1 << 31 for number in numbers):
                raise UsageError(f"a KV head has the memory '{word:.60}'", hint="write WINDOW or WINDOW+SLOTS")
            if len(numbers) not in (1, 1 + len(self.slots)):
                raise UsageError(
                    f"a KV head has the memory '{word:.60}', but there are {len(self.slots)} pools",
                    hint="give a head slots in every pool or in none",
                )
            if self.judged and len(numbers) == 1:
                raise UsageError(
                    f"a KV head has the memory '{word:.60}' without slots", hint="novelty needs slots in every head"
                )

    def _check_layers(self) -> None:
        layers = [layer for layer, _, _ in self.layer_memory]
        if len(set(layers)) != len(layers) or set(layers) & self.unchanged:
            raise UsageError(
                f"a layer has two memories: {', '.join(map(str, layers))}", hint="name it once, kept as softmax or not"
            )
        for layer, _, slots in self.layer_memory:
            if [name for name, _ in slots] != [name for name, _ in self.slots]:
                raise UsageError(f"the pools of layer {layer} use other scores than those of the rest",
                                 hint="a layer may differ in the sizes of its window and its pools")  # fmt: skip
            self.for_layer(layer)

    def for_layer(self, layer: int) -> LigerConfig:
        """Return the configuration of one converted layer."""
        sizes = {at: (window, slots) for at, window, slots in self.layer_memory}
        window, slots = sizes.get(layer, (self.window, self.slots))
        heads = (self.heads[layer],) if self.heads else ()
        alone: dict[str, Any] = {"layer_memory": (), "keep_softmax": (), "keep_window": None}
        return replace(self, window=window, slots=slots, heads=heads, **alone)

    def for_heads(self) -> tuple[LigerConfig, ...]:
        """Return the memory of each KV head of the only layer in `heads`, in the type of the activations."""
        made = []
        for word in self.heads[0].split():
            window, *counts = map(int, word.split("+"))
            names = [name for name, _ in self.slots] if counts else []
            slots = tuple(zip(names, counts, strict=True))
            made.append(replace(self, window=window, slots=slots, heads=(), state_dtype="activation"))
        return tuple(made)

    def in_all_layers(self, change: Callable[[LigerConfig], LigerConfig]) -> LigerConfig:
        """Return this configuration with `change` applied to the windows and pools of every layer."""
        changed = change(replace(self, layer_memory=()))
        single = [(layer, change(self.for_layer(layer))) for layer, _, _ in self.layer_memory]
        return replace(changed, layer_memory=tuple((layer, c.window, c.slots) for layer, c in single))

    @property
    def kept(self) -> int:
        """Number of slots beside the window: sinks and scored slots."""
        return self.sinks + sum(count for _, count in self.slots)

    @property
    def num_slots(self) -> int:
        """N, the number of all exact slots per KV head."""
        return self.window + self.kept

    @property
    def ragged(self) -> bool:
        """Whether the slots of all KV heads of a layer lie on one axis of the state."""
        return bool(self.heads) or self.state_dtype != "activation"

    @property
    def scaled(self) -> bool:
        """Whether keys and values of slots are codes with a scale for each token and head."""
        return self.state_dtype == "int8"

    @property
    def unchanged(self) -> frozenset[int]:
        """Layers that see the same tokens as in the Transformer."""
        return frozenset(self.keep_softmax) | frozenset(self.keep_window or ())

    @property
    def judged(self) -> bool:
        """Whether a pool ranks by novelty, which needs a linear state of its own."""
        return any(get_score(name).signal == "novelty" for name, _ in self.slots)

    @property
    def foresees(self) -> bool:
        """Whether a pool ranks by a learned score, which comes with each token."""
        return any(get_score(name).signal == "learned" for name, _ in self.slots)

    @property
    def recurrent(self) -> bool:
        """Whether the output contains a recurrence."""
        return self.recurrence_weight > 0

    @property
    def evicts(self) -> bool:
        """Whether evicted tokens go to the recurrence."""
        return self.recurrent and self.recurrence != "parallel"

    @property
    def celled(self) -> bool:
        """Whether evicted tokens go to cells."""
        return self.recurrent and self.recurrence == "cells"

    @property
    def linear(self) -> bool:
        """Whether the recurrence is linear attention with one state, which is a matrix."""
        return self.recurrent and not self.celled and not self.routed

    @property
    def routed(self) -> bool:
        """Whether a router chooses the memories of a token."""
        return self.recurrent and self.memories > 0

    @property
    def expands(self) -> bool:
        """Whether evicted tokens go to linear attention, which expands the softmax around their mean logit."""
        return self.evicts and self.linear

    @property
    def keyed(self) -> bool:
        """Whether the rows of the recurrent state have keys, which are a second recurrence."""
        return self.recurrent and not self.evicts and get_gate(self.gate).keyed

    @property
    def normalised(self) -> bool:
        """Whether the recurrence is a mean, for which the state has the sum of the weights as its last column."""
        return self.recurrent and not self.evicts and get_gate(self.gate).normalised

    @property
    def fuses(self) -> bool:
        """Whether fused kernels can compute a step: without cells, memories and ragged slots."""
        return not self.celled and not self.routed and not self.ragged

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        memory = [[layer, window, [list(pool) for pool in slots]] for layer, window, slots in self.layer_memory]
        lists = {
            "slots": [list(pool) for pool in self.slots],
            "layer_memory": memory,
            "keep_softmax": list(self.keep_softmax),
            "keep_window": None if self.keep_window is None else list(self.keep_window),
        }
        new = set() if self.recurrence == "cells" else {"cells"}
        new |= set() if self.memories else {"memories", "active"}
        if self.ragged:
            lists["heads"] = list(self.heads)
        else:
            new |= {"heads", "state_dtype"}
        # conversions that need none of these stay readable by older versions
        return {name: value for name, value in (asdict(self) | lists).items() if name not in new}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> LigerConfig:
        """Read what `to_dict` wrote.

        Raises:
            UsageError: A key is unknown, such as one of a newer version, or a value is out of range.
        """
        known = cls.__dataclass_fields__
        for key in data:
            if key not in known:
                raise UsageError(f"unknown setting '{key}' in the liger configuration", hint=close_matches(key, known))
        return cls(**data)


@dataclass(frozen=True)
class Preset:
    """A named configuration and its purpose."""

    config: LigerConfig
    doc: str


DEFAULT_PRESET = "recall"
OPEN_PRESET = "memory"
"""The preset of a conversion that names none but sets what the default chooses: gate, mix, or sizes."""

_LEARNED = LigerConfig(
    window=60, sinks=4, slots=(("recent_use", 28), ("learned", 36)), attention_weight=1.0, recurrence_weight=0.0
)

PRESETS: dict[str, Preset] = {
    "liger": Preset(
        LigerConfig(gate="gla", window=64),
        "the paper: window 64, no sinks, half softmax and half recurrence; needs recovery",
    ),
    "mom": Preset(
        LigerConfig(gate="gla", window=64, recurrence_weight=0.25, memories=4),
        "the same with Mixture-of-Memories: a shared state and 4 others, of which each token uses 2; needs recovery",
    ),
    "sinks": Preset(
        LigerConfig(window=60, sinks=4, attention_weight=1.0, recurrence_weight=0.0),
        "the control: 4 sinks and a window of 60, softmax only",
    ),
    "memory": Preset(
        LigerConfig(
            window=60,
            sinks=4,
            slots=(("recent_use", 28), ("peak_effect", 18), ("novelty", 18)),
            attention_weight=1.0,
            recurrence_weight=0.0,
        ),
        "sinks, window and slots kept by a score that needs no fit",
    ),
    "foresight": Preset(
        _LEARNED,
        "the same with a score that foresees what will be asked for; needs --calibrate or scores that come with "
        "the model",
    ),
    "recall": Preset(
        replace(_LEARNED, window=256, slots=(("learned", 384),), state_dtype="int8"),
        "the default: a window and slots of its own size for each KV head, in 8 bits, so that a question about a long "
        "text can be answered; `convert` fits sizes and score",
    ),
    "evicted": Preset(
        replace(_LEARNED, recurrence_weight=1.0, recurrence="evicted"),
        "foresight, and a recurrence that reads what loses its slot and shares the softmax's denominator",
    ),
}


def get_preset(name: str, **changes: Any) -> LigerConfig:
    """Return the configuration of a preset, with some fields changed.

    Args:
        name: Row of `PRESETS`.
        **changes: Fields of `LigerConfig`; None leaves the preset's value.
    """
    preset = look_up("preset", name, PRESETS)
    return replace(preset.config, **{key: value for key, value in changes.items() if value is not None})


def read_memory(path: str | Path, preset: str | None = None, **changes: Any) -> LigerConfig:
    """Return a conversion with the windows and pools of a file.

    Args:
        path: JSON with the fields `MEMORY`, as `allocate` writes it.
        preset: Row of `PRESETS`; None takes the conversion in which they were measured, if the file states it.
        **changes: Other fields of `LigerConfig`; None leaves their value.

    Raises:
        UsageError: The file holds no memory, or a field that it sets is among the changes.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if twice := [name for name in MEMORY if name in changes]:
        option = twice[0].replace("_", "-")
        raise UsageError(f"both --memory and --{option}", hint=f"the file sets it too: leave --{option} out")
    try:
        data = json.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        fields = {name: data[name] for name in MEMORY}
        base = data.get("record", {}).get("base")
        LigerConfig(**fields)
        measured = get_preset(preset or OPEN_PRESET) if preset or base is None else LigerConfig.from_dict(base)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, UsageError) as error:
        hint = "give the file that `ligerexport allocate` wrote"
        raise UsageError(f"{path} holds no memory of layers ({error})", hint=hint) from None
    return replace(measured, **fields, **changes)
