"""Errors in the form of OpenAI's API: what every endpoint answers to a request that it refuses.

Messages quote at most a few characters of a request, and never a header, so they may be logged.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from ligerexport.console import warn
from ligerexport.errors import LigerError, UsageError, one_line
from ligerexport.serve.request import Draining, QueueFull

JSON_TYPES = {dict: "an object", list: "an array", str: "a string", bool: "a boolean", int: "an integer",
              float: "a decimal", type(None): "null"}  # fmt: skip
EXPECTED = {"string": "a string", "int": "an integer", "float": "a decimal", "bool": "a boolean", "list": "an array",
            "model": "an object", "dict": "an object"}  # fmt: skip
"""Types of pydantic's errors (`string_type` and the like) in OpenAI's words."""


class ApiError(HTTPException):
    """A refusal with a status of HTTP.

    Args:
        status: Status code.
        message: What was found and what was expected.
        param: Field of the request that it is about.
        code: OpenAI's name for this error.
        kind: OpenAI's class of errors.
        headers: Headers of the response.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None,
        kind: str = "invalid_request_error", headers: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(status, message, dict(headers or {}))
        self.param, self.code, self.kind = param, code, kind

    def body(self) -> dict[str, Any]:
        """Return the content of the response."""
        return {"error": {"message": self.detail, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """Return the response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def explain(error: Exception) -> ApiError:
    """Return the refusal that an exception becomes."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            wait = max(1, round(error.retry_after))
            return ApiError(429, f"The queue is full. Try again in {wait} s.", code="rate_limit_exceeded",
                            kind="requests", headers={"Retry-After": str(wait)})  # fmt: skip
        case Draining():
            return ApiError(503, "The server is shutting down.", code="service_unavailable", kind="server_error",
                            headers={"Retry-After": "5"})  # fmt: skip
        case UsageError():
            return ApiError(400, error.message, code="invalid_value")
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException():
            return _of_http(error)
    warn(f"a request failed: {error.message if isinstance(error, LigerError) else type(error).__name__}")
    return ApiError(500, "The server had an error while processing your request.", code="server_error",
                    kind="server_error")  # fmt: skip


def _of_http(error: HTTPException) -> ApiError:
    if error.status_code == 400:  # the only one that FastAPI raises by itself
        return ApiError(400, "We could not parse the JSON body of your request.")
    if error.status_code == 404:
        return ApiError(404, "Invalid URL", code="unknown_url")
    return ApiError(error.status_code, str(error.detail), code="method_not_supported", headers=error.headers)


def _invalid(errors: Sequence[Any]) -> ApiError:
    """Return a refusal for what pydantic found. A union reports each of its types: the deepest one came closest."""
    found = max(errors, key=lambda error: len(error["loc"]))
    kind, limits, value = found["type"], found.get("ctx", {}), found.get("input")
    param = _path(found["loc"]) or None
    if kind == "value_error":
        return ApiError(400, f"{found['msg']}.", param=param, code="invalid_value")
    if kind == "json_invalid" or param is None:
        return ApiError(400, "We could not parse the JSON body of your request. The API expects a JSON object with the "
                        "header 'Content-Type: application/json'.")  # fmt: skip
    bound = next((limits[name] for name in ("ge", "gt", "le", "lt") if name in limits), None)
    number = "decimal" if isinstance(bound, float) else "integer"
    shown = one_line(repr(value)[:60])
    if kind == "missing":
        said, code = f"Missing required parameter: '{param}'.", "missing_required_parameter"
    elif kind == "extra_forbidden":
        said, code = f"Unknown parameter: '{param}'.", "unknown_parameter"
    elif kind.removesuffix("_type") in EXPECTED:
        got = JSON_TYPES.get(type(value), "something else")
        said = f"Invalid type for '{param}': expected {EXPECTED[kind.removesuffix('_type')]}, but got {got} instead."
        code = "invalid_type"
    elif kind in ("greater_than_equal", "greater_than"):
        limit = f"{'>=' if 'ge' in limits else '>'} {bound:g}"
        said = f"Invalid '{param}': {number} below minimum value. Expected a value {limit}, but got {shown} instead."
        code = f"{number}_below_min_value"
    elif kind in ("less_than_equal", "less_than"):
        limit = f"{'<=' if 'le' in limits else '<'} {bound:g}"
        said = f"Invalid '{param}': {number} above maximum value. Expected a value {limit}, but got {shown} instead."
        code = f"{number}_above_max_value"
    elif kind == "too_short":
        said, code = f"Invalid '{param}': empty array. Expected an array with at least one element.", "empty_array"
    elif kind == "literal_error":
        said, code = f"Invalid value: {shown}. Supported values are: {limits['expected']}.", "invalid_value"
    else:
        said, code = f"Invalid '{param}': {one_line(found['msg'])}.", "invalid_value"
    return ApiError(400, said, param=param, code=code)


def _path(place: Sequence[str | int]) -> str:
    """Return a place in the body as `messages[0].content`, without the names of a union's types."""
    path = ""
    for part in place[1:]:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part.islower() and part.isidentifier() and part not in ("str", "int", "float", "bool"):
            path += f".{part}" if path else part
        elif not path:  # an unknown field with any name
            path = one_line(part[:60])
    return path


def install(app: FastAPI) -> None:
    """Make an application answer every exception in this form."""

    async def answer(request: Request, error: Exception) -> JSONResponse:
        return explain(error).response()

    for kind in (HTTPException, RequestValidationError, LigerError, QueueFull, Draining, Exception):
        app.add_exception_handler(kind, answer)
