"""The text that ships for the fit of a memory: as its script writes it, varied, and apart from what is measured."""

from __future__ import annotations

import ast
import random
import re
from pathlib import Path

import pytest

from ligerexport.measure.evaluate.reading import FORMATS

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "ligerexport" / "data" / "calibration").glob("*.txt"))


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


def test_generated_text_is_that_of_its_script() -> None:
    import calibration_text

    written = calibration_text.fitting(calibration_text.made(), calibration_text.SIZES["made"])
    assert next(file for file in SHIPPED if file.stem == "made").read_text(encoding="utf-8") == written


def test_shipped_text_is_small_and_in_passages() -> None:
    import calibration_text

    assert [file.stem for file in SHIPPED] == sorted(calibration_text.SIZES)
    assert 300_000 < sum(file.stat().st_size for file in SHIPPED) < 400_000
    for file in SHIPPED:
        passages = file.read_text(encoding="utf-8").split("\n\n")
        assert len(set(passages)) == len(passages) > 50
        assert all(passage.strip() and len(passage) < 2500 for passage in passages)


def test_shipped_text_has_no_format_of_the_measured_keys() -> None:
    tree = ast.parse((ROOT / "benchmarks" / "slot_budgets.py").read_text(encoding="utf-8"))  # torch is slow to import
    constants = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    keys, names = (ast.literal_eval(constants[name]) for name in ("KEYS", "NAMES"))
    text = "\n".join(file.read_text(encoding="utf-8") for file in SHIPPED)
    for said, _ in keys:
        pattern = re.escape(said.format(n="NAME", d="DIGITS")).replace("NAME", r"\w+").replace("DIGITS", r"\d+")
        assert not re.search(rf"^{pattern}$", text, re.MULTILINE), said
    for form in FORMATS.values():
        pattern = re.escape(form.said.format("NAME")).replace("NAME", r"\w+") + ".{1,40}?" + re.escape(form.end)
        assert not re.search(pattern, text), form.said
    assert "pass key" not in text
    assert not any(name in text for name in names)


def test_documents_answer_the_questions_about_them() -> None:
    import made_forms

    rng, shapes, asked = random.Random(0), set(), 0
    for _ in range(400):
        made = made_forms.make(rng)
        shapes.add(made.text[:12])
        assert "\n\n" not in made.text and not re.search(r"\{(person|place|date|n|count)\d*\}", made.text)
        for question, answer in made.facts:
            asked += 1
            assert answer.lower().removeprefix("the ").removeprefix("a ") and question.endswith("?")
            for word in re.findall(r"\d[\d,.:/-]*\d|[A-Z]\w+", answer):
                assert word.lower() in made.text.lower(), (question, answer, made.text)
    assert len(shapes) > 300 and asked > 800
