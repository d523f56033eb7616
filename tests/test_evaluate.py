"""Evaluation: equal numbers from torch, the artifact and plain formulas; controls; inputs; the verb."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ligerexport as lx
from ligerexport.checkpoint.convert import convert_in_memory, load_model
from ligerexport.errors import CheckpointError, LigerError, MissingDependency, UsageError
from ligerexport.measure import opened
from ligerexport.measure.evaluate.controls import RandomJudge, control_config, make_control, random_scores
from ligerexport.measure.evaluate.estimate import Estimate
from ligerexport.measure.evaluate.nll import by_position, position_bins
from ligerexport.measure.evaluate.recall import ONCE, PlainTokenizer, passkey_prompts
from ligerexport.measure.evaluate.settings import Settings, choose_parts
from ligerexport.measure.opened import ArtifactModel, TorchModel, check_same_tokenizer, chunk_size, open_model
from ligerexport.model.config import LigerConfig
from ligerexport.run.runtime import load
from ligerexport.text.corpus import cut_windows, read_tokens, text_files
from ligerexport.text.tokenizer import TextModel
from tests import toy
from tests.checkpoints import MEMORY, make_checkpoint
from tests.tolerances import MODEL_FP32

MIXED = replace(MEMORY, attention_weight=0.7, recurrence_weight=0.3)
SIZED = replace(MEMORY, layer_memory=((1, 11, tuple((name, count + 3) for name, count in MEMORY.slots)),))
SIZES = {"vocab_size": toy.VOCAB, "bos_token_id": toy.BOS, "eos_token_id": toy.EOS}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Use one thread, because more slow down models this small."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def add_tokenizer(path: Path) -> Path:
    toy.tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    return path


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("evaluate") / "liger", MIXED, **SIZES))


@pytest.fixture(scope="module")
def teacher(liger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Transformer with the weights of `liger`."""
    path = tmp_path_factory.mktemp("evaluate") / "teacher"
    path.mkdir()
    for file in liger.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    del config["liger"]
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.fixture(scope="module")
def artifact(liger: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lx.build(liger, tmp_path_factory.mktemp("evaluate") / "artifact")


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluate") / "text"
    (path / "more").mkdir(parents=True)
    from ligerexport.exporters.verify.text import PROMPT

    (path / "a.txt").write_text(PROMPT)
    (path / "more" / "b.txt").write_text(PROMPT[::-1])
    return path


@pytest.fixture(scope="module")
def windows(liger: Path, text: Path) -> torch.Tensor:
    return cut_windows(read_tokens(text_files([text]), TextModel(liger)), 200, 3, [toy.BOS])


def torch_scorer(path: Path) -> TorchModel:
    return TorchModel(load_model(path).eval())


# Scorers


@pytest.mark.parametrize("lowering", ["ort", "portable"])
@pytest.mark.parametrize(
    "config", [MIXED, LigerConfig(window=8, keep_softmax=(1,)), SIZED], ids=["memory", "hybrid", "sized"]
)
def test_an_artifact_scores_every_token_as_torch(tmp_path: Path, config: LigerConfig, lowering: str) -> None:
    checkpoint = make_checkpoint(tmp_path / "liger", config)
    artifact = lx.build(checkpoint, tmp_path / "onnx", lowering=lowering, verify=False)
    ids = torch.randint(0, 131, (1, 90))
    expected = load_model(checkpoint).eval()(ids).logits
    session = load(artifact, scoring=True)
    found = torch.cat(list(ArtifactModel(session).logits(ids, chunk=50)), dim=1)
    assert found.shape == expected.shape and (found - expected).abs().max() < MODEL_FP32
    stepped = torch.cat([torch.from_numpy(part) for part in load(artifact).every(ids.numpy())], dim=1)
    assert (stepped - expected).abs().max() < MODEL_FP32
    session.reset()
    assert abs(session.prefill(ids[:, :9].numpy()) - expected[:, 8].detach().numpy()).max() < MODEL_FP32
    assert abs(session.step(int(ids[0, 9])) - expected[:, 9].detach().numpy()).max() < MODEL_FP32


@pytest.mark.parametrize("kind", ["liger", "teacher", "artifact"])
def test_chunks_ends_and_greedy_choices_agree(kind: str, request: pytest.FixtureRequest) -> None:
    scorer = open_model(request.getfixturevalue(kind), scoring=True, dtype="float32")
    ids = torch.randint(0, toy.BYTES, (1, 130))
    whole = torch.cat(list(scorer.logits(ids)), dim=1)
    pieces = list(scorer.logits(ids, chunk=48))
    assert [piece.shape[1] for piece in pieces] == [48, 48, 34]
    assert (torch.cat(pieces, dim=1) - whole).abs().max() < MODEL_FP32
    for last in (1, 40, 130):
        assert (scorer.forced(ids, last) - whole[:, -last:]).abs().max() < MODEL_FP32
    line = ids[0].tolist()
    for _, (token,) in zip(range(4), scorer.greedy(ids.tolist()), strict=False):
        assert token == int(scorer.forced(torch.tensor([line]), 1)[0, -1].argmax())
        line.append(token)


def test_a_long_prompt_is_read_in_chunks(liger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, ids = torch_scorer(liger), torch.randint(0, toy.BYTES, (2, 150))
    expected = scorer.forced(ids, 20)
    monkeypatch.setattr(opened, "CHUNK", 32)
    assert (scorer.forced(ids, 20) - expected).abs().max() < MODEL_FP32


def test_the_logits_of_a_call_stay_within_the_budget() -> None:
    assert chunk_size(1, 49152) == 1024 and chunk_size(16, 49152) == 128 and chunk_size(64, 262144) == 64


# Held-out loss and agreement


@pytest.mark.parametrize(
    ("length", "bins"),
    [
        (8192, [(0, 64), (64, 128), (128, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]),
        (200, [(0, 64), (64, 128), (128, 200)]),
        (64, [(0, 64)]),
        (9, [(0, 9)]),
    ],
)
def test_bins(length: int, bins: list[tuple[int, int]]) -> None:
    assert position_bins(length) == bins


def test_nll_and_agreement_are_those_of_the_plain_formulas(liger: Path, teacher: Path, windows: torch.Tensor) -> None:
    scorers = {"model": torch_scorer(liger), "teacher": open_model(teacher, scoring=True, device="cpu")}
    chunked = by_position(scorers, windows, teacher="teacher", batch=2)
    log_p = {name: scorer.model(windows[:, :-1]).logits.log_softmax(-1) for name, scorer in scorers.items()}
    target = windows[:, 1:, None]
    losses = {name: -p.gather(2, target)[..., 0] for name, p in log_p.items()}
    ours, theirs = log_p["model"], log_p["teacher"]
    kl = (theirs.exp() * (theirs - ours)).sum(-1)
    same = (theirs.argmax(-1) == ours.argmax(-1)).double()
    assert set(chunked["teacher"]) == {"nll"} and set(chunked["model"]) == {"nll", "top1", "kl"}
    expected = {"nll": losses["model"], "kl": kl, "top1": same}
    for name, values in expected.items():
        found = chunked["model"][name]
        for low, high in ((0, 64), (64, 128), (128, 200)):
            means = values[:, max(0, low - 1) : high - 1].double().mean(1)
            estimate = found[f"{low}-{high}"]
            assert estimate.mean == pytest.approx(means.mean().item(), abs=1e-3)
            assert estimate.stderr == pytest.approx(means.std().item() / math.sqrt(len(windows)), abs=1e-3)
            assert estimate.count == len(windows)
        assert found["mean"].mean == pytest.approx(values.double().mean().item(), abs=1e-3)
    assert chunked["teacher"]["nll"]["mean"].mean == pytest.approx(losses["teacher"].mean().item(), abs=1e-4)
    assert chunked["model"]["kl"]["mean"].mean > 0.01


def test_a_model_agrees_with_itself(teacher: Path, windows: torch.Tensor) -> None:
    one, other = (open_model(teacher, scoring=True) for _ in range(2))
    table = by_position({"model": one, "teacher": other}, windows, teacher="teacher")["model"]
    assert table["top1"]["mean"].mean == 1.0 and abs(table["kl"]["mean"].mean) < 1e-6


def test_the_artifact_has_the_numbers_of_its_checkpoint(
    liger: Path, artifact: Path, text: Path, windows: torch.Tensor
) -> None:
    subjects = [open_model(path, scoring=True, dtype="float32") for path in (liger, artifact)]
    ours, theirs = (by_position({"model": subject}, windows)["model"]["nll"] for subject in subjects)
    for name, estimate in ours.items():
        assert theirs[name].mean == pytest.approx(estimate.mean, abs=1e-3)
    tokenizer = PlainTokenizer(subjects[0].text)
    prose = read_tokens(text_files([text]), subjects[0].text)
    for prompt in passkey_prompts(tokenizer, prose, ONCE, 128, 3):
        choices = [s.forced(torch.tensor([prompt.ids]), 6)[0].argmax(-1).tolist() for s in subjects]
        assert choices[0] == choices[1]
    assert subjects[0].sequence_bytes == subjects[1].sequence_bytes is not None


# Controls


def test_control_settings() -> None:
    window = control_config("window", MIXED)
    assert window.num_slots == MIXED.num_slots and window.sinks == 4 and not window.slots
    assert (window.attention_weight, window.recurrence_weight) == (1.0, 0.0)
    assert control_config("no-recurrence", MIXED) == replace(MIXED, recurrence_weight=0.0)
    for name in ("window", "random-judge"):  # every layer keeps its number of slots
        sized = control_config(name, SIZED)
        for layer in (0, 1):
            assert sized.for_layer(layer).num_slots == SIZED.for_layer(layer).num_slots
        assert sized.for_layer(1).num_slots > sized.for_layer(0).num_slots
    judge = control_config("random-judge", MIXED)
    assert judge.slots == (("learned", 12),) and judge.num_slots == MIXED.num_slots
    with pytest.raises(UsageError, match="no recurrence"):
        control_config("no-recurrence", MEMORY)
    with pytest.raises(UsageError, match="no scored slots"):
        control_config("random-judge", LigerConfig())
    with pytest.raises(UsageError, match="unknown control 'windw'"):
        control_config("windw", MIXED)


def test_a_control_shares_weights_and_computes_its_configuration(liger: Path, tmp_path: Path) -> None:
    model = load_model(liger).eval()
    control = make_control("no-recurrence", model)
    weights = dict(control.named_parameters())
    assert all(weights[name].data_ptr() == weight.data_ptr() for name, weight in model.named_parameters())
    config = replace(MIXED, recurrence_weight=0.0)
    written = load_model(make_checkpoint(tmp_path / "same", config, **SIZES)).eval()
    ids = torch.randint(0, toy.BYTES, (2, 90))
    assert torch.equal(control(ids).logits, written(ids).logits)
    assert not torch.equal(control(ids).logits, model(ids).logits)
    assert LigerConfig.from_dict(model.config.liger) == MIXED


def test_a_window_that_holds_everything_is_the_teacher(teacher: Path) -> None:
    scorer = open_model(teacher, scoring=True, dtype="float32")
    everything = LigerConfig(window=64, attention_weight=1.0, recurrence_weight=0.0)
    converted = TorchModel(convert_in_memory(scorer.model, everything))  # type: ignore[attr-defined]
    ids = torch.randint(0, toy.BYTES, (2, 60))
    assert (converted.forced(ids, 60) - scorer.forced(ids, 60)).abs().max() < MODEL_FP32


def test_the_random_judge_does_not_depend_on_cuts_or_batches(liger: Path) -> None:
    model = load_model(liger).eval()
    judge = TorchModel(make_control("random-judge", model))
    assert all(isinstance(layer.self_attn, RandomJudge) for layer in judge.model.model.layers)
    ids = torch.randint(0, toy.BYTES, (2, 150))
    whole = torch.cat(list(judge.logits(ids)), dim=1)
    assert (torch.cat(list(judge.logits(ids, chunk=37)), dim=1) - whole).abs().max() < MODEL_FP32
    assert (torch.cat(list(judge.logits(ids[1:])), dim=1) - whole[1:]).abs().max() < MODEL_FP32
    novelty = TorchModel(convert_in_memory(model, replace(MIXED, slots=(("novelty", 12),))))
    assert (torch.cat(list(novelty.logits(ids)), dim=1) - whole).abs().max() > 0.01
    other = TorchModel(make_control("random-judge", model, seed=1))
    assert (torch.cat(list(other.logits(ids)), dim=1) - whole).abs().max() > 0.01


def test_the_random_judge_leaves_layers_that_keep_their_window(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", MEMORY, "gemma3_text")).eval()
    control = make_control("random-judge", model)
    assert [isinstance(layer.self_attn, RandomJudge) for layer in control.model.layers] == [False, True, False]
    assert control(torch.randint(0, 131, (1, 60))).logits.isfinite().all()


def test_the_random_judge_keeps_tokens_of_any_age(liger: Path) -> None:
    model = make_control("random-judge", load_model(liger).eval())
    cache = model(torch.randint(0, toy.BYTES, (1, 400)), use_cache=True).past_key_values
    position = torch.cat([layer.state["slot_position"][0] for layer in cache.layers])
    scored = position[(position >= MIXED.sinks) & (position < 400 - MIXED.window)].double()
    assert len(scored) == 3 * 2 * 12
    assert 100 < scored.mean() < 290 and scored.min() < 60 and scored.max() > 330


def test_random_scores_are_uniform_and_independent_of_layer_and_head() -> None:
    position = torch.arange(20000)[None]
    scores = [random_scores(position, 2, seed)[0] for seed in (0, 1, 1_000_003)]
    flat = torch.cat(scores, dim=1).double()
    assert flat.min() > 0 and flat.max() <= 1
    assert (flat.mean(0) - 0.5).abs().max() < 0.01 and (flat.var(0) - 1 / 12).abs().max() < 0.002
    assert (torch.corrcoef(flat.T) - torch.eye(6)).abs().max() < 0.03
    assert torch.corrcoef(torch.stack([flat[:-1, 0], flat[1:, 0]]))[0, 1].abs() < 0.03


# Inputs


def test_text_files_and_windows(text: Path, tmp_path: Path) -> None:
    assert text_files([text]) == [text / "a.txt", text / "more" / "b.txt"]
    with pytest.raises(UsageError, match="no file or directory"):
        text_files([tmp_path / "absent"])
    with pytest.raises(UsageError, match=r"no \.txt file"):
        text_files([tmp_path])
    ids = list(range(100))
    windows = cut_windows(ids, 10, 4, prefix=(777,))
    assert windows.shape == (4, 10) and windows[:, 0].tolist() == [777] * 4
    assert windows[:, 1].tolist() == [0, 18, 36, 54]
    with pytest.raises(UsageError, match="has 100 tokens, one window has 128") as caught:
        cut_windows(ids, 128, 4)
    assert caught.value.hint is not None and "--length 64" in caught.value.hint


def test_a_file_that_is_no_text(liger: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"caf\xe9")
    with pytest.raises(LigerError, match="not UTF-8"):
        read_tokens([tmp_path / "x.txt"], TextModel(liger))


def test_parts_are_chosen_by_the_inputs() -> None:
    assert choose_parts(None, None, text=True, teacher=False) == (("nll", "recall"), ())
    assert choose_parts(None, None, text=True, teacher=True)[0] == ("nll", "agreement", "recall")
    assert choose_parts(None, ["piqa"], text=False, teacher=True) == (("tasks",), ("piqa",))
    assert choose_parts(["tasks"], None, text=False, teacher=False)[1][0] == "piqa"
    for parts in (None, ["nll"], ["tasks", "recall"]):
        with pytest.raises(UsageError, match="no text for") as caught:
            choose_parts(parts, None, text=False, teacher=False)
        assert caught.value.hint is not None and "--text" in caught.value.hint
    with pytest.raises(UsageError, match="needs a teacher"):
        choose_parts(["agreement"], None, text=True, teacher=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": ("nl",)}, "unknown part 'nl'"),
        ({"controls": ("windo",)}, "unknown control 'windo'"),
        ({"device": "gpu"}, "unknown device 'gpu'"),
        ({"dtype": "fp32"}, "unknown dtype 'fp32'"),
        ({"trials": 0}, "trials 0"),
        ({"length": 1}, "length 1"),
        ({"limit": 0}, "limit 0"),
    ],
)
def test_settings_that_make_no_sense(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Settings(**change)  # type: ignore[arg-type]


def test_models_with_other_tokens_are_not_compared(artifact: Path, teacher: Path, tmp_path: Path) -> None:
    for file in teacher.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    model, other = (open_model(path, scoring=True) for path in (artifact, tmp_path))
    with pytest.raises(UsageError, match="different tokenizers \\(2 tokens differ\\)"):
        check_same_tokenizer(model, other)
    check_same_tokenizer(model, open_model(teacher, scoring=True))


def test_controls_need_a_converted_checkpoint(artifact: Path, teacher: Path, text: Path) -> None:
    for model in (artifact, teacher):
        with pytest.raises(CheckpointError, match="not a converted checkpoint"):
            lx.evaluate(model, text=[text], controls=["window"], length=64, trials=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_device_that_is_not_there(liger: Path, text: Path) -> None:
    with pytest.raises(MissingDependency, match="cuda"):
        lx.evaluate(liger, text=[text], device="cuda")


def test_estimates() -> None:
    assert Estimate.of([1.0, 3.0]) == Estimate(2.0, 1.0, 2)
    assert Estimate.of([4.0]) == Estimate(4.0, None, 1)


# The verb and the report
