"""Nodes per layer of the step graph, for every preset, lowering and precision of weights. No graph is run.

python benchmarks/nodes.py -o benchmarks/results/nodes.json
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from itertools import product
from pathlib import Path

from build import make_checkpoint

from ligerexport.exporters.onnx.graph import build_graph, nodes_by_layer, weight_storage
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.targets import TARGETS
from ligerexport.model.config import PRESETS


def count(preset: str, layers: int = 3, max_chunk: int = 128) -> dict[str, dict[str, int]]:
    """Return the nodes of a layer by lowering and precision, for a Llama with `layers` layers.

    Raises:
        ValueError: Layers differ.
    """
    with tempfile.TemporaryDirectory() as place:
        spec = read_spec(make_checkpoint(Path(place, "model"), "tiny", layers, PRESETS[preset].config))
        found: dict[str, dict[str, int]] = {}
        for lowering, weights in product(TARGETS["onnx"].lowerings, TARGETS["onnx"].weights):
            storage = weight_storage(weights, lowering=lowering)
            each = nodes_by_layer(build_graph(spec, lowering=lowering, max_chunk=max_chunk, storage=storage).graph)
            if len(each) != layers or len(set(each)) != 1:
                raise ValueError(f"{preset}, {lowering}, {weights}: layers have {each} nodes")
            found.setdefault(lowering, {})[weights] = each[0]
    return found


def main() -> None:
    """Count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, required=True)
    args = parser.parse_args()
    result = {
        "command": "python " + " ".join(sys.argv),
        "presets": {preset: count(preset) for preset in PRESETS},
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
