"""Sampling, stop strings, characters over several tokens, chat templates and conversations."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken

import ligerexport as lx
from ligerexport.errors import ArtifactError, LigerError, UsageError
from ligerexport.run.generate import Chunk, Conversation, Sampler, StopStrings, generate
from ligerexport.text.tokenizer import TextModel

CHATML = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind."
    "<|im_end|>\n{% endif %}{% generation %}<|im_start|>{{ message.role }}\n{{ message['content'] | trim }}<|im_end|>\n"
    "{% endgeneration %}{% if loop.last %}{{ bos_token }}{{ message | tojson }}{% break %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


def ids_of(text: str) -> list[int]:
    return toy.tokenizer().encode(text, add_special_tokens=False).ids


def play(artifact: Path, text: str, end: Sequence[int] = (toy.EOS,), **settings: object) -> list[Chunk]:
    """Generate from a session that will write `text`."""
    session = toy.Scripted(artifact, [*ids_of(text), *end])
    return list(generate(session, "ask", **settings))  # type: ignore[arg-type]


def test_streams_text_and_ends_at_eos(artifact: Path) -> None:
    chunks = play(artifact, "Hello")
    assert [c.text for c in chunks] == ["H", "e", "l", "l", "o", ""]
    assert [c.finish for c in chunks] == [None] * 5 + ["eos"]
    summary = chunks[-1].summary
    assert summary is not None and (summary.prompt_tokens, summary.new_tokens) == (1 + len("ask"), 6)
    assert summary.ttft == chunks[0].seconds > 0
    assert summary.decode_seconds == pytest.approx(sum(c.seconds for c in chunks[1:]))


def test_bos_comes_from_the_post_processor_and_only_in_front(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*ids_of("ab"), toy.EOS])
    list(generate(session, "x"))
    assert session.fed == [toy.BOS, *ids_of("x"), *ids_of("ab")]
    list(generate(session, "y", fresh=False))
    assert toy.BOS not in session.fed[4:]
    list(generate(session, ids_of("z")))
    assert session.fed[0] == ids_of("z")[0]


def test_length(artifact: Path) -> None:
    chunks = play(artifact, "Hello", max_new_tokens=3)
    assert "".join(c.text for c in chunks) == "Hel"
    assert chunks[-1].finish == "length"


@pytest.mark.parametrize("stop", [["lo"], ["xx", "lo"], ["llox", "lo"], ["lo W", "o"]])
def test_stop_strings_over_token_borders(artifact: Path, stop: list[str]) -> None:
    chunks = play(artifact, "Hello World", stop=stop)
    assert chunks[-1].finish == "stop"
    text = "".join(c.text for c in chunks)
    assert text == ("Hell" if stop[-1] == "o" else "Hel")


def test_text_that_only_began_a_stop_string_is_not_lost(artifact: Path) -> None:
    assert "".join(c.text for c in play(artifact, "Hello", stop=["lot"])) == "Hello"
    assert "".join(c.text for c in play(artifact, "Hello", stop=["lot"], max_new_tokens=5)) == "Hello"
    assert "".join(c.text for c in play(artifact, "Hello World", stop="lo")) == "Hel"


@given(text=st.text("ab", max_size=30), stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
def test_stop_strings_do_what_a_search_of_the_whole_text_does(text: str, stops: list[str]) -> None:
    matcher, out, found = StopStrings(stops), "", False
    for letter in text:
        piece, found = matcher.push(letter)
        out += piece
        if found:
            break
    out += "" if found else matcher.flush()
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    expected = text[: min(at for end, at in ends if end == min(ends)[0])] if ends else text
    assert (out, found) == (expected, bool(ends))


def test_a_character_comes_whole(artifact: Path) -> None:
    assert [c.text for c in play(artifact, "a€😀")] == ["a", "", "", "€", "", "", "", "😀", ""]


def test_bytes_that_are_no_character_do_not_hold_the_stream(artifact: Path) -> None:
    half = ids_of("😀")[:2]
    chunks = play(artifact, "", end=[*half, *ids_of("abcdef"), toy.EOS])
    assert "".join(c.text for c in chunks).endswith("abcdef")
    assert play(artifact, "", end=[*half, toy.EOS])[-1].text == "\ufffd"


def test_greedy_takes_the_largest() -> None:
    assert Sampler()(np.array([0.0, 3.0, 2.0])) == 1


def test_top_k_and_top_p_keep_the_right_tokens() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3]))
    ids, weights = Sampler(1.0, top_k=2).distribution(logits)
    assert dict(zip(ids.tolist(), weights.round(6).tolist(), strict=True)) == {1: 0.571429, 3: 0.428571}
    assert Sampler(1.0, top_p=0.6).distribution(logits)[0].tolist() == [1, 3]
    assert Sampler(1.0, top_p=0.75).distribution(logits)[0].tolist() == [1, 3, 2]
    assert Sampler(1.0, top_p=1e-9).distribution(logits)[0].tolist() == [1]
    # top_p is of what top_k left: 0.4 of 0.7 is 0.571
    assert Sampler(1.0, top_k=2, top_p=0.55).distribution(logits)[0].tolist() == [1]


@given(
    logits=st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=40),
    top_p=st.floats(0.01, 1.0),
    temperature=st.floats(0.05, 5.0),
)
def test_top_p_equals_a_full_sort(logits: list[float], top_p: float, temperature: float) -> None:
    array = np.array(logits)
    weights = np.exp((array - array.max()) / temperature)
    weights /= weights.sum()
    ids, kept = Sampler(temperature, top_p=top_p).distribution(array)
    total = weights[ids].sum()
    assert total >= top_p - 1e-9 and kept.sum() == pytest.approx(1)
    assert len(ids) == len(array) or weights[ids].min() >= np.delete(weights, ids).max()
    if top_p < 1 and len(ids) > 1:
        assert total - weights[ids].min() < top_p + 1e-9


def test_sampling_follows_the_probabilities_and_the_seed() -> None:
    logits = np.log(np.array([0.1, 0.2, 0.7]))
    one, two, other = Sampler(1.0, seed=1), Sampler(1.0, seed=1), Sampler(1.0, seed=2)
    drawn = [one(logits) for _ in range(4000)]
    assert drawn == [two(logits) for _ in range(4000)]
    assert drawn != [other(logits) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(drawn) / 4000, [0.1, 0.2, 0.7], atol=0.03)
    assert Sampler(1e-6, seed=0)(logits) == 2


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_an_error(bad: float) -> None:
    with pytest.raises(LigerError, match="instead of logits"):
        Sampler()(np.array([0.0, bad, 1.0]))


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"seed": -1},
    ],
)
def test_settings_that_make_no_sense_are_refused_at_once(artifact: Path, settings: dict[str, float]) -> None:
    with pytest.raises(UsageError):
        generate(toy.Scripted(artifact, [0]), "x", **settings)  # type: ignore[arg-type]


def test_no_tokens_and_no_prompt(artifact: Path) -> None:
    session = toy.Scripted(artifact, [0])
    for prompt in ([], None):
        with pytest.raises(UsageError):
            generate(session, prompt)


def test_a_long_prompt_needs_no_more_memory_than_a_short_one(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*ids_of("ok"), toy.EOS])
    reported = []

    def progress(description: str, total: float | None = None, unit: str = "bytes") -> Any:
        assert total == 100_000
        return nullcontext(reported.append)

    list(generate(session, [5] * 100_000, progress=progress))
    assert sum(reported) == 100_000 and max(reported) <= session.chunk * 16


def test_without_a_tokenizer_ids_still_work(artifact: Path, tmp_path: Path) -> None:
    from ligerexport.artifact.artifact import ArtifactWriter

    with ArtifactWriter(tmp_path / "bare") as writer:
        toy.write_files(writer.directory)
        (writer.directory / "tokenizer.json").unlink()
        writer.commit(toy.manifest())
    session = toy.Scripted(tmp_path / "bare", [7, 8])
    with pytest.raises(ArtifactError, match=r"no tokenizer\.json"):
        generate(session, "text")
    assert [c.token for c in generate(session, [1], max_new_tokens=2)] == [7, 8]


def test_chat_template_as_transformers_renders_it(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    made = toy.tokenizer()
    made.add_special_tokens([AddedToken("<|im_start|>"), AddedToken("<|im_end|>")])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(tmp_path)
    model = TextModel(tmp_path)
    messages = [{"role": "user", "content": " Wörld <b> 'x' "}, {"role": "assistant", "content": "Yes."}]
    for turns in (messages[:1], messages):
        for answer in (True, False):
            text = fast.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
            ids = fast.apply_chat_template(turns, add_generation_prompt=answer, return_dict=False)
            assert model.render(turns, answer=answer) == text
            assert model.encode(text, special=False) == ids
    assert "Be kind" in text


def test_chat_goes_through_the_template(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*ids_of("hi"), toy.EOS])
    assert "".join(c.text for c in generate(session, "  hello ", chat=True)) == "hi"
    assert session.fed[: len("hello") + 2] == [toy.USER, *ids_of("hello\n")]


def test_a_template_that_refuses(tmp_path: Path) -> None:
    toy.write_files(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UsageError, match="roles must alternate"):
        TextModel(tmp_path).render([{"role": "user", "content": "x"}])
    (tmp_path / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UsageError, match="unsafe"):
        TextModel(tmp_path).render([{"role": "user", "content": "x"}])


def turn(text: str) -> list[int]:
    return [toy.USER, *ids_of(text + "\n")]


def test_each_turn_prefills_its_own_text_alone(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*ids_of("ab"), toy.EOS])
    chat = Conversation(session)
    assert "".join(c.text for c in chat.say("one")) == "ab"
    assert session.fed == [*turn("one"), *ids_of("ab")]
    session.fed, before = session.fed[:], len(session.fed)
    session._given = 0
    list(chat.say("two"))
    assert session.fed[before:] == [toy.EOS, *turn("two"), *ids_of("ab")]


def test_an_answer_that_is_stopped_is_still_remembered(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*ids_of("abcdef"), toy.EOS])
    chat = Conversation(session)
    answer = chat.say("one")
    assert [next(answer).text for _ in range(3)] == ["a", "b", "c"]
    answer.close()
    before = len(session.fed)
    next(chat.say("two"))
    assert session.fed[before:] == [*ids_of("c"), toy.EOS, *turn("two")]


def test_a_saved_conversation_goes_on(artifact: Path, tmp_path: Path) -> None:
    def tokens(chat: Conversation, text: str) -> list[int]:
        return [c.token for c in chat.say(text)]

    one = Conversation(lx.load(artifact), max_new_tokens=8)
    tokens(one, "hello")
    one.save(tmp_path / "chat")
    expected = tokens(one, "and then?")
    two = Conversation(lx.load(artifact), max_new_tokens=8)
    two.load(tmp_path / "chat")
    assert tokens(two, "and then?") == expected
    two.reset()
    assert two.session.position.tolist() == [0]


def test_real_session_is_reproducible_and_continues(artifact: Path) -> None:
    session = lx.load(artifact)

    def draw(seed: int) -> list[int]:
        return [c.token for c in generate(session, "abc", temperature=60.0, seed=seed, max_new_tokens=12)]

    assert draw(3) == draw(3) != draw(4)
    whole = [c.token for c in generate(session, [5, 6, 7, 8], max_new_tokens=6)]
    session.reset()
    session.prefill([5, 6])
    assert [c.token for c in generate(session, [7, 8], max_new_tokens=6, fresh=False)] == whole
