"""The share of attention that falls on forgotten tokens, and which tokens are held: the loop, every lowering, text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import ligerexport as lx
from ligerexport.cli.app import app
from ligerexport.errors import UsageError, VerificationError
from ligerexport.exporters.onnx import graph as onnx_graph
from ligerexport.exporters.onnx.lowerings import Portable
from ligerexport.exporters.targets import TARGETS
from ligerexport.kernels.memory_attention import rotary_table
from ligerexport.kernels.ops import BLOCK, liger_mixer
from ligerexport.kernels.reference import liger_mixer_reference
from ligerexport.measure.opened import ArtifactModel
from ligerexport.model.state import FORGOTTEN, MixerSpec
from tests import toy
from tests.checkpoints import FORESIGHT, SIZES, make_checkpoint
from tests.tolerances import MODEL_FP32

EVICTED = replace(FORESIGHT, recurrence="evicted", recurrence_weight=1.0)
RAGGED = replace(EVICTED, slots=(("learned", 9),), heads=("12+9 5", "6 14+5", "20 4+9"), state_dtype="int8")
CELLS = replace(EVICTED, recurrence="cells", cells=3)
LOWERINGS = [name for name in TARGETS["onnx"].lowerings if name != "plugin"]
IDS = np.random.default_rng(3).integers(0, SIZES["vocab_size"], 90)


@pytest.fixture(scope="module", params=[EVICTED, RAGGED], ids=["equal heads", "ragged"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("meter") / "liger", request.param)


@pytest.mark.parametrize("config", [EVICTED, RAGGED, CELLS, replace(RAGGED, recurrence="cells")])
def test_the_op_equals_the_loop_at_any_cut(config: lx.LigerConfig) -> None:
    torch.manual_seed(0)
    spec = MixerSpec(config.for_layer(0), q_heads=4, kv_heads=2, d_k=8, d_v=12, scale=8**-0.5, max_distance=40)
    inputs = [torch.randn(2, 70, heads, d, dtype=torch.float64) for heads, d in ((4, 8), (2, 8), (2, 12))]
    table = rotary_table(10.0 ** (-torch.arange(3) / 3), 40, BLOCK, torch.float64)
    score, router = torch.randn(2, 70, 2), torch.randn(2, config.cells, 9)
    plain, start = (spec.initial_state(2, torch.float64, meter=meter) for meter in (False, True))

    def mix(mixer: Any, state: Any, first: int, last: int) -> Any:
        part = [x[:, first:last] for x in inputs]
        return mixer(*part, torch.tensor([first] * 2), state, spec, table, score[:, first:last], router)

    output, whole = mix(liger_mixer, start, 0, 70)
    _, loop = mix(liger_mixer_reference, start, 0, 70)
    _, state = mix(liger_mixer, start, 0, 41)
    _, state = mix(liger_mixer, state, 41, 70)
    assert torch.equal(output, mix(liger_mixer, plain, 0, 70)[0])
    assert loop[FORGOTTEN].shape == (2, 2, 2) and loop[FORGOTTEN].min() > 0 and loop[FORGOTTEN].max() < 1
    for found in (whole, state):
        torch.testing.assert_close(found[FORGOTTEN].float(), loop[FORGOTTEN], atol=0, rtol=1e-6)  # both in fp32


def both_measure(session: lx.Session, torch_session: lx.Session) -> None:
    """Run both sessions on the same tokens, and compare the shares of two rows."""
    for each in (session, torch_session):
        each.prefill(np.stack([IDS[:60], IDS[20:80]]))
        each.step([3, -1])
        each.step([4, 5])
    # keys that are rounded to another code move a share, by much less than its size
    ragged = session.artifact.manifest.liger.get("heads")
    np.testing.assert_allclose(session.forgotten, torch_session.forgotten, atol=5e-3 if ragged else MODEL_FP32)
    assert session.forgotten.shape == (2, 3) and session.forgotten.min() > 0 and session.forgotten.max() < 1
    assert session.snapshot().tensors.keys() == torch_session.snapshot().tensors.keys()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_session_measures_what_torch_does(checkpoint: Path, tmp_path: Path, lowering: str) -> None:
    engine = lx.build(checkpoint, tmp_path / "engine", lowering=lowering, meter=True, verify=lowering == "native")
    session = lx.load(engine, batch=2, chunk=32)
    both_measure(session, lx.load(checkpoint, batch=2, meter=True))
    assert ArtifactModel(session).forgotten() == session.forgotten[0].tolist()


@pytest.mark.gpu
def test_a_gpu_measures_the_same(checkpoint: Path) -> None:
    both_measure(*(lx.load(checkpoint, batch=2, meter=True, device=device) for device in ("cuda", "cpu")))


def test_the_graph_without_a_meter_says_nothing(checkpoint: Path, tmp_path: Path) -> None:
    built = lx.build(checkpoint, tmp_path / "engine", verify=False)
    session = lx.load(built)
    chunks = list(lx.generate(session, [1, 2, 3], max_new_tokens=3, report_forgetting=True))
    assert session.forgotten is None and [chunk.forgotten for chunk in chunks] == [None] * len(chunks)
    assert lx.load(checkpoint).forgotten is None


def test_generated_tokens_say_what_was_forgotten(checkpoint: Path) -> None:
    session = lx.load(checkpoint, meter=True)
    *_, last = chunks = list(lx.generate(session, IDS.tolist(), max_new_tokens=4, report_forgetting=True))
    session.reset()
    session.prefill(IDS)
    assert session.forgotten is not None
    assert chunks[0].forgotten == pytest.approx(session.forgotten.mean(), rel=1e-3)
    assert last.summary is not None
    assert last.summary.forgotten == pytest.approx(np.mean([chunk.forgotten for chunk in chunks]))
    quiet = list(lx.generate(session, IDS.tolist(), max_new_tokens=1))
    assert quiet[0].forgotten is None


@pytest.mark.parametrize(("lowering", "config"), [("native", EVICTED), ("portable", RAGGED)])
def test_a_wrong_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lowering: str, config: lx.LigerConfig
) -> None:
    def spoilt(lower: Portable, *args: Any) -> Any:
        mixed, present = mixer(lower, *args)
        present[FORGOTTEN] = lower.g.op("Mul", present[FORGOTTEN], lower.g.floats(1.01))
        return mixed, present

    mixer = onnx_graph.mixer
    monkeypatch.setattr(onnx_graph, "mixer", spoilt)
    checkpoint = make_checkpoint(tmp_path / "liger", config)
    with pytest.raises(VerificationError, match="share of attention on forgotten tokens"):
        lx.build(checkpoint, tmp_path / "engine", lowering=lowering, meter=True)


@pytest.mark.parametrize("settings", [{"target": "trt", "engine": False}, {"genai": True}, {}])
def test_what_cannot_have_a_meter_says_so(tmp_path: Path, settings: dict[str, Any]) -> None:
    config = EVICTED if settings else FORESIGHT
    liger = make_checkpoint(tmp_path / "liger", config)
    with pytest.raises(UsageError, match="a meter"):
        lx.build(liger, tmp_path / "engine", meter=True, **settings)


@pytest.mark.parametrize("lowering", [*LOWERINGS, "torch"])
def test_held_tokens(tmp_path: Path, lowering: str) -> None:
    """Sinks and window are those that they must be, and each head has as many tokens as slots."""
    config = replace(RAGGED, keep_softmax=(1,) if lowering != "torch" else ())
    liger = make_checkpoint(tmp_path / "liger", config)
    session = lx.load(liger if lowering == "torch" else lx.build(
        liger, tmp_path / "engine", lowering=lowering, verify=False), batch=2)  # fmt: skip
    session.prefill(np.stack([IDS, IDS]))
    session.reset(0)
    session.step([1, 1])
    assert [len(head) for layer in session.held(0) for head in layer] == [1] * 6
    for layer, heads in enumerate(session.held(1)):
        for word, head in zip(config.heads[layer].split(), heads, strict=True):
            window, *slots = map(int, word.split("+"))
            if layer in config.keep_softmax:
                assert head.tolist() == list(range(len(IDS) + 1))
                continue
            assert len(head) == window + sum(slots) + config.sinks and len(set(head.tolist())) == len(head)
            assert head[: config.sinks].tolist() == list(range(config.sinks))
            assert head[len(head) - window :].tolist() == list(range(len(IDS) + 1 - window, len(IDS) + 1))


@pytest.mark.parametrize(("config", "said"), [(EVICTED, "at least"), (FORESIGHT, "nothing keeps")])
def test_run_says_it(tmp_path: Path, config: lx.LigerConfig, said: str) -> None:
    liger = make_checkpoint(tmp_path / "liger", config, vocab_size=512)
    toy.tokenizer().save(str(liger / "tokenizer.json"))
    result = CliRunner().invoke(app, ["run", str(liger), "the", "-n", "2", "--forgetting"])
    assert result.exit_code == 0 and said in result.stderr, result.output
