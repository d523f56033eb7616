"""Clients of `serve` that others wrote: LangChain, a chat program for the terminal, and a load generator.

`make clients` runs this file in an environment that has them, and without the fixtures of `conftest.py`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import toy
from serving import Address, serving

pytestmark = pytest.mark.clients

LOCUST = """
from itertools import count

from locust import HttpUser, task
from locust.exception import StopUser

FINISHED = count(1)

class Chats(HttpUser):
    def on_start(self):
        self.said = []

    @task
    def turn(self):
        self.said.append({"role": "user", "content": "hello"})
        body = {"model": "toy", "messages": self.said, "max_tokens": 8, "temperature": 0}
        with self.client.post("/v1/chat/completions", json=body, catch_response=True) as response:
            answer = response.json()["choices"][0]["message"]
            self.said.append({"role": "assistant", "content": answer["content"]})
        if len(self.said) == 12:
            if next(FINISHED) == 8:
                self.environment.runner.quit()
            raise StopUser
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with serving(toy.build(tmp_path_factory.mktemp("clients") / "toy")) as found:
        yield found


def answered(server: Address, text: str, **more: object) -> str:
    body = {"model": "toy", "messages": [{"role": "user", "content": text}], "temperature": 0, "max_tokens": 12}
    content: str = server.ask("/v1/chat/completions", body | more)[1]["choices"][0]["message"]["content"]
    return content


def test_langchain(server: Address) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(model="toy", base_url=f"{server.url}/v1", api_key="any", temperature=0, max_tokens=12)
    expected = answered(server, "hello")
    assert chat.invoke("hello").content == expected != ""
    assert "".join(chunk.content for chunk in chat.stream("hello")) == expected
    assert [x.content for x in chat.batch(["hello", "no"])] == [expected, answered(server, "no")]
    schema = {"title": "person", "type": "object", "properties": {"age": {"type": "integer", "maximum": 9}},
              "required": ["age"], "additionalProperties": False}  # fmt: skip
    found = chat.with_structured_output(schema, method="json_schema", strict=True).invoke("hello")
    assert found.keys() == {"age"} and isinstance(found["age"], int)


def test_llm(server: Address, tmp_path: Path) -> None:
    """Simon Willison's `llm`, which reads other servers from a file."""
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: local\n  model_name: toy\n  api_base: {server.url}/v1\n  api_key_name: none\n"
    )
    program = Path(sys.executable).parent / "llm"
    line = [program, "-m", "local", "-o", "temperature", "0", "-o", "max_tokens", "12", "--key", "any", "hello"]
    done = subprocess.run(line, env=os.environ | {"LLM_USER_PATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == answered(server, "hello").strip(), done.stderr


def test_locust(server: Address, tmp_path: Path) -> None:
    """Eight users, each of which holds a chat of six turns."""
    (tmp_path / "locustfile.py").write_text(LOCUST)
    line = [sys.executable, "-m", "locust", "--headless", "--host", server.url, "-u", "8", "-r", "8", "-t", "5m",
            "--json"]  # fmt: skip
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)
    assert found["num_requests"] == 8 * 6 and found["num_failures"] == 0
    assert server.engine.stats()["cached"] > 0
