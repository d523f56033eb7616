"""The preset `recall` in `convert`: sizes for a number of bytes, with and without a fit, for every family."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models

from ligerexport.checkpoint import passages, recall, sizes
from ligerexport.checkpoint.calibrate import digest, load_scores, score_shapes
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.convert import ConvertPlan, convert, load_model
from ligerexport.checkpoint.describe import describe_checkpoint
from ligerexport.checkpoint.recall import Effort
from ligerexport.checkpoint.shares import OPTIONS
from ligerexport.cli import main
from ligerexport.cli.convert import parse_bytes
from ligerexport.errors import LigerError, UsageError
from ligerexport.model.config import LigerConfig, get_preset
from ligerexport.model.families import FAMILIES
from tests import toy
from tests.test_convert import readable_teacher
from tests.test_model import make_teacher

EFFORT = Effort(repeated=2, tokens=150, prose=1, prose_tokens=300, asked=1, asked_tokens=150)
KB = 1000


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text for the fit in place of the package's, and only a little of it."""
    place = tmp_path / "calibration"
    place.mkdir()
    (place / "a.txt").write_text(
        "\n\n".join(f"On day {i} there were {i * i} gulls, and {i} came by." for i in range(50))
    )
    monkeypatch.setattr(passages, "CALIBRATION", place)
    monkeypatch.setattr(recall, "SHORT", EFFORT)
    monkeypatch.setattr(recall, "FULL", EFFORT)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_sizes_within_the_bytes(tmp_path: Path, family: str) -> None:
    teacher = readable_teacher(tmp_path / "teacher", family=family)
    liger = convert(teacher, tmp_path / "liger", state_bytes=40 * KB, keep_softmax=(2,))
    info = check_checkpoint(liger)
    config, facts = LigerConfig.from_dict(info.config["liger"]), info.config["liger_scores"]
    assert [len(layer.split()) for layer in config.heads] == [0 if i in config.unchanged else 2 for i in range(3)]
    shapes = score_shapes(info.config, config)
    assert {name for name in info.tensors if ".score_proj." in name} == set(shapes)
    assert facts["sha256"] == digest(load_scores(info.files, shapes)) and 0 < facts["explained"] < 1
    assert (facts["from"], facts["bytes"], facts["texts"], facts["seed"]) == ("fit", 40 * KB, 4, 0)
    assert 1000 < facts["tokens"] <= 4 * 512
    model = load_model(liger)
    spent = sum(
        tensor.nbytes()
        for i, layer in enumerate(model.model.layers)
        if i not in config.unchanged
        for tensor in layer.self_attn.spec.state()
        if tensor.name.startswith("slot_")
    )
    assert 0 < spent <= 40 * KB
    assert model(torch.randint(0, toy.VOCAB, (1, 300))).logits.isfinite().all()


def test_a_fit_can_be_repeated_used_again_and_changed_by_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, text = readable_teacher(tmp_path / "teacher"), tmp_path / "own.txt"
    text.write_text("xyz " * 3000)
    found = [
        check_checkpoint(convert(teacher, tmp_path / name, preset="recall", calibrate=calibrate)).config
        for name, calibrate in (("first", None), ("second", None), ("third", [text]))
    ]
    first, second, third = (config["liger_scores"]["sha256"] for config in found)
    assert first == second != third and found[0]["liger"] == found[1]["liger"]
    shard = tmp_path / "first" / "model-00002-of-00002.safetensors"
    monkeypatch.setattr(sizes, "_fit", None)  # an earlier fit is used
    for source, scores in ((tmp_path / "first", None), (teacher, shard)):
        again = check_checkpoint(convert(source, tmp_path / "again", preset="recall", scores=scores, force=True)).config
        assert again["liger"] == found[0]["liger"] and again["liger_scores"]["sha256"] == first
        less = convert(source, tmp_path / "less", preset="recall", scores=scores, state_bytes=9 * KB, force=True)
        config = LigerConfig.from_dict(check_checkpoint(less).config["liger"])
        assert describe_checkpoint(less, config)["state_bytes"] <= 9 * KB


def test_without_a_fit_every_head_has_the_same_window(tmp_path: Path) -> None:
    teacher = readable_teacher(tmp_path / "teacher")
    liger = convert(teacher, tmp_path / "liger", preset="recall", state_bytes=40 * KB, fit=False)
    info = check_checkpoint(liger)
    config = LigerConfig.from_dict(info.config["liger"])
    assert config.heads == () == config.slots and config.state_dtype == "int8" and "liger_scores" not in info.config
    each = 40 * KB // 6 // (2 * 16 + 8)  # six heads of width 16
    assert config.window == each - config.sinks
    assert 39 * KB < describe_checkpoint(liger, config)["state_bytes"] <= 40 * KB + 3 * 8


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"state_bytes": KB}, "1,000 bytes of state, but the smallest memory", "--state-bytes 4800"),
        ({"state_bytes": KB, "fit": False}, "1,000 bytes of state are too few", "--state-bytes 1200"),
        ({"state_bytes": KB, "preset": "memory"}, "--state-bytes is for sizes", "--preset recall"),
        ({"fit": False, "preset": None, "gate": "gsa"}, "--no-fit is for sizes", "--preset recall"),
        ({"window": 9}, "--window with the preset recall", "--state-bytes"),
        ({"scores": "a", "fit": False}, "both --scores and --no-fit", "use a fit"),
        ({"scores": "teacher/model.safetensors"}, "score_proj.weight is missing", "another model"),
        ({"calibrate": ["a.txt"], "fit": False}, "both --calibrate and --no-fit", "use a fit"),
    ],
)
def test_sizes_that_cannot_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, object], message: str, hint: str
) -> None:
    readable_teacher(tmp_path / "teacher")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ligerexport.checkpoint.recall.fit_memory", None)  # it is refused before a fit
    with pytest.raises(LigerError, match=message) as error:
        convert("teacher", "liger", **{"preset": "recall"} | settings)  # type: ignore[arg-type]
    assert hint in str(error.value.hint) and not (tmp_path / "liger").exists()


def test_too_little_memory_for_a_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = readable_teacher(tmp_path / "teacher")
    monkeypatch.setattr(sizes, "_room", lambda: (1000, "free on the GPU"))
    with pytest.raises(LigerError, match=r"needs .* of memory, and 1 kB are free on the GPU") as error:
        convert(teacher, tmp_path / "liger", preset="recall")
    assert "--no-fit" in str(error.value.hint) and "--preset memory" in str(error.value.hint)


@pytest.mark.parametrize(
    ("length", "tokenizer", "message"),
    [(64, toy.tokenizer(), "texts of 64 tokens, too few"), (512, Tokenizer(models.BPE()), "makes no tokens of a text")],
)
def test_where_no_fit_is_possible_the_default_says_so(
    tmp_path: Path, length: int, tokenizer: Tokenizer, message: str
) -> None:
    teacher = make_teacher(tmp_path / "teacher", vocab_size=toy.VOCAB, max_position_embeddings=length)
    tokenizer.save(str(teacher / "tokenizer.json"))
    with pytest.raises(UsageError, match=message) as error:
        convert(teacher, tmp_path / "liger")
    assert "--no-fit" in str(error.value.hint) and "--preset memory" in str(error.value.hint)
    assert not (tmp_path / "liger").exists()
    convert(teacher, tmp_path / "liger", preset="memory")


@pytest.mark.parametrize(
    ("settings", "preset"),
    [
        ({}, "recall"),
        ({"sinks": 2, "keep_softmax": (1,), "max_distance": 300}, "recall"),
        ({"gate": "hgrn2", "recurrence_weight": 0.5}, "memory"),
        ({"window": 9}, "memory"),
        ({"slots": ()}, "memory"),
        ({"preset": "sinks"}, "sinks"),
    ],
)
def test_the_preset_that_is_meant(tmp_path: Path, settings: dict[str, object], preset: str) -> None:
    plan = ConvertPlan(readable_teacher(tmp_path / "teacher"), tmp_path / "liger", **settings)  # type: ignore[arg-type]
    assert plan.liger == get_preset(preset, **{key: value for key, value in settings.items() if key != "preset"})
    assert (plan.preset, plan.sized) == (preset, preset == "recall")


def test_adapters_that_ship(tmp_path: Path) -> None:
    def liger(preset: str | None) -> LigerConfig:
        return ConvertPlan("smollm2-135m", tmp_path / "liger", preset=preset, adapter="shipped").liger

    assert liger(None) == liger("recall") and len(liger(None).heads) == 30
    assert liger("evicted").evicts and liger("evicted").layer_memory
    with pytest.raises(UsageError, match="no adapter ships for smollm2-135m with the preset memory") as error:
        liger("memory")
    assert "recover" in str(error.value.hint)
    with pytest.raises(UsageError) as error:
        ConvertPlan(tmp_path / "smollm2-135m", tmp_path / "liger", adapter="shipped")
    assert "ligerexport convert smollm2-135m --adapter shipped" in str(error.value.hint)


def test_no_window_reaches_beyond_the_largest_distance() -> None:
    costs, heads = {0: [[-float(window) for window, _ in OPTIONS]]}, sizes.Heads((0,), 1, 32)
    for distance, window in ((None, "1024"), (256, "256")):
        liger = get_preset("recall", max_distance=distance)
        assert sizes._words(costs, heads, 1000 * KB, liger, 1) == (window,)


def test_the_command_says_what_it_will_do_and_did(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    teacher, liger = readable_teacher(tmp_path / "teacher"), tmp_path / "liger"

    def command(*more: str) -> tuple[dict[str, object], str]:
        with pytest.raises(SystemExit) as caught:
            main(["convert", str(teacher), "-o", str(liger), "--preset", "recall", "--json", *more])
        said = capfd.readouterr()
        assert caught.value.code == 0, said.err
        return json.loads(said.out), said.err

    plan, said = command("--state-bytes", "40kB", "--dry-run")
    assert plan["state_bytes"] == 40 * KB and plan["fit"] == "4 texts with 1,200 tokens" and not liger.exists()
    assert "fit seconds" in said and "fit memory" in said
    facts, said = command("--state-bytes", "40kB")
    assert "fitting 40 kB of state for 6 KV heads" in said and "--no-fit goes without" in said
    assert "KV heads have scored slots" in str(facts["heads"]) and "--state-bytes" in str(facts["more"])
    assert facts["layers"] == "3 of 3 converted" and "ligerexport build" in said
    with pytest.raises(SystemExit):
        main(["inspect", str(liger)])
    told = capfd.readouterr().out
    assert str(facts["heads"]) in told and "384" not in told  # the slots of a head, not those of the preset
    assert "window+scored slots of each KV head" in told and re.search(r"slot_key +\[\d+ to \d+, 16\] +int8 +3 ", told)
    plan, _ = command("--no-fit", "--force", "--dry-run")
    assert (
        plan["exact_slots"] == sizes.equal_sizes(check_checkpoint(teacher).config, get_preset("recall"), None).num_slots
    )


def test_sizes_in_bytes() -> None:
    texts = ("8MB", "24MiB", "8000000", "1.5 gb", "2k")
    assert [parse_bytes(text) for text in texts] == [8_000_000, 24 << 20, 8_000_000, 1_500_000_000, 2000]
    for text in ("", "MB", "8 MBit", "-1MB", "inf", "nan"):
        with pytest.raises(UsageError, match="--state-bytes") as error:
            parse_bytes(text)
        assert "8MB" in str(error.value.hint)
