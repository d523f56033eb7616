"""The apps of examples/ continue what any runtime of the same model has read, and refuse what they cannot continue."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from test_examples import (  # noqa: F401
    EXAMPLES,
    PROMPT,
    TOKENS,
    App,
    app,
    browser,
    expected,
    needs_packages,
    options,
)

import ligerexport as lx
from ligerexport.exporters.targets import STATES
from ligerexport.text.tokenizer import TextModel
from tests.checkpoints import FORESIGHT, make_checkpoint
from tests.toy import EOS, VOCAB, build, tokenizer

pytestmark = pytest.mark.system


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A checkpoint, artifacts of it with each type of the state, and one whose state grows."""
    root = tmp_path_factory.mktemp("states")
    checkpoint = make_checkpoint(root / "checkpoint", FORESIGHT, vocab_size=VOCAB, eos_token_id=EOS)
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    made = {"toy": build(root / "toy"), "checkpoint": checkpoint, "ort": lx.build(checkpoint, root / "ort")}
    for state in STATES:
        lowering = "native" if state == "fp32" else "portable"
        made[state] = lx.build(checkpoint, root / state, lowering=lowering, state=state)
    return made


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        ("checkpoint", "ort"),
        ("fp32", "ort"),
        ("int8", "ort"),
        ("int8", "int8"),
        ("fp16", "fp16"),
        ("toy", "toy"),
    ],
)
def test_every_app_continues_a_state(
    app: App, states: dict[str, Path], tmp_path: Path, writer: str, reader: str
) -> None:
    """What torch and other artifacts have read: slots in any order, in the same type or one that is widened."""
    session = lx.load(states[writer])
    session.prefill(TextModel(states["toy"]).encode(PROMPT))
    for token in range(60, 90):
        session.step(token)
    session.snapshot().save(tmp_path / "state")
    found = app(states[reader], "and more", TOKENS, tmp_path / "state")
    assert found == expected(states[reader], "and more", TOKENS, tmp_path / "state")
    assert found != expected(states[reader], "and more", TOKENS)


@pytest.mark.parametrize("program", ["cpp", "node"])
def test_an_app_refuses_a_state(
    program: str, request: pytest.FixtureRequest, states: dict[str, Path], tmp_path: Path
) -> None:
    session, state = lx.load(states["ort"]), tmp_path / "state"
    session.step(5)
    session.snapshot().save(state)
    whole = state.read_bytes()
    if program == "node":
        needs_packages("node")
    command = ["node", EXAMPLES / "node" / "run.mjs"] if program == "node" else [request.getfixturevalue("liger_run")]
    for artifact, content, message in (
        ("toy", whole, "this state belongs to another model"),
        ("int8", whole, "this state has no past.0.slot_key that fits this artifact"),
        ("ort", whole[:-1] + bytes([whole[-1] ^ 1]), "this state was changed after it was written"),
        ("ort", whole[:-1], "this file is not a saved state"),
        ("ort", whole.replace(b'snapshot":"2"', b'snapshot":"3"'), "a saved state of format 2 was expected"),
        ("ort", b"text", "this file is not a saved state"),
    ):
        state.write_bytes(content)
        done = subprocess.run([*command, states[artifact], *options("a", 2, state)], capture_output=True, text=True)
        assert done.returncode and message in done.stderr, message
