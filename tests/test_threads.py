"""The number of threads: the physical cores or --threads, and never more cores than the process has."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

from ligerexport import threads
from ligerexport.cli import main
from ligerexport.errors import LigerError, UsageError
from ligerexport.threads import default_threads, use_threads
from tests.checkpoints import MEMORY, make_checkpoint

FRESH = """
import json, os, sys
from ligerexport.threads import default_threads, use_threads
with use_threads({count}):
    assert "torch" not in sys.modules
    import torch
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "RAYON_NUM_THREADS")
    print(json.dumps([torch.get_num_threads(), default_threads(), *map(os.environ.get, names)]))
assert "RAYON_NUM_THREADS" not in os.environ
"""


def fresh(count: int | None, **environment: str) -> list[Any]:
    """Return the thread counts of a process that chooses its threads before it imports torch."""
    names = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "RAYON_NUM_THREADS", "LOCAL_WORLD_SIZE")
    plain = {name: value for name, value in os.environ.items() if name not in names}
    done = subprocess.run([sys.executable, "-c", FRESH.format(count=count)], env=plain | environment,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found: list[Any] = json.loads(done.stdout)
    return found


def test_a_fresh_process_takes_the_cores_and_lets_its_threads_sleep() -> None:
    cores = default_threads()
    assert fresh(None) == [cores, cores, "passive", "2000", str(cores)]
    assert fresh(None, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="active")[:3] == [1, 1, "active"]
    assert fresh(1, OMP_NUM_THREADS="2", LOCAL_WORLD_SIZE="64")[:2] == [1, 1]


def test_a_process_with_torch_gets_its_threads_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before, environment = torch.get_num_threads(), dict(os.environ)
    with use_threads(before + 2):
        assert torch.get_num_threads() == default_threads() == before + 2
        with use_threads(1):
            assert torch.get_num_threads() == default_threads() == 1
        assert torch.get_num_threads() == before + 2
    assert torch.get_num_threads() == before and dict(os.environ) == environment
    monkeypatch.setattr(threads.os, "sched_getaffinity", lambda pid: set(range(64)), raising=False)
    with use_threads(None):  # torch was given fewer
        assert torch.get_num_threads() == before
    with pytest.raises(UsageError, match="0 threads"), use_threads(0):
        pass


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny checkpoint and text."""
    path = tmp_path_factory.mktemp("threads")
    make_checkpoint(path / "liger", MEMORY, vocab_size=toy.VOCAB, num_hidden_layers=2)
    toy.tokenizer().save(str(path / "liger" / "tokenizer.json"))
    (path / "prose.txt").write_text("some words to read " * 400)
    return {"liger": path / "liger", "text": path / "prose.txt"}


VERBS = {
    "convert": ("ligerexport.checkpoint.convert", "ConvertPlan.run", "{liger}"),
    "recover": ("ligerexport.train.recover", "RecoverPlan.run", "{liger} --data {text} --steps 1 --length 32"),
    "allocate": (
        "ligerexport.train.allocate",
        "AllocatePlan.run",
        "{liger} --data {text} --text {text} --length 48 --windows 1 --distance 40",
    ),
    "eval": ("ligerexport.measure.evaluate.evaluate", "EvaluatePlan.run", "{liger} --text {text}"),
    "build": ("ligerexport.exporters.build", "BuildPlan.run", "{liger}"),
}
"""Module and function in which a verb computes, and the verb's arguments."""


@pytest.mark.parametrize("count", [None, 3])
@pytest.mark.parametrize("verb", list(VERBS))
def test_every_verb_that_computes_has_threads(
    places: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    verb: str, count: int | None,
) -> None:  # fmt: skip
    module, function, words = VERBS[verb]
    seen: list[int] = []

    def compute(*args: Any, **options: Any) -> None:
        seen.extend((torch.get_num_threads(), default_threads()))
        raise LigerError("this is as far as it goes")

    before, handler = torch.get_num_threads(), signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(f"{module}.{function}", compute)
    option = [] if count is None else ["--threads", str(count)]
    with pytest.raises(SystemExit):
        main([verb, *words.format(**places).split(), "-o", str(tmp_path / "out"), *option])
    signal.signal(signal.SIGTERM, handler)
    assert "as far as it goes" in capfd.readouterr().err
    assert seen == [count or min(before, default_threads())] * 2 and torch.get_num_threads() == before


def test_warnings_of_libraries_are_for_those_who_ask() -> None:
    code = """
import os, warnings
from ligerexport.cli.options import verb
@verb(computes=True)
def heard(threads=None):
    warnings.warn("said to developers", FutureWarning)
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "error"
heard(threads=None)
"""
    for options, heard in (([], False), (["-W", "default"], True)):
        done = subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True)
        assert (done.returncode, "developers" in done.stderr) == (0, heard), done.stderr
