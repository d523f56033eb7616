"""The apps of examples/ sample, stop, chat, cache prompts and save states as the package does, and check options."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_examples import EXAMPLES, PROMPT, TOKENS, Page, browser, expected, needs_packages, run  # noqa: F401

import ligerexport as lx
from ligerexport.model.state import FADE
from ligerexport.run.generate import Conversation
from ligerexport.run.prompt_cache import PromptCache
from ligerexport.run.sampling import Sampler
from ligerexport.text.pieces import PIECES
from ligerexport.text.tokenizer import TextModel
from tests.checkpoints import MEMORY, make_checkpoint
from tests.toy import EOS, TEMPLATE, VOCAB, tokenizer

pytestmark = pytest.mark.system

Program = Callable[..., str]
"""Function from an artifact and other arguments to what an app writes."""
SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.01, "seed": 2**40 + 7}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with sums that do not decay, and with a chat template."""
    root = tmp_path_factory.mktemp("use")
    checkpoint = make_checkpoint(root / "checkpoint", MEMORY, vocab_size=VOCAB, eos_token_id=EOS)
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(names))
    return lx.build(checkpoint, root / "artifact")


@pytest.fixture(params=["cpp", "node"])
def command(request: pytest.FixtureRequest) -> list[str | Path]:
    if request.param == "cpp":
        return [request.getfixturevalue("liger_run")]
    needs_packages("node")
    return ["node", EXAMPLES / "node" / "run.mjs"]


@pytest.fixture
def program(command: list[str | Path]) -> Program:
    return lambda *words, **options: run(*command, *words, "--tokens", str(TOKENS), errors="replace", **options)


def flags(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


def generated(artifact: Path, prompt: str = PROMPT, **settings: Any) -> list[lx.Chunk]:
    return list(lx.generate(lx.load(artifact), prompt, max_new_tokens=TOKENS, **settings))


@pytest.mark.parametrize("left_out", ["top_k", "top_p"])
def test_a_seed_gives_the_tokens_of_the_package(program: Program, artifact: Path, left_out: str) -> None:
    settings = {name: value for name, value in SAMPLING.items() if name != left_out}
    found = program(artifact, PROMPT, "--ids", *flags(settings)).split()
    assert found == [str(chunk.token) for chunk in generated(artifact, **settings)]
    assert found != [str(chunk.token) for chunk in generated(artifact)]


def test_a_text_ends_at_a_stop_string(program: Program, artifact: Path) -> None:
    text = "".join(chunk.text for chunk in generated(artifact, **SAMPLING)).encode(errors="ignore").decode()
    printable = max(text.replace("\ufffd", "\n").split("\n"), key=len)
    stop = printable[1:3]
    assert len(stop) == 2
    chunks = generated(artifact, stop=[stop, "nowhere"], **SAMPLING)
    assert chunks[-1].finish == "stop"
    done = program(artifact, PROMPT, *flags(SAMPLING), "--stop", stop, "--stop", "nowhere")
    assert done == "".join(chunk.text for chunk in chunks) + "\n"


def test_a_chat_of_several_turns(program: Program, artifact: Path) -> None:
    """Also with a token at the end of an answer that the session has not read."""
    questions = [" Who?", "And then, 'é'? ", "Why"]
    talk = Conversation(lx.load(artifact), system="Be brief.", max_new_tokens=TOKENS)
    answers = [[chunk.token for chunk in talk.say(question)] for question in questions]
    found = program(artifact, "--chat", "--system", "Be brief.", "--ids", input="\n".join(questions))
    assert [[int(word) for word in line.split()] for line in found.splitlines()] == answers
    found = program(artifact, questions[0], "--chat", "--ids")
    assert found.split() == [str(chunk.token) for chunk in generated(artifact, questions[0], chat=True)]


def test_caches_and_states_of_each_other(program: Program, artifact: Path, tmp_path: Path) -> None:
    long = PROMPT + "And a question?"
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    program(artifact, PROMPT, "--prompt-cache", theirs, "--save-state", tmp_path / "state")
    cache = PromptCache(theirs)
    tokens = [chunk.token for chunk in generated(artifact, long, prompt_cache=cache)]
    assert cache.note == "used" and tokens == expected(artifact, long, TOKENS)
    generated(artifact, PROMPT, prompt_cache=ours)
    before = ours.read_bytes()
    assert [int(word) for word in program(artifact, long, "--ids", "--prompt-cache", ours).split()] == tokens
    assert ours.read_bytes() == before  # it was read only
    program(artifact, PROMPT[: len(PROMPT) // 2] + "?", "--prompt-cache", ours)  # keeps what both share
    assert len(lx.Snapshot.load(ours).ids) == len(lx.Snapshot.load(theirs).ids) // 2 + 1
    state = lx.Snapshot.load(tmp_path / "state")
    session = lx.load(artifact)
    session.restore(state)
    chunks = lx.generate(session, " more", max_new_tokens=TOKENS, fresh=False)
    assert [chunk.token for chunk in chunks] == expected(artifact, PROMPT + " more", TOKENS)


def test_sums_are_halved(program: Program, artifact: Path, tmp_path: Path) -> None:
    session = lx.load(artifact)
    session.prefill(list(range(90)))
    start = replace(session.snapshot(), position=np.array([FADE - 3]))
    start.save(tmp_path / "start")
    program(artifact, "twelve bytes", "--state", tmp_path / "start", "--save-state", tmp_path / "end")
    session.restore(start)
    session.prefill(TextModel(artifact).encode("twelve bytes", special=False))
    found, ours = lx.Snapshot.load(tmp_path / "end"), session.snapshot()
    sums = [name for name in ours.tensors if name.endswith("judge_state")]
    assert found.position.tolist() == [FADE + 9] and sums
    for name in sums:
        np.testing.assert_allclose(found.tensors[name], ours.tensors[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["a", "--tokens", "many"], 2, "--tokens needs a whole number from 1 to 2147483647, not 'many'"),
        (["a", "--tokens", "0"], 2, "--tokens needs a whole number from 1"),
        (["a", "--top-p", "2"], 2, "--top-p needs a number from 1e-0"),
        (["a", "--temperature", ""], 2, "--temperature needs a number from 0 to"),
        (["a", "--seed", "1.5"], 2, "--seed needs a whole number from 0"),
        (["a", "--speed", "3"], 2, "--speed"),
        (["a", "--stop"], 2, "--stop"),
        ([], 2, "an artifact and one prompt were expected"),
        (["a", "b"], 2, "an artifact and one prompt were expected"),
        (["a", "--system", "b"], 2, "--system needs --chat"),
        (["a", "--state", "b", "--prompt-cache", "c"], 2, "leave out --state or --prompt-cache"),
        (["<user>", "--chat"], 1, "a message has <user>"),
        ([" ", "--chat"], 1, "a message is empty"),
        (["a", "--state", "nowhere"], 1, "nowhere"),
    ],
)
def test_wrong_options(command: list[str | Path], artifact: Path, words: list[str], code: int, message: str) -> None:
    done = subprocess.run([*command, artifact, *words], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, "")
    assert done.stderr.startswith("error: ") and message in done.stderr.replace("1e-9", "1e-09")
    assert ("usage: " in done.stderr) == (code == 2)


def test_native_without_a_library(liger_run: Path, artifact: Path, tmp_path: Path) -> None:
    """The C++ program has the operator; Node takes the second graph, and says that it cannot without one."""
    both = lx.build(artifact.parent / "checkpoint", tmp_path / "both", lowering="native,ort")
    found = run(liger_run, both, PROMPT, "--ids", "--tokens", str(TOKENS))
    assert [int(word) for word in found.split()] == expected(both, PROMPT, TOKENS)
    needs_packages("node")
    node = "node", EXAMPLES / "node" / "run.mjs"
    assert run(*node, both, PROMPT, "--ids", "--tokens", str(TOKENS)) == found
    manifest = json.loads((both / "manifest.json").read_text()) | {"fallback": None}
    (both / "manifest.json").write_text(json.dumps(manifest))
    done = subprocess.run([*node, both, "a"], capture_output=True, text=True)
    assert done.returncode == 1 and "build the artifact with --lowering native,ort" in done.stderr


def test_the_program_of_the_guide(liger_run: Path, ort_home: Path, tmp_path: Path) -> None:
    """It compiles as printed, loads int4 of the lowering native, and writes what `liger-run` writes."""
    guide = (EXAMPLES.parent / "docs" / "guides" / "apps.md").read_text().partition("### A program of your own")[2]
    blocks = dict(re.findall(r"^```(\w*)\n(.*?)^```", guide.partition("\n## ")[0], re.DOTALL | re.MULTILINE))
    (tmp_path / "app.cpp").write_text(blocks["cpp"])
    (tmp_path / "CMakeLists.txt").write_text(blocks["cmake"])
    (tmp_path / "ligerexport").symlink_to(EXAMPLES.parent)
    (tmp_path / re.search(r"-DORT_HOME=\$PWD/(\S+)", blocks[""])[1]).symlink_to(ort_home)
    sizes = {"vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "eos_token_id": None}
    checkpoint = make_checkpoint(tmp_path / "checkpoint", MEMORY, **sizes)
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    engine = lx.build(checkpoint, tmp_path / "engine", weights="int4", lowering="native")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    found = run("sh", "-ec", blocks[""], cwd=tmp_path, env=os.environ | {"PATH": path}, errors="replace")
    library = run(sys.executable, "-m", "ligerexport", "native").split()[-1]  # others round in another way
    words = engine, "Once upon a time", "--tokens", "64", "--library", library
    written = run(liger_run, *words, errors="replace")
    assert len(written) > 32 and found.endswith(f"\n{written}")


def test_an_artifact_without_pieces(command: list[str | Path], artifact: Path, tmp_path: Path) -> None:
    for file in artifact.iterdir():
        if file.name != PIECES:
            (tmp_path / file.name).symlink_to(file)
    done = subprocess.run([*command, tmp_path, "Hi", "--chat"], capture_output=True, text=True)
    assert done.returncode == 1 and "no chat.json" in done.stderr


def test_a_chat_on_the_page(browser: Any, artifact: Path, tmp_path: Path) -> None:
    """It samples with a seed, takes a second turn, and saves a state that the package continues."""
    needs_packages("web")
    page = Page(browser, artifact)
    settings = {"temperature": "0.8", "top-k": "40", "seed": "5", "system": "Be brief.", "tokens": str(TOKENS)}
    for name, value in settings.items():
        page.page.fill(f"#{name}", value)
    page.page.check("#chat")
    talk = Conversation(lx.load(artifact), Sampler(0.8, 40, seed=5), system="Be brief.",
                        max_new_tokens=TOKENS)  # fmt: skip
    for question, button in (("Who?", "#write"), ("And then?", "#next")):
        page.page.fill("#prompt", question)
        page.page.click(button)
        page.wait()
        assert page.ids() == [chunk.token for chunk in talk.say(question)]
    with page.page.expect_download() as download:
        page.page.click("#save")
    download.value.save_as(tmp_path / "state")
    found, ours = lx.Snapshot.load(tmp_path / "state"), talk.session.snapshot()
    assert found.position.tolist() == ours.position.tolist() and found.identity == ours.identity
    assert page.complaints == []
    page.server.shutdown()
