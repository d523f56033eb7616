"""Sessions in torch that replay CUDA graphs: the same logits and states as without; what cannot be captured runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ligerexport.checkpoint.convert import load_model
from ligerexport.exporters import torch_graph
from ligerexport.exporters.torch_fused import fuse
from ligerexport.exporters.torch_session import TorchSession
from ligerexport.model.config import PRESETS, LigerConfig
from tests.checkpoints import make_checkpoint

RAGGED = LigerConfig(
    window=8, slots=(("learned", 5),), attention_weight=1.0, recurrence_weight=0.0, sinks=2, state_dtype="int8",
    heads=("6+9 20", "20 3", "3 12+8"),
)  # fmt: skip
CONFIGS = {"recall": RAGGED, "liger": replace(PRESETS["liger"].config, window=8)}


def follow(session: TorchSession, plain: TorchSession) -> None:
    """Run two sessions side by side: prompts of whole and broken chunks, steps, idle rows, resets and snapshots."""
    ids = np.random.default_rng(0).integers(0, 131, (2, 64))
    saved = None
    for part in (ids[:, :35], ids[:, 35:36], ids[:, 36:37], ids[:, 37:55], *ids[:, 55:60].T[..., None], ids[:, 60:]):
        logits = [each.prefill(part) for each in (session, plain)]
        np.testing.assert_allclose(*logits, atol=1e-5)
        saved = saved or session.snapshot()
    for act in (
        lambda each: each.step([5, -1]),
        lambda each: each.restore(saved),
        lambda each: each.step([7, 8]),
        lambda each: each.reset(1),
        lambda each: each.step([3, 4]),
    ):
        act(session), act(plain)
    found, expected = session.snapshot(), plain.snapshot()
    assert found.position.tolist() == expected.position.tolist() == [37, 1]
    for name, x in expected.tensors.items():
        np.testing.assert_allclose(found.tensors[name], x, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(session.step([9, 10]), plain.step([9, 10]), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_replayed_calls_equal_direct_ones(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where a call stands in for its graph."""
    captured = []

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        captured.append(run)
        return run

    path = make_checkpoint(tmp_path / "model", CONFIGS[name])
    session, plain = (TorchSession(path, batch=2, chunk=16) for _ in range(2))
    assert session.eager == plain.eager == "a cpu device has no CUDA graphs"
    monkeypatch.setattr(torch_graph, "capture", capture)
    monkeypatch.setattr(torch_graph, "warm_up", lambda run: run())
    session._replay.eager = None
    follow(session, plain)
    assert len(captured) == 2, "of a step and of a whole chunk"
    other = session.sibling(1)
    assert other.eager and other.step(1).shape == (1, 131), "a sibling has a state and graphs of its own"


def test_what_cannot_be_captured_runs_directly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*args: object, **given: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    def capture(run: Callable[[], None]) -> Callable[[], None]:
        with monkeypatch.context() as patch:  # after the first layer has advanced
            patch.setattr(session._model.model.layers[1], "forward", fail)
            run()
        return run

    path = make_checkpoint(tmp_path / "model", RAGGED)
    session, plain = (TorchSession(path, batch=2, chunk=16) for _ in range(2))
    monkeypatch.setattr(torch_graph, "capture", capture)
    monkeypatch.setattr(torch_graph, "warm_up", lambda run: run())
    session._replay.eager = None
    follow(session, plain)
    assert session.eager == "this model's calls cannot be captured: operation not permitted when stream is capturing"
    assert capsys.readouterr().err.count("cannot be captured") == 1


@pytest.mark.parametrize(
    ("family", "norms"), [("llama", 7), ("qwen2", 7), ("qwen3", 13), ("gemma3_text", 0), ("phi3", 7)]
)
def test_fused_layers_compute_the_same(family: str, norms: int, tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "model", RAGGED, family), torch.float32)
    ids = torch.randint(131, (2, 20))
    with torch.inference_mode():
        expected = model(ids).logits
        fuse(model)
        found = model(ids).logits
    assert sum("forward" in vars(module) for module in model.modules()) == norms
    assert not any("q_proj" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGS)
def test_graphs_on_a_gpu(name: str, tmp_path: Path) -> None:
    path = make_checkpoint(tmp_path / "model", CONFIGS[name])
    session, plain = (TorchSession(path, batch=2, chunk=16, device="cuda") for _ in range(2))
    plain._replay.eager = "for the comparison"
    follow(session, plain)
    assert session.eager is None and sorted(session._replay._graphs) == [1, 16]
    session.reset()
    reference, ids = TorchSession(path, batch=2), np.random.default_rng(1).integers(0, 131, (2, 40))
    np.testing.assert_allclose(session.prefill(ids), reference.prefill(ids), atol=2e-3)
