"""The checks of a verb before its work, and the results that it keeps if they cannot be written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pathlib import Path

import pytest
import toy
from typer.models import ArgumentInfo

import ligerexport as lx
from ligerexport.cli import main
from ligerexport.cli.app import app
from ligerexport.cli.options import path
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.backend import BuildSettings
from ligerexport.exporters.build import BuildPlan
from tests.checkpoints import FORESIGHT, make_checkpoint

PATHS = [
    (str(command.name), "" if isinstance(info, ArgumentInfo) else f"--{name.replace('_', '-')}")
    for command in app.registered_commands
    for name, parameter in signature(command.callback or app).parameters.items()
    for info in parameter.annotation.__metadata__
    if info.parser is path
]


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_checkpoint(tmp_path_factory.mktemp("plans") / "liger", FORESIGHT, vocab_size=toy.VOCAB)
    toy.tokenizer().save(str(made / "tokenizer.json"))
    (made / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": toy.TEMPLATE}))
    return made


@pytest.mark.parametrize(("verb", "option"), PATHS, ids=" ".join)
def test_an_empty_path_is_not_this_directory(verb: str, option: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert ("eval", "--text") in PATHS and len(PATHS) >= 20
    with pytest.raises(SystemExit, match="2"):
        main([verb, *filter(None, [option]), ""])
    assert "a path is empty" in capfd.readouterr().err


def test_an_empty_path_is_refused_by_the_library(liger: Path, tmp_path: Path) -> None:
    calls = (
        lambda: lx.evaluate(liger, text=[""]),
        lambda: lx.convert(liger, tmp_path / "out", preset="foresight", calibrate=[""]),
        lambda: lx.convert(liger, tmp_path / "out", adapter=""),
    )
    for call in calls:
        with pytest.raises(UsageError, match="a path is empty"):
            call()


def test_a_full_disk_does_not_lose_what_was_measured(
    liger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    @contextmanager
    def full(place: Path, **options: object) -> Iterator[Path]:
        raise LigerError(f"cannot write {place}: No space left on device")
        yield place

    monkeypatch.setattr("ligerexport.train.allocate.staged_file", full)
    monkeypatch.setattr("ligerexport.measure.evaluate.report.staged_directory", full)
    (prose := tmp_path / "prose.txt").write_text("some words to read " * 100)
    small = ["--length", "48", "--windows", "1", "--trials", "1", "-o", str(tmp_path / "out")]
    allocate = ["allocate", str(liger), "--data", str(prose), "--text", str(prose), "--distance", "40", *small]
    for command in (allocate, ["eval", str(liger), "--text", str(prose), "--parts", "nll", "--json", *small]):
        with pytest.raises(SystemExit, match="1"):
            main(command)
        said = capfd.readouterr()
        assert "No space left" in said.err and json.loads(said.out)


@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_a_cache_that_cannot_be_written_is_told_before_the_build(
    liger: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(LigerError, match="is not a writable directory"):
        BuildPlan(liger, tmp_path / "out", BuildSettings(lowering="native"))
    assert not (tmp_path / "out").exists()
