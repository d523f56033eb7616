"""A server of the toy artifact in this process, for the tests of `serve`, and plain requests to it."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from ligerexport.serve.app import Access, make_app
from ligerexport.serve.host import listen
from ligerexport.serve.models import open_models


@dataclass
class Address:
    """Where a server is, and the engine behind it."""

    port: int
    engine: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(
        self, path: str, body: Any = None, *, method: str | None = None, headers: dict[str, str] | None = None
    ) -> tuple[int, Any, dict[str, str]]:
        """Send a request; return the status, the content and the headers of the response in lower case.

        Args:
            path: Path of the endpoint.
            body: Bytes, or what becomes JSON.
            method: Default: POST with a body, otherwise GET.
            headers: Headers; by default those of JSON.
        """
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            kind = {"Content-Type": "application/json"} if content is not None else {}
            connection.request(method or ("GET" if content is None else "POST"), path, content, kind | (headers or {}))
            response = connection.getresponse()
            raw, found = response.read(), {name.lower(): value for name, value in response.getheaders()}
            return response.status, json.loads(raw) if "json" in found.get("content-type", "") else raw, found
        finally:
            connection.close()


@contextmanager
def serving(
    artifact: Path, access: Access | None = None, adapters: dict[str, Path] | None = None, **settings: Any
) -> Iterator[Address]:
    """Serve an artifact under the name `toy` from a thread."""
    options: dict[str, Any] = {"max_batch": 4, "memory": 1 << 26, "queue": 64, "state_dir": None, "device": "cpu",
                               "threads": 1, "longest": 256, "deadline": None}  # fmt: skip
    models = open_models("toy", artifact, adapters or {}, **options | settings)
    listener = listen("127.0.0.1", 0)
    app = make_app(models, access or Access(), patience=5)
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        yield Address(listener.getsockname()[1], models[0].engine)
    finally:
        server.should_exit = True
        thread.join()
