"""The command: verbs, exit codes, content of stdout and stderr, typos, Ctrl-C."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import toy
from google.protobuf.message import EncodeError

from ligerexport.artifact.artifact import ArtifactWriter
from ligerexport.cli import main
from ligerexport.model.config import PRESETS
from ligerexport.model.gates import GATES
from ligerexport.model.scores import SCORES
from ligerexport.run import runtime


class Result(NamedTuple):
    code: int
    out: str
    err: str


Cli = Callable[..., Result]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact without an end-of-text token."""
    path = tmp_path_factory.mktemp("toy") / "endless"
    with ArtifactWriter(path) as writer:
        toy.write_files(writer.directory)
        (writer.directory / "generation_config.json").write_text('{"eos_token_id": []}')
        writer.commit(toy.manifest())
    return path


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Iterator[Cli]:
    """Run the command in this process."""

    def call(*arguments: object) -> Result:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert isinstance(caught.value.code, int)
        return Result(caught.value.code, captured.out, captured.err)

    before = signal.getsignal(signal.SIGTERM)
    yield call
    signal.signal(signal.SIGTERM, before)


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "ligerexport", *map(str, arguments)]


def test_help_loads_what_writes_it_and_nothing_else() -> None:
    code = (
        "import sys; before = set(sys.modules); from ligerexport.cli import main\n"
        "try: main(['--help'])\n"
        "finally: print(*{name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.splitlines()[-1].split())
    assert loaded <= {"ligerexport", "typer", "click", "rich", "shellingham", "pygments", "markdown_it", "mdurl",
                      "typing_extensions", "annotated_doc", "filelock", "safetensors"}  # fmt: skip
    for verb in ("convert", "allocate", "recover", "eval", "build", "run", "chat", "bench", "demo", "inspect", "doctor",
                 "list", "serve"):  # fmt: skip
        assert f"\n  {verb} " in done.stdout


def test_running_loads_neither_torch_nor_what_only_sampling_needs(artifact: Path) -> None:
    code = (
        "import sys; import ligerexport as lx\n"
        f"list(lx.generate(lx.load({str(artifact)!r}), 'hi', max_new_tokens=2))\n"
        "print(*{'torch', 'transformers', 'numpy.random'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "\n", done.stderr


def test_no_arguments_is_help_and_version_is_data(cli: Cli) -> None:
    assert cli() == cli("--help")
    assert cli("--version").out.startswith("ligerexport 0")


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["rnu", "x"], 2, "unknown command 'rnu'", "run"),
        (["run", "x", "y", "--tmperature", "1"], 2, "unknown option '--tmperature'", "--temperature"),
        (["run", "x", "--item"], 2, "unknown option '--item'", "A prompt that begins with a dash goes after --"),
        (["run"], 2, "Missing argument", "ligerexport run --help"),
        (["run", "smollm2-13m", "hi"], 1, "built-in model 'smollm2-13m'", "did you mean smollm2-135m?"),
        (["serve", "/absent"], 1, "built-in model '/absent'", "owner/name for a model of the hub"),
        (["list", "gate"], 2, "unknown table 'gate'", "gates"),
        (["convert", "m", "-o", "o", "--preset", "memorry"], 2, "unknown preset 'memorry'", "did you mean memory?"),
        (["convert", "m", "-o", "o", "--gate", "hgrn"], 2, "unknown gate 'hgrn'", "did you mean hgrn2?"),
        (["convert", "m", "-o", "o", "--slots", "peek_use=3"], 2, "unknown score 'peek_use'", "did you mean peak_use"),
        (["convert", "m", "-o", "o", "--slots", "peak_use"], 2, "--slots peak_use", "peak_use=32"),
        (["convert", "m", "-o", "o", "--keep-softmax", "a"], 2, "--keep-softmax a", "8,16"),
        (["convert", "m", "-o", "o", "--layer-memory", "7"], 2, "--layer-memory 7", "window=240"),
        (["convert", "m", "-o", "o", "--layer-memory", "7:use=2"], 2, "--layer-memory 7:use=2", "window=240"),
        (["convert", "m", "-o", "o", "--window", "0"], 2, "window 0", "at least 1"),
        (["convert", "smolm2-135m", "-o", "o", "--dry-run"], 1, "model 'smolm2-135m'", "did you mean smollm2-135m?"),
        (["convert", "m"], 2, "Missing option", "ligerexport convert --help"),
        (["build", "--target", "onxn"], 2, "onxn", "onnx"),
        (["build", "/absent"], 1, "/absent", "config.json"),
    ],
)
def test_mistakes_get_one_line_and_a_hint(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, error: str, hint: str
) -> None:
    monkeypatch.chdir(tmp_path)
    result = cli(*arguments)
    lines = [line for line in result.err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert (result.code, result.out, len(lines)) == (code, "", 2), result
    assert error in lines[0] and hint in lines[1]
    assert "Traceback" not in result.err and not any(tmp_path.iterdir())


def test_commands_to_paste_quote_their_paths() -> None:
    command = re.compile(r"(?:ligerexport [a-z]+|liger-run|cp -rL|git -C|--memory) \{(?!quoted\()[^}]*\}")
    root = Path(__file__).parents[1]
    files = list((root / "ligerexport").rglob("*.py"))
    assert [found for file in files for found in command.findall(file.read_text())] == []


def test_debug_shows_the_traceback() -> None:
    done = subprocess.run(command("run", "/absent", "hi", "--debug"), capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" in done.stderr and "SourceError" in done.stderr


def test_run_streams_text_to_stdout_and_talks_on_stderr(cli: Cli, artifact: Path) -> None:
    result = cli("run", artifact, "hello", "-n", 6)
    told = json.loads(cli("run", artifact, "hello", "-n", 6, "--json").out)
    assert result.code == 0 and result.out == told["text"] + "\n"
    for word in ("tokens per second", "first token", "state", "KV cache larger", "ligerexport chat"):
        assert word in result.err
    assert (told["prompt_tokens"], told["new_tokens"], told["finish"]) == (6, 6, "length")
    assert told["state_bytes"] == 48 + 32 * 11


def test_quiet_says_nothing_but_errors(cli: Cli, artifact: Path) -> None:
    assert cli("run", artifact, "hi", "-n", 2, "--quiet", "--verbose").err == ""
    assert cli("run", artifact, "hi", "-n", 0, "--quiet").err.startswith("error: max_new_tokens 0")


def test_settings_are_told_where_they_are_asked_for(cli: Cli, artifact: Path) -> None:
    assert "max_new_tokens" not in cli("run", artifact, "hi", "-n", 2).err
    assert "run: " in (told := cli("run", artifact, "hi", "-n", 2, "--verbose").err) and "max_new_tokens=2" in told


def test_sampling_flags_reach_the_sampler(cli: Cli, artifact: Path) -> None:
    def text(*flags: object) -> str:
        return json.loads(cli("run", artifact, "hi", "-n", 20, "-t", 50, "--json", *flags).out)["text"]

    assert text("--seed", 1) == text("--seed", 1) != text("--seed", 2)
    assert text("--seed", 1, "--top-k", 1) == text("--seed", 2, "--top-p", 0.0001)


def test_a_long_prompt_from_a_pipe(artifact: Path) -> None:
    arguments = command("run", artifact, "-", "-n", 1, "--json")
    done = subprocess.run(arguments, input="x" * 20_000, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["prompt_tokens"] == 20_001
    assert "reading the prompt" in done.stderr


@pytest.mark.parametrize(
    ("words", "prepack"),
    [(("run", "a"), False), (("run", "a" * 8193), True), (("chat",), True)],
    ids=["short", "long", "chat"],
)
def test_a_short_answer_does_not_wait_for_the_fastest_order(
    cli: Cli, artifact: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], prepack: bool
) -> None:
    """Copying weights takes a large share of loading time, and saves little time per token."""
    loaded = []

    def load(*arguments: Any, **options: Any) -> runtime.Session:
        loaded.append(runtime_load(*arguments, **options))
        return loaded[-1]

    runtime_load = runtime.load
    monkeypatch.setattr(runtime, "load", load)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    verb, *prompt = words
    assert cli(verb, artifact, *prompt, "-n", 1).code == 0
    options = loaded[0]._session.get_session_options()
    assert options.get_session_config_entry("session.disable_prepacking") == str(int(not prepack))


def test_prompt_cache(cli: Cli, artifact: Path, tmp_path: Path) -> None:
    prompt, file = "x" * 60, tmp_path / "cache"
    first, second, plain = (
        cli("run", artifact, prompt, "-n", 4, "--json", *options) for options in (*[["--prompt-cache", file]] * 2, [])
    )
    assert "made, 60 tokens" in first.err and "used, 60 tokens" in second.err
    results = [json.loads(result.out) for result in (first, second, plain)]
    assert [result["cached_tokens"] for result in results] == [0, 60, 0]
    assert results[0]["text"] == results[1]["text"] == results[2]["text"]
    done = subprocess.run(
        command("chat", artifact, "-n", 4, "--system", prompt, "--prompt-cache", tmp_path / "chat"),
        input="hi\n", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "prompt cache" in done.stderr and (tmp_path / "chat").is_file()


def test_chat_from_a_pipe(artifact: Path, tmp_path: Path) -> None:
    lines = [
        "first",
        "/save ~/kept",
        "second",
        "/reset",
        "/load kept",
        "second",
        "/sve x",
        "/load absent",
        "/exit",
        "no",
    ]
    arguments = command("chat", artifact, "-n", 6, "-t", 0, "--json")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "HOME": str(tmp_path)}
    done = subprocess.run(
        arguments, input="\n".join(lines), capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    turns = json.loads(done.stdout.splitlines()[-1])["turns"]
    assert done.returncode == 0
    assert [turn["user"] for turn in turns] == ["first", "second", "second"]
    assert turns[1] == turns[2] and turns[0]["answer"] != turns[1]["answer"]
    assert "unknown command '/sve'" in done.stderr and "did you mean /save?" in done.stderr
    assert "cannot read a state from absent" in done.stderr


def test_chat_without_a_template_says_so(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "plain") as writer:
        toy.write_files(writer.directory)
        (writer.directory / "tokenizer_config.json").write_text("{}")
        writer.commit(toy.manifest())
    done = subprocess.run(command("chat", tmp_path / "plain"), input="hi\n", capture_output=True, text=True)
    assert done.returncode == 2 and "no chat template" in done.stderr and "ligerexport run" in done.stderr


def test_ctrl_c_while_running_is_130(endless: Path) -> None:
    with subprocess.Popen(
        command("run", endless, "hi", "-n", 10_000_000, "-t", 1), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == 130
    assert b"stopped" in err and b"Traceback" not in err


def sleeps(pid: int) -> bool:
    """Return whether a process waits for something, such as a key."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_ctrl_c_in_a_chat_stops_the_answer_only(endless: Path) -> None:
    master, slave = pty.openpty()
    arguments = command("chat", endless, "-n", 10_000_000, "-t", 1)
    with subprocess.Popen(arguments, stdin=slave, stdout=slave, stderr=slave, start_new_session=True) as process:
        os.close(slave)
        seen = b""

        def read() -> None:
            nonlocal seen
            seen += os.read(master, 65536)

        def expect(word: bytes) -> None:
            nonlocal seen
            while word not in seen:
                read()
            seen = seen.partition(word)[2]

        expect(b"> ")
        for question in (b"one", b"two"):
            os.write(master, question + b"\n")
            expect(question)
            expect(b"\n")
            while len(seen) < 200:
                read()
            process.send_signal(signal.SIGINT)
            expect(b"[stopped")
            expect(b"> ")
        while not sleeps(process.pid):  # between prompt and wait, Python's readline sees a signal at the next key only
            pass
        process.send_signal(signal.SIGINT)
        expect(b"again leaves")
        os.write(master, b"/exit\n")
        expect(b"2 turns")
        assert process.wait() == 0
    os.close(master)


def test_ctrl_c_and_sigterm_while_building_leave_nothing(tmp_path: Path) -> None:
    code = (
        f"import sys, time; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import toy; from ligerexport.cli.app import app, main\n"
        "from ligerexport.artifact.artifact import ArtifactWriter\n"
        "@app.command('write')\n"
        "def write() -> None:\n"
        f"    with ArtifactWriter({str(tmp_path / 'artifact')!r}) as writer:\n"
        "        toy.write_files(writer.directory); print('half', flush=True); time.sleep(3600)\n"
        "main(['write'])\n"
    )
    for number, expected in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stdout.readline() == b"half\n"
            process.send_signal(number)
            assert process.wait() == expected
        assert list(tmp_path.iterdir()) == []


def test_a_reader_that_leaves_early(endless: Path) -> None:
    shell = f"{' '.join(command('run', endless, 'hi', '-n', 100000, '-t', 1))} | head -c 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True)
    assert b"Traceback" not in done.stderr and len(done.stdout) == 1


def test_output_on_a_full_disk() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(command("list", "presets"), stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: reading or writing failed: No space left on device\n"


def _raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory", "file"),
        OSError("codec configuration error when writing image file"),
        EncodeError("Failed to serialize proto"),
        _raised_from(RuntimeError("serialize"), MemoryError()),
    ],
)
def test_memory_that_ran_out(cli: Cli, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*talk: bool) -> None:
        raise error

    monkeypatch.setattr("ligerexport.cli.options.begin", fail)
    code, _, err = cli("doctor")
    assert code == 1 and err.startswith("error: memory ran out\nhint: ")


def test_inspect_tells_what_an_artifact_is(cli: Cli, artifact: Path) -> None:
    told = json.loads(cli("inspect", artifact, "--json").out)
    assert told["kind"] == "artifact" and told["verification"] == {"passed": True}
    assert told["state"][0] == {"name": "recurrent_state", "shape": [8], "dtype": "float32", "layers": 1, "bytes": 32}
    text = cli("inspect", artifact).out
    assert text.startswith(f'supported; next: ligerexport run {artifact} "What is gravity?" --chat\n')
    for word in ("recurrent_state", "slot_position", "grows", "ort lowering", "passed=True", "gate=gla"):
        assert word in text
    assert max(map(len, text.splitlines())) > 100  # no line is wrapped in a pipe


def test_inspect_notices_damage(cli: Cli, tmp_path: Path) -> None:
    path = toy.build(tmp_path / "artifact")
    (path / "config.json").write_text("{}")
    result = cli("inspect", path)
    assert result.code == 1 and "config.json has 2 bytes" in result.err


def test_doctor(cli: Cli) -> None:
    result = cli("doctor", "--json")
    told = json.loads(result.out)
    names = {check["name"] for check in told["checks"]}
    assert {"python", "cores", "memory", "cache", "model smollm2-135m"} <= names
    assert result.code == (0 if told["ok"] else 4)
    assert all(check["mend"] for check in told["checks"] if not check["ok"])
    assert "python" in cli("doctor").out


@pytest.mark.parametrize(("table", "rows"), [("gates", GATES), ("presets", PRESETS), ("scores", SCORES)])
def test_list_shows_every_row(cli: Cli, table: str, rows: dict[str, object]) -> None:
    assert list(json.loads(cli("list", table, "--json").out)) == list(rows)
    assert all(name in cli("list", table).out for name in rows)
    assert list(json.loads(cli("list", "--json").out)[table]) == list(rows) and table in cli("list").out
