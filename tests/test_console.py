"""The output of the commands: data on stdout, messages on stderr, errors with a hint."""

from __future__ import annotations

import json
import queue
import re

import pytest

from ligerexport import console, errors


def test_talk_goes_to_stderr_and_can_be_silenced(capsys: pytest.CaptureFixture[str]) -> None:
    console.say("said [bold]as is[/bold]")
    console.warn("careful")
    console.set_quiet()
    console.say("not this")
    with console.progress("nor this", 10) as advance:
        advance(10)
    console.data("data")
    captured = capsys.readouterr()
    assert captured.err == "said [bold]as is[/bold]\nwarning: careful\n"
    assert captured.out == "data\n"


def test_long_lines_are_not_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    console.data("[x] " * 100)
    console.data_json({"long": "y" * 300})
    console.card("done", [("where", "here")], next_command="ligerexport " + "z" * 300)
    captured = capsys.readouterr()
    first, rest = captured.out.split("\n", 1)
    assert first == "[x] " * 100
    assert json.loads(rest) == {"long": "y" * 300}
    assert captured.err.splitlines()[-1] == "  next   ligerexport " + "z" * 300


def test_errors_are_printed_even_when_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    console.set_quiet()
    console.print_error(errors.UsageError("unknown gate 'gal'", hint=errors.close_matches("gal", ["gla", "hgrn2"])))
    console.print_error(errors.LigerError("no hint", hint=""))
    assert capsys.readouterr().err == "error: unknown gate 'gal'\nhint: did you mean gla?\nerror: no hint\n"
    assert console.err.quiet


def test_progress_off_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.progress("fetching", 2_000_000) as advance:
        advance(1_500_000)
        advance(500_000)
    assert capsys.readouterr().err.startswith("fetching: 2 MB in 0.")
    lines = queue.SimpleQueue[str]()
    monkeypatch.setattr(console, "say", lines.put)
    monkeypatch.setattr(console, "_FIRST", 0.0)
    monkeypatch.setattr(console, "_EVERY", 0.01)
    with console.progress("reading", 4, "steps") as advance:
        assert lines.get().startswith("reading: at work for ")
        advance(1)
        assert any(lines.get().startswith("reading: 25% after ") for _ in range(1000))
    ended = [lines.get() for _ in range(lines.qsize())]
    assert re.fullmatch(r"reading: \d+\.\d s", ended[-1])


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (999_600, "1 MB"), (538_090_408, "538 MB"),
     (1.5e9, "1.5 GB"), (2e12, "2,000 GB")],
)  # fmt: skip
def test_format_bytes(count: float, text: str) -> None:
    assert console.format_bytes(count) == text


@pytest.mark.parametrize(
    ("name", "choices", "hint"),
    [
        ("GLA", ["gla", "hgrn2"], "did you mean gla?"),
        ("xyz", ["b", "a"], "choose from a, b"),
        ("xyz", [], "there is nothing to choose from"),
    ],
)
def test_close_matches(name: str, choices: list[str], hint: str) -> None:
    assert errors.close_matches(name, choices) == hint


def test_exit_codes() -> None:
    assert errors.LigerError("").exit_code == errors.SourceError("").exit_code == 1
    assert errors.UsageError("").exit_code == 2
    assert errors.VerificationError("").exit_code == 3
    assert errors.MissingDependency("gguf", extra="builtin").exit_code == 4
