"""The data of a recovery: every form of file, every bad input, the learned part of a chat, and packing."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import toy
from tokenizers import Tokenizer

from ligerexport.errors import LigerError, UsageError
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.data import Documents, tokenize
from ligerexport.train.packing import ALIGNED, IGNORE, Rows, pack
from ligerexport.train.records import DataError, Record, as_record, read_records, reasoning_share
from ligerexport.train.recover import warn_of_reasoning

CHAT = (("user", "hi"), ("assistant", "you"), ("user", "and"), ("assistant", "me"))
MESSAGES = [{"role": role, "content": content} for role, content in CHAT]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    return make_text(tmp_path_factory.mktemp("text"), toy.TEMPLATE)


def make_text(path: Path, template: str | None) -> TextModel:
    toy.tokenizer().save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    return TextModel(path)


def documents(text: TextModel, *records: Record, **settings: Any) -> Documents:
    return tokenize(records, text, **{"length": 64, "vocab_size": toy.VOCAB} | settings)


def lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def test_every_form_of_line(tmp_path: Path) -> None:
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "you"}]
    file = lines(
        tmp_path / "all.jsonl", {"messages": MESSAGES}, {"conversations": sharegpt},
        {"prompt": "hi", "response": "you"}, {"instruction": "hi", "input": "there", "output": "you"},
        {"instruction": "hi", "input": "", "output": "you"}, {"text": "plain"},
    )  # fmt: skip
    turns = [record.turns for record in read_records([file])]
    assert turns[0] == CHAT and turns[1] == turns[2] == turns[4] == CHAT[:2]
    assert turns[3] == (("user", "hi\n\nthere"), ("assistant", "you"))
    assert read_records([file])[5] == Record(f"{file}:6", text="plain")


def test_files_directories_and_arrays(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("first\n\nsecond")
    (tmp_path / "sub" / "b.json").write_text(json.dumps([{"text": "third"}]))
    (tmp_path / "ignored.py").write_text("no text")
    assert [record.text for record in read_records([tmp_path])] == ["first\n\nsecond", "third"]


def test_a_hub_data_set_is_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "chats"  # the library takes a folder of that name for the data set
    folder.mkdir(parents=True)
    lines(folder / "train.jsonl", {"prompt": "hi", "response": "you"})
    monkeypatch.chdir(tmp_path)
    [record] = read_records(["owner/chats:train"])
    assert record.turns == CHAT[:2] and record.where == "owner/chats:train, row 0"


def test_an_absent_library_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LigerError) as caught:
        read_records(["owner/chats"])
    assert caught.value.exit_code == 4 and "ligerexport[recover]" in str(caught.value.hint)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"messages": [', "bad.jsonl:2 is not JSON"),
        ("[1]", "holds list"),
        ('{"question": "a", "answer": "b"}', "has the keys question, answer"),
        ('{"messages": []}', "no list of turns"),
        ('{"messages": "hi"}', "no list of turns"),
        ('{"messages": ["hi"]}', "has str as turn 0"),
        ('{"messages": [{"role": "robot", "content": "a"}]}', "role 'robot' in turn 0"),
        ('{"messages": [{"role": "user", "content": [1]}]}', "a part of the kind int"),
        ('{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "a part of the kind image_url"),
        ('{"messages": [{"role": "assistant", "tool_calls": [{}]}]}', "has tool_calls in turn 0"),
        ('{"text": "half \\ud83d"}', r"\ud83d alone"),
        ("[" * 100_000, "is not JSON"),
        ('{"prompt": "a", "response": null}', "has nothing as 'response'"),
        ('{"text": 3}', "has int as 'text'"),
        ('{"text": "abc", "learn": [[1, 4]]}', "has [1, 4] in 'learn', in a text of 3 characters"),
        ('{"text": "abc", "learn": [[1, 2], [0, 1]]}', "has [0, 1] in 'learn'"),
        ('{"text": "abc", "learn": [["a", "b"]]}', "has ['a', 'b'] in 'learn'"),
        ('{"text": "abc", "learn": 2}', "has 2 in 'learn'"),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    file = tmp_path / "bad.jsonl"
    file.write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(DataError, match=r"bad\.jsonl:2") as caught:
        read_records([file])
    assert message in caught.value.message and caught.value.hint
    assert caught.value.message.count("bad.jsonl") == 1


def test_nothing_to_read(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "none").mkdir()
    for source, message in (("empty.jsonl", "nothing to learn"), ("latin.txt", "not UTF-8"), ("none", "no text in"),
                            ("absent.jsonl", "no file or directory")):  # fmt: skip
        with pytest.raises(LigerError, match=message) as caught:
            read_records([tmp_path / source])
        assert caught.value.hint


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "hi", "completion": "you"}, CHAT[:2]),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}, CHAT[:2]),
        ({"prompt": MESSAGES[:3], "completion": "me", "messages": None}, CHAT),
        ({"messages": [{"role": "developer", "content": "be"}, *MESSAGES[:2]]}, (("system", "be"), *CHAT[:2])),
        ({"messages": [*MESSAGES[:1], {"role": "tool", "content": "7"}]}, (*CHAT[:1], ("tool", "7"))),
        (
            {"messages": [{"role": "User", "content": [{"type": "text", "text": "h"}, "i"]}, *MESSAGES[1:2]]},
            CHAT[:2],
        ),
    ],
)
def test_forms_of_other_libraries(row: Any, turns: Any) -> None:
    assert as_record(row, "x").turns == turns


def test_texts_and_pairs_end_as_the_model_ends_a_text(tmp_path: Path) -> None:
    text = make_text(tmp_path, None)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [toy.USER, toy.EOS]}))
    pair = as_record({"prompt": "hi", "completion": "you"}, "x")
    for record, whole, learned in ((Record("x", text="abc"), "abc", 5), (pair, "hi\n\nyou", 4)):
        found = documents(text, record)
        assert found.ids.tolist() == [*text.encode(whole), toy.EOS]
        assert found.answers.sum() == learned and found.answers[-1]
    long = documents(text, Record("x", text="a" * 150))
    assert long.lengths.tolist() == [64, 64, 24] and (long.ids == toy.EOS).nonzero()[0].tolist() == [151]
    full = documents(text, Record("x", text="a" * 63))  # with BOS just as long as a piece
    assert full.lengths.tolist() == [64, 2] and full.ids[-1] == toy.EOS and full.answers[-1]
    cut = documents(text, as_record({"prompt": "hi", "completion": "y" * 100}, "x"))
    assert len(cut.ids) == 64 and toy.EOS not in cut.ids
    again = documents(text, Record("x", text="abc</s>"))  # who wrote the end does not get a second one
    assert again.ids.tolist() == [*text.encode("abc"), toy.EOS]
    nothing = (Record("x", text=" "), as_record({"prompt": "hi", "response": ""}, "x"), Record("y", text="abc"))
    counts = documents(text, *nothing).counts
    assert counts == {"records": 3, "empty": 1, "without an answer": 1}


def test_a_chat_ends_as_its_template_ends_it(tmp_path: Path) -> None:
    text = make_text(tmp_path, toy.TEMPLATE)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [toy.EOS]}))
    assert documents(text, Record("x", CHAT)).ids.tolist().count(toy.EOS) == 2


def test_a_chat_whose_template_writes_no_end_gets_one(tmp_path: Path) -> None:
    text = make_text(tmp_path, toy.TEMPLATE.replace("</s>", "\\n"))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [toy.EOS]}))
    found = documents(text, Record("x", CHAT))
    assert found.ids.tolist().count(toy.EOS) == 1 and found.ids[-1] == toy.EOS and found.answers[-1]


def test_only_answers_are_learned(text: TextModel) -> None:
    found = documents(text, Record("x", CHAT))
    assert text.encode(text.render(MESSAGES, answer=False), special=False) == found.ids.tolist()
    learned = [int(i) for i, answer in zip(found.ids, found.answers, strict=True) if answer]
    assert learned == text.encode("you</s>me</s>", special=False)
    assert found.counts == {"records": 1}


def test_special_tokens_in_a_chat_are_text(text: TextModel) -> None:
    found = documents(text, Record("x", [("user", "a</s>b"), ("assistant", "<user>\U000f0000")]))
    inner = Tokenizer.from_str(json.dumps(json.loads(toy.tokenizer().to_str()) | {"added_tokens": []})).encode
    plain = [inner(part, add_special_tokens=False).ids for part in ("a</s>b\n", "<user>\U000f0000")]
    assert found.ids.tolist() == [toy.USER, *plain[0], *plain[1], toy.EOS]


def test_all_of_a_plain_text_is_learned(text: TextModel) -> None:
    found = documents(text, Record("x", text="a" * 150))
    assert found.answers.all() and found.lengths.tolist() == [64, 64, 23]  # with BOS in front
    assert found.ids[0] == toy.BOS and (found.ids[1:] == found.ids[1]).all()


def test_a_long_chat_is_cut_or_dropped_and_counted(text: TextModel) -> None:
    long = Record("x", (("user", "hi"), ("assistant", "y" * 100)))
    hopeless = Record("x", (("user", "h" * 100), ("assistant", "y")))
    short = Record("x", CHAT)
    cut = documents(text, long, hopeless, short)
    assert sorted(cut.lengths) == [len(documents(text, short).ids), 64]
    assert cut.counts == {"records": 3, "cut": 2, "with no answer within the length": 1}
    dropped = documents(text, long, hopeless, short, overlong="drop")
    assert len(dropped.lengths) == 1 and dropped.counts["dropped as too long"] == 2
    with pytest.raises(DataError, match=r"nothing is left.*1 dropped as too long"):
        documents(text, long, overlong="drop")


def test_an_empty_answer_is_read_and_not_learned(text: TextModel) -> None:
    """If it were learned, the model would learn to end at once."""
    silent = (("user", "hi"), ("assistant", " "))
    found = documents(text, Record("x", (*silent, *CHAT[2:])), Record("y", silent, alone=True))
    assert found.counts == {"records": 2, "without an answer": 1}
    assert found.answers.sum() == documents(text, Record("x", CHAT[2:])).answers.sum()


def test_chats_without_answers_and_refused_ones_are_counted(tmp_path: Path) -> None:
    strict = "{% if messages[0].role != 'user' %}{{ raise_exception('no') }}{% endif %}" + toy.TEMPLATE
    text = make_text(tmp_path, strict)
    found = documents(text, Record("x", CHAT), Record("y", CHAT[:1]), Record("z", CHAT[1:]))
    assert found.counts == {"records": 3, "without an answer": 1, "refused by the chat template": 1}
    assert len(found.lengths) == 1


@pytest.mark.parametrize("role", ["tool", "system"])
def test_a_template_that_skips_a_role_learns_nothing_from_such_chats(tmp_path: Path, role: str) -> None:
    template = "{% for m in messages if m.role != '" + role + "' %}<{{ m.content }}>{% endfor %}"
    said = Record("x", (*CHAT[:1], (role, "7"), *CHAT[1:]))
    found = documents(make_text(tmp_path, template), said, Record("y", CHAT))
    assert found.counts == {"records": 2, "with a turn that the chat template leaves out": 1}
    assert documents(make_text(tmp_path, toy.TEMPLATE), said).counts == {"records": 1}


def test_a_template_that_drops_earlier_answers_ends_what_is_learned(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    template = "{% for m in messages %}{% if loop.last or m.role == 'user' %}<{{ m.content }}>{% endif %}{% endfor %}"
    found = documents(make_text(tmp_path, template), Record("x", CHAT))
    assert len(found.lengths) == 1 and sum(found.counts.values()) == 2


def test_an_answer_to_nothing_is_read_but_not_learned(text: TextModel) -> None:
    found = documents(text, Record("x", CHAT[1:]))
    assert found.counts == {"records": 1}
    prompt = text.encode(text.render(MESSAGES[1:3]), special=False)
    assert found.ids.tolist()[: len(prompt)] == prompt
    assert found.answers.tolist() == [False] * len(prompt) + [True] * (len(found.ids) - len(prompt))
    whole = text.render(MESSAGES[1:], answer=False)
    assert text.decode(found.ids.tolist()) == text.decode(text.encode(whole, special=False))


def test_without_a_template_pairs_are_read_plainly(tmp_path: Path) -> None:
    text = make_text(tmp_path, None)
    found = documents(text, as_record({"prompt": "hi", "response": "you"}, "x"))
    assert text.decode(found.ids.tolist()) == "hi\n\nyou" and found.answers.sum() == 3
    assert found.ids[0] == toy.BOS and found.counts == {"records": 1}
    with pytest.raises(UsageError, match="x is a chat"):
        documents(text, Record("x", CHAT))


def test_marked_answers_of_a_text(text: TextModel) -> None:
    record = as_record({"text": "who? me. and? you!", "learn": [[4, 7], [13, 17], [17, 18]]}, "x")
    found = documents(text, record)
    assert text.decode(found.ids[found.answers].tolist()) == " me you!" and found.ids[0] == toy.BOS
    assert found.ids.tolist() == documents(text, as_record({"text": "who? me. and? you!"}, "x")).ids.tolist()
    assert not documents(text, Record("x", text="nothing to learn", learned=())).answers[:-1].any()


@pytest.mark.parametrize(
    ("content", "found"),
    [("<think>2 and 2 is 4</think> 4", 1), ("Let's think step by step. It is 4.", 1), ("Step by step, they left.", 0)],
)
def test_chains_of_thought_are_noticed(content: str, found: int, capsys: pytest.CaptureFixture[str]) -> None:
    plain = [Record("x", text="I think so.")] * 27
    marked = [Record("x", (("user", "2 + 2?"), ("assistant", content))), Record("x", text=content)]
    assert reasoning_share(plain + marked * 3) == found * 6 / 33
    warn_of_reasoning(plain + marked * 3)
    said = capsys.readouterr().err
    assert said.startswith("warning: 18% of the records hold chains of thought") if found else not said
    warn_of_reasoning(plain + marked)
    assert not capsys.readouterr().err


def test_records_are_encoded_in_blocks_that_do_not_show(text: TextModel, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (Record("x", CHAT), Record("y", text="plain " * 30), Record("z", CHAT[:1]), Record("e"))
    records = [*kinds, Record("l", (("user", "hi"), ("assistant", "y" * 100)))] * 5
    for wanted in (None, 1, 300):
        whole = documents(text, *records, wanted=wanted)
        for block in (1, 100):
            monkeypatch.setitem(tokenize.__globals__, "_BLOCK", block)
            parts = documents(text, *records, wanted=wanted)
            assert parts.sha256 == whole.sha256 and parts.counts == whole.counts
        monkeypatch.undo()
    assert text.encode_batch(["hi", "you"]) == [text.encode("hi"), text.encode("you")]


def test_a_chat_beyond_what_is_wanted_is_not_missed(tmp_path: Path) -> None:
    text = make_text(tmp_path, None)
    records = [Record("x", text="a" * 30)] * 4
    order = list(range(5))
    random.Random(0).shuffle(order)
    records.insert(order[-1], Record("x", CHAT))  # is taken last
    assert documents(text, *records, wanted=100).counts == {"records": 4}
    with pytest.raises(UsageError, match="x is a chat"):
        documents(text, *records)


def test_a_tokenizer_of_another_model(text: TextModel) -> None:
    with pytest.raises(UsageError, match="the model has 100 tokens"):
        documents(text, Record("x", text="abc"), vocab_size=100)


def test_the_order_and_the_digest_follow_the_seed(text: TextModel) -> None:
    records = [Record("x", text=f"text {i}") for i in range(20)]
    first, again, other = (documents(text, *records, seed=seed) for seed in (0, 0, 1))
    assert first.sha256 == again.sha256 != other.sha256
    some = documents(text, *records, wanted=20)
    assert some.ids.tolist() == first.ids[: len(some.ids)].tolist() and some.counts["records"] == 3


def test_rows_are_full_and_hold_everything_once() -> None:
    lengths = (1 + np.random.default_rng(0).exponential(15, 500)).clip(max=64).astype(int)
    rows = pack(lengths, 64)
    assert sorted(document for row in rows for document in row) == list(range(500))
    assert max(lengths[row].sum() for row in rows) <= 64
    assert lengths.sum() / (64 * len(rows)) > 0.97
    assert pack([64, 64], 64) == [[0], [1]]


def test_every_epoch_has_all_rows_in_another_order(text: TextModel) -> None:
    docs = documents(text, *(Record("x", text="a" * 40) for _ in range(7)))
    rows = Rows(docs, pack(docs.lengths, 64), 64, seed=3)
    epochs = [rows.at(7 * epoch, 7) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1] != epochs[2]
    assert rows.at(5, 11) == (epochs[0] + epochs[1] + epochs[2])[5:16]


def test_a_batch_keeps_documents_apart(text: TextModel) -> None:
    docs = documents(text, Record("x", CHAT), Record("y", text="ab"), seed=1, length=40)
    rows = Rows(docs, [[0, 1]], 40)
    batch = rows.collate([0, 0])
    total = len(docs.ids)
    assert batch.input_ids[0, :total].tolist() == docs.ids.tolist()
    first = int(docs.lengths[0])
    assert batch.cu_seq_lens_q.tolist() == [0, first, 40, 40 + first, 80]
    assert batch.max_length_q % ALIGNED == 0 and 0 <= batch.max_length_q - (40 - first) < ALIGNED
    expected = [*range(first), *range(40 - first)]
    assert batch.position_ids[1].tolist() == expected
    assert (batch.targets[0, : first - 1] == batch.input_ids[0, 1:first]).all()
    assert (batch.targets[0, [first - 1, total - 1]] == IGNORE).all() and (batch.targets[0, total:] == IGNORE).all()
    answers = batch.count(answers=True, after=0)
    assert int(answers.counted.sum()) == 2 * (docs.answers.sum() - docs.answers[docs.bounds[:-1]].sum())
    heavy = batch.count(answers=False, after=0, weight=4.0)
    assert heavy.weights[heavy.counted & heavy.answers].unique().tolist() == [4.0]
    assert heavy.weights[heavy.counted & ~heavy.answers].unique().tolist() == [1.0]
    assert not heavy.weights[~heavy.counted].any()
    late = batch.count(answers=False, after=3)
    assert int(late.counted.sum()) == 2 * sum(max(0, int(n) - 1 - 3) for n in docs.lengths)
    assert late.places.tolist() == late.counted.flatten().nonzero().flatten().tolist()
