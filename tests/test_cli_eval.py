"""The command `eval`: its output, and its errors for bad and missing inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_cli import Cli, cli  # noqa: F401
from test_evaluate import _one_thread, artifact, liger, teacher, text, windows  # noqa: F401

import ligerexport as lx
from ligerexport.errors import MissingDependency
from ligerexport.measure.evaluate.estimate import Estimate
from ligerexport.measure.evaluate.report import Report

SMALL = ("--length", 128, "--windows", 2, "--trials", 2)


def test_the_verb_end_to_end(cli: Cli, liger: Path, teacher: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "report"
    command = ["eval", liger, "--against", teacher, "--text", text, *SMALL, "-o", output]
    result = cli(*command, "--controls", "window,no-recurrence,random-judge", "--json")
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert list(told["rows"]) == ["teacher", "model", "window", "no-recurrence", "random-judge"]
    for name, row in told["rows"].items():
        assert {"nll", "once", "twice", "keys_4", "keys_8", "copy", "copy_nll"} <= set(row)
        assert ("kl" in row and "top1" in row) == (name != "teacher")
        assert set(row["nll"]) == {"0-64", "64-128", "mean"}
        assert set(row["once"]["128"]) == {"mean", "stderr", "count"} and row["once"]["128"]["count"] == 2
    assert told["state_bytes"]["teacher"] is None and told["state_bytes"]["model"] > 0
    assert told["settings"]["parts"] == ["nll", "agreement", "recall"]
    assert "left_out" in told["environment"]  # a vocabulary of bytes has no words
    assert json.loads((output / "report.json").read_text()) == told
    report = Report.from_dict(told)
    assert (output / "report.md").read_text() == report.markdown()
    for title in ("Held-out negative log likelihood", "KL(teacher || model)", "Key said once"):
        assert title in report.markdown()
    assert "nats per token" in result.err and str(output) in "".join(result.err.split())  # the card folds long lines

    again = cli(*command, "--json")
    assert again.code == 2 and "not empty" in again.err
    again = cli(*command, "--force", "--parts", "nll", "--quiet")
    assert again.code == 0 and again.err == "" and again.out == (output / "report.md").read_text()


def test_the_verb_measures_an_artifact_as_its_checkpoint(cli: Cli, liger: Path, artifact: Path, text: Path) -> None:
    rows = []
    for model in (liger, artifact):
        result = cli("eval", model, "--text", text, *SMALL, "--json", "-q")
        assert result.code == 0, result.err
        rows.append(json.loads(result.out)["rows"]["model"])
    for measure, columns in rows[0].items():
        for column, estimate in columns.items():
            assert rows[1][measure][column]["mean"] == pytest.approx(estimate["mean"], abs=1e-3), (measure, column)


def test_the_seed_decides(artifact: Path, text: Path) -> None:
    tables = [
        lx.evaluate(artifact, text=[text], parts=["recall"], length=64, trials=2, seed=seed).rows for seed in (0, 0, 1)
    ]
    assert tables[0] == tables[1] != tables[2]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        ((), "no text for nll, recall", "--text"),
        (("--text", "/absent"), "no file or directory /absent", "--text"),
        (("--parts", "nll,recal", "--text", "x"), "unknown part 'recal'", "did you mean recall or reading?"),
        (("--controls", "windw", "--text", "x"), "unknown control 'windw'", "did you mean window or equal-window?"),
        (("--parts", "nll,,recall"), "an empty name", "NAME,NAME"),
        (("--parts", "agreement", "--text", "x"), "agreement needs a teacher", "--against"),
    ],
)
def test_bad_inputs(cli: Cli, liger: Path, arguments: tuple[str, ...], message: str, hint: str) -> None:
    result = cli("eval", liger, *arguments)
    assert result.code == 2 and message in result.err and hint in result.err


def test_short_text_and_dry_run(cli: Cli, liger: Path, text: Path, tmp_path: Path) -> None:
    result = cli("eval", liger, "--text", text)
    assert result.code == 2 and "one window has 8,192" in result.err and "--length" in result.err
    output = tmp_path / "report"
    result = cli("eval", "no-such-model", "--text", text, "-o", output, "--dry-run", "--json", *SMALL)
    told = json.loads(result.out)
    assert result.code == 0 and told["text_files"] == 2 and told["rows"] == ["model"] and not output.exists()
    assert told["tokens_each"] == 2 * 128 + 2 * 128 * 5


def test_plots_where_matplotlib_is_there(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    bins = {"0-64": Estimate(3.0, 0.1, 4), "64-128": Estimate(2.5, None, 1), "mean": Estimate(2.7, 0.1, 4)}
    shares = {"128": Estimate(1.0, 0.0, 4), "512": Estimate(0.4, 0.2, 4)}
    rows = {"teacher": {"nll": bins}, "model": {"nll": bins, "once": shares, "copy": shares}}
    output = Report({"length": 128}, rows).save(tmp_path / "report")
    for name in ("nll", "recall"):
        assert "<svg" in (output / f"{name}.svg").read_text()
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_tasks_without_lm_eval(liger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingDependency, match="lm-eval") as caught:
        lx.evaluate(liger, tasks=["piqa"])
    assert caught.value.extra == "eval"
