"""lm-eval's tasks: the adapter scores as lm-eval's own models do, on checkpoint and artifact, without a network."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import ligerexport as lx
from ligerexport.errors import LigerError, UsageError
from ligerexport.measure.evaluate.tasks import check_tasks, run_tasks
from ligerexport.measure.opened import open_model
from ligerexport.model.config import LigerConfig
from tests.checkpoints import MEMORY, make_checkpoint
from tests.test_evaluate import SIZES, add_tokenizer

lm_eval = pytest.importorskip("lm_eval")

LENGTH = 64

QUESTIONS = [
    {"question": question, "choices": choices, "gold": gold}
    for question, choices, gold in (
        ("The sky is", [" blue", " a stone and a river", " red"], 0),
        ("Two and two are", [" five", " four"], 1),
        ("Fish live in", [" trees", " water", " books"], 1),
        ("It is cold in", [" winter", " summer"], 0),
        ("A horse has four", [" wheels of wood", " legs"], 1),
        ("x" * 70 + " and", [" more", " less"], 1),  # longer than the context
    )
]

CHOICE = """
task: local_choice
dataset_path: local_questions
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""

ROLLING = """
task: local_rolling
dataset_path: local_questions
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question * 3}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""

WRITING = """
task: local_writing
dataset_path: local_questions
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{choices[gold]}}"
generation_kwargs: {until: ["e"], max_gen_toks: 12, do_sample: false}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""

SAMPLING = WRITING.replace("do_sample: false", "do_sample: true, temperature: 1.0").replace("_writing", "_sampling")
ABSENT = CHOICE.replace("local_questions", "nowhere/such_data").replace("local_choice", "local_absent")
MAKING = """
task: local_making
custom_dataset: !function made.rows
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: ""
process_results: !function made.results
generation_kwargs: {until: [], max_gen_toks: 2, do_sample: false}
metric_list:
  - {metric: "4096", aggregation: mean, higher_is_better: true}
"""
MADE = """
from pathlib import Path
import datasets
def rows(tokenizer, max_seq_lengths, **others):
    print("noise")
    assert (Path(tokenizer) / "tokenizer.json").is_file()
    made = [{"question": "x" * length, "length": length} for length in max_seq_lengths for _ in range(3)]
    return {"test": datasets.Dataset.from_list(made)}
def results(row, answers):
    return {"4096": -1.0, str(row["length"]): float(row["length"])}
"""
TASKS = {
    "choice": CHOICE,
    "rolling": ROLLING,
    "writing": WRITING,
    "sampling": SAMPLING,
    "absent": ABSENT,
    "making": MAKING,
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with tasks, and their data set in a folder with the data set's name."""
    path = tmp_path_factory.mktemp("tasks")
    (path / "local_questions").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in QUESTIONS)
    (path / "local_questions" / "test.jsonl").write_text(lines)
    for name, content in TASKS.items():
        (path / f"{name}.yaml").write_text(content)
    (path / "made.py").write_text(MADE)
    return path


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("tasks") / "liger", MEMORY, **SIZES))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted checkpoint whose window is as long as the context."""
    config = LigerConfig(window=LENGTH, attention_weight=1.0, recurrence_weight=0.0)
    return add_tokenizer(make_checkpoint(tmp_path_factory.mktemp("tasks") / "everything", config, **SIZES))


def requests(kind: str) -> list[Any]:
    from lm_eval.api.instance import Instance

    pairs: Sequence[tuple[Any, ...]]
    if kind == "loglikelihood":
        pairs = [(q["question"], choice) for q in QUESTIONS for choice in q["choices"]]
        pairs += [("", " blue"), ("Ends with a space ", "word"), ("short", "y" * 60)]
    elif kind == "loglikelihood_rolling":
        pairs = [(q["question"] * 3,) for q in QUESTIONS] + [("tail",)]
    else:
        pairs = [(q["question"], {"until": ["e", "zz"], "max_gen_toks": 12, "do_sample": False}) for q in QUESTIONS]
    return [Instance(request_type=kind, doc={}, arguments=pair, idx=i) for i, pair in enumerate(pairs)]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["loglikelihood", "loglikelihood_rolling", "generate_until"])
@pytest.mark.parametrize("checkpoint", ["everything", "liger"])
def test_the_adapter_answers_as_the_models_of_lm_eval(
    checkpoint: str, kind: str, request: pytest.FixtureRequest
) -> None:
    from lm_eval.models.huggingface import HFLM
    from transformers import PreTrainedTokenizerFast

    from ligerexport.measure.evaluate.harness import HarnessLM

    path = request.getfixturevalue(checkpoint)
    subject = open_model(path, scoring=True)
    assert subject.model is not None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    theirs = HFLM(pretrained=subject.model, tokenizer=tokenizer, max_length=LENGTH, batch_size=1, device="cpu")
    ours = HarnessLM(subject, subject.text, LENGTH)
    asked = requests(kind)
    expected = getattr(theirs, kind)(asked, disable_tqdm=True)
    found = getattr(ours, kind)(asked)
    assert len(found) == len(expected) == len(asked)
    for mine, other in zip(found, expected, strict=True):
        if kind == "loglikelihood":
            assert mine[0] == pytest.approx(other[0], abs=1e-3) and mine[1] == other[1]
        elif kind == "loglikelihood_rolling":
            assert mine == pytest.approx(other, abs=1e-2)
        else:
            assert mine == other


def test_tasks_run_without_a_network_on_checkpoint_and_artifact(
    liger: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    names = ["local_choice", "local_rolling", "local_writing"]
    before = Path.cwd()
    artifact = lx.build(liger, tmp_path / "artifact")
    rows = []
    for path in (liger, artifact):
        report = lx.evaluate(path, tasks=names, task_data=data)
        rows.append(report.rows["model"]["tasks"])
        assert "## Tasks" in report.markdown()
    assert Path.cwd() == before
    assert set(rows[0]) == {
        "local_choice acc", "local_choice acc_norm", "local_rolling word_perplexity", "local_rolling bits_per_byte",
        "local_writing exact_match",
    }  # fmt: skip
    for name, estimate in rows[0].items():
        means = [row[name].mean for row in rows]
        if "perplexity" in name:  # an exponential of what is compared
            means = [math.log(mean) for mean in means]
        assert means[1] == pytest.approx(means[0], rel=1e-3), name
        assert estimate.count == len(QUESTIONS)
    accuracy = rows[0]["local_choice acc"]
    p, n = accuracy.mean, len(QUESTIONS)
    assert accuracy.stderr == pytest.approx((p * (1 - p) / (n - 1)) ** 0.5)
    limited = lx.evaluate(liger, tasks=["local_choice"], task_data=data, limit=2)
    assert limited.rows["model"]["tasks"]["local_choice acc"].count == 2


def test_a_task_that_makes_its_prompts_runs_at_every_length(
    liger: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = lx.evaluate(liger, tasks=["local_making", "local_choice"], task_data=data, limit=2, task_lengths=(8, 16))
    scores = report.rows["model"]["tasks"]
    assert set(scores) == {"local_making 8", "local_making 16", "local_choice acc", "local_choice acc_norm"}
    assert capsys.readouterr().out == ""  # stdout is for the report
    for length in (8, 16):  # the limit holds for each length
        assert (scores[f"local_making {length}"].mean, scores[f"local_making {length}"].count) == (length, 2)


@pytest.mark.slow  # lm-eval reads thousands of files
def test_unknown_tasks() -> None:
    with pytest.raises(UsageError, match="unknown task 'piqqa'") as caught:
        check_tasks(["piqa", "piqqa"])
    assert caught.value.hint is not None and "piqa" in caught.value.hint


def test_tasks_that_cannot_run(liger: Path, data: Path, tmp_path: Path) -> None:
    subject = open_model(liger, scoring=True)
    with pytest.raises(UsageError, match="no directory"):
        check_tasks(["piqa"], tmp_path / "absent")
    with pytest.raises(UsageError, match="samples its answers"):
        run_tasks(subject, subject.text, ["local_sampling"], max_length=LENGTH, data=data)
    from ligerexport.measure.evaluate.harness import HarnessLM

    with pytest.raises(UsageError, match="an answer has 80 tokens"):
        HarnessLM(subject, subject.text, LENGTH)._loglikelihood_tokens([(None, [1], [2] * 80)])
    with pytest.raises(LigerError, match="local_absent could not run") as absent:
        run_tasks(subject, subject.text, ["local_absent"], max_length=LENGTH, data=data)
    assert absent.value.hint is not None and "--task-data" in absent.value.hint
