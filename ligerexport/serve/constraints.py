"""The one place that turns a request into a grammar of its answer: JSON schemas, other grammars, and tools."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ligerexport.errors import UsageError
from ligerexport.run.generate import check_text
from ligerexport.run.grammar import Grammar, json_rule, lark
from ligerexport.serve.answers import Served
from ligerexport.serve.errors import ApiError
from ligerexport.serve.schemas import ChatRequest, Function, ResponseRequest
from ligerexport.text.calls import CallReader, Form, form_of
from ligerexport.text.tokenizer import TextModel

NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
"""Schema of the arguments of a function that has none."""
_compiled = lru_cache(maxsize=64)(Grammar)


@dataclass(frozen=True)
class Tools:
    """The functions that an answer may call.

    Attributes:
        form: How the model writes calls.
        functions: The functions.
        forced: Those of which the answer must call one; empty if it may be a text.
        several: Whether an answer may have more than one call.
    """

    form: Form
    functions: Sequence[Function]
    forced: Sequence[Function]
    several: bool

    def shown(self) -> list[dict[str, Any]]:
        """Return the functions as chat templates take them."""
        return [{"type": "function", "function": function.model_dump(exclude={"strict"}, exclude_none=True)}
                for function in self.functions]  # fmt: skip

    def reader(self) -> CallReader:
        """Return what finds the calls of one answer."""
        return CallReader(self.form, {function.name for function in self.functions}, self.several)

    def rules(self) -> str:
        """Return the rule `calls`, and those that it needs, in the form of Lark."""
        form, functions = self.form, self.forced or self.functions
        between = f" ({json.dumps(form.between)} call)*" if form.between and self.several else ""
        lines = [f"calls: call{between}", "call: " + " | ".join(f"call_{at}" for at in range(len(functions)))]
        for at, function in enumerate(functions):
            head = json.dumps(f'{form.before}{{"name": "{function.name}", "{form.arguments}": ')
            lines.append(f"call_{at}: {head} arguments_{at} {json.dumps('}' + form.after)}")
            lines.append(f"arguments_{at}: {json_rule(function.parameters or NOTHING)}")
        return "\n".join(lines)


def tools_of(body: ChatRequest, text: TextModel) -> Tools | None:
    """Return the tools of a request; None if its answer may call none.

    Raises:
        ApiError: The choice is unknown, or the model has no tools.
    """
    choice, functions = body.tool_choice, [tool.function for tool in body.tools or ()]
    if choice is not None and not functions:
        raise _refused("'tool_choice' is only allowed when 'tools' are specified.", "tool_choice")
    if not functions or choice == "none":
        return None
    if choice not in (None, "auto", "required") and not isinstance(choice, dict):
        raise _refused(f"Invalid value: {choice!r:.60}. Supported values are: 'none', 'auto', and 'required'.",
                       "tool_choice")  # fmt: skip
    forced, several = functions if choice == "required" else [], body.parallel_tool_calls is not False
    if isinstance(choice, dict):
        named = choice.get("function")
        name = named.get("name") if choice.get("type") == "function" and isinstance(named, dict) else None
        forced, several = [function for function in functions if function.name == name], False
        if not forced:
            raise _refused(f"Tool choice {name!r:.80} is not found in 'tools'.", "tool_choice")
    if len({function.name for function in functions}) < len(functions):
        raise _refused("Two tools have the same name.", "tools")
    for function in functions:
        check_text(json.dumps(function.model_dump(), ensure_ascii=False), f"the tool {function.name}")
    form = form_of(text.chat_template or "")
    if form is None:
        raise ApiError(400, "'tools' is not supported: the chat template of this model has no tools in a known form.",
                       param="tools", code="unsupported_parameter")  # fmt: skip
    return Tools(form, functions, forced, several)


def grammar_of(body: ChatRequest | ResponseRequest, model: Served, tools: Tools | None = None) -> Grammar | None:
    """Return the grammar of an answer; None if the request has none.

    Args:
        body: The request.
        model: The model, whose tokens the grammar allows.
        tools: Result of `tools_of`.

    Raises:
        ApiError: The request asks for what is not supported, or is invalid; the error names the field.
    """
    asked: Any
    if isinstance(body, ChatRequest):
        asked, param = body.response_format or {}, "response_format"
    else:
        asked, param = (body.text or {}).get("format") or {}, "text.format"
        if body.tools and body.tool_choice != "none":
            raise ApiError(400, "'tools' is not supported by this endpoint.", param="tools",
                           code="unsupported_parameter")  # fmt: skip
    try:
        if tools and tools.forced:
            param = "tools"
            source: str | None = f"start: calls\n{tools.rules()}"
        else:
            source = _source(asked, param, tools)
        if source is None:
            return None
        return _compiled(model.text, model.engine.manifest.model.vocab_size, model.text.turn_ends, source)
    except UsageError as error:
        raise _refused(f"Invalid '{param}': {error.message}.", param) from None


def _source(asked: Any, param: str, tools: Tools | None) -> str | None:
    """Return the grammar of a format; if there are tools, an answer may be a call instead."""
    kind = asked.get("type", "text") if isinstance(asked, Mapping) else asked
    if kind == "text":
        return None
    if kind in ("json_object", "json_schema"):
        described = asked.get("json_schema", asked) if kind == "json_schema" else {"schema": {"type": "object"}}
        if not isinstance(described, Mapping) or "schema" not in described:
            raise ApiError(400, f"Missing required parameter: '{param}.schema'.", param=param,
                           code="missing_required_parameter")  # fmt: skip
        rules = f"answer: {json_rule(described['schema'])}"
        return f"start: answer | calls\n{rules}\n{tools.rules()}" if tools else f"start: answer\n{rules}"
    field = {"regex": "pattern", "grammar": "grammar"}.get(str(kind))
    if field is None:
        raise _refused(f"Invalid value: {kind!r:.60}. Supported values are: 'text', 'json_object', 'json_schema', "
                       "'regex', and 'grammar'.", param)  # fmt: skip
    if tools:
        raise _refused(f"'{param}' of the type '{kind}' cannot be combined with 'tools'.", param)
    if not isinstance(asked.get(field), str):
        raise _refused(f"Invalid '{param}': expected a string '{field}'.", param)
    return lark(**{str(kind): asked[field]})


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="invalid_value")
