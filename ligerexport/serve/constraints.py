"""The one place that turns a request into a constraint on its tokens: JSON schemas, grammars and tools."""

from __future__ import annotations

from ligerexport.serve.errors import ApiError
from ligerexport.serve.request import Constraint
from ligerexport.serve.schemas import ChatRequest, ResponseRequest
from ligerexport.text.tokenizer import TextModel


def constraint_of(body: ChatRequest | ResponseRequest, text: TextModel) -> Constraint | None:
    """Return a new constraint for one answer; None if the request has none.

    Args:
        body: The request.
        text: The tokenizer, whose tokens the constraint allows.

    Raises:
        ApiError: The request asks for what is not supported; the error names the field.
    """
    if body.tools and body.tool_choice != "none":
        raise _unsupported("tools")
    if isinstance(body, ChatRequest):
        asked, param = body.response_format, "response_format"
    else:
        asked, param = (body.text or {}).get("format"), "text.format"
    if asked is not None and (not isinstance(asked, dict) or asked.get("type") != "text"):
        raise _unsupported(param)
    return None


def _unsupported(param: str) -> ApiError:
    return ApiError(400, f"'{param}' is not supported by this server.", param=param, code="unsupported_parameter")
