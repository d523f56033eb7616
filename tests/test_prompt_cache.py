"""Prompt caches: restored tokens are not read again, and the text is the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.errors import LigerError, UsageError
from ligerexport.exporters.onnx.session import OnnxSession
from ligerexport.run.generate import Conversation, generate
from ligerexport.run.prompt_cache import WORTH, PromptCache

IDS = np.random.default_rng(6).integers(0, toy.VOCAB, 120).tolist()
SYSTEM, QUESTIONS = IDS[:70], (IDS[70:90], IDS[90:97], IDS[97:120])


class Counting(OnnxSession):
    """A session that counts the tokens of prompts."""

    fed = 0

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Any = None) -> np.ndarray:
        self.fed += np.size(ids)
        return super().prefill(ids, padding)


def write(artifact: Path, ids: Sequence[int], cache: Path | None = None) -> tuple[list[int], int, int]:
    """Return the tokens written after a prompt, and the numbers of restored and of read prompt tokens."""
    session = Counting(open_artifact(artifact))
    chunks = list(generate(session, ids, max_new_tokens=12, prompt_cache=cache))
    summary = chunks[-1].summary
    assert summary is not None and summary.prompt_tokens == len(ids)
    return [chunk.token for chunk in chunks], summary.cached_tokens, session.fed


def test_the_same_prompt_is_read_once(built: tuple[Path, Path], tmp_path: Path) -> None:
    expected, _, fed = write(built[1], IDS)
    assert fed == 120
    assert write(built[1], IDS, tmp_path / "cache") == (expected, 0, 120)
    assert write(built[1], IDS, tmp_path / "cache") == (expected, 119, 1)
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_what_a_killed_run_left_goes_when_the_file_is_read(built: tuple[Path, Path], tmp_path: Path) -> None:
    write(built[1], IDS, tmp_path / "cache")
    (tmp_path / ".cache.123.partial").mkdir()  # killed after its file got its name
    write(built[1], IDS, tmp_path / "cache")
    assert [file.name for file in tmp_path.iterdir()] == ["cache"]


def test_what_prompts_share_is_found_and_kept(built: tuple[Path, Path], tmp_path: Path) -> None:
    restored = []
    for question in (*QUESTIONS, QUESTIONS[0]):
        prompt = SYSTEM + question
        tokens, cached, fed = write(built[1], prompt, tmp_path / "cache")
        assert tokens == write(built[1], prompt)[0] and cached + fed == len(prompt)
        restored.append(cached)
    assert restored == [0, 0, 70, 70]


def test_a_prompt_of_another_kind_takes_the_file(built: tuple[Path, Path], tmp_path: Path) -> None:
    other = IDS[::-1][:50]
    for prompt, cached in ((IDS, 0), (other, 0), (other, 49), (other[:40], 0), (other, 39)):
        assert write(built[1], prompt, tmp_path / "cache")[1:] == (cached, len(prompt) - cached)


def test_a_short_prompt_makes_no_file(built: tuple[Path, Path], tmp_path: Path) -> None:
    write(built[1], IDS[:WORTH], tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    write(built[1], IDS[: WORTH + 1], tmp_path / "cache")
    assert list(tmp_path.iterdir())


def test_the_file_of_another_model_is_made_again(built: tuple[Path, Path], tmp_path: Path) -> None:
    write(toy.build(tmp_path / "toy"), IDS, tmp_path / "cache")
    cache, session = PromptCache(tmp_path / "cache"), lx.load(built[1])
    tokens = [chunk.token for chunk in generate(session, IDS, max_new_tokens=12, prompt_cache=cache)]
    assert (cache.restored, cache.keep, cache.note) == (0, 119, "made again: it was for another model")
    assert tokens == write(built[1], IDS)[0]
    assert write(built[1], IDS, tmp_path / "cache") == (tokens, 119, 1)


def test_a_file_that_is_something_else_is_left_alone(built: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "letter").write_text("dear reader")
    session = lx.load(built[1])
    session.prefill(IDS)
    session.snapshot().save(tmp_path / "chat")
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name, message in (("letter", "cannot read a state"), ("chat", "not a prompt"), ("no/file", "no directory")):
        with pytest.raises(LigerError, match=message):
            write(built[1], IDS, tmp_path / name)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_only_a_fresh_prompt_has_a_beginning(built: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fresh=False"):
        generate(lx.load(built[1]), IDS, fresh=False, prompt_cache=tmp_path / "cache")


def test_a_conversation_begins_with_it(tmp_path: Path) -> None:
    artifact = toy.build(tmp_path / "toy")

    def talk(cache: PromptCache | None) -> list[list[int]]:
        chat = Conversation(lx.load(artifact), system="Be kind. " * 9, max_new_tokens=5, prompt_cache=cache)
        return [[chunk.token for chunk in chat.say(text)] for text in ("hello", "and then?")]

    expected, cache = talk(None), PromptCache(tmp_path / "cache")
    for restored in (False, True, True):
        assert talk(cache) == expected
        assert bool(cache.restored) is restored
