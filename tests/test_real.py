"""Level 4: the built-in model itself. Prefill, steps and cuts agree in torch and artifacts.

The preset `memory` runs over 64 tokens in `ort` and `portable`, and the default with the adapter that ships over 32 in
every lowering.
"""

from __future__ import annotations

import json
import os
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

import ligerexport as lx
from ligerexport.checkpoint.convert import load_model
from ligerexport.exporters.onnx.spec import read_spec
from ligerexport.exporters.targets import TARGETS
from ligerexport.exporters.verify.compare import tolerance_of
from ligerexport.exporters.verify.text import PROMPT
from ligerexport.exporters.verify.torch_model import Answer, Reference
from ligerexport.exporters.verify.verify import Verification
from ligerexport.layers.mixer import LigerCache
from ligerexport.model.config import PRESETS
from tests.tolerances import MODEL_FP32

pytestmark = pytest.mark.real

STEPS = 64
GREEDY = 32
CUTS = (0, 1, 2, 65, 130, 131, 200)


@pytest.fixture(scope="module")
def liger(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lx.convert(smollm2, tmp_path_factory.mktemp("real") / "liger", preset="memory")


@pytest.fixture(scope="module")
def prompt(smollm2: Path) -> np.ndarray:
    return np.array(AutoTokenizer.from_pretrained(smollm2)(PROMPT).input_ids[: CUTS[-1]])


@pytest.fixture(scope="module")
def torch_run(liger: Path, prompt: np.ndarray) -> tuple[np.ndarray, list[int], np.ndarray]:
    """Return the logits after the prompt, `STEPS` greedy tokens, and the logits after them."""
    model = load_model(liger).eval()
    cache = LigerCache(model.config)
    with torch.inference_mode():
        ids = torch.from_numpy(prompt)[None]
        first = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0, -1]
        logits, tokens = first, []
        for _ in range(STEPS):
            tokens.append(int(logits.argmax()))
            logits = model(torch.tensor([[tokens[-1]]]), past_key_values=cache, use_cache=True).logits[0, -1]
        whole = model(torch.cat([ids, torch.tensor([tokens])], dim=1), use_cache=False, logits_to_keep=1).logits[0, -1]
        assert (whole - logits).abs().max() <= MODEL_FP32
        cache = LigerCache(model.config)
        pieces = [
            model(ids[:, a:b], past_key_values=cache, use_cache=True, logits_to_keep=1) for a, b in pairwise(CUTS)
        ]
        assert (pieces[-1].logits[0, -1] - first).abs().max() <= MODEL_FP32
    return first.numpy(), tokens, logits.numpy()


@pytest.mark.parametrize("lowering", ["ort", "portable"])
def test_an_artifact_equals_torch(
    liger: Path, prompt: np.ndarray, torch_run: tuple[np.ndarray, list[int], np.ndarray], tmp_path: Path, lowering: str
) -> None:
    first, tokens, last = torch_run
    lx.build(liger, tmp_path / "engine", lowering=lowering, verify=False)
    session = lx.load(tmp_path / "engine")
    session.prefill(prompt)
    snapshot = session.snapshot()

    session.reset()
    for a, b in pairwise(CUTS):
        logits = session.prefill(prompt[a:b])
    assert np.abs(logits[0] - first).max() <= MODEL_FP32
    session.restore(snapshot)
    logits, found = first[None], []
    for _ in range(STEPS):
        found.append(int(logits[0].argmax()))
        logits = session.step(found[-1])
    assert found == tokens
    assert np.abs(logits[0] - last).max() <= MODEL_FP32
    session.reset()
    logits = session.prefill(np.concatenate([prompt, tokens]))
    assert np.abs(logits[0] - last).max() <= MODEL_FP32


@pytest.fixture(scope="module")
def shipped(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default conversion of the built-in model, with its adapter."""
    return lx.convert("smollm2-135m", tmp_path_factory.mktemp("shipped") / "liger", adapter="shipped")


@pytest.fixture(scope="module")
def chosen(shipped: Path, prompt: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """Return what a session in torch writes greedily after the prompt, with slots that are not rounded."""
    exact = tmp_path_factory.mktemp("exact") / "liger"
    shutil.copytree(shipped, exact, copy_function=os.link)
    config = json.loads((shipped / "config.json").read_text())
    assert config["liger"]["heads"] and config["liger"].pop("state_dtype") == "int8" and "liger_recovery" in config
    (exact / "config.json").unlink()
    (exact / "config.json").write_text(json.dumps(config))
    session = lx.load(exact)
    logits, tokens = session.prefill(prompt), list[int]()
    for _ in range(GREEDY):
        tokens.append(int(logits[0].argmax()))
        logits = session.step(tokens[-1])
    return tokens


@pytest.fixture(scope="module")
def answers(shipped: Path, prompt: np.ndarray, chosen: list[int]) -> list[Answer]:
    """Return torch's answers to a cut prompt and to these tokens, one by one."""
    pieces = [*np.split(prompt, CUTS[1:-1]), *np.array(chosen)[:, None]]
    whole = {*range(len(CUTS) - 1), *range(0, len(pieces), 8)}
    found = Reference(read_spec(shipped, "activation")).answers(pieces, whole=whole)
    assert [int(answer.logits.argmax()) for answer in found[len(CUTS) - 2 : -1]] == chosen
    return found


@pytest.mark.parametrize("lowering", TARGETS["onnx"].lowerings)
def test_the_default_writes_what_torch_writes(
    shipped: Path, answers: list[Answer], tmp_path: Path, lowering: str
) -> None:
    artifact = lx.build(shipped, tmp_path / "engine", lowering=lowering, state="fp32", verify=False)
    spec = read_spec(shipped, "activation")
    check = Verification(spec, tolerance_of("float32"), Reference(spec))
    check.run(lx.load(artifact), answers, lambda count: None, prompt=len(CUTS) - 1)
    result = check.result
    assert result.greedy_tokens == result.greedy_tokens_equal >= GREEDY - 4 and result.near_ties <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_kernels_give_the_logits_of_plain_torch(smollm2: Path, prompt: np.ndarray, tmp_path: Path, preset: str) -> None:
    """Fused kernels on the GPU in fp32 against plain torch in fp64 there: a padded batch, a cut, and single steps.

    Slots are kept as they are: with codes of 8 bits plain torch in fp32 is 0.6% from fp64 too, since codes near a half
    are rounded the other way, and each changes what later layers round.
    """
    liger = lx.convert("smollm2-135m", tmp_path / "liger", preset=preset)  # by name: its learned scores ship with us
    config = json.loads((liger / "config.json").read_text())
    config["liger"]["state_dtype"] = "activation"
    (liger / "config.json").write_text(json.dumps(config))
    ids = torch.from_numpy(np.stack([prompt[:150], np.concatenate([prompt[:20] * 0, prompt[20:150]])])).cuda()
    mask = torch.ones(2, 160, dtype=torch.long, device="cuda")
    mask[1, :20] = 0
    results = []
    for dtype in (torch.float64, torch.float32):
        model = load_model(liger).to("cuda", dtype).eval()
        cache = LigerCache(model.config)
        logits = []
        for start, end in (*pairwise((0, 70, 140)), *((t, t + 1) for t in range(140, 150))):
            piece = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
            logits.append(piece.logits)
        together = torch.cat(logits, dim=1).double()
        results.append(torch.cat([together[0], together[1, 20:]]))
    truth, found = results
    assert (found - truth).norm() <= MODEL_FP32 * truth.norm()
    assert (found.argmax(-1) == truth.argmax(-1)).double().mean() > 0.99


def test_the_shipped_adapter_fits_and_helps(smollm2: Path, tmp_path: Path) -> None:
    ids = torch.tensor(AutoTokenizer.from_pretrained(smollm2)(PROMPT).input_ids)[None]

    def nll(**options: str) -> float:
        model = load_model(lx.convert("smollm2-135m", tmp_path / "liger", force=True, **options)).eval()
        with torch.inference_mode():
            return float(model(ids, labels=ids, use_cache=False).loss)

    assert nll(preset="evicted", adapter="shipped") < nll(preset="foresight") - 0.1
