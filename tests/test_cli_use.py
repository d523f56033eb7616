"""The inputs of `run` and `chat`: prompts of any kind, pipes of any encoding, pasted lines, sampling settings."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy

import ligerexport as lx
from ligerexport.artifact.artifact import ArtifactWriter
from ligerexport.cli import main
from ligerexport.errors import UsageError

RECOMMENDED = {"do_sample": True, "temperature": 40.0, "top_k": 30, "repetition_penalty": 1.5}


def build(path: Path, **generation: Any) -> Path:
    with ArtifactWriter(path) as writer:
        toy.write_files(writer.directory)
        (writer.directory / "generation_config.json").write_text(json.dumps(generation))
        writer.commit(toy.manifest())
    return path


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("toy") / "artifact", eos_token_id=[], **RECOMMENDED)


def ligerexport(*words: object, shell: str = "", **options: Any) -> subprocess.CompletedProcess[bytes]:
    """Run the command in a separate process, with redirections of the shell."""
    command = ["bash", "-c", f'exec "$@" {shell}', "bash", sys.executable, "-m", "ligerexport"]
    options = {"stdin": subprocess.DEVNULL} | options
    return subprocess.run([*command, *map(str, words)], capture_output=True, **options)


def error(done: subprocess.CompletedProcess[bytes], code: int) -> str:
    """Return the error and its hint from a command that prints nothing more."""
    said = done.stderr.decode()
    assert (done.returncode, said[:7]) == (code, "error: "), said
    assert said.count("\n") == 2 and "\nhint: " in said and "bug" not in said
    return said


@pytest.fixture
def told(capfd: pytest.CaptureFixture[str]) -> Iterator[Any]:
    """Run the command in this process; return its JSON and its messages."""

    def call(*words: object) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in words])
        found = capfd.readouterr()
        assert caught.value.code == 0, found.err
        return json.loads(found.out) if "--json" in words else found.out, found.err

    return call


def text(artifact: Path, **settings: Any) -> str:
    return "".join(chunk.text for chunk in lx.generate(lx.load(artifact), "hi", max_new_tokens=20, **settings))


def test_chat_samples_as_recommended_and_run_is_greedy(told: Any, artifact: Path) -> None:
    def run(*words: object) -> str:
        return told("run", artifact, "hi", "-n", 20, "--json", *words)[0]["text"]

    sampled = {"temperature": 40.0, "top_k": 30, "repetition_penalty": 1.5, "seed": 1}
    assert run() == text(artifact)
    assert run("--chat", "--seed", 1) == text(artifact, chat=True, **sampled) != text(artifact, chat=True)
    assert run("--chat", "--seed", 1, "--top-k", 0) == text(artifact, chat=True, **sampled | {"top_k": 0})
    assert run("--chat", "-t", 0) == text(artifact, chat=True, repetition_penalty=1.5)
    said = told("run", artifact, "hi", "--chat", "-n", 2)[1]
    assert "temperature=40" in said and "generation_config.json" in said


@pytest.mark.parametrize("built", [()], indirect=True)
def test_a_state_goes_from_torch_to_an_artifact(told: Any, built: tuple[Path, Path], tmp_path: Path) -> None:
    """What follows a prompt that torch has read is what follows it where it was read."""
    checkpoint, artifact = built
    whole = told("run", artifact, "the sea and the sky", "-n", 9, "--json")[0]
    told("run", checkpoint, "the sea", "-n", 1, "--save-state", tmp_path / "state")
    words = "run", artifact, " and the sky", "-n", 9, "--json", "--state", tmp_path / "state"
    assert told(*words, "--save-state", tmp_path / "next")[0]["text"] == whole["text"]
    assert lx.Snapshot.load(tmp_path / "next").position.tolist() == [whole["prompt_tokens"]]
    other = ligerexport("run", build(tmp_path / "other"), "hi", "--state", tmp_path / "state")
    assert "this state belongs to another model" in error(other, 2)


@pytest.mark.parametrize(
    "settings", [{"min_p": 0.5}, {"repetition_penalty": 3.0}, {"presence_penalty": 99.0}, {"frequency_penalty": 99.0}]
)
def test_options_of_sampling(told: Any, artifact: Path, settings: dict[str, float]) -> None:
    ((name, value),) = settings.items()
    options = ["-t", 20, "--seed", 3, f"--{name.replace('_', '-')}", value]
    found = told("run", artifact, "hi", "-n", 20, "--json", *options)[0]["text"]
    assert found == text(artifact, temperature=20.0, seed=3, **settings) != text(artifact, temperature=20.0, seed=3)


def test_chat_says_how_it_samples(artifact: Path) -> None:
    done = ligerexport("chat", artifact, "-n", 3, "--top-p", 0.5, stdin=None, input=b"hi\n")
    words = " ".join(done.stderr.decode().split())
    assert "temperature=40 top_k=30 top_p=0.5 repetition_penalty=1.5" in words and "your options" in words


def test_a_text_that_ends_at_once_says_so(told: Any, tmp_path: Path) -> None:
    path = build(tmp_path / "silent", eos_token_id=list(range(toy.VOCAB)))
    out, said = told("run", path, "What is the sea?")
    assert out == "\n" and "ended the text at once" in said and "--chat sends the prompt as a question" in said
    assert "--chat" not in told("run", path, "What is the sea?", "--chat")[1].partition("warning")[2]
    assert "at once" not in told("run", path, "hi", "--quiet")[1]


def test_prompts_from_files_and_pipes_and_with_dashes(told: Any, artifact: Path, tmp_path: Path) -> None:
    def ids(*words: object, **options: Any) -> int:
        done = ligerexport("run", artifact, "-n", 1, "--json", *words, **options)
        return int(json.loads(done.stdout)["prompt_tokens"])

    (tmp_path / "prompt").write_text("\ufeff" + "é" * 20_000, encoding="utf-8")
    assert ids("--file", tmp_path / "prompt") == 40_001
    assert ids("-", stdin=None, input="\ufeffé".encode()) == 3
    assert ids("--", "- item") == 7
    said = error(ligerexport("run", artifact, "- item"), 2)
    assert "ligerexport run ARTIFACT [OPTIONS] -- PROMPT" in said
    for words in ([], ["hi", "--file", tmp_path / "prompt"]):
        assert "expected one prompt" in error(ligerexport("run", artifact, *words), 2)


@pytest.mark.parametrize("words", [["caf\udce9"], ["caf\udce9", "--chat"], ["-"], ["--file", "prompt"]], ids=" ".join)
def test_a_prompt_that_is_not_utf_8(artifact: Path, tmp_path: Path, words: list[str]) -> None:
    (tmp_path / "prompt").write_bytes(b"caf\xe9")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = ligerexport("run", artifact, *words, cwd=tmp_path, env=environment, stdin=None, input=b"caf\xe9")
    assert "the prompt is not UTF-8: the byte 0xe9 comes after 3 characters" in error(done, 2)


def test_stdin_is_read_as_a_file_is(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_bytes("hé\r\nthere\r\n".encode())
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    lengths = {
        json.loads(ligerexport("run", artifact, *words, "-n", 1, "--json", stdin=prompt, env=environment).stdout)[
            "prompt_tokens"
        ]
        for words in (["-"], ["--file", "-"], ["--file", tmp_path / "prompt"])
        for prompt in [(tmp_path / "prompt").open("rb")]
    }
    assert lengths == {1 + len("hé\nthere\n".encode())}  # with BOS


def test_a_prompt_in_utf_16_and_a_stop_that_is_not_utf_8(artifact: Path) -> None:
    done = ligerexport("run", artifact, "-", stdin=None, input="hi".encode("utf-16"))
    assert "iconv -f utf-16 -t utf-8" in error(done, 2)
    assert "a stop string is not UTF-8" in error(ligerexport("run", artifact, "hi", "--stop", "\udce9"), 2)


def test_chat_goes_on_after_a_line_that_is_not_utf_8(artifact: Path) -> None:
    done = ligerexport("chat", artifact, "-n", 3, "--json", stdin=None, input=b"caf\xe9\nhi\n")
    assert done.returncode == 0 and b"error: the prompt is not UTF-8" in done.stderr
    assert [turn["user"] for turn in json.loads(done.stdout)["turns"]] == ["hi"]
    said = error(ligerexport("chat", artifact, "--system", "caf\udce9"), 2)
    assert "the system message is not UTF-8" in said


def test_halves_of_characters_in_python(artifact: Path) -> None:
    for arguments in ({"prompt": "a\ud83d"}, {"messages": [{"role": "user", "content": "a\ud83d"}]}):
        with pytest.raises(UsageError, match=r"half a character, U\+D83D, comes after 1 characters"):
            lx.generate(lx.load(artifact), **arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "shell", "code", "said"),
    [
        (["run", "ARTIFACT", "hi", "-q"], ">&-", 1, "stdout is closed"),
        (["chat", "ARTIFACT"], ">&-", 1, "stdout is closed"),
        (["list", "gates", "--json"], ">&-", 1, "stdout is closed"),
        (["list", "gates"], ">&-", 1, "stdout is closed"),
        (["run", "ARTIFACT", "-"], "<&-", 2, "stdin is closed"),
        (["chat", "ARTIFACT"], "<&-", 2, "stdin is closed"),
    ],
    ids=str,
)
def test_closed_standard_files(artifact: Path, words: list[str], shell: str, code: int, said: str) -> None:
    arguments = [str(artifact) if word == "ARTIFACT" else word for word in words]
    assert said in error(ligerexport(*arguments, shell=shell), code)


def test_a_closed_stderr_loses_talk_alone(artifact: Path) -> None:
    done = ligerexport("run", artifact, "hi", "-n", 4, "--json", shell="2>&-")
    assert done.returncode == 0 and json.loads(done.stdout)["new_tokens"] == 4
    assert ligerexport("run", "/absent", "hi", shell="2>&-").returncode == 1


@pytest.mark.parametrize("encoding", ["iso8859-1", "cp1252", "ascii"])
def test_an_stdout_without_the_characters(artifact: Path, encoding: str) -> None:
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    words = ["run", artifact, "hi", "-n", 40, "-t", 60, "--seed", 3]
    said = error(ligerexport(*words, "-q", env=environment), 1)
    assert f"stdout is in {encoding}, which does not have '\\ufffd'" in said and "PYTHONIOENCODING=utf-8" in said
    assert "\ufffd" in json.loads(ligerexport(*words, "--json", env=environment).stdout)["text"]


def test_the_c_locale_is_utf_8(artifact: Path) -> None:
    done = ligerexport("run", artifact, "hé", "-n", 40, "-t", 60, "--seed", 3, env=os.environ | {"LC_ALL": "C"})
    assert done.returncode == 0 and "\ufffd" in done.stdout.decode()


def test_several_pasted_lines_are_one_turn(artifact: Path) -> None:
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "ligerexport", "chat", artifact, "-n", "3"]
    environment = os.environ | {"TERM": "xterm"}
    with subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=environment) as process:
        os.close(slave)
        seen = b""

        def expect(word: bytes) -> None:
            nonlocal seen
            while word not in seen:
                seen += os.read(master, 65536)
            seen = seen.partition(word)[2]

        expect(b"\x1b[?2004h")
        expect(b"> ")
        os.write(master, b"\x1b[200~/one\ntwo\nthree\x1b[201~\n")
        expect(b"[length limit")
        expect(b"> ")
        os.write(master, b"/exit\n")
        expect(b"1 turn")
        assert process.wait() == 0
    os.close(master)


def test_a_home_that_cannot_be_used_names_the_variable() -> None:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("XDG_CACHE_HOME", "LIGEREXPORT_CACHE")
    }
    done = ligerexport("run", "smollm2-135m", "hi", env=environment | {"HOME": "/dev/null"})
    assert "LIGEREXPORT_CACHE" in error(done, 1)
