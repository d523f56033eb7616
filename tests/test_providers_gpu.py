"""Artifacts on the CUDA execution provider, state on the device, against the CPU: logits, tokens and state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from checkpoints import FORESIGHT, MEMORY, make_checkpoint
from tolerances import MODEL_FP32

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.exporters.verify.compare import state_error
from ligerexport.exporters.verify.slots import sort_slots
from ligerexport.model.config import PRESETS, LigerConfig

CUDA = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
needs_cuda = pytest.mark.skipif(not CUDA, reason="onnxruntime has no CUDA")
STEPS = 64
VOCABULARY = 200
CONFIGS = {
    "paper": LigerConfig(window=20),
    "memory": MEMORY,
    "foresight": FORESIGHT,
    "evicted": PRESETS["evicted"].config,
    "softmax": LigerConfig(window=20, keep_softmax=(1,)),
}


def compare(one: OnnxSession, other: OnnxSession) -> None:
    """Compare the states of two sessions."""
    found, expected = (session.snapshot().tensors for session in (one, other))
    assert found.keys() == expected.keys()
    for layer in range(3):
        ours, theirs = (
            {k.rpartition(".")[2]: v for k, v in state.items() if k.startswith(f"past.{layer}.")}
            for state in (found, expected)
        )
        if "slot_position" in ours:
            ours, theirs = sort_slots(ours), sort_slots(theirs)
            np.testing.assert_array_equal(ours["slot_position"], theirs["slot_position"])
        for name, tensor in theirs.items():
            assert state_error(tensor, ours[name]) < MODEL_FP32, f"{layer}.{name}"


def run(cuda: OnnxSession, cpu: OnnxSession) -> None:
    """Feed both a prompt in pieces and single tokens; two sequences, the second shorter.

    No token occurs twice: in the first layer equal tokens have equal scores, between which rounding would decide.
    """
    ids = np.stack([np.random.default_rng(row).permutation(VOCABULARY)[: 90 + STEPS] for row in (0, 1)])
    for piece, padding in ((ids[:, :50], [0, 9]), (ids[:, 50:90], None)):
        found, expected = cuda.prefill(piece, padding), cpu.prefill(piece, padding)
        np.testing.assert_allclose(found, expected, atol=MODEL_FP32, rtol=0)
    compare(cuda, cpu)
    for chosen in ids[:, 90:].T:
        gap = expected.max(-1) - np.take_along_axis(expected, found.argmax(-1)[:, None], 1)[:, 0]
        assert (gap <= 2 * MODEL_FP32).all()  # the same token, but for ties
        found, expected = cuda.step(chosen), cpu.step(chosen)
        np.testing.assert_allclose(found, expected, atol=MODEL_FP32, rtol=0)
    compare(cuda, cpu)


def sessions(path: Path, **options: Any) -> tuple[OnnxSession, OnnxSession]:
    artifact = open_artifact(path)
    cuda, cpu = (OnnxSession(artifact, batch=2, chunk=32, device=device, **options) for device in ("cuda", "cpu"))
    return cuda, cpu


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("lowering", ["portable", "ort"])
@pytest.mark.parametrize("name", CONFIGS)
def test_cuda_is_the_cpu(tmp_path: Path, name: str, lowering: str) -> None:
    source = make_checkpoint(tmp_path / "liger", CONFIGS[name], vocab_size=VOCABULARY)
    cuda, cpu = sessions(lx.build(source, tmp_path / "engine", lowering=lowering, verify=False))
    run(cuda, cpu)
    saved = cuda.snapshot(1)
    for session in (cuda, cpu):
        session.reset(1)
        session.restore(saved, 0)
    compare(cuda, cpu)
    for session in (cuda, cpu):
        session.reset()
    run(cuda, cpu)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("lowering", ["portable", "ort"])
def test_int4(tmp_path: Path, lowering: str) -> None:
    """Products that leave activations in fp32 on both."""
    source = make_checkpoint(tmp_path / "liger", MEMORY, vocab_size=VOCABULARY)
    path = lx.build(source, tmp_path / "engine", lowering=lowering, weights="int4", verify=False)
    run(*sessions(path, exact=True))


def test_what_a_device_needs(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "liger", MEMORY)
    path = lx.build(source, tmp_path / "engine", lowering="native", verify=False)
    with pytest.raises(UsageError, match="native"):
        lx.load(path, device="cuda")
    with pytest.raises(UsageError, match="cdua"):
        lx.load(path, device="cdua")
    if not CUDA:
        path = lx.build(source, tmp_path / "other", verify=False)
        with pytest.raises(MissingDependency, match="CUDAExecutionProvider"):
            lx.load(path, device="cuda")
