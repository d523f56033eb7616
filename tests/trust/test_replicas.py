"""The server on Ray: where requests go, and a sample of `tests/trust/replicas.py`.

`make clients` runs this file in an environment that has Ray, and without the fixtures of `conftest.py`.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import toy

from ligerexport.errors import UsageError

pytestmark = pytest.mark.clients

HERE = Path(__file__).parent


def test_a_chat_stays_with_its_replica_until_others_have_much_less_to_do() -> None:
    from ligerexport.serve.ray import PrefixRouter

    lengths = {"a": 0, "b": 0}
    router: Any = PrefixRouter.__new__(PrefixRouter)
    router.initialize_state(slack=2)
    router._replica_queue_len_cache = lengths
    replicas = [SimpleNamespace(replica_id=name) for name in lengths]

    def asked(*digests: str) -> Any:
        return SimpleNamespace(args=[SimpleNamespace(beginnings=digests)], routing_context=SimpleNamespace())

    def ranks(*digests: str, of: Sequence[Any] = replicas) -> list[list[str]]:
        chosen = asyncio.run(router.choose_replicas(list(of), asked(*digests)))
        return [[replica.replica_id for replica in rank] for rank in chosen]

    assert ranks("1") == [["a", "b"]]
    router.on_request_routed(asked("1"), "b", None)
    router.on_request_routed(asked("1", "2"), "a", None)
    assert ranks("1", "2", "3") == [["a"], ["a", "b"]]
    assert ranks("x", "2", "y") == [["a"], ["a", "b"]] and ranks("x") == ranks() == [["a", "b"]]
    lengths["a"] = 3
    assert ranks("1", "2") == [["a", "b"]]
    lengths["b"] = 1
    assert ranks("1", "2") == [["a"], ["a", "b"]]
    assert ranks("1", "2", of=replicas[1:]) == [["b"]]  # the other one has died


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"replicas": "2", "max_replicas": "1"}, "max_replicas 1 is less"), ({"replica": "2"}, "replica: "),
     ({"memory": "much"}, "memory: "), ({"replicas": "0"}, "replicas: ")],
    ids=str,
)  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, str], said: str) -> None:
    from ligerexport.serve.ray import app

    with pytest.raises(UsageError, match=said):
        app({"artifact": "x"} | wrong)


def test_killed_replicas_cost_no_answer(tmp_path: Path) -> None:
    artifact, output = toy.build(tmp_path / "toy"), tmp_path / "result.json"
    line = [sys.executable, HERE / "replicas.py", artifact, "-o", output, "--chats", "4", "--turns", "4"]
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1])}
    done = subprocess.run([*map(str, line)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(output.read_text())
    assert found["killed"] == 2 and found["answers"] == 16 and found["different"] == 0
