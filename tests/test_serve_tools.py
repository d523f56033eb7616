"""Structured answers and tools of `serve`. The model has random weights: only the constraint makes answers valid."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from serving import Address, serving
from test_grammar import SCHEMAS

from ligerexport.text.calls import HERMES, LLAMA, Arguments, Call, CallReader, Form, Part, form_of

openai = pytest.importorskip("openai")
jsonschema_rs = pytest.importorskip("jsonschema_rs")
pytest.importorskip("llguidance")

HERMES_TEMPLATE = (
    "{% if tools %}Tools:{% for tool in tools %}\n{{ tool | tojson }}{% endfor %}\n"
    'Answer with <tool_call>\n{"name": <name>, "arguments": <arguments>}\n</tool_call>\n{% endif %}'
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}</s>\n{% endfor %}"
)
LLAMA_TEMPLATE = (
    "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Respond as {"name": function, "parameters": dictionary}\n{% endif %}'
    "{% for message in messages %}{{ 'ipython' if message['role'] == 'tool' else message['role'] }}: "
    "{{ message['content'] }}</s>\n{% endfor %}"
)
WEATHER = {"type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"$ref": "#/$defs/days"}},
           "required": ["city", "days"], "additionalProperties": False,
           "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 7}}}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "description": "</s> says it", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now"}},
]
HELLO = [{"role": "user", "content": "hello"}]
ASK: dict[str, Any] = {"model": "toy", "messages": HELLO, "max_tokens": 1500, "temperature": 1, "seed": 3}
SCHEMA = SCHEMAS["nested"]


@pytest.fixture(scope="module", params=[HERMES_TEMPLATE, LLAMA_TEMPLATE, toy.TEMPLATE], ids=["hermes", "llama", "none"])
def server(
    request: pytest.FixtureRequest, built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Address]:
    place = tmp_path_factory.mktemp("tools") / "toy"
    shutil.copytree(built[1], place)
    (place / "chat_template.jinja").write_text(request.param)
    with serving(place, longest=1500) as found:
        yield found


@pytest.fixture
def client(server: Address) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def streamed(client: Any, asked: dict[str, Any]) -> tuple[str, list[tuple[str, str]], str | None]:
    """Return the text, the calls and the reason of a stream."""
    text, calls, reason = "", list[list[str]](), None
    for chunk in client.chat.completions.create(**asked, stream=True):
        choice = chunk.choices[0]
        text, reason = text + (choice.delta.content or ""), choice.finish_reason or reason
        for call in choice.delta.tool_calls or ():
            if call.id:
                assert (call.index, call.type, call.function.arguments) == (len(calls), "function", "")
                calls.append([call.function.name, ""])
            else:
                assert call.index == len(calls) - 1 and len(call.function.arguments) < 20
                calls[-1][1] += call.function.arguments
    return text, [(name, arguments) for name, arguments in calls], reason


recurrent = pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])
plain = pytest.mark.parametrize("server", [toy.TEMPLATE], indirect=True, ids=["none"])
hermes = pytest.mark.parametrize("server", [HERMES_TEMPLATE], indirect=True, ids=["hermes"])
both = pytest.mark.parametrize("server", [HERMES_TEMPLATE, LLAMA_TEMPLATE], indirect=True, ids=["hermes", "llama"])


@recurrent
@plain
def test_formats(client: Any) -> None:
    formats = [{"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}
               for schema in (SCHEMA, SCHEMAS["choice"], SCHEMAS["tuple"])]  # fmt: skip
    for form in formats:
        found = client.chat.completions.create(**ASK, response_format=form, n=2)
        text, _, reason = streamed(client, ASK | {"response_format": form})
        for written in (text, *(choice.message.content for choice in found.choices)):
            assert jsonschema_rs.is_valid(form["json_schema"]["schema"], json.loads(written))
        assert text == found.choices[0].message.content and reason == found.choices[0].finish_reason == "stop"
    asked = ASK | {"extra_body": {"response_format": {"type": "regex", "pattern": "[xy]{4}"}}}
    assert re.fullmatch("[xy]{4}", streamed(client, asked)[0])
    asked["extra_body"]["response_format"] = {"type": "grammar", "grammar": 'root ::= "a" [0-9]'}
    assert re.fullmatch("a[0-9]", streamed(client, asked)[0])
    started = client.chat.completions.create(**ASK | {"max_tokens": 1}, response_format={"type": "json_object"})
    assert started.choices[0].message.content == "{"


@recurrent
@plain
def test_responses(client: Any) -> None:
    form = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
    whole = client.responses.create(model="toy", input="hello", temperature=1, text=form)
    assert whole.status == "completed" and jsonschema_rs.is_valid(SCHEMA, json.loads(whole.output_text))


@recurrent
@both
@pytest.mark.parametrize(
    ("choice", "names"),
    [("required", {"weather", "now"}), ({"type": "function", "function": {"name": "weather"}}, {"weather"})],
    ids=["required", "named"],
)
def test_forced_calls_fit_their_schemas(client: Any, choice: Any, names: set[str]) -> None:
    for seed in (0, 2):
        asked = ASK | {"tools": TOOLS, "tool_choice": choice, "seed": seed, "parallel_tool_calls": False}
        written = []
        for found in client.chat.completions.create(**asked, n=2).choices:  # with this seed and the next one
            (call,) = found.message.tool_calls
            assert found.message.content is None and found.finish_reason == "tool_calls"
            assert call.function.name in names
            schema = WEATHER if call.function.name == "weather" else {"maxProperties": 0}
            assert jsonschema_rs.is_valid(schema, json.loads(call.function.arguments))
            written.append((call.function.name, call.function.arguments))
        assert streamed(client, asked) == ("", written[:1], "tool_calls")


@recurrent
@hermes
def test_answers_may_be_text_or_a_format_beside_tools(client: Any, server: Address) -> None:
    asked = ASK | {"tools": TOOLS, "max_tokens": 20}
    free = client.chat.completions.create(**asked).choices[0]
    assert free.message.tool_calls is None and streamed(client, asked)[0] == free.message.content
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for seed in range(3):
        asked = ASK | {"tools": TOOLS, "response_format": form, "seed": seed}
        text, calls, _ = streamed(client, asked)
        assert calls or jsonschema_rs.is_valid(SCHEMA, json.loads(text))
    called = {"id": "1", "type": "function", "function": {"name": "now", "arguments": "{}"}}
    said = [*HELLO, {"role": "assistant", "content": None, "tool_calls": [called]},
            {"role": "tool", "tool_call_id": "1", "content": "noon"}]  # fmt: skip
    called = {"function": {"name": "now", "arguments": {}}}
    turns = [*HELLO, {"role": "assistant", "content": "", "tool_calls": [called]}, {"role": "tool", "content": "noon"}]
    for more, tools in (({"tools": TOOLS, "tool_choice": "none"}, None), ({"tools": TOOLS}, TOOLS)):
        found = client.chat.completions.create(**ASK | {"messages": said, "max_tokens": 1} | more)
        assert found.usage.prompt_tokens == len(server.engine.text.encode_chat(turns, tools=tools))


CHANGES: list[tuple[dict[str, Any], str, str | None]] = [
    ({"response_format": {"type": "xml"}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema"}}, "missing_required_parameter", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "txt"}}}},
     "invalid_value", "response_format"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": 3}}}, "invalid_value",
     "response_format"),
    ({"response_format": {"type": "regex", "pattern": "("}}, "invalid_value", "response_format"),
    ({"response_format": {"type": "regex", "pattern": "a"}, "tools": TOOLS}, "invalid_value", "response_format"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "invalid_value", "tools[0].function.name"),
    ({"tools": [{"type": "web"}]}, "invalid_value", "tools[0].type"),
    ({"tools": [{"type": "function", "function": {"name": "a", "description": "\ud800"}}]}, "invalid_value",
     "tools[0].function.description"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"title": "\ud800"}}}]}, "invalid_value",
     None),
    ({"tools": [TOOLS[0], TOOLS[0]]}, "invalid_value", "tools"),
    ({"tools": TOOLS, "tool_choice": "always"}, "invalid_value", "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "rain"}}}, "invalid_value",
     "tool_choice"),
    ({"tool_choice": "auto"}, "invalid_value", "tool_choice"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "txt"}}}],
      "tool_choice": "required"}, "invalid_value", "tools"),
    ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "a", "arguments": "["}}]}]},
     "invalid_value", "messages[0].tool_calls"),
]  # fmt: skip


@recurrent
@hermes
@pytest.mark.parametrize(("change", "code", "param"), CHANGES, ids=lambda value: str(value)[:60])
def test_bad_requests(server: Address, change: dict[str, Any], code: str, param: str | None) -> None:
    status, content, _ = server.ask("/v1/chat/completions", ASK | change)
    assert (status, content["error"]["code"], content["error"]["param"]) == (400, code, param)
    assert content["error"]["message"]


@recurrent
@plain
def test_a_template_without_tools_is_named(server: Address) -> None:
    status, content, _ = server.ask("/v1/chat/completions", ASK | {"tools": TOOLS})
    assert (status, content["error"]["code"], content["error"]["param"]) == (400, "unsupported_parameter", "tools")


ONE = '{"name": "f", "arguments": {"a": "</tool_call>"}}'
WRITTEN: list[tuple[Form, str, list[Part]]] = [
    (HERMES, f"<tool_call>\n{ONE}\n</tool_call>", [Call("f", '{"a": "</tool_call>"}')]),
    (HERMES, f"So:\n<tool_call>{ONE}</tool_call>\n<tool_call>\n{{\"name\": \"g\"}}\n</tool_call>\n",
     ["So:", Call("f", '{"a": "</tool_call>"}'), Call("g", "{}")]),
    (HERMES, '<tool_call>\n{"arguments": {}, "name": "f"}\n</tool_call>', [Call("f", "{}")]),
    (HERMES, f"<tool_call>{ONE[:-9]}", [Call("f", '{"a": "</tool')]),
    (HERMES, '<tool_call>\n{"name": "f", "arguments": {"a": [{"b}\n</tool_call>\n' + f"<tool_call>{ONE}</tool_call>",
     [Call("f", '{"a": [{"b}\n'), Call("f", '{"a": "</tool_call>"}')]),
    (HERMES, f"<tool_call>\n{ONE}", [Call("f", '{"a": "</tool_call>"}')]),
    (HERMES, '<tool_call>\n{"name": "other"}\n</tool_call>', ['<tool_call>\n{"name": "other"}\n</tool_call>']),
    (HERMES, "<tool_call>\n{\n</tool_call> no", ["<tool_call>\n{\n</tool_call> no"]),
    (HERMES, "a < b <tool_ \n", ["a < b <tool_ \n"]),
    (LLAMA, ' {"name": "f", "parameters": {"é": 1}} ', [Call("f", '{"é": 1}')]),
    (LLAMA, '{"name": "f", "parameters": 3}', ['{"name": "f", "parameters": 3}']),
    (LLAMA, '{"name": "f", "parameters": {"a": "\\\\\\"}"}} and more', [Call("f", '{"a": "\\\\\\"}"}')]),
    (LLAMA, 'Use {"name": "f", "parameters": {}}', ['Use {"name": "f", "parameters": {}}']),
]  # fmt: skip


@pytest.mark.parametrize(("form", "text", "expected"), WRITTEN, ids=lambda value: str(value)[:30])
@given(data=st.data())
def test_calls_are_found_however_a_text_is_cut(
    form: Form, text: str, expected: list[Part], data: st.DataObject
) -> None:
    cuts = sorted({0, len(text), *data.draw(st.lists(st.integers(0, len(text)), max_size=9))})
    reader, found = CallReader(form, {"f", "g"}), list[Part]()
    for start, end in pairwise(cuts):
        found += reader.push(text[start:end])
    joined = list[Part]()
    for part in [*found, *reader.flush()]:
        if isinstance(part, Arguments):
            begun = joined[-1]
            assert isinstance(begun, Call)
            joined[-1] = Call(begun.name, begun.arguments + part.text)
        elif isinstance(part, str) and joined and isinstance(joined[-1], str):
            joined[-1] += part
        else:
            joined.append(part)
    assert joined == expected


def test_forms_are_known_by_their_templates() -> None:
    assert form_of(HERMES_TEMPLATE) is HERMES and form_of(LLAMA_TEMPLATE) is LLAMA
    assert form_of(toy.TEMPLATE) is None and form_of("{{ tools }}<tool_call><function=x>") is None
