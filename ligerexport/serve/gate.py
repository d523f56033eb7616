"""What happens to a request before an endpoint sees it: keys, names of hosts, sizes of bodies, headers, counts.

It reads the headers first, so a request without a valid key is refused before its body is read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders

from ligerexport.serve.errors import ApiError
from ligerexport.serve.keys import read_keys

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/health", "/ready", "/openapi.json")
"""Paths that need no key."""


def too_long(most: int) -> ApiError:
    """Return the refusal of a body of more than `most` bytes."""
    return ApiError(413, f"The request is too long. The largest body has {most} bytes.", code="request_too_large")


class Keys:
    """The keys that clients may use. Only their hashes are kept.

    Args:
        file: See `read_keys`, also for errors.
    """

    def __init__(self, file: Path) -> None:
        self._owners = {self.digest(key) for key in read_keys(file)}

    @staticmethod
    def digest(key: str) -> str:
        """Return the name under which the states of a key are kept."""
        return hashlib.sha256(key.encode()).hexdigest()[:32]

    def owner(self, authorization: str | None) -> str:
        """Return whose request it is.

        Args:
            authorization: The header of this name.

        Raises:
            ApiError: There is no key, or a wrong one.
        """
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(401, "You didn't provide an API key. You need to provide your API key in an Authorization "
                           "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        if (owner := self.digest(key.strip())) not in self._owners:
            raise ApiError(401, "Incorrect API key provided.", code="invalid_api_key",
                           headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        return owner


class Gate:
    """Middleware in front of the endpoints; it sets the state `owner` of a request.

    Args:
        app: The application.
        keys: The valid keys; None lets everybody in.
        hosts: Names by which the server may be addressed; None allows all. It keeps pages of other sites, whose names
            resolve to this machine, from using the server.
        most: Largest number of bytes in a body.
        count: Called with path and status of each response.
    """

    def __init__(
        self, app: Any, *, keys: Keys | None, hosts: Sequence[str] | None, most: int, count: Callable[[str, int], None]
    ) -> None:
        self._app, self._keys, self._hosts, self._most, self._count = app, keys, hosts, most, count

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)

        async def counted(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._count(getattr(scope.get("route"), "path", "other"), message["status"])
                MutableHeaders(scope=message).update(
                    {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
                )
            await send(message)

        try:
            self._check(scope, headers)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, self._limited(receive), counted)

    def _check(self, scope: Any, headers: Headers) -> None:
        host = headers.get("host", "").rpartition("]")[0].lstrip("[") or headers.get("host", "").partition(":")[0]
        if self._hosts is not None and host.lower() not in self._hosts:
            raise ApiError(403, f"This server is not {host[:60]!r}.", code="unknown_host")
        scope.setdefault("state", {})["owner"] = ""
        if self._keys is not None and scope["path"] not in OPEN:
            scope["state"]["owner"] = self._keys.owner(headers.get("authorization"))
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._most:
            raise too_long(self._most)

    def _limited(self, receive: Any) -> Any:
        """Return a function that receives a body, in pieces of unknown size, up to the limit."""
        left = self._most

        async def limited() -> Any:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise too_long(self._most)
            return message

        return limited
