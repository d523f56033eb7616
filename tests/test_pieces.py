"""A chat template as pieces of text: they give what the template gives, or there are none."""

from __future__ import annotations

from pathlib import Path

import pytest

from ligerexport.text.pieces import chat_pieces, join
from ligerexport.text.tokenizer import TextModel
from tests.test_text_special import TEMPLATES, letters, write

QUESTIONS = ("  What\n is it? ", "Say 'no'.", "é {{ 1 }}")
CHANGED = {"gemma3_text", "smollm3"}
"""Families whose templates do more with a system message than to put it first."""


def text_model(place: Path, template: str) -> TextModel:
    return TextModel(write(place, "family", "config", template, letters(), tokenizer_class="PreTrainedTokenizerFast"))


@pytest.mark.parametrize("family", TEMPLATES)
def test_pieces_give_what_the_template_gives(family: str, tmp_path: Path) -> None:
    model = text_model(tmp_path, TEMPLATES[family])
    pieces = chat_pieces(model)
    assert pieces is not None
    trims, turns = pieces["trims"], [{"role": "user", "content": QUESTIONS[0]}]
    text = join(pieces["first"], QUESTIONS[0], trims=trims)
    assert text == model.render(turns) != ""
    for question in QUESTIONS[1:]:
        turns += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": question}]
        whole = model.render(turns)
        assert whole.endswith(f"Yes.{join(pieces['next'], question, trims=trims)}") and len(whole) > len(text)
    assert pieces["ends"] == sorted(model.turn_ends) and set(pieces["special"]) >= model.special_ids.keys()
    system = [{"role": "system", "content": " Be brief."}, turns[0]]
    assert (pieces["system"] is None) == (family in CHANGED)
    if pieces["system"]:
        assert model.render(system) == join(pieces["system"], " Be brief.", QUESTIONS[0], trims=trims)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.content | upper }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ loop.index }}{{ m.content }}{% endfor %}",
        "{{ strftime_now('%d %b %Y') }}{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}",
        "{% for m in messages %}{{ m.content | truncate(20) }}{% endfor %}",
        "{% if messages | length > 3 %}{{ raise_exception('long') }}{% endif %}{{ messages[-1].content }}",
        "{{ messages",
        "",
    ],
)
def test_a_template_that_does_more_has_no_pieces(template: str, tmp_path: Path) -> None:
    assert chat_pieces(text_model(tmp_path, template)) is None
