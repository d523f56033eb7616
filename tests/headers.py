"""Print the headers that list the tensors of the C++ operators, from the Python tables.

`python tests/headers.py native > ligerexport/exporters/onnx/native/operands.h` and
`python tests/headers.py plugin > ligerexport/exporters/tensorrt/plugin/operands.h`; a test compares the two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from ligerexport.exporters.onnx.native.node import INPUTS, OUTPUTS
from ligerexport.exporters.tensorrt.node import OPERANDS
from ligerexport.model.state import FORGOTTEN, RAGGED

TYPES = {"stored": "kStored", "float32": "kFloat", "float16": "kHalf", "int32": "kInteger"}
ATTRIBUTES = {"slots": "pools", "linear": "recurrent", "expands": "evicts"}
"""Attributes of a `LigerMixer` node whose names differ from those in `LigerConfig`."""


def _constant(name: str, prefix: str = "k") -> str:
    return prefix + name.title().replace("_", "")


def _enumeration(name: str, constants: Sequence[str]) -> str:
    return "\n".join([f"enum {name} : size_t {{", *(f"  {constant}," for constant in constants), "};"])


def native() -> str:
    """Return `operands.h` of the operator `BoundedMemory`."""
    outputs = [_constant(name, "k" if name in ("mixed", FORGOTTEN) else "kNew") for name in OUTPUTS]
    return f"""// Inputs and outputs of `BoundedMemory`, in order. Written from node.py by tests/headers.py.
#pragma once

#include <cstddef>

namespace liger::operands {{

{_enumeration("Input", [*map(_constant, INPUTS), "kInputs"])}

{_enumeration("Output", [*outputs, "kOutputs"])}

}}  // namespace liger::operands
"""


def plugin() -> str:
    """Return `operands.h` of the node `LigerMixer`."""
    rows = []
    for row in RAGGED:  # rows of equal heads are the same without scales, with activations in slots
        if row.needs not in ("celled", "routed"):
            needs = f"&MixerAttributes::{ATTRIBUTES.get(row.needs, row.needs)}" if row.needs else "nullptr"
            rows.append(f'    {{"{row.name}", Type::{TYPES[row.dtype]}, {needs}}},')
    names = ", ".join(f'"{name}"' for name in OPERANDS)
    lines = "\n".join(rows)
    return f"""// The tensors of a `LigerMixer` node, in order. Written from model/state.py by tests/headers.py.
#pragma once

#include "mixer.h"

namespace liger {{

// Inputs before the state. A joint node has key and value in the query, and only one with learned scores has a score.
constexpr const char* kOperands[] = {{{names}}};

struct StateRow {{
  const char* name;
  Type type;
  int32_t MixerAttributes::*needs;  // is not 0 where the tensor exists; none if it always does
}};

constexpr StateRow kState[] = {{
{lines}
}};

}}  // namespace liger
"""


if __name__ == "__main__":
    sys.stdout.write({"native": native, "plugin": plugin}[sys.argv[1]]())
