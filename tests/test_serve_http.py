"""The endpoints of `serve`, asked by OpenAI's own client and by clients that break the rules."""

from __future__ import annotations

import http.client
import io
import json
import shutil
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import Phase, given, settings
from serving import Address, serving

import ligerexport as lx
from ligerexport.cli import main
from ligerexport.run.generate import text_model
from ligerexport.serve.app import Access
from ligerexport.serve.chat import _separators, encode
from ligerexport.serve.gate import LOOPBACK, Keys
from ligerexport.serve.schemas import Message

openai = pytest.importorskip("openai")
schemathesis = pytest.importorskip("schemathesis")

HELLO = [{"role": "user", "content": "hello"}]
ASK = {"model": "toy", "messages": HELLO, "max_tokens": 4, "temperature": 0}


pytestmark = pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])


@pytest.fixture(scope="module")
def artifact(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, whose random weights make every token about as likely as the others."""
    place = tmp_path_factory.mktemp("serve") / "toy"
    shutil.copytree(built[1], place)
    (place / "chat_template.jinja").write_text(toy.TEMPLATE)
    return place


@pytest.fixture(scope="module")
def server(artifact: Path) -> Iterator[Address]:
    with serving(artifact) as found:
        yield found


@pytest.fixture(scope="module")
def client(server: Address) -> Any:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)


def written(artifact: Path, **asked: Any) -> str:
    """Return what `generate` writes."""
    return "".join(chunk.text for chunk in lx.generate(lx.load(artifact), **asked))


def logprobs(artifact: Path, ids: Sequence[int]) -> np.ndarray:
    """Return the log probabilities after each id, `[T, V]`."""
    session = lx.load(artifact)
    logits = np.stack([session.prefill([token])[0].astype(np.float64) for token in ids])
    shifted = logits - logits.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def letter(text: str) -> int:
    """Return the id of a letter, which is a token of its own."""
    return toy.tokenizer().token_to_id(text)


def begun(client: Any, asked: dict[str, Any]) -> Any:
    """Return a stream whose first token has come."""
    stream = client.chat.completions.create(**asked, stream=True)
    while not next(stream).choices[0].delta.content:
        pass
    return stream


def test_chat_writes_what_generate_writes(artifact: Path, client: Any) -> None:
    expected = written(artifact, messages=HELLO, max_new_tokens=40)
    asked = ASK | {"max_tokens": 40}
    whole = client.chat.completions.create(**asked)
    assert whole.choices[0].message.content == expected and whole.choices[0].finish_reason == "length"
    prompt = len(text_model(artifact).encode_chat(HELLO))
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt, 40)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
    assert chunks[-1].usage.total_tokens == prompt + 40 and not chunks[-1].choices
    assert chunks[-2].choices[0].finish_reason == "length" and len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("said", ["and\n", " <user> no turn </s>", "\U000f0000</s>\U000f0001", "é" * 20_000])
def test_turns_that_were_encoded_before_give_the_same_ids(artifact: Path, said: str) -> None:
    text, messages = text_model(artifact), list[Message]()
    for number in range(4):
        messages += [Message(role="user", content=f"{said}{number}"), Message(role="assistant", content=said)]
        ids, beginning = encode(text, [Message(role="system", content="Be brief."), *messages[:-1]])
        turns = [{"role": message.role, "content": message.text} for message in messages[:-1]]
        assert ids == text.encode_chat([{"role": "system", "content": "Be brief."}, *turns])
        assert beginning >= len(text.encode("Be brief.", special=False))
    assert _separators(text) == ("</s>",)


def test_several_answers_have_seeds_of_their_own(client: Any) -> None:
    asked = ASK | {"max_tokens": 12, "temperature": 2, "seed": 5}
    alone = client.chat.completions.create(**asked)
    both = client.chat.completions.create(**asked, n=2)
    texts = [choice.message.content for choice in both.choices]
    assert texts[0] == alone.choices[0].message.content and texts[0] != texts[1]
    assert both.usage.prompt_tokens == alone.usage.prompt_tokens
    streamed = ["", ""]
    for chunk in client.chat.completions.create(**asked, n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_bias_penalties_and_stops(client: Any) -> None:
    a, b = str(letter("A")), str(letter("B"))
    bias = ASK | {"max_tokens": 6, "logit_bias": {a: 100, b: 99}}
    assert client.chat.completions.create(**bias).choices[0].message.content == "AAAAAA"
    punished = client.chat.completions.create(**bias, frequency_penalty=2)
    assert punished.choices[0].message.content == "ABABAB"
    stopped = client.chat.completions.create(**bias, frequency_penalty=2, stop=["BA"])
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("A", "stop")
    streamed = client.chat.completions.create(**bias, frequency_penalty=2, stop="BA", stream=True)
    choices = [chunk.choices[0] for chunk in streamed]
    assert ("".join(x.delta.content or "" for x in choices), choices[-1].finish_reason) == ("A", "stop")


def test_logprobs_are_those_of_the_model(artifact: Path, client: Any) -> None:
    ids = text_model(artifact).encode("Once upon")
    whole = client.completions.create(
        model="toy", prompt="Once upon", max_tokens=3, temperature=0, logprobs=2, echo=True
    )
    same = client.completions.create(model="toy", prompt=ids, max_tokens=3, temperature=0, logprobs=2, echo=True)
    choice = whole.choices[0]
    assert choice.text.startswith("Once upon") and same.choices[0].logprobs == choice.logprobs
    names = [text_model(artifact).token_bytes(token).decode(errors="backslashreplace") for token in range(toy.VOCAB)]
    new = [names.index(name) for name in choice.logprobs.tokens[len(ids) :]]
    assert choice.logprobs.tokens[: len(ids)] == [names[token] for token in ids] and len(new) == 3
    rows = logprobs(artifact, [*ids, *new])
    expected = [rows[place, token] for place, token in enumerate([*ids, *new][1:])]
    assert choice.logprobs.token_logprobs[0] is None and choice.logprobs.top_logprobs[0] is None
    np.testing.assert_allclose(choice.logprobs.token_logprobs[1:], expected, atol=1e-4)
    assert all(
        next(iter(top.values())) == max(top.values()) and len(top) == 2 for top in choice.logprobs.top_logprobs[1:]
    )
    chat = client.chat.completions.create(**ASK, logprobs=True, top_logprobs=3).choices[0]
    rows = logprobs(artifact, text_model(artifact).encode_chat(HELLO))
    first = chat.logprobs.content[0]
    assert first.logprob == pytest.approx(rows[-1].max(), abs=1e-4) and len(first.top_logprobs) == 3
    assert b"".join(bytes(x.bytes) for x in chat.logprobs.content).decode(errors="replace") == chat.message.content


def test_prompts_of_every_form_are_continued(artifact: Path, client: Any) -> None:
    ids = [text_model(artifact).encode(text) for text in ("ab", "xyz")]
    texts = [written(artifact, prompt=prompt, max_new_tokens=16) for prompt in ids]
    for prompt in (["ab", "xyz"], ids):
        found = client.completions.create(model="toy", prompt=prompt, temperature=0, n=2)
        assert [choice.text for choice in found.choices] == [texts[0], texts[0], texts[1], texts[1]]
        assert found.usage.prompt_tokens == sum(map(len, ids))
    chunks = client.completions.create(model="toy", prompt="ab", temperature=0, stream=True, echo=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == "ab" + texts[0]


def test_responses_stream_every_event(client: Any) -> None:
    whole = client.responses.create(model="toy", input=HELLO, temperature=0, max_output_tokens=9)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    plain = client.chat.completions.create(**ASK | {"max_tokens": 9})
    assert whole.output_text == plain.choices[0].message.content and whole.usage.output_tokens == 9
    events = list(client.responses.create(model="toy", input="hello", temperature=0, max_output_tokens=9, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert events[0].type == "response.created" and events[-1].type == "response.incomplete"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text == events[-1].response.output_text


@pytest.mark.parametrize(
    ("change", "status", "code", "param"),
    [
        ({"model": "other"}, 404, "model_not_found", "model"),
        ({"model": None}, 400, "invalid_type", "model"),
        ({"messages": None}, 400, "invalid_type", "messages"),
        ({"messages": []}, 400, "empty_array", "messages"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "invalid_value", "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "invalid_value",
         "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", "messages[0].content"),
        ({"model": "\ud800"}, 400, "invalid_value", "model"),
        ({"stop": ["\ud800"]}, 400, "invalid_value", "stop[0]"),
        ({"metadata": {"a": "\ud800"}}, 400, "invalid_value", "metadata.a"),
        ({"\ud800": 1}, 400, None, None),
        ({"temperature": -0.1}, 400, "decimal_below_min_value", "temperature"),
        ({"temperature": 2.1}, 400, "decimal_above_max_value", "temperature"),
        ({"temperature": "hot"}, 400, "invalid_type", "temperature"),
        ({"top_p": -1}, 400, "decimal_below_min_value", "top_p"),
        ({"n": 0}, 400, "integer_below_min_value", "n"),
        ({"n": 129}, 400, "integer_above_max_value", "n"),
        ({"max_tokens": -4}, 400, "integer_below_min_value", "max_tokens"),
        ({"max_tokens": 1.5}, 400, "invalid_type", "max_tokens"),
        ({"frequency_penalty": 3}, 400, "decimal_above_max_value", "frequency_penalty"),
        ({"logit_bias": {"x": 1}}, 400, "invalid_value", "logit_bias"),
        ({"logit_bias": {"99999": 1}}, 400, "invalid_value", "logit_bias"),
        ({"top_logprobs": 3}, 400, "invalid_value", "top_logprobs"),
        ({"stop": [1]}, 400, "invalid_type", "stop[0]"),
        ({"stop": "a<user>"}, 400, "invalid_value", None),
        ({"colour": "red"}, 400, "unknown_parameter", "colour"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "unsupported_parameter", "tools"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_requests_are_refused_as_openai_does(
    server: Address, change: dict[str, Any], status: int, code: str | None, param: str | None
) -> None:
    found, content, _ = server.ask("/v1/chat/completions", ASK | change)
    assert (found, content["error"]["code"], content["error"]["param"]) == (status, code, param)
    assert content["error"]["type"] == "invalid_request_error" and content["error"]["message"]


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"\xff\xfe", b'{"model": "toy", "prompt": "\xff"}', b"[" * 100_000, b'{"model": "toy", "prompt": NaN}',
     b"7" * 10_000, b"null", b'{"prompt": "a"}', b'{"model": "toy", "prompt": []}', b'{"model": "toy", "prompt": [[]]}',
     b'{"model": "toy", "prompt": [-1]}', b'{"model": "toy", "prompt": [300]}', b'{"model": "toy", "prompt": [true]}'],
    ids=lambda body: str(body[:40]),
)  # fmt: skip
def test_bodies_that_are_no_requests(server: Address, body: bytes) -> None:
    status, content, _ = server.ask("/v1/completions", body, method="POST")
    assert status == 400 and content["error"]["type"] == "invalid_request_error"


def test_paths_methods_and_hosts(artifact: Path, server: Address) -> None:
    assert server.ask("/v1/nothing")[1]["error"]["code"] == "unknown_url"
    assert server.ask("/tokenize", {"prompt": "\ud800"})[1]["error"]["param"] == "prompt"
    status, content, headers = server.ask("/v1/models", {})
    assert (status, content["error"]["code"], headers["allow"]) == (405, "method_not_supported", "GET")
    assert server.ask("/v1/completions", b"model=toy", headers={"Content-Type": "text/plain"})[0] == 400
    assert "access-control-allow-origin" not in server.ask("/v1/models", headers={"Origin": "http://a.test"})[2]
    with serving(artifact, Access(hosts=LOOPBACK, origins=["http://a.test"], most=1000)) as guarded:
        assert guarded.ask("/health", headers={"Host": "evil.test"})[0] == 403
        allowed = guarded.ask("/v1/models", headers={"Origin": "http://a.test"})[2]
        assert allowed["access-control-allow-origin"] == "http://a.test"
        assert guarded.ask("/v1/completions", b" " * 1001)[1]["error"]["code"] == "request_too_large"
        connection = http.client.HTTPConnection("127.0.0.1", guarded.port)
        connection.request("POST", "/v1/completions", iter([b" " * 600] * 3), {"Content-Type": "application/json"})
        assert connection.getresponse().status == 413
        connection.close()


def test_keys(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "keys").write_text("# ours\n\nsecret-one\nsecret-two\n", encoding="utf-8-sig")
    body = ASK | {"pin": True}
    with serving(artifact, Access(keys=Keys(tmp_path / "keys"))) as server:
        for wrong in ({}, {"Authorization": "Bearer nothing"}, {"Authorization": "Basic secret-one"}):
            status, content, headers = server.ask("/v1/chat/completions", body, headers=wrong)
            assert status == 401 and headers["www-authenticate"] == "Bearer" and "secret" not in str(content)
        assert server.ask("/health")[0] == 200 and server.ask("/metrics")[0] == 401
        one, two = ({"Authorization": f"Bearer secret-{name}"} for name in ("one", "two"))
        assert server.ask("/v1/chat/completions", body, headers=one)[0] == 200
        assert server.ask("/v1/states", headers=one)[1]["data"] and not server.ask("/v1/states", headers=two)[1]["data"]
        state = server.ask("/v1/states", headers=one)[1]["data"][0]["id"]
        assert server.ask(f"/v1/states/{state}", method="DELETE", headers=two)[0] == 404
        monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
        with pytest.raises(SystemExit) as done:
            main(["chat", "--server", server.url, "-n", "4", "--api-key-file", str(tmp_path / "keys")])
        assert done.value.code == 0


def test_states_are_listed_pinned_named_and_deleted(server: Address) -> None:
    said = [{"role": "user", "content": "a text of its own to remember"}]
    first = server.ask("/v1/chat/completions", ASK | {"messages": said})[1]
    again = server.ask("/v1/chat/completions", ASK | {"messages": said})[1]
    assert again["choices"][0]["message"] == first["choices"][0]["message"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    rows = server.ask("/v1/states?model=toy")[1]["data"]
    state = rows[0]["id"]
    status, changed, _ = server.ask(f"/v1/states/{state}", {"pinned": True, "name": "mine"})
    assert status == 200 and (changed["id"], changed["pinned"], changed["name"]) == (state, True, "mine")
    assert server.ask(f"/v1/states/{state}", method="DELETE")[1] == {"id": state, "object": "state", "deleted": True}
    assert state not in {row["id"] for row in server.ask("/v1/states")[1]["data"]}
    assert server.ask(f"/v1/states/{state}", method="DELETE")[1]["error"]["code"] == "state_not_found"


def test_an_answer_ends_when_its_client_leaves(client: Any, server: Address) -> None:
    endless = ASK | {"max_tokens": 1 << 30}
    stream = begun(client, endless)
    assert server.engine.stats()["running"] == 1
    stream.close()
    with socket.create_connection(("127.0.0.1", server.port)) as waiting:  # for a whole answer
        body = json.dumps(endless).encode()
        waiting.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                        b"Content-Length: %d\r\n\r\n%s" % (len(body), body))  # fmt: skip
        while not server.engine.stats()["running"]:
            pass
    while server.engine.stats()["running"]:  # the test ends only if both are cancelled
        pass


def test_a_full_queue_says_when_to_come_back(artifact: Path) -> None:
    with serving(artifact, max_batch=1, queue=1) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)
        running = begun(client, ASK | {"max_tokens": 1 << 30})
        status, content, headers = server.ask("/v1/chat/completions", ASK | {"n": 4})
        running.close()
        assert status == 429 and int(headers["retry-after"]) >= 1 and content["error"]["code"] == "rate_limit_exceeded"


def test_a_deadline_cuts_an_answer_off(artifact: Path) -> None:
    with serving(artifact, deadline=0.2) as server:
        _, content, _ = server.ask("/v1/chat/completions", ASK | {"max_tokens": 1 << 30})
        assert content["choices"][0]["finish_reason"] == "length" and content["usage"]["completion_tokens"] > 0


def test_facts_for_those_who_watch(server: Address) -> None:
    assert server.ask("/ready")[1] == {"status": "ready"}
    model = server.ask("/v1/models/toy")[1]
    assert model["state_bytes"] > 0 and server.ask("/v1/models")[1]["data"] == [model]
    ids = server.ask("/tokenize", {"prompt": "abc"})[1]
    assert ids == {"count": len(ids["tokens"]), "tokens": ids["tokens"]} and ids["count"] >= 3
    assert server.ask("/tokenize", {})[0] == 400
    server.ask("/v1/chat/completions", ASK)
    page = server.ask("/metrics")[1].decode()
    assert 'ligerexport_requests_total{path="/v1/chat/completions",status="200"}' in page
    assert (
        'ligerexport_first_token_seconds_count{model="toy"}' in page and 'ligerexport_running{model="toy"} 0.0' in page
    )
    assert "# TYPE ligerexport_cached_total counter" in page
    before, server.engine._failed = server.engine._failed, "lightning"
    status, content, _ = server.ask("/health")
    server.engine._failed = before
    assert status == 503 and "lightning" not in content["error"]["message"] and server.ask("/health")[0] == 200
    _, html, headers = server.ask("/")
    assert b"<script>" in html and "default-src 'none'" in headers["content-security-policy"]


def test_chat_talks_to_a_server(
    server: Address, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand?\n/save x\n/reset\nhello\n"))
    with pytest.raises(SystemExit) as done:
        main(["chat", "--server", server.url, "-n", "4", "-t", "0", "--json"])
    printed = capsys.readouterr()
    result = json.loads(printed.out)
    expected = server.ask("/v1/chat/completions", ASK)[1]
    assert done.value.code == 0 and "the server keeps the state" in printed.err
    assert [turn["answer"] for turn in result["turns"]][::2] == [expected["choices"][0]["message"]["content"]] * 2
    assert result["position"] == expected["usage"]["total_tokens"] and result["state_bytes"] > 0
    for words, hint in (["--model", "other"], "choose from toy"), (["--server", "toy"], "http://127.0.0.1:8080"):
        with pytest.raises(SystemExit) as done:
            main(["chat", "--server", server.url, *words])
        assert done.value.code == 2 and hint in capsys.readouterr().err


def test_openapi_is_kept(server: Address) -> None:
    """Schemathesis makes requests, valid and invalid, from the description of the interface."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    asked = 0
    for operation in schema.get_all_operations():

        @given(case=operation.ok().as_strategy())
        @settings(max_examples=6, phases=[Phase.generate], database=None, derandomize=True)
        def check(case: Any) -> None:
            nonlocal asked
            asked += 1
            case.call_and_validate(excluded_checks=[schemathesis.checks.positive_data_acceptance])

        check()
    assert asked > 40


def test_lm_eval_scores_what_the_model_scores(artifact: Path, server: Address) -> None:
    """Its model `local-completions` sends ids, and reads `echo` with log probabilities."""
    pytest.importorskip("tenacity")
    api = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    model = api.LocalCompletionsAPI(
        base_url=f"{server.url}/v1/completions", model="toy", tokenizer=str(artifact), tokenizer_backend="huggingface"
    )
    pairs = [("Once upon", " a time"), ("The sky is", " blue"), ("x", "y")]
    asked = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = model.loglikelihood(asked, disable_tqdm=True)
    for (score, greedy), (context, continuation) in zip(found, pairs, strict=True):
        start = model.tok_encode(context)
        ids = model.tok_encode(context + continuation)
        rows = logprobs(artifact, ids)
        expected = sum(rows[place - 1, ids[place]] for place in range(len(start), len(ids)))
        assert score == pytest.approx(expected, abs=1e-3) and not greedy
