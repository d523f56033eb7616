"""Every family and gate, in every lowering and precision: ONNX Runtime computes what torch computes."""

from __future__ import annotations

from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from checkpoints import EVERY_GATE, make_checkpoint

from ligerexport.artifact.artifact import Artifact, open_artifact
from ligerexport.exporters.build import build
from ligerexport.exporters.onnx.graph import weight_storage
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.targets import TARGETS, WEIGHTS
from ligerexport.exporters.verify.compare import tolerance_of
from ligerexport.exporters.verify.slots import unrounded
from ligerexport.exporters.verify.torch_model import Answer, Reference
from ligerexport.exporters.verify.verify import Verification
from ligerexport.model.config import STATE_DTYPES, LigerConfig
from ligerexport.model.families import FAMILIES
from ligerexport.model.gates import get_gate

CUTS, STEPS = (50, 1, 39), 64
IDS = np.random.default_rng(2).integers(0, 131, sum(CUTS) + STEPS)
PIECES = np.split(IDS, np.cumsum([*CUTS, *[1] * (STEPS - 1)]))
WHOLE = {0, 1, 2, 18, len(PIECES) - 1}
SIZES = {"gemma3_text": {"layer_types": ["full_attention", "sliding_attention"]}}
"""Two layers of Gemma 3, one of each kind."""
OLDEST = ("gla", "hgrn2", "gsa")
CASES = [*product(FAMILIES, OLDEST, TARGETS["onnx"].weights),
         *(("llama", gate, "fp32") for gate in EVERY_GATE if gate not in OLDEST)]  # fmt: skip
"""Three gates with every family; the others differ from them only in the decay and the shape of the state."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("matrix")


@lru_cache
def checkpoint(place: Path, family: str, gate: str) -> Path:
    liger = LigerConfig(gate=gate, window=20, sinks=2, slots=(("peak_effect", 4), ("novelty", 6)))
    path = place / f"{family}-{gate}"
    return make_checkpoint(path, liger, family, num_hidden_layers=2, **SIZES.get(family, {}))


@lru_cache
def engine(place: Path, family: str, gate: str, weights: str, lowering: str) -> Artifact:
    path = checkpoint(place, family, gate)
    built = build(path, path / f"{lowering}-{weights}", lowering=lowering, weights=weights, verify=False)
    return open_artifact(built, hashes=False)


@lru_cache
def answers(place: Path, family: str, gate: str, weights: str) -> list[Answer]:
    """Return torch's answers with the weights that a build stores; all lowerings store the same numbers."""
    storage, artifact = weight_storage(weights), engine(place, family, gate, weights, "ort")
    tolerance = tolerance_of(storage.precision.dtype).weights
    torch_model = Reference(read_spec(checkpoint(place, family, gate)), artifact, storage, tolerance)
    return torch_model.answers(PIECES, whole=WHOLE)


@pytest.mark.parametrize(("family", "gate", "weights"), CASES)
@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_logits_and_state(place: Path, family: str, gate: str, weights: str, lowering: str) -> None:
    """A prompt in pieces, 64 steps, and the prompt at once: all logits, and the state after the last and some calls."""
    artifact = engine(place, family, gate, weights, lowering)
    session = OnnxSession(artifact, chunk=64, threads=1, exact=artifact.manifest.block is not None)
    comparison = Verification(read_spec(checkpoint(place, family, gate)), tolerance_of(WEIGHTS[weights].dtype))
    comparison.run(session, answers(place, family, gate, weights), str, prompt=len(CUTS))
    assert comparison.result.passed and comparison.result.near_ties == 0
    assert comparison.result.checks == len(PIECES) + 1 and comparison.result.max_state_error > 0


@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
@pytest.mark.parametrize("number", range(len(FAMILIES)), ids=list(FAMILIES))
def test_sizes_for_each_head(tmp_path: Path, number: int, lowering: str) -> None:
    """Gates, memories and types of the state take turns: every lowering has each of them with several families."""
    family, at = list(FAMILIES)[number], number + TARGETS["onnx"].lowerings.index(lowering)
    gate, dtype = EVERY_GATE[number % len(EVERY_GATE)], STATE_DTYPES[at % len(STATE_DTYPES)]
    memories = 0 if get_gate(gate).keyed or get_gate(gate).normalised else 3 * (number % 2)
    sizes = ("", "6+9 14+3") if family == "gemma3_text" else ("12+9 5", "6+9 14+3")
    slots = (("peak_effect", 4),)
    liger = LigerConfig(gate=gate, sinks=2, slots=slots, heads=sizes, state_dtype=dtype, memories=memories)
    swapped = {"layer_types": SIZES["gemma3_text"]["layer_types"][::-1]} if family == "gemma3_text" else {}
    spec = read_spec(make_checkpoint(tmp_path / "model", liger, family, num_hidden_layers=2, **swapped))
    artifact = open_artifact(build(spec.path, tmp_path / "engine", lowering=lowering, verify=False), hashes=False)
    tolerance = tolerance_of(WEIGHTS["fp32"].dtype)
    storage = weight_storage("fp32", lowering=lowering)
    reference = Reference(unrounded(spec), artifact, storage, tolerance.weights)
    comparison = Verification(spec, tolerance)
    comparison.run(OnnxSession(artifact, chunk=64, threads=1, exact=dtype != "activation"),
                   reference.answers(PIECES, whole=WHOLE), str, prompt=len(CUTS))  # fmt: skip
    assert comparison.result.passed and comparison.result.near_ties == 0
    assert comparison.result.checks == len(PIECES) + 1 and comparison.result.max_state_error > 0
