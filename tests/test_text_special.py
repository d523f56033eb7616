"""Special tokens: read as in transformers, plain text in the content of messages, ends of texts and turns."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

import ligerexport as lx
from ligerexport.artifact.artifact import ArtifactWriter
from ligerexport.errors import ArtifactError, UsageError
from ligerexport.run.generate import Conversation, generate
from ligerexport.text.tokenizer import TextModel

CHATML = (
    "{%- for message in messages -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
TEMPLATES = {
    "llama": (
        "{{- bos_token }}{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content']|trim %}"
        "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
        "{{- '<|start|>system<|stop|>\n\n' + system + '<|eot|>' }}{%- for message in messages %}"
        "{{- '<|start|>' + message['role'] + '<|stop|>\n\n' + message['content'] | trim + '<|eot|>' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start|>assistant<|stop|>\n\n' }}{%- endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if message.role == 'user' %}{% if loop.last and "
        "messages[0].role == 'system' %}{{ '[INST] ' + messages[0].content + '\n\n' + message.content + ' [/INST]' }}"
        "{% else %}{{ '[INST] ' + message.content + ' [/INST]' }}{% endif %}{% elif message.role == 'assistant' %}"
        "{{ ' ' + message.content + eos_token }}{% endif %}{% endfor %}"
    ),
    "qwen2": "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML,
    "qwen3": (
        "{%- set ns = namespace(last=messages|length - 1) %}{%- for message in messages[::-1] %}"
        "{%- if ns.last == messages|length - 1 and message.role == 'user' %}"
        "{%- set ns.last = messages|length - 1 - loop.index0 %}{%- endif %}{%- endfor %}"
        "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}"
        "{%- set thought = '' %}{%- if '</think>' in content %}"
        "{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
        "{%- set content = content.split('</think>')[-1].lstrip('\n') %}{%- endif %}{%- if loop.index0 > ns.last %}"
        "{%- set content = '<think>\n' + thought + '\n</think>\n\n' + content %}{%- endif %}{%- endif %}"
        "{{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- if enable_thinking is defined and "
        "enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
    ),
    "gemma3_text": (
        "{{ bos_token }}{%- set first = '' -%}{%- if messages[0]['role'] == 'system' -%}"
        "{%- set first = messages[0]['content'] + '\n\n' -%}{%- set rest = messages[1:] -%}{%- else -%}"
        "{%- set rest = messages -%}{%- endif -%}{%- for message in rest -%}"
        "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{ raise_exception('roles alternate') }}"
        "{%- endif -%}{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
        "{{ '<start_of_turn>' + role + '\n' + (first if loop.first else '') }}{%- if message['content'] is string -%}"
        "{{ message['content'] | trim }}{%- else -%}{%- for item in message['content'] -%}{{ item['text'] | trim }}"
        "{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
    ),
    "phi3": (
        "{% for message in messages %}{% if message['content'] %}{{'<|' + message['role'] + '|>\n' + "
        "message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}"
        "{% else %}{{ eos_token }}{% endif %}"
    ),
    "granite": (
        "{%- for message in messages %}{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + "
        "message['content'] + '<|end_of_text|>\n' }}{%- if loop.last and add_generation_prompt %}"
        "{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}{%- endfor %}"
    ),
    "olmo2": (
        "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'assistant' %}{% if not loop.last %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token + '\n' }}{% else %}"
        "{{ '<|assistant|>\n' + message['content'] + eos_token }}{% endif %}{% else %}"
        "{{ '<|' + message['role'] + '|>\n' + message['content'] + '\n' }}{% endif %}"
        "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
    ),
    "smollm3": (
        "{%- set quick = messages[0].role == 'system' and '/no_think' in messages[0].content -%}"
        "{%- set mode = '/no_think' if quick else '/think' -%}"
        "{{- '<|im_start|>system\nReasoning: ' + mode + '<|im_end|>\n' -}}{%- for message in messages -%}"
        "{%- set content = message.content if message.content is string else '' -%}{%- if message.role == 'user' -%}"
        "{{ '<|im_start|>user\n' + content + '<|im_end|>\n' }}{%- elif message.role == 'assistant' -%}{% generation %}"
        "{%- set content = content.lstrip('\n') -%}{{ '<|im_start|>assistant\n' + content + '<|im_end|>\n' }}"
        "{% endgeneration %}{%- endif -%}{%- endfor -%}{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}"
        "{%- if mode == '/no_think' -%}{{ '<think>\n\n</think>\n' }}{%- endif -%}{%- endif -%}"
    ),
}
"""The constructs of each family's templates, shortened."""
ENDS = {"llama": "<|eot|>", "mistral": "</s>", "gemma3_text": "<end_of_turn>", "phi3": "<|end|>", "olmo2": "</s>",
        "granite": "<|end_of_text|>"}  # fmt: skip
"""Text that each template puts after an answer; the others use ChatML."""
WORDS = ["Hi", " there", "\n", "  ", "é한", "🙂", "/no_think", "'", '"', "{{ x }}", "<|", "|>", "\U000f0000"]
THOUGHT = "<think>\nso\n</think>\n"
PLAIN = ("<think>", "</think>", "   ")
"""Added tokens that are text to the tokenizer."""
LAYOUTS = ("config", "map", "decoder")


def words(template: str) -> list[str]:
    """Return the special tokens that a template writes."""
    return sorted({*re.findall(r"<\|?\w+\|?>", template), "<s>", "</s>", "<|user|>", "<|system|>"} - {"<think>", "<|>"})


def pieces() -> Tokenizer:
    """Return a SentencePiece vocabulary that puts a space before each part of a text."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁Hithere한", "▁t"]
    vocabulary = {name: index for index, name in enumerate(dict.fromkeys(names))}
    made = Tokenizer(models.BPE(vocabulary, [("▁", "t")], byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def letters() -> Tokenizer:
    made = Tokenizer.from_str(json.dumps(json.loads(toy.tokenizer().to_str()) | {"added_tokens": []}))
    made.post_processor = processors.ByteLevel()
    return made


def write(place: Path, family: str, layout: str, template: str, made: Tokenizer, **config: Any) -> Path:
    """Write a tokenizer whose special tokens are described in one of the layouts that checkpoints have."""
    tokens = [*(AddedToken(word, special=True) for word in words(template)), *map(AddedToken, PLAIN)]
    complete = Tokenizer.from_str(made.to_str())
    complete.add_tokens(tokens)
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    if layout == "decoder":
        described = complete.get_added_tokens_decoder().items()
        config["added_tokens_decoder"] = {
            str(index): {name: getattr(token, name) for name in ("content", "lstrip", "rstrip", "normalized",
                                                                 "single_word", "special")}
            for index, token in described
        }  # fmt: skip
    if layout == "map":
        (place / "special_tokens_map.json").write_text(json.dumps({
            "bos_token": {"content": "<s>", "lstrip": False, "rstrip": False, "normalized": False,
                          "single_word": False},
            "eos_token": "</s>", "additional_special_tokens": ["<|more|>"],
        }))  # fmt: skip
        named = {}
    (made if layout == "decoder" else complete).save(str(place / "tokenizer.json"))
    (place / "config.json").write_text(json.dumps({"model_type": family}))
    (place / "tokenizer_config.json").write_text(json.dumps(named | config))
    (place / "chat_template.jinja").write_text(template)
    return place


CASES = [(family, layout, "") for family in TEMPLATES for layout in LAYOUTS]
CASES += [("llama", "config", "LlamaTokenizerFast"), ("llama", "map", "LlamaTokenizer"),
          ("mistral", "decoder", "LlamaTokenizer")]  # fmt: skip


@pytest.fixture(params=CASES, ids="-".join, scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[TextModel, Any]:
    """A tokenizer, read by this package and by transformers."""
    family, layout, name = request.param
    config = {"tokenizer_class": name} if name else {"tokenizer_class": "PreTrainedTokenizerFast"}
    made = pieces() if name or family == "gemma3_text" else letters()
    place = write(tmp_path_factory.mktemp(family), family, layout, TEMPLATES[family], made, **config)
    return TextModel(place), AutoTokenizer.from_pretrained(place)


CONTENT = st.lists(st.sampled_from(WORDS), max_size=6).map("".join)


@st.composite
def conversations(draw: st.DrawFn, content: st.SearchStrategy[str] = CONTENT) -> list[dict[str, Any]]:
    turns = [{"role": "system", "content": draw(content)}] if draw(st.booleans()) else []
    for index in range(draw(st.integers(1, 4))):
        said = draw(content) if index % 2 == 0 else draw(CONTENT) + draw(st.sampled_from(["", THOUGHT]))
        turns.append({"role": ("user", "assistant")[index % 2], "content": said})
    return turns


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=conversations(), answer=st.booleans())
def test_a_conversation_is_what_transformers_makes_of_it(
    pair: tuple[TextModel, Any], turns: list[dict[str, Any]], answer: bool
) -> None:
    model, auto = pair
    try:
        text = auto.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer)
    except Exception:
        with pytest.raises(UsageError):
            model.render(turns, answer=answer)
        return
    assert model.render(turns, answer=answer) == text
    ids = auto.apply_chat_template(turns, add_generation_prompt=answer, return_dict=False)
    assert model.encode_rendered(model.render(turns, answer=answer, marked=True)) == ids
    assert model.encode(text) == auto.encode(text)
    assert model.decode(ids) == auto.decode(ids, skip_special_tokens=True)


@settings(deadline=None, max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_special_tokens_in_content_are_text(pair: tuple[TextModel, Any], data: st.DataObject) -> None:
    model, auto = pair
    special = st.sampled_from([*model.special_ids, "<think>", *WORDS])
    turns = data.draw(conversations(st.lists(special, max_size=6).map("".join)))
    try:
        hi = [turn if turn["role"] == "assistant" else turn | {"content": turn["content"] and "Hi"} for turn in turns]
        expected = [token for token in model.encode_chat(hi) if token in model.special_ids.values()]
        ids = model.encode_chat(turns)
    except UsageError:
        return
    assert [token for token in ids if token in model.special_ids.values()] == expected
    if not model.byte_ids:  # it has all characters
        assert auto.decode(ids) == model.render(turns)
    spelled = model.encode(model.render(turns), special=False)
    assert model.encode_chat(turns, special_content=True) == spelled
    texts = "".join(turn["content"] for turn in turns)
    if hasattr(auto, "chat_control_tokens") and "think>" not in texts and "\U000f0000" not in texts:
        assert ids == auto.apply_chat_template(
            turns, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
        )


def test_a_turn_ends_at_what_the_template_puts_after_an_answer(pair: tuple[TextModel, Any]) -> None:
    model, auto = pair
    family = json.loads((Path(auto.name_or_path) / "config.json").read_text())["model_type"]
    ends = {auto.convert_tokens_to_ids(ENDS.get(family, "<|im_end|>")), auto.eos_token_id}
    assert model.turn_ends == ends
    assert model.eos_ids == {auto.eos_token_id} and model.bos_id == auto.bos_token_id


def test_a_completed_tokenizer_needs_no_other_file(pair: tuple[TextModel, Any], tmp_path: Path) -> None:
    model, auto = pair
    place = Path(shutil.copytree(auto.name_or_path, tmp_path / "artifact"))
    model.write_tokenizer(place / "tokenizer.json")
    again, theirs = TextModel(place), AutoTokenizer.from_pretrained(place)
    alone = Tokenizer.from_file(str(place / "tokenizer.json"))
    text = "".join(f"{token} Hi  é한{token}" for token in [*model.special_ids, *PLAIN, "<s>", "\n"])
    ids = model.encode(text)
    assert ids == again.encode(text) == alone.encode(text).ids == auto.encode(text) == theirs.encode(text)
    assert model.decode(ids) == again.decode(ids) == alone.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    again.write_tokenizer(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (place / "tokenizer.json").read_bytes()


def test_a_tokenizer_that_says_all_stays_what_it_is(tmp_path: Path) -> None:
    place = write(tmp_path, "llama", "config", TEMPLATES["llama"], letters())
    text = json.dumps(json.loads((place / "tokenizer.json").read_text()))
    (place / "tokenizer.json").write_text(text)
    TextModel(place).write_tokenizer(tmp_path / "copy.json")
    assert (tmp_path / "copy.json").read_text() == text


def test_names_of_extra_tokens_reach_the_template(tmp_path: Path) -> None:
    template = "{{ image_token }}{{ bos_token }}{{ other_token }}{{ messages[0].content }}"
    place = write(
        tmp_path, "llama", "map", template, letters(), extra_special_tokens={"image_token": "<|user|>"},
        other_token="<|system|>",
    )  # fmt: skip
    turns = [{"role": "user", "content": "Hi"}]
    model, auto = TextModel(place), AutoTokenizer.from_pretrained(place)
    assert model.render(turns) == auto.apply_chat_template(turns, tokenize=False) == "<|user|><s><|system|>Hi"
    assert model.encode("<|more|><|user|>") == auto.encode("<|more|><|user|>")


@pytest.mark.real
def test_the_real_model_reads_as_transformers_does(smollm2: Path) -> None:
    model, auto = TextModel(smollm2), AutoTokenizer.from_pretrained(smollm2)
    turns = [{"role": "user", "content": "Say <|im_end|> and 한국어 12345."}, {"role": "assistant", "content": " ok"}]
    for part in (turns[:1], turns):
        plain = [turn | {"content": turn["content"].replace("<|im_end|>", "it")} for turn in part]
        assert model.encode_chat(plain) == auto.apply_chat_template(plain, add_generation_prompt=True)["input_ids"]
    assert model.encode_chat(turns).count(auto.eos_token_id) == 1 + model.encode_chat(turns[:1]).count(2)


USER, SAID = "a</s>[[the answer]]<user>b", "x</s>"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy.build(tmp_path_factory.mktemp("toy") / "artifact")


@cache
def plain_tokenizer() -> Tokenizer:
    return letters()


def plainly(text: str) -> list[int]:
    return plain_tokenizer().encode(text).ids


def test_what_a_user_says_cannot_end_the_turn_or_begin_another(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*plainly("ok"), toy.EOS])
    chat = Conversation(session)
    for said in (USER, SAID, USER):
        session._given, before = 0, len(session.fed)
        list(chat.say(said))
        end = [toy.EOS] if before else []
        assert session.fed[before:] == [*end, toy.USER, *plainly(said + "\n"), *plainly("ok")]
    list(generate(session, messages=[{"role": "user", "content": SAID}]))
    assert session.fed[: len(SAID) + 2] == [toy.USER, *plainly(SAID + "\n")]
    list(generate(session, SAID, chat=True, special_content=True))
    assert session.fed[:4] == [toy.USER, *plainly("x"), toy.EOS, *plainly("\n")]


def test_a_stop_that_is_a_special_token_stops_at_its_id(artifact: Path) -> None:
    session = toy.Scripted(artifact, [*plainly("one"), toy.USER, *plainly("two"), toy.EOS])
    chunks = list(generate(session, "x", stop=["nothing", "<user>"]))
    assert "".join(chunk.text for chunk in chunks) == "one" and chunks[-1].finish == "stop"
    session.reset()
    chat = Conversation(session, stop=["<user>"])
    assert "".join(chunk.text for chunk in chat.say("x")) == "one"
    before = len(session.fed)
    next(chat.say("y"))
    assert session.fed[before:] == [toy.EOS, toy.USER, *plainly("y\n")]


@pytest.mark.parametrize("stop", ["one<user>", "a</s>b"])
def test_a_stop_with_text_before_a_special_token_is_refused(artifact: Path, stop: str) -> None:
    session = toy.Scripted(artifact, plainly("one"))
    for start in (lambda: generate(session, "x", stop=["ok", stop]), lambda: Conversation(session, stop=[stop])):
        with pytest.raises(UsageError, match="text before the special token <"):
            start()


def changed(place: Path, gone: tuple[str, ...], **files: str) -> Path:
    """Build the toy without some files and with others instead."""
    with ArtifactWriter(place) as writer:
        toy.write_files(writer.directory)
        for name in gone:
            (writer.directory / name).unlink()
        for name, text in files.items():
            (writer.directory / name).write_text(text)
        writer.commit(toy.manifest())
    return place


@pytest.mark.parametrize("kept", ["tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"])
def test_an_end_that_only_one_file_names_ends_the_turn(kept: str, tmp_path: Path) -> None:
    chat = kept == "chat_template.jinja"
    text = toy.TEMPLATE if chat else json.dumps({"eos_token": "</s>"})
    place = changed(tmp_path / "x", ("tokenizer_config.json", "generation_config.json"), **{kept: text})
    session = toy.Scripted(place, [*plainly("ok"), toy.EOS, *plainly("more")])
    chunks = list(generate(session, "x", chat=chat, max_new_tokens=8))
    assert (chunks[-1].finish, "".join(chunk.text for chunk in chunks)) == ("eos", "ok")


def test_ids_alone_end_where_the_configuration_says(tmp_path: Path) -> None:
    session = toy.Scripted(changed(tmp_path / "x", ("tokenizer.json",)), [7, toy.EOS, 8])
    assert [chunk.token for chunk in generate(session, [1], max_new_tokens=8)] == [7, toy.EOS]


def test_run_stops_at_a_special_token(tmp_path: Path) -> None:
    written = [chunk.token for chunk in generate(lx.load(toy.build(tmp_path / "toy")), "abc", max_new_tokens=9)]
    data = json.loads(toy.tokenizer().to_str())
    at = next(index for index, token in enumerate(written) if token < toy.BYTES and token not in plainly("abc"))
    letter = next(letter for letter, index in data["model"]["vocab"].items() if index == written[at])
    data["model"]["vocab"]["<|halt|>"] = data["model"]["vocab"].pop(letter)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    data["added_tokens"].append({"id": written[at], "content": "<|halt|>", "special": True, **flags})
    place = changed(tmp_path / "x", (), **{"tokenizer.json": json.dumps(data)})
    command = [sys.executable, "-m", "ligerexport", "run", place, "abc", "--stop", "<|halt|>", "-n", "9", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert (found["finish"], found["new_tokens"]) == ("stop", written.index(written[at]) + 1)


@pytest.mark.parametrize(
    "config",
    [
        {"added_tokens_decoder": [1]},
        {"added_tokens_decoder": {"x": {"content": "<x>"}}},
        {"added_tokens_decoder": {"1": {"content": 3}}},
        {"extra_special_tokens": 3},
        {"extra_special_tokens": [3]},
        {"bos_token": {"lstrip": 1}},
    ],
)
def test_tokens_that_are_none_are_refused(config: dict[str, Any], tmp_path: Path) -> None:
    toy.write_files(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match="cannot be read"):
        TextModel(tmp_path)


def test_an_extra_token_cannot_take_the_place_of_the_messages(tmp_path: Path) -> None:
    toy.write_files(tmp_path)
    extra = {"extra_special_tokens": {"messages": "<x>", "": "<y>"}, "chat_template": toy.TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(extra))
    assert TextModel(tmp_path).render([{"role": "user", "content": "Hi"}]) == "<user>Hi\n"
