"""`liger-run` and the command line with an artifact for TensorRT, on the fake runtime and on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from test_trt_session import MOST, ROOT, STATE, artifact, engines, expected, library, runner  # noqa: F401

from ligerexport.cli import main


def test_text_on_the_command_line(artifact: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with suppress(SystemExit):
        main(["run", str(artifact), "hello", "-n", "5", "--json"])
    made = json.loads(capsys.readouterr().out)
    ids = [toy.BOS, *toy.tokenizer().encode("hello", add_special_tokens=False).ids]
    assert made["prompt_tokens"] == len(ids) and 1 <= made["new_tokens"] <= 5 and made["state_bytes"] == 28


def commanded(library: Path, artifact: Path, *words: object) -> Any:
    command = [library.parent / "liger-run", artifact, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True)


def greedy(ids: Iterable[int], count: int) -> Iterator[int]:
    known = list(ids)
    for _ in range(count):
        known.append(int(expected(known)[0].argmax()))
        yield known[-1]


def test_liger_run(library: Path, artifact: Path, tmp_path: Path) -> None:
    logits, state, prompt = tmp_path / "logits", tmp_path / "state", [1, 2, 3, 250]
    words = ["--ids", ",".join(map(str, prompt)), "--tokens", 6, "--batch", 2, "--dump-logits", logits,
             "--dump-state", state, "--bench", 3, "--prefill-bench", 20]  # fmt: skip
    for graph in ([], ["--no-graph"]):
        done = commanded(library, artifact, *words, *graph)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        tokens = list(greedy(prompt, 6))
        assert report["generated"]["tokens"] == [[x, x] for x in tokens] and report["device_bytes"] == 4096
        assert report["step_no_graph"]["median_ms"] == 0.5 and ("step" in report) == (not graph)
        wanted = [expected(prompt + tokens[:i])[0] for i in range(7)]
        found = np.fromfile(logits, np.float32).reshape(7, 2, -1)
        np.testing.assert_array_equal(found, np.repeat(np.stack(wanted)[:, None], 2, 1))
        last = [np.stack([x, x]).tobytes() for x in expected(prompt + tokens)[1].values()]
        assert state.read_bytes() == b"".join(last)
        assert [x["name"] for x in report["state"]] == [x.present for x in STATE]
    (tmp_path / "ids").write_text("1,2,3,250")
    forced = ["--ids", f"@{tmp_path / 'ids'}", "--tokens", 3, "--follow", "7,8", "--batch", 2, "--sequences", 1]
    done = commanded(library, artifact, *forced, "--profile", 4, "--dump-logits", logits)
    report = json.loads(done.stdout)
    assert report["generated"]["tokens"] == [[x] for x in greedy(prompt, 3)] and report["layers"] == {
        "LigerMixer": 0.25
    }
    wanted = [expected(prompt + [7, 8][:i])[0] for i in range(3)]
    np.testing.assert_array_equal(np.fromfile(logits, np.float32).reshape(3, -1), np.stack(wanted))
    assert commanded(library, artifact).returncode == 2
    done = commanded(library, artifact, "--build")
    assert done.returncode == 0 and json.loads(done.stdout)["batch"] == 1 and len(engines(artifact)) == 2
    done = commanded(library, artifact, "--ids", "1", "--batch", MOST + 1)
    assert done.returncode == 1 and "hint: this artifact has kernels for 1 to 4" in done.stderr


def test_what_runs_on_a_gpu(artifact: Path, library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The script that compares real engines with torch, with right and wrong outputs of the fake's model."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    script: Any = import_module("trt_session")
    prompt, count, every = script.PROMPT, script.STEPS, script.EVERY
    ids = np.random.default_rng(2).integers(0, toy.VOCAB, prompt + count)
    steps = [expected(ids[: prompt + i])[0] for i in range(every, count + 1, every)]
    rows = [expected(script.sequence(ids, row))[0] for row in range(len(script.ROWS))]
    states = {f"{when}.{name}": x[None] for when, part in (("read", ids[:prompt]), ("end", ids))
              for name, x in expected(part)[1].items()}  # fmt: skip
    whole: dict[str, Any] = {"ids": ids, "prompt": expected(ids[:prompt])[0], "steps": steps, "rows": rows} | states
    command = [sys.executable, "benchmarks/trt_session.py", "run", artifact, "--runner", library,
               "--libraries", library.parent, "--expected", tmp_path / "expected.npz"]  # fmt: skip

    def run(**changes: Any) -> tuple[int, dict[str, Any]]:
        np.savez(tmp_path / "expected.npz", **(whole | changes))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(map(str, command), cwd=ROOT, capture_output=True, text=True, env=environment)
        assert done.stdout, done.stderr
        return done.returncode, json.loads(done.stdout.splitlines()[-1])

    code, report = run()
    assert code == 0 and report["fine"], report
    assert report["torch"]["largest_divergence"] == 0 and report["torch"]["state_at_the_end"]["slots_alike"] == 1
    key = "end.past.0.recurrent_state"
    for part, changes in (("torch", {key: whole[key] * 1.1}), ("rows", {"rows": rows[::-1]})):
        code, report = run(**changes)
        assert code == 1 and not report[part]["fine"], report
