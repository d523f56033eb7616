"""Answers of a tiny model with random weights follow schemas and grammars: only the constraint makes them valid."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.cli import main
from ligerexport.errors import UsageError
from ligerexport.run.grammar import Grammar, lark
from ligerexport.text.tokenizer import TextModel

jsonschema_rs = pytest.importorskip("jsonschema_rs")
pytest.importorskip("llguidance")
pytestmark = pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])

WORD = {"type": "string", "maxLength": 8}
SCHEMAS: dict[str, Any] = {
    "empty": {"type": "object", "additionalProperties": False},
    "null": {"type": "null"},
    "boolean": {"type": "boolean"},
    "constant": {"const": {"a": [1, "é\n\"", None]}},
    "choice": {"enum": ["red", 7, False, None, {"x": 1}]},
    "integers": {"type": "array", "items": {"type": "integer", "minimum": -3, "maximum": 120}, "maxItems": 4},
    "number": {"type": "object", "properties": {"x": {"type": "number", "minimum": 0, "maximum": 1}}, "required": ["x"],
               "additionalProperties": False},
    "tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "null"}], "items": False, "minItems": 2},
    "length": {"type": "string", "minLength": 3, "maxLength": 5},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "union": {"anyOf": [WORD, {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}]},
    "types": {"type": ["null", "boolean"]},
    "all": {"allOf": [{"type": "integer", "minimum": 5}, {"maximum": 9}]},
    "optional": {"type": "object", "properties": {"a": WORD, "b": {"type": "null"}}, "additionalProperties": False},
    "nested": {"type": "object", "properties": {"a": {"type": "object", "properties": {"b": WORD}, "required": ["b"],
               "additionalProperties": False}}, "required": ["a"], "additionalProperties": False},
    "open": {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
    "reference": {"$ref": "#/$defs/tree", "$defs": {"tree": {"type": "object", "properties": {"leaf": {"type":
                  "boolean"}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/tree"}]}}, "required":
                  ["leaf", "next"], "additionalProperties": False}}},
    "names": {"type": "object", "properties": {"é \"q\"": {"type": "boolean"}}, "required": ["é \"q\""],
              "additionalProperties": False},
}  # fmt: skip
"""Schemas whose values end by themselves, since a model with random weights does not close what may go on."""


def text(built: tuple[Path, Path], **asked: Any) -> tuple[str, str | None]:
    """Return what `generate` writes, and the reason for its end."""
    chunks = list(lx.generate(lx.load(built[1]), "Answer:", **{"temperature": 1, "max_new_tokens": 2000} | asked))
    return "".join(chunk.text for chunk in chunks), chunks[-1].finish


def test_what_ends_a_text_is_no_part_of_it(built: tuple[Path, Path]) -> None:
    """Also a token that is text to the tokenizer, which generation_config.json may name."""
    model = TextModel(built[1])
    quote, sign = model.encode('"#', special=False)
    size = open_artifact(built[1]).manifest.model.vocab_size
    for others in (set(), {sign}):
        constraint = Grammar(model, size, model.turn_ends - {sign} | others, str(lark(WORD))).begin()
        assert constraint.accept(quote) and constraint.mask()[sign] == (not others)


@pytest.mark.parametrize("name", SCHEMAS)
def test_every_answer_fits_its_schema(built: tuple[Path, Path], name: str) -> None:
    for seed in range(4):
        written, finish = text(built, json_schema=SCHEMAS[name], seed=seed)
        assert finish == "eos" and jsonschema_rs.is_valid(SCHEMAS[name], json.loads(written)), written


@pytest.mark.parametrize(
    ("rules", "pattern"),
    [
        ({"regex": "[ab]{3}(x|é)"}, "[ab]{3}(x|é)"),
        ({"grammar": 'start: "a" B ~ 2\nB: /[0-9]/'}, "a[0-9]{2}"),
        ({"grammar": 'root ::= "yes" | "no" digit\ndigit ::= [0-9]'}, "yes|no[0-9]"),
    ],
    ids=["regex", "lark", "gbnf"],
)
def test_other_grammars(built: tuple[Path, Path], rules: dict[str, str], pattern: str) -> None:
    written, finish = text(built, seed=1, **rules)
    assert finish == "eos" and re.fullmatch(pattern, written)


def test_a_limit_cuts_an_answer_off(built: tuple[Path, Path]) -> None:
    assert text(built, regex="a{9}", max_new_tokens=5) == ("aaaaa", "length")


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        ({"json_schema": {"type": "txt"}}, "txt"),
        ({"json_schema": {"if": {}}}, "Unimplemented"),
        ({"json_schema": {"$ref": "https://example.com/schema"}}, "not present"),
        ({"json_schema": []}, "a JSON schema is"),
        ({"json_schema": {"const": {1}}}, "no JSON"),
        ({"json_schema": {"$ref": "#"}}, "cannot be used"),
        ({"regex": "("}, "unclosed group"),
        ({"grammar": "start: nothing"}, "nothing"),
        ({"regex": "a", "grammar": "b"}, "expected one of"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_no_grammar_is_refused(built: tuple[Path, Path], rules: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        text(built, **rules)


def test_run(built: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*options: str) -> tuple[Any, str]:
        with pytest.raises(SystemExit) as ended:
            main(["run", str(built[1]), "Numbers:", "--quiet", *options])
        return ended.value.code, capsys.readouterr().out

    schema, rules = tmp_path / "schema.json", tmp_path / "rules.gbnf"
    schema.write_text(json.dumps(SCHEMAS["integers"]))
    rules.write_text('root ::= "a" "b"')
    code, written = run("--json-schema", str(schema))
    assert code == 0 and jsonschema_rs.is_valid(SCHEMAS["integers"], json.loads(written))
    assert run("--regex", "1{3}") == (0, "111\n") and run("--grammar", str(rules)) == (0, "ab\n")
    schema.write_text("[")
    assert run("--json-schema", str(schema)) == (2, "")
