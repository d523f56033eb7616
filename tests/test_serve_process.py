"""`ligerexport serve` as a process of its own: signals, memory, and what it writes."""

from __future__ import annotations

import http.client
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from serving import Process

from ligerexport.cli import main

TOKENS = 1500
"""Number of tokens in an answer that is not yet complete when its first tokens have come."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """Start servers of the toy, which end with the test."""
    started: list[Process] = []
    artifact = toy.build(tmp_path / "toy")

    def run(*words: object) -> Process:
        started.append(Process(artifact, *words, log=tmp_path / f"log{len(started)}"))
        return started[-1]

    yield run
    for server in started:
        server.process.kill()
        server.process.wait()


def test_sigterm_finishes_the_answers_that_were_begun(start: Callable[..., Process], tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("very-secret\n")
    server = start("--api-key-file", tmp_path / "keys", "--state-dir", tmp_path / "states")
    body = {"model": "toy", "prompt": "Once", "max_tokens": TOKENS, "temperature": 0, "stream": True,
            "logit_bias": {str(toy.EOS): -100}, "stream_options": {"include_usage": True}}  # fmt: skip
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    headers = {"Content-Type": "application/json", "Authorization": "Bearer very-secret"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    lines = [response.readline()]
    server.process.send_signal(signal.SIGTERM)
    lines += response.readlines()
    assert server.process.wait() == 0
    assert lines[-2] == b"data: [DONE]\n"
    assert json.loads(lines[-4].removeprefix(b"data: "))["usage"]["completion_tokens"] == TOKENS
    with pytest.raises(ConnectionRefusedError):
        server.ask("/health")
    said = server.log.read_text()
    assert "warning" not in said and "secret" not in said and "Traceback" not in said


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_malformed_requests_leave_nothing_behind(start: Callable[..., Process]) -> None:
    server = start()
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    good: dict[str, Any] = {"model": "toy", "prompt": "a", "max_tokens": 1}
    bad = [b"{", b"\xff" * 50, b"[" * 5000, b"[]", b'"' + b"x" * 5000, b"{}", *(
        json.dumps(good | change).encode()
        for change in ({"model": "x"}, {"n": -1}, {"prompt": []}, {"stop": 5}, {"x" * 500: 1}, {"logit_bias": {"q": 1}})
    )]  # fmt: skip

    def send(count: int) -> None:
        for number in range(count):
            connection.request("POST", "/v1/completions", bad[number % len(bad)], {"Content-Type": "application/json"})
            response = connection.getresponse()
            assert response.status in (400, 404) and b'"error"' in response.read()

    send(100)
    before = server.memory()
    send(300)
    assert server.memory() - before < 2 << 20
    assert server.ask("/v1/completions", good)[0] == 200
    assert server.stop() == 0 and "Traceback" not in server.log.read_text()


def test_what_cannot_be_served_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    artifact = toy.build(tmp_path / "toy")
    (tmp_path / "empty").write_text("# none\n")
    (tmp_path / "utf16").write_text("secret\n", encoding="utf-16")
    for words, code, said in (
        ([tmp_path / "nothing"], 1, "nothing"),
        ([artifact, f"toy={artifact}"], 2, "two artifacts are named toy"),
        ([artifact, "--memory", "much"], 2, "'much' is no size"),
        ([artifact, "--host", "192.0.2.1"], 2, "cannot serve on 192.0.2.1"),
        ([artifact, "--api-key-file", tmp_path / "empty"], 2, "has no API key"),
        ([artifact, "--api-key-file", tmp_path / "utf16"], 2, "is not UTF-8"),
        ([artifact, "--max-batch", 0], 2, "--max-batch"),
        ([artifact, "--deadline", "nan"], 2, "--deadline"),
        ([artifact, "--stall", "0ms"], 2, "--stall '0ms'"),
        ([artifact, "--stall", "fast"], 2, "--stall 'fast'"),
        ([artifact, "--drain", "inf"], 2, "--drain"),
        ([f"..={artifact}"], 2, "no name"),
        ([artifact, "--lora", "law"], 2, "names no adapter of a model"),
        ([artifact, f"other={artifact}", "--lora", "law=law"], 2, "MODEL:NAME=ADAPTER with a model of toy, other"),
        ([artifact, "--lora", "law=a", "--lora", "toy:law=b"], 2, "two models are named toy:law"),
        ([artifact, "--lora", "law=law"], 2, "takes no adapters"),
        ([artifact, "--port", 99_999], 2, "--port 99999 is out of range"),
    ):
        with pytest.raises(SystemExit) as done:
            main(["serve", "--port", "0", *map(str, words)])
        assert done.value.code == code and said in capsys.readouterr().err
