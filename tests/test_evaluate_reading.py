"""Reading: prompts have their parts in the right places, and answers are scored as plain formulas say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from test_cli import Cli, cli  # noqa: F401
from test_evaluate import MIXED, SIZED, _one_thread, artifact, liger, teacher, text  # noqa: F401
from test_evaluate_recall import Oracle

from ligerexport.checkpoint.calibrate import _FACTS
from ligerexport.checkpoint.convert import load_model
from ligerexport.errors import LigerError, UsageError
from ligerexport.layers.mixer import layer_specs
from ligerexport.measure.evaluate import evaluate
from ligerexport.measure.evaluate.answers import ask, ask_keys, exact_match, f1, score, summarise, write
from ligerexport.measure.evaluate.controls import equal_window, make_control
from ligerexport.measure.evaluate.estimate import Estimate
from ligerexport.measure.evaluate.questions import Question, questions_file, read_questions
from ligerexport.measure.evaluate.reading import (
    FORMATS,
    LEAD,
    ReadingPrompt,
    chat_prompts,
    key_prompts,
    reading_prompts,
)
from ligerexport.measure.opened import TorchModel, open_model
from ligerexport.model.config import LigerConfig
from ligerexport.text.tokenizer import TextModel
from tests import toy
from tests.checkpoints import make_checkpoint
from tests.tolerances import MODEL_FP32

TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


RAGGED = LigerConfig(
    window=8, sinks=4, slots=(("learned", 12),), attention_weight=1.0, recurrence_weight=0.0,
    heads=("8+40 20", "", "9 64"), keep_softmax=(1,), state_dtype="int8",
)  # fmt: skip


def passage(number: int) -> str:
    rng = random.Random(number)
    return f"Passage {number} says " + " ".join(str(rng.randrange(1000, 9999)) for _ in range(30)) + "."


ROWS = [
    Question(passage(i), f"What is answer {j} of passage {i}?", f"the {i} and {j}", f"Title {i}" if i % 2 else "")
    for i in range(16)
    for j in range(3)
]


@pytest.fixture(scope="module")
def tokenizer(liger: Path, tmp_path_factory: pytest.TempPathFactory) -> TextModel:
    """The tokenizer of `liger` with a chat template."""
    path = tmp_path_factory.mktemp("reading")
    (path / "tokenizer.json").write_bytes((liger / "tokenizer.json").read_bytes())
    config = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return TextModel(path)


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "questions.jsonl"
    path.write_text("".join(json.dumps(vars(row)) + "\n" for row in ROWS))
    return path


# Questions


def test_questions_are_read_and_split_by_passage(questions: Path, tmp_path: Path) -> None:
    assert read_questions(questions) == ROWS
    whole = tmp_path / "questions.json"
    rows = [{k: f" {v}\n" for k, v in vars(row).items() if v} for row in ROWS]
    whole.write_text(json.dumps([*rows, rows[0]], indent=1))
    assert read_questions(whole) == ROWS
    halves = [read_questions(questions, half) for half in ("dev", "test")]
    assert sorted(map(str, [*halves[0], *halves[1]])) == sorted(map(str, ROWS))
    assert {row.passage for row in halves[0]}.isdisjoint(row.passage for row in halves[1])
    assert min(map(len, halves)) >= 3 * 4


@pytest.mark.parametrize(
    ("content", "half", "message"),
    [
        ('{"passage": "a", "question": "b"}\n', None, "no text in 'answer'"),
        ('{"passage": "a", "question": "b", "answer": 5}\n', None, "no text in 'answer'"),
        ('{"passage": " ", "question": "b", "answer": "c"}\n', None, "no text in 'passage'"),
        ('{"passage": "a", "question": "b", "answer": "c", "title": 1}\n', None, "no text in 'title'"),
        ("[1, 2]\n", None, "no text in 'passage'"),
        ('{"passage": "a", "question"\n', None, "not JSON"),
        ("\n", None, "has no questions"),
        ('{"passage": "a", "question": "b", "answer": "c"}\n', "test", "no questions in the half 'test'"),
    ],
)
def test_questions_that_cannot_be_read(tmp_path: Path, content: str, half: str | None, message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(LigerError, match=message) as caught:
        read_questions(questions_file(tmp_path / "rows.jsonl"), half)
    assert caught.value.hint
    with pytest.raises(UsageError, match="no file"):
        questions_file(tmp_path / "absent")


# Prompts


@pytest.mark.parametrize("distance", [0, 300, 1000])
def test_a_paragraph_stands_among_others(tokenizer: TextModel, distance: int) -> None:
    prompts = reading_prompts(tokenizer, ROWS, distance, 20)
    assert (
        prompts == reading_prompts(tokenizer, ROWS, distance, 20) != reading_prompts(tokenizer, ROWS, distance, 20, 1)
    )
    asked = {(row.question, row.answer): row for row in ROWS}
    places, passages = [], []
    for prompt in prompts:
        context, question = tokenizer.decode(prompt.context), tokenizer.decode(prompt.question)
        row = asked[question.removeprefix("Question: ").removesuffix("\nAnswer:"), prompt.gold]
        own = f"Title {row.title.split()[1]}\n{row.passage}\n\n" if row.title else f"{row.passage}\n\n"
        assert question == f"Question: {row.question}\nAnswer:"
        assert tokenizer.decode(prompt.answer) == f" {row.answer}" and prompt.gold == row.answer
        assert prompt.context[0] == toy.BOS and toy.BOS not in prompt.context[1:]
        assert len(prompt.context) == 1 + (distance or len(own)) and context.endswith("\n\n")
        assert context.count(own) == 1 and all(context.count(passage(i)) <= 1 for i in range(16))
        places.append(context.index(own) / len(context))
        passages.append(row.passage)
    assert len(set(passages[:16])) == 16  # every passage before any is asked about twice
    assert not distance or (min(places) < 0.2 and max(places) > 0.4)
    near = reading_prompts(tokenizer, ROWS, 0, 20)
    assert [p.question for p in prompts] == [p.question for p in near]


@pytest.mark.parametrize(("distance", "message"), [(9000, "too few for this distance"), (100, "no passage is shorter")])
def test_passages_that_do_not_fit(tokenizer: TextModel, distance: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        reading_prompts(tokenizer, ROWS, distance, 2)


def test_keys_are_said_once_in_every_format(tokenizer: TextModel) -> None:
    prose = tokenizer.encode("lorem ipsum " * 200, special=False)
    prompts = key_prompts(tokenizer, prose, 128, 32)
    assert len(FORMATS) >= 8 and [p.format for p in prompts[::4]] == list(FORMATS)
    guessed = key_prompts(tokenizer, prose, 128, 32, said=False)
    for prompt, floor in zip(prompts, guessed, strict=True):
        context, other = tokenizer.decode(prompt.context), tokenizer.decode(floor.context)
        form = FORMATS[prompt.format]
        assert prompt.gold in tokenizer.decode(prompt.answer) and context.count(prompt.gold) == 1
        before, _, after = context.partition(f"{tokenizer.decode(prompt.answer)}{form.end}\n")
        assert len(after) == 128 + 1 and len(before.rpartition("\n")[0]) == LEAD
        assert (floor.question, floor.answer) == (prompt.question, prompt.answer)
        assert other == before[:LEAD] + after and len(floor.context) == 1 + LEAD + 128 + 1
    values = {name: {p.gold for p in prompts if p.format == name} for name in FORMATS}
    assert all(len(found) == 4 for found in values.values())


def test_keys_are_asked_as_no_score_is_fitted() -> None:
    words = {word.strip(".?").lower() for fact in _FACTS for part in fact for word in part.split() if "{" not in word}
    common = {"the", "of", "is", "what", "to", "in", "which", "where", "did", "does", "as", "whom"}
    for form in FORMATS.values():
        used = {word.strip(".?,").lower() for word in f"{form.said} {form.end} {form.asked}".split()}
        assert not used & (words - common)


@pytest.mark.parametrize("distance", [0, 600])
def test_a_late_turn_asks_about_the_first(tokenizer: TextModel, distance: int) -> None:
    for prompt in chat_prompts(tokenizer, ROWS, distance, 4):
        context, question = (tokenizer.decode(ids) for ids in (prompt.context, prompt.question))
        turns = context.split("<|")
        number = int(question.split("passage ")[1].split("?")[0])
        assert passage(number) in turns[1] and context.count(passage(number)) == 1
        assert question.startswith("<|user|>") and question.endswith("<|assistant|>")
        between = "<|".join(turns[3:])
        assert len(between) >= distance and (len(turns) - 3) % 2 == 0
        assert len(set(turns[3::2])) == (len(turns) - 3) // 2 <= 1 + distance // 170
        assert tokenizer.decode(prompt.answer) == prompt.gold
    with pytest.raises(UsageError, match="too few for a chat"):
        chat_prompts(tokenizer, ROWS, 9000, 1)


# Answers


def test_padded_batches_have_the_loss_of_single_prompts(liger: Path) -> None:
    scorer = open_model(liger, scoring=True)
    assert isinstance(scorer, TorchModel)
    rng = random.Random(0)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(toy.BYTES) for _ in range(count))

    prompts = [ReadingPrompt(ids(20 + 7 * i % 90), ids(5 + i % 3), ids(1 + i % 4), "") for i in range(11)]
    scorer.batch = 4
    for prompt, (loss, share) in zip(prompts, score(scorer, prompts), strict=True):
        line = torch.tensor([[*prompt.context, *prompt.question, *prompt.answer]])
        target = line[0, -len(prompt.answer) :]
        logits = scorer.model(line.to(scorer.device)).logits[0, -len(target) - 1 : -1].cpu()
        assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, target).item(), abs=MODEL_FP32)
        assert share == pytest.approx((logits.argmax(-1) == target).double().mean().item())
    together = write(scorer, prompts, 6)
    scorer.batch = 1
    assert write(scorer, prompts, 6) == together and any(together)
    expected = []
    for _, (token,) in zip(range(6), scorer.greedy([(*prompts[0].context, *prompts[0].question)]), strict=False):
        expected.append(token)
    assert together[0] == scorer.text.decode(expected).partition("\n")[0].strip()


@pytest.mark.parametrize(
    ("answer", "gold", "exact", "overlap"),
    [
        ("The Eiffel-Tower!", "eiffeltower", 1, 1),
        ("a red house", "the red house", 1, 1),
        ("red", "the red house", 0, 2 / 3),
        ("red red barn", "red house", 0, 0.4),
        ("", "house", 0, 0),
        ("the", "a", 1, 1),
        ("house red", "red house", 0, 1),
    ],
)
def test_answers_are_compared_as_in_squad(answer: str, gold: str, exact: float, overlap: float) -> None:
    assert exact_match(answer, gold) == exact and f1(answer, gold) == pytest.approx(overlap)


def test_a_closed_gap_has_the_error_of_paired_samples() -> None:
    rng = random.Random(1)
    whole = [1 + rng.random() for _ in range(200)]
    exactly = Estimate.closed([0.25 * x for x in whole], whole)
    assert exactly is not None and exactly.mean == pytest.approx(0.75) and exactly.stderr == pytest.approx(0, abs=1e-9)
    gaps = [0.5 * x + rng.gauss(0, 0.3) for x in whole]
    found = Estimate.closed(gaps, whole)
    assert found is not None and found.mean == pytest.approx(1 - sum(gaps) / sum(whole)) and found.count == 200
    left_out = [1 - (sum(gaps) - a) / (sum(whole) - b) for a, b in zip(gaps, whole, strict=True)]
    middle = sum(left_out) / 200
    jackknife = (199 / 200 * sum((x - middle) ** 2 for x in left_out)) ** 0.5
    assert found.stderr == pytest.approx(jackknife, rel=0.02)
    assert Estimate.closed([1.0], [-1.0]) is None and Estimate.closed([1.0], [2.0]) == Estimate(0.5, None, 1)


def test_shares_of_the_gap_and_keys_above_the_floor() -> None:
    losses = {"teacher": [1.0, 2.0], "equal-window": [3.0, 4.0], "model": [1.5, 2.5]}
    samples = {name: {"reading_nll": {"0": x}} for name, x in losses.items()}
    found = summarise(samples, "reading", teacher="teacher", control="equal-window")
    assert found["model"]["reading_above"]["0"] == Estimate(0.5, 0.0, 2)
    assert found["model"]["reading_closed"]["0"] == Estimate(0.75, 0.0, 2)
    assert set(found["teacher"]) == {"reading_nll"} and "reading_closed" not in found["equal-window"]
    assert set(summarise(samples, "reading")["model"]) == {"reading_nll"}


def test_an_oracle_that_copies_recalls_keys_and_guesses_without_them(tokenizer: TextModel) -> None:
    class Bytes(Oracle):
        vocab_size = toy.VOCAB

    prose = tokenizer.encode("lorem ipsum " * 200, special=False)
    pair = tuple(key_prompts(tokenizer, prose, 64, 16, said=said) for said in (True, False))
    table = ask_keys(Bytes(), {"64": pair})  # type: ignore[arg-type, dict-item]
    same = [name for name, form in FORMATS.items() if form.asked == form.said]
    assert len(same) >= 4 and {*table["formats_64"]} == {*FORMATS, "mean"} == {*table["formats_floor_64"]}
    assert all(table["formats_64"][name].mean == 1 for name in same)
    said, guessed = (table[f"formats_{which}64"]["mean"].mean for which in ("", "floor_"))
    assert guessed < 0.4 < said and table["formats"]["64"].mean == pytest.approx((said - guessed) / (1 - guessed))


# The control and the verb


@pytest.mark.parametrize(
    "config",
    [MIXED, SIZED, LigerConfig(window=20, keep_softmax=(1,)), RAGGED],
    ids=["mixed", "sized", "hybrid", "ragged"],
)
def test_an_equal_window_has_the_bytes_of_the_state(tmp_path: Path, config: LigerConfig) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", config)).eval()
    control = make_control("equal-window", model)
    liger_config = LigerConfig.from_dict(control.config.liger)
    assert liger_config == equal_window(model.config, 4)
    assert not liger_config.recurrent and not liger_config.slots and liger_config.sinks == 4
    assert liger_config.keep_softmax == config.keep_softmax and liger_config.state_dtype == config.state_dtype

    def nbytes(made: Any) -> int:
        return sum(t.nbytes(4) for spec in layer_specs(made.config) if spec for t in spec.state())

    control.config.liger["window"] += 1
    longer = nbytes(control)
    control.config.liger["window"] -= 1
    assert nbytes(control) <= nbytes(model) < longer
    assert control(torch.randint(0, 131, (1, 90))).logits.isfinite().all()


def test_controls_of_heads_with_sizes_of_their_own(tmp_path: Path) -> None:
    model = load_model(make_checkpoint(tmp_path / "liger", RAGGED)).eval()
    ids = torch.randint(0, 131, (1, 150))
    judged = make_control("random-judge", model)
    assert [layer.self_attn.spec.config.heads for layer in judged.model.layers if layer.self_attn.layer_idx != 1] == [
        ("8+40 20",),
        ("9 64",),
    ]
    assert (judged(ids).logits - model(ids).logits).abs().max() > 0.01
    with pytest.raises(UsageError, match="no window has as many slots"):
        make_control("window", model)


SMALL = ("--trials", 4, "--length", 256, "--answer-tokens", 3)


def test_the_verb_asks_and_reports(
    cli: Cli,
    liger: Path,
    teacher: Path,
    text: Path,
    questions: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "READING_DISTANCES", (0, 250))
    monkeypatch.setattr(evaluate, "KEY_DISTANCES", (0, 50))
    command = ["eval", liger, "--against", teacher, "--text", text, "--questions", questions, *SMALL]
    result = cli(
        *command, "--parts", "reading,formats,chats", "--controls", "equal-window", "-o", tmp_path / "r", "--json"
    )
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert list(told["rows"]) == ["teacher", "model", "equal-window"]
    assert told["environment"]["left_out"] == "chats: the model has no chat template"
    for name, row in told["rows"].items():
        assert {"reading_nll", "reading_exact", "reading_f1", "formats", "formats_0", "formats_floor_50"} <= set(row)
        assert list(row["reading_nll"]) == ["0", "250"] and list(row["formats"]) == ["0", "50"]
        assert ("reading_above" in row) == (name != "teacher") and ("reading_closed" in row) <= (name == "model")
        assert all(value["count"] == 4 for value in row["reading_nll"].values())
    markdown = (tmp_path / "r" / "report.md").read_text()
    sizes = [told["state_bytes"][name] for name in ("model", "equal-window")]
    assert sizes[0] * 0.9 < sizes[1] <= sizes[0]
    assert "| teacher | grows |" in markdown and f"| model | {sizes[0] / 1000:.3g} kB |" in markdown
    halves = [
        cli(*command, "--parts", "reading", "--half", half, "--length", 200, "--json", "-q") for half in ("dev", "test")
    ]
    found = [json.loads(half.out)["rows"]["model"]["reading_nll"] for half in halves]
    assert found[0] != found[1] and list(found[0]) == ["0"]


def test_an_artifact_answers_as_its_checkpoint(liger: Path, artifact: Path) -> None:
    found = []
    for path in (liger, artifact):
        scorer = open_model(path, scoring=True, dtype="float32")
        found.append(ask(scorer, "reading", {"0": reading_prompts(scorer.text, ROWS, 0, 2)}, 3))
    assert found[0]["reading_nll"]["0"] == pytest.approx(found[1]["reading_nll"]["0"], abs=1e-3)
    assert set(found[0]) == set(found[1]) == {"reading_nll", "reading_exact", "reading_f1"}


def test_a_chat_is_asked_of_a_model_with_a_template(
    liger: Path,
    questions: Path,
    tmp_path: Path,
    cli: Cli,
) -> None:
    path = tmp_path / "liger"
    path.mkdir()
    for file in liger.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    result = cli("eval", path, "--questions", questions, "--parts", "chats", "--length", 64, "--trials", 3, "--json")
    told = json.loads(result.out)
    assert set(told["rows"]["model"]) == {"chats_nll"} and told["rows"]["model"]["chats_nll"]["0"]["count"] == 3
    assert "left_out" not in told["environment"]


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (("--parts", "reading"), "no questions for reading", "--questions"),
        (("--parts", "formats"), "no text for formats", "--text"),
        (("--questions", "/absent"), "no file /absent", "--questions"),
        (("--questions", "x", "--half", "tets"), "unknown half 'tets'", "test"),
        (("--questions", "x", "--answer-tokens", -1), "answer_tokens -1", "0"),
        (("--tasks", "x", "--task-lengths", "1k"), "--task-lengths 1k", "128,1024"),
    ],
)
def test_bad_inputs(cli: Cli, liger: Path, arguments: tuple[Any, ...], message: str, hint: str) -> None:
    result = cli("eval", liger, *arguments)
    assert result.code == 2 and message in result.err and hint in result.err
