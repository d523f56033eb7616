"""Generated documents: prose from sentences of `made_frames.txt`, tables, code, logs, dialogues and other forms."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from made_words import ANIMALS, FIELDS, FIRST, GOODS, LAST, THINGS, UNITS, Rng, fill


def _read(file: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Return first sentences of each kind of prose, and all other lines of each kind."""
    leads: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    kind = ""
    for line in filter(None, file.read_text(encoding="utf-8").splitlines()):
        if line.startswith("# "):
            kind = line[2:]
        elif line.startswith("> "):
            leads.setdefault(kind, []).append(line[2:])
        elif kind:
            others.setdefault(kind, []).append(line)
    return leads, others


LEADS, FRAMES = _read(Path(__file__).with_name("made_frames.txt"))
PROSE = list(LEADS)
"""Kinds of prose."""


class Made(NamedTuple):
    """A document.

    Attributes:
        text: Its text, without blank lines.
        facts: Questions about it, with their answers.
    """

    text: str
    facts: list[tuple[str, str]]


class Writer:
    """Fills templates for one document."""

    def __init__(self, rng: Rng) -> None:
        self.rng, self.bound = rng, dict[str, str]()

    def __call__(self, template: str) -> str:
        """Return a filled template, with the right form of "a"."""
        return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", fill(template, self.rng, self.bound))

    def sentence(self, template: str) -> str:
        """Return a filled template with a capital at its beginning."""
        text = self(template)
        return text[:1].upper() + text[1:]

    def some(self, pool: Any, least: int, most: int) -> list[Any]:
        """Return between `least` and `most` different entries of a pool, in a random order."""
        return self.rng.sample(list(pool), min(len(pool), self.rng.randint(least, most)))


def prose(rng: Rng, kind: str) -> Made:
    """Write a first sentence and others of a kind of prose, in one or several paragraphs or as a list."""
    write, (leads, others) = Writer(rng), (LEADS[kind], FRAMES[kind])
    lines, facts = [write.sentence(rng.choice(leads))], []
    for sentence in write.some(others, 6, 12):
        said, _, asked = sentence.partition(" ? ")
        lines.append(write.sentence(said))
        question, _, answer = asked.rpartition("? ")
        if question:
            facts.append((write(question) + "?", write(answer)))
    joint = rng.choice((" ", " ", " ", "\n", "\n- "))
    if kind == "rules" and joint == " ":
        joint = "\n"
        lines = [lines[0], *(f"{i}. {line}" for i, line in enumerate(lines[1:], 1))]
    return Made(joint.join(lines), facts)


_COLUMNS = {
    "Name": "{person}", "Town": "{place}", "Year": "{year}", "Price": "{money}", "Weight": "{dec} kg",
    "Code": "{code}", "Opened": "{date}", "Share": "{pct}", "Seats": "{count}", "Head": "{last}", "Stock": "{nn}",
    "Item": "{adj} {thing}", "Phone": "{tel}", "Start": "{clock}", "Goods": "{goods}", "Trade": "{trade}",
    "Animal": "{animal}", "Height": "{n} m", "Temperature": "{n}.{n} °C", "Owner": "{first} {last}", "Day": "{day}",
    "Month": "{month}", "Distance": "{n} km",
}  # fmt: skip


def table(rng: Rng) -> Made:
    """Write a table with a first column of names: Markdown, comma-separated, tab-separated or aligned."""
    write = Writer(rng)
    columns, rows = write.some(_COLUMNS, 3, 5), rng.randint(4, 9)
    cells = [[write(_COLUMNS[column]).replace(",", "") for column in columns] for _ in range(rows)]
    shape = rng.randrange(5)
    lines = [columns, *cells]
    if shape == 0:
        text = [f"| {' | '.join(line)} |" for line in lines]
        text.insert(1, "|" + "---|" * len(columns))
    elif shape == 1:
        text = [",".join(line) for line in lines]
    elif shape == 2:
        text = ["\t".join(line) for line in lines]
    elif shape == 3:
        text = ["  ".join(f"{cell:<16}" for cell in line).rstrip() for line in lines]
    else:
        text = [";".join(f'"{cell}"' for cell in line) for line in lines]
    title = write(
        "[Table {n}. {goods} in {place}, {year}|{last} collection, shelf {n}|Results of {date}|Stations of line {n}]"
    )
    at, which = rng.randrange(rows), rng.randrange(1, len(columns))
    facts = [(f"In the table, what stands under {columns[which]} for {cells[at][0]}?", cells[at][which])]
    return Made("\n".join([title, *text]), facts)


def record(rng: Rng) -> Made:
    """Write objects as JSON, YAML, XML, INI or a card."""
    write = Writer(rng)
    keys = write.some(_COLUMNS, 4, 8)
    objects = [{key.lower(): write(_COLUMNS[key]) for key in keys} for _ in range(rng.randint(1, 4))]
    for i, one in enumerate(objects):
        if rng.random() < 0.5:
            one |= {"id": str(rng.randrange(10_000, 99_999)), "tags": ", ".join(write.some(GOODS, 2, 3))}
        objects[i] = {key: one[key] for key in write.some(one, len(one), len(one))}
    shape, root = rng.randrange(6), write("[item|entry|station|member|part|vessel]")
    named = list(enumerate(objects))
    if shape == 0:
        whole = objects if len(objects) > 1 else objects[0]
        text = json.dumps(whole, ensure_ascii=False, indent=rng.choice((None, 1, 2)))
    elif shape == 1:
        text = "\n".join(json.dumps({root: i, **one}, ensure_ascii=False) for i, one in named)
    elif shape == 2:
        text = "\n".join(f"{root}_{i}:" + "".join(f"\n  {k}: {v}" for k, v in one.items()) for i, one in named)
    elif shape == 3:
        fields = ("".join(f"<{k}>{v}</{k}>" for k, v in one.items()) for one in objects)
        text = "\n".join(f"<{root}>{field}</{root}>" for field in fields)
    elif shape == 4:
        text = "\n".join(f"[{root}.{i}]" + "".join(f"\n{k} = {v}" for k, v in one.items()) for i, one in named)
    else:
        text = "\n---\n".join("\n".join(f"{k.upper()}: {v}" for k, v in one.items()) for one in objects)
    one = rng.choice(objects)
    key, *_, by = write.some(one, len(one), len(one))
    return Made(text, [(f"What is the {key} of the {root} with the {by} {one[by]}?", one[key])])


def log(rng: Rng) -> Made:
    """Write lines of a log with times that rise."""
    write = Writer(rng)
    day, second, shape = write("20{n}-0[1|2|3|4|5]-1[0|1|2|3|4|5]"), rng.randrange(50_000), rng.randrange(3)
    lines = []
    for _ in range(rng.randint(7, 14)):
        second += rng.randrange(1, 900)
        at = f"{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}"
        level = rng.choice(("INFO", "INFO", "WARN", "ERROR", "DEBUG"))
        message = write(rng.choice(FRAMES["log"]))
        lines.append((f"{day}T{at}Z {level} {message}", f"[{at}] {level.lower()}: {message}", f"{at} {message}")[shape])
    time, _, message = lines[-1].partition(" ")
    return Made("\n".join(lines), [(f"Which message has the time {time} in the log?", message)])


def dialogue(rng: Rng) -> Made:
    """Write a conversation of two or three people."""
    write = Writer(rng)
    people = write.some(FIRST, 2, 3)
    lines, shape = [], rng.randrange(4)
    said = [write.sentence(line) for exchange in write.some(FRAMES["dialogue"], 4, 7) for line in exchange.split(" / ")]
    for i, line in enumerate(said):
        who = people[i % len(people)]
        end = rng.choice(("said", "asked" if line.endswith("?") else "answered", "replied"))
        lines.append((f"{who}: {line}", f"— {line}", f'"{line}" {end} {who}.', f"<{who.lower()}> {line}")[shape])
    facts = [(f'What comes after the words "{said[i]}"?', said[i + 1]) for i in write.some(range(len(said) - 1), 1, 2)]
    return Made(("\n", "\n", " ", "\n")[shape].join(lines), facts)


def mail(rng: Rng) -> Made:
    """Write an e-mail, a letter or a note."""
    write = Writer(rng)
    body = [write.sentence(line) for line in write.some(FRAMES["mail"], 4, 8)]
    sender = write("{person}")
    head = rng.choice((
        "From: {first}.{last}@{word}.example\nTo: {first}@{word}.example\nDate: {date} {clock}\n"
        "Subject: [Re: |]{thing1} for {place}\nDear {first},",
        "{place}, {date}\nDear {person},", "Hi {first},", "NOTE {code}, {day}", "To all tenants of {last} House:",
    ))  # fmt: skip
    text = "\n".join((write(head), " ".join(body), write("[Best regards|Yours|Thanks|See you|Sincerely],"), sender))
    return Made(text, [("Who signed the message?", sender)])


def recipe(rng: Rng) -> Made:
    """Write a recipe, a shopping list or a bill."""
    write = Writer(rng)
    goods = write.some(GOODS + THINGS if rng.random() < 0.4 else GOODS, 5, 8)
    amounts = [write("{n} [g|ml|spoons|cups|pieces] of") for _ in goods]
    costs = [rng.randrange(50, 9000) for _ in goods]
    if rng.random() < 0.5:
        lines = [write("[Invoice|Receipt|Order] {code1}, {last} & {last}, {date}")]
        lines += [
            f"{rng.randrange(1, 20)} x {what} @ {cost / 100:.2f}" for what, cost in zip(goods, costs, strict=True)
        ]
        lines += [f"Total {sum(costs) / 100:.2f}", write("[Paid|Due] {date}, [cash|card {nn}|cheque {nn}]")]
        return Made("\n".join(lines), [(f"What is the price of {goods[0]}?", f"{costs[0] / 100:.2f}")])
    lines = [write("{word} [soup|pie|stew|bread|salad] for {few} people, from {place}"), "Ingredients:"]
    lines += [f"- {amount} {what}" for amount, what in zip(amounts, goods, strict=True)]
    steps = (f"Heat the {goods[0]} for {{n}} minutes.", f"Add {goods[1]} and stir {{few}} times.", "Wait for {first}.",
             f"Cut the {goods[2]} into {{n}} pieces.", "Bake at {nn} degrees.", f"Serve with {goods[3]}.")  # fmt: skip
    lines += [f"{i}. {write(step)}" for i, step in enumerate(steps, 1)]
    return Made("\n".join(lines), [(f"How much {goods[0]} is needed?", amounts[0].removesuffix(" of"))])


def sums(rng: Rng) -> Made:
    """Write problems of arithmetic with their solutions."""
    write, lines, facts = Writer(rng), [], []
    for i in range(1, rng.randint(4, 6)):
        who, a, b, c = rng.choice(FIRST), rng.randrange(12, 400), rng.randrange(2, 30), rng.randrange(2, 12)
        what, where, unit = rng.choice(GOODS), write("{place}"), rng.choice(UNITS)
        asked, answer = rng.choice((
            (f"{who} has {a} {unit} of {what} and buys {b} more in each of {c} weeks. How much is it then?", a + b * c),
            (f"A cart from {where} carries {b} boxes of {c} {rng.choice(THINGS)}s. How many are there?", b * c),
            (f"{a * b} {unit} of {what} are shared by {b} people in {where}. How much does each get?", a),
            (f"The way from {where} to the mill takes {c} hours at {b} km an hour. How long is it?", b * c),
            (f"{who} is {c} years older than {rng.choice(LAST)}, who is {b}. How old is {who}?", b + c),
        ))  # fmt: skip
        lines += [f"{rng.choice(('Problem', 'Exercise', 'Q'))} {i}: {asked}", f"Answer: {answer}"]
        facts.append((asked, str(answer)))
    return Made("\n".join(lines), facts[:1])


def questions(rng: Rng) -> Made:
    """Write a short passage with questions and answers about it."""
    text, facts = prose(rng, rng.choice(PROSE))
    first, second = rng.choice(
        (("Q: ", "A: "), ("Question: ", "Answer: "), ("- ", "  "), ("? ", "> "), ("Student: ", "Teacher: "))
    )
    asked = facts[: rng.randint(2, 5)]
    return Made("\n".join([text, *(f"{first}{question}\n{second}{answer}" for question, answer in asked)]), facts)


def program(rng: Rng) -> Made:
    """Write a few lines of code in one of several languages."""
    write = Writer(rng)
    v, w, u = (rng.choice(pool).split()[-1] for pool in (ANIMALS, [*THINGS, *FIELDS], GOODS))
    a, b, c = rng.randrange(100, 9999), rng.randrange(12, 99), rng.randrange(2, 10)
    write.bound |= {"v": v, "w": w, "u": u, "W": v.upper(), "N": w.title(), "a": str(a), "b": str(b), "c": str(c)}
    text = fill(rng.choice(FRAMES["code"]).replace("\\n", "\n"), rng, write.bound, choices=False)
    text = text.replace("{{", "{").replace("}}", "}")
    return Made(text, [(f"Which number stands first in the code about {v}?", re.findall(r"\b\d+", text)[0])])


def listing(rng: Rng) -> Made:
    """Write a list: a plan of days, sources, cards of people, words and their meaning, or a timetable."""
    write = Writer(rng)
    frames = rng.choice(FRAMES["list"]).split(" / ")
    mark = rng.choice(("- ", "* ", "", "{n}) "))
    lines = [write(mark.replace("{n}", str(i)) + rng.choice(frames)) for i in range(1, rng.randint(7, 13))]
    at = rng.randrange(len(lines) - 1)
    return Made("\n".join(lines), [(f'In the list, what follows "{lines[at]}"?', lines[at + 1])])


def foreign(rng: Rng) -> Made:
    """Write sentences in a language other than English."""
    return Made(Writer(rng)(rng.choice(FRAMES["foreign"])), [])


_FORMS: tuple[tuple[Callable[[Rng], Made], int], ...] = (
    (lambda rng: prose(rng, rng.choice(PROSE)), 46), (table, 7), (record, 7), (log, 4), (dialogue, 7), (mail, 6),
    (recipe, 4), (sums, 3), (questions, 6), (program, 5), (listing, 6), (foreign, 2),
)  # fmt: skip


def make(rng: random.Random) -> Made:
    """Write a document of a random form."""
    form = rng.choices([form for form, _ in _FORMS], [weight for _, weight in _FORMS])[0]
    return form(rng)
