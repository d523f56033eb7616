"""Write the tables of the documents from `benchmarks/results/`, so that no number in them is typed by hand.

python benchmarks/report.py            writes them
python benchmarks/report.py --check    fails if a document disagrees with the results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from textwrap import fill
from typing import Any

import report_edge
import report_kernels
import report_memory
import report_trt
import report_trust
import report_weights

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [
    ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md")),
]  # fmt: skip


def table(header: Iterable[object], rows: Iterable[Iterable[object]]) -> str:
    """Return a Markdown table."""
    lines = [list(header), *[list(row) for row in rows]]
    text = ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]
    return "\n".join([text[0], "|" + "---|" * len(lines[0]), *text[1:]])


def result(name: str) -> Any:
    """Read one file of results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def nll() -> str:
    """Untrained presets: held-out NLL by position."""
    data = result("quality")
    bins = list(data["rows"]["teacher"]["nll"])
    rows = ([name, *(f"{row['nll'][b]:.3f}" for b in bins)] for name, row in data["rows"].items())
    return table(["nats per token at positions", *bins], rows)


def recall() -> str:
    """Untrained presets: recall of a key in prose, and bytes of state."""
    data = result("quality")
    distances = list(data["rows"]["teacher"]["recall_once"])
    header = ["", *(f"once, {d}" for d in distances), *(f"twice, {d}" for d in distances), "state"]
    rows = []
    for name, row in data["rows"].items():
        shares = [f"{row[f'recall_{said}'][d]:.2f}" for said in ("once", "twice") for d in distances]
        size = row["state_bytes"]
        rows.append([name, *shares, "grows with the text" if size is None else f"{size / 1e6:.1f} MB"])
    return table(header, rows)


def stream() -> str:
    """Streams beyond the trained length."""
    rows = {name: row["stream"] for name, row in result("quality")["rows"].items() if "stream" in row}
    lengths = list(next(iter(rows.values())))
    return table(
        ["NLL of the same 2,048 tokens after", *(f"{int(n):,} tokens" for n in lengths)],
        ([name, *(f"{row[n]:.3f}" for n in lengths)] for name, row in rows.items()),
    )


def decode() -> str:
    """Time and memory of a decoded token."""
    rows = result("decode")["rows"]
    contexts = list(dict.fromkeys(row["context"] for row in rows))
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in rows):
        found = {row["context"]: row for row in rows if row["engine"] == engine}
        cells = (f"{found[c]['ms_per_token']:.1f} ms, {found[c]['rss'] / 1e6:.0f} MB" for c in contexts)
        lines.append([engine, *cells])
    return table(["tokens of context", *(f"{c:,}" for c in contexts)], lines)


def flat() -> str:
    """Artifacts alone, to long contexts."""
    return peers("flat_recall").replace("| ligerexport: ", "| memory: ").replace("| ligerexport ", "| ")


def build() -> str:
    """Build time and memory."""
    data = result("build")
    rows = (
        [row["lowering"], f"{row['seconds']:.0f} s", f"{row['peak'] / 1e6:.0f} MB", f"{row['ratio']:.2f}"]
        for row in data["rows"]
    )
    return table(["lowering", "build and verify", "peak resident", "times the weights"], rows)


def sweep() -> str:
    """All settings tried on the development split."""
    parts = []
    for group in result("slots")["groups"]:
        rows = group["rows"]
        bins = list(next(iter(rows.values()))["nll"])[4:]
        distances = list(next(iter(rows.values()))["recall_once"])
        header = ["setting", *bins, *(f"once {d}" for d in distances), *(f"twice {d}" for d in distances)]
        lines = []
        for name, row in sorted(rows.items(), key=lambda item: item[1]["nll"]["mean"]):
            shares = [
                f"{row[f'recall_{said}'].get(d, float('nan')):.2f}" for said in ("once", "twice") for d in distances
            ]
            lines.append([name, *(f"{row['nll'][b]:.3f}" for b in bins), *shares])
        parts.append(f"**{group['group']}** ({group['note']})\n\n{table(header, lines)}")
    return "\n\n".join(parts)


def evicted() -> str:
    """Ways to treat tokens that lose their slot: the prototype."""
    data = result("evicted")["rows"]
    bins = list(data["teacher"]["nll"])
    rows = [
        [name, *(f"{row['nll'][b]:.3f}" for b in bins), f"{row['nll_6144']:.3f}", f"{row['nll_chats_2048']:.3f}",
         *(f"{row['once'][d]:.2f}" for d in ("512", "1024")), f"{row['keys_4']['512']:.2f}"]
        for name, row in data.items()
    ]  # fmt: skip
    return table(["", *bins, "6,144 tokens", "chats, 2,048", "once, 512", "once, 1024", "4 keys, 512"], rows)


def budgets() -> str:
    """Loss above the Transformer's, and keys, by bytes of state with sizes for each KV head."""
    data = result("slot_budgets")
    whole = "Transformer"
    rows = [
        [name, *(f"{found[name] - found[whole]:+.2f}" for found in data["reading"].values()),
         f"{data['prose'][name] - data['prose'][whole]:+.3f}",
         *(f"{found[name]:.2f}" for found in data["keys"].values())]
        for name in data["prose"]
    ]  # fmt: skip
    head = [f"answer among {int(d):,}" for d in data["reading"]]
    return table(["state", *head, "prose, 8,192", *(f"key, {int(d):,}" for d in data["keys"])], rows)


def recovered() -> str:
    """Results of recovery and its controls."""
    return _recovered(lambda name, row: row.get("recipe") != "paper")


def paper() -> str:
    """The paper's recipe and its ablations."""
    return _recovered(lambda name, row: row.get("recipe") == "paper")


def _recovered(wanted: Callable[[str, Any], bool], source: str = "recovery") -> str:
    rows = []
    for name, row in result(source)["rows"].items():
        for model, found in row["tables"].items() if wanted(name, row) else ():
            title = name if model == "model" else f"{name}: {model}"
            chats = row["chats"][model]["nll"]["mean"]
            shares = [f"{found['once'][d]['mean']:.2f}" for d in ("512", "1024", "4096")]
            shares += [f"{found[part]['1024']['mean']:.2f}" for part in ("keys_4", "pairs_4", "copy")]
            nll = found["nll"]
            rows.append([title, f"{nll['mean']['mean']:.3f}", f"{nll['2048-4096']['mean']:.3f}",
                         f"{chats['mean']:.3f} ± {chats['stderr']:.3f}", *shares])  # fmt: skip
    return table(
        ["", "prose, 4,096", "prose, 2,048-4,096", "chats, 2,048", "once, 512", "once, 1,024", "once, 4,096",
         "4 keys, 1,024", "4 pairs, 1,024", "copy, 1,024"],
        rows,
    )  # fmt: skip


def kept() -> str:
    """The adapter of `evicted`: its model, the Transformer and the control."""
    rows = result("recovery")["rows"]
    names = {
        "the Transformer": "teacher",
        "the same, after the same chats": "Transformer, paper",
        "ours, trained": "spread, blend",
        "ours, untrained": "spread, untrained",
        "window of 128, the same training": "window, blend",
        "window of 128, untrained": "window, untrained",
    }
    return table(
        ["", "prose, 4,096", "chats, 2,048", "once, 512", "once, 1,024", "once, 4,096", "4 keys, 1,024", "copy, 1,024"],
        [[title, f"{found['nll']['mean']['mean']:.3f}", f"{rows[name]['chats']['model']['nll']['mean']['mean']:.3f}",
          *(f"{found['once'][d]['mean']:.2f}" for d in ("512", "1024", "4096")),
          *(f"{found[part]['1024']['mean']:.2f}" for part in ("keys_4", "copy"))]
         for title, name in names.items() for found in [rows[name]["tables"]["model"]]],
    )  # fmt: skip


def cost() -> str:
    """What the model of quickstart loses, in a sentence."""
    rows = {(row["peer"], row["kind"]): row["columns"] for row in result("memory_peers")["rows"]}
    ours, theirs, untrained = (rows[x, "ours"] for x in ("recall 8 MB, 3M tokens", "Transformer", "recall 8 MB"))
    prose = [f"{found['nll prose 8192']['mean']:.3f}" for found in (ours, theirs, untrained)]
    keys, far = ours["keys 4096"], ours["reading 7000"]
    return fill(
        "With 8 MB of memory, the adapter that ships (LoRA that was trained on 3 million tokens) and fp32 weights, "
        "SmolLM2-135M predicts prose almost as well as the Transformer: its loss is "
        f"{prose[0]} [nats](docs/glossary.md#nat) per token, and the Transformer's {prose[1]} (untrained {prose[2]}). "
        "It answers questions about a passage among 1,000 or 3,000 tokens as well as the Transformer. A pass key is a "
        "number, a name or the like. Of those that the Transformer still knows after 4,096 more tokens, it knows "
        f"{keys['mean']:.0%}. Among 7,000 tokens its answers have a loss of {far['mean']:.2f} ± {far['stderr']:.2f} "
        "more ([table](benchmarks/results/memory_peers.json)).", 130
    )  # fmt: skip


def shares() -> str:
    """Slots of the layers, as `allocate` chose them."""
    chosen = result("spread")["chosen"]
    layers = range(len(result("spread")["measured"][0]["layers"]))
    lines = []
    for slots, memory in chosen.items():
        single = {layer: (window, pools) for layer, window, pools in memory["layer_memory"]}
        totals = [4 + window + sum(count for _, count in pools) for window, pools in (
            single.get(layer, (memory["window"], memory["slots"])) for layer in layers)]  # fmt: skip
        lines.append([slots, *(", ".join(str(i) for i in layers if totals[i] == size) for size in SIZES)])
    return table(["slots per layer on average", *(f"{size} in layers" for size in SIZES)], lines)


SIZES = (40, 64, 128, 256, 512)


def mmlu() -> str:
    """MMLU of a larger model."""
    rows = {name: row["mmlu acc"] for name, row in result("mmlu")["rows"].items()}
    best = next(iter(rows.values()))["mean"] - 0.25
    return table(
        ["Qwen2.5-Coder-1.5B-Instruct", "MMLU, 5 examples", "share of the Transformer above chance"],
        [[name, f"{x['mean']:.3f} ± {x['stderr']:.3f}", f"{(x['mean'] - 0.25) / best:.2f} ± {x['stderr'] / best:.2f}"]
         for name, x in rows.items()],
    )  # fmt: skip


def tasks() -> str:
    """Short tasks of lm-eval."""
    rows = [(name, row["tables"]["model"]["tasks"]) for name, row in result("recovery")["rows"].items()
            if "tasks" in row["tables"]["model"]]  # fmt: skip
    names = [name for name in rows[0][1] if name.endswith(" acc")]
    body = [[name, *(f"{found[task]['mean']:.3f} ± {found[task]['stderr']:.3f}" for task in names),
             f"{sum(found[task]['mean'] for task in names) / len(names):.3f}"] for name, found in rows]  # fmt: skip
    return table(["accuracy", *(name.removesuffix(" acc") for name in names), "mean"], body)


def layers() -> str:
    """Cost of single layers."""
    data = result("layers")
    cells = lambda row: [f"{row['kl']:.3f}", f"{row['once']:.2f}", f"{row['once_nll']:.2f}"]  # noqa: E731
    ranked = sorted(enumerate(data["layers"]), key=lambda x: x[1]["kl"] + x[1]["once_nll"])
    rows = [["none", *cells(data["converted"])], *[[str(i), *cells(row)] for i, row in ranked[:8]]]
    rows += [[", ".join(map(str, row["layers"])), *cells(row)] for row in data["chosen"][1:]]
    rows += [["all: the Transformer", "0", f"{data['teacher']['once']:.2f}", f"{data['teacher']['once_nll']:.2f}"]]
    return table(["softmax in layers", "divergence, nats", "once, 2,048", "its NLL, nats"], rows)


def peers(name: str = "peers", engines: tuple[str, ...] = ()) -> str:
    """Decode, prefill and memory against some or all other engines with the original model."""
    data = [row for row in result(name)["rows"] if not engines or row["engine"] in engines]
    contexts = sorted({row["context"] for row in data})
    cells: dict[str, Callable[[Any], str]] = {
        "time per token": lambda row: f"{row['ms_per_token']:.1f} ms ({row['ms_low']:.1f}-{row['ms_high']:.1f})",
        "reading a prompt": lambda row: f"{read:.0f} tokens/s" if (read := row["prefill_tokens_per_s"]) else "-",
        "resident memory": lambda row: f"{row['rss'] / 1e6:.0f} MB",
    }
    lines = []
    for engine in dict.fromkeys(row["engine"] for row in data):
        rows = {row["context"]: row for row in data if row["engine"] == engine}
        for what, write in cells.items():
            line = [write(rows[c]) if c in rows else "-" for c in contexts]
            if set(line) != {"-"}:  # transformers reads no prompt: its cache is filled
                lines.append([f"{engine}: {what}", *line])
    return table(["tokens of context", *(f"{c:,}" for c in contexts)], lines)


def bench() -> str:
    """The longest context of `ligerexport bench`."""
    data = result("bench")["rows"]
    longest = [row for row in data if row["context"] == max(x["context"] for x in data)]
    header = [
        f"{longest[0]['context']:,} tokens of context",
        "time per token",
        "first token",
        "state or KV cache",
        "resident",
    ]
    names = {"artifact": "ligerexport"}
    lines = [
        [f"{names.get(row['kind'], 'the Transformer')}, {row['precision']}", f"{row['ms']:.1f} ms",
         f"{row['ttft_s']:.0f} s", f"{row['state_bytes'] / 1e6:.0f} MB", f"{row['rss'] / 1e6:.0f} MB"]
        for row in longest
    ]  # fmt: skip
    return table(header, lines)


def native() -> str:
    """Decode by lowering and precision."""
    rows = []
    for name, cells in result("native")["artifacts"].items():
        texts = [f"{x['ms_per_token']:.1f} ms ({x['ms_low']:.1f}-{x['ms_high']:.1f})" for x in cells]
        rows.append([name, *texts, f"{cells[0]['rss'] / 1e6:.0f} MB"])
    return table(["lowering, weights", "128", "1,024", "resident"], rows)


def nodes() -> str:
    """Nodes of a layer of the step graph."""
    presets = result("nodes")["presets"]
    kinds = [(lowering, weights) for lowering, row in next(iter(presets.values())).items() for weights in row]
    rows = [
        [f"{lowering}, {weights}", *(found[lowering][weights] for found in presets.values())]
        for lowering, weights in kinds
    ]
    return table(["nodes of a layer", *presets], rows)


def prompt_cache() -> str:
    """First token of a long prompt, with and without a cache."""
    rows = []
    for row in result("prompt_cache")["rows"]:
        restored = f"{row['ms_restored']:.0f} ms ({row['ms_low']:.0f}-{row['ms_high']:.0f})"
        size = f"{row['file_bytes'] / 1e6:.1f} MB"
        rows.append([row["artifact"], f"{row['tokens']:,}", f"{row['seconds_read']:.1f} s", restored, size])
    return table(["artifact", "tokens of the prompt", "first token, read", "first token, restored", "file"], rows)


def loading() -> str:
    """From a command to its first token."""
    data = result("loading")
    run = {row["artifact"]: row["seconds"] for row in data["run"]}
    used = {row["artifact"]: row["weights"] for row in data["rows"]}  # `run` uses the last one

    def seconds(cell: dict[str, float]) -> str:
        return f"{cell['median']:.2f} s ({cell['low']:.2f}-{cell['high']:.2f})"

    lines = []
    for row in data["rows"]:
        name, weights = row["artifact"], row["weights"]
        lines.append(
            [f"{name}, {weights}", seconds(row["load"]), seconds(row["first_token"]),
             seconds(run[name]) if used[name] == weights else "", f"{row['token']['median'] * 1e3:.1f} ms",
             f"{row['prompt_tokens_per_second']['median']:.0f}", f"{row['rss']['median'] / 1e6:.0f} MB"]
        )  # fmt: skip
    header = ["artifact, weights", "load", "first token after it", "`run -n 1`, all of it", "time per token",
              "prompt tokens/s", "resident"]  # fmt: skip
    return table(header, lines)


TABLES: dict[str, Callable[[], str]] = {
    "nll": nll, "recall": recall, "stream": stream, "decode": decode, "flat": flat, "build": build, "sweep": sweep,
    "evicted": evicted, "budgets": budgets, "recovered": recovered, "paper": paper, "tasks": tasks,
    **{source: lambda source=source: _recovered(lambda name, row: True, source) for source in ("gates", "mom")},
    "layers": layers, "native": native, "kept": kept, "cost": cost, "shares": shares,
    "mmlu": mmlu, "prompt_cache": prompt_cache, "loading": loading, "nodes": nodes, "bench": bench,
    "peers_more": peers,
    "peers_qwen": lambda: peers("peers_qwen"),
    "peers_qwen_1_5b": lambda: peers("peers_qwen_1_5b"),
    "peers": lambda: peers("peers_recall", ("ligerexport", "llama.cpp")),
}  # fmt: skip
for prefix, made in {
    "": (
        report_kernels.linear, report_kernels.linear_profile, report_kernels.linear_memory,
        report_kernels.linear_softmax, report_kernels.memory_kernel, report_kernels.step, report_kernels.first_result,
    ),
    "trt_": (
        report_trt.verified, report_trt.goals, report_trt.contexts, report_trt.prompts, report_trt.builds,
        report_trt.primitives, report_trt.overlap, report_trt.layer, report_trt.products, report_trt.recall,
        report_trt.in_torch, report_trt.row_codes,
    ),
    "trust_": (
        report_trust.promises, report_trust.faults, report_trust.hostile, report_trust.drift, report_trust.concurrency,
    ),
    "edge_": (
        report_edge.goals, report_edge.memory, report_edge.packages, report_edge.serve, report_edge.speculation,
        report_edge.calls,
    ),
    "memory_": (
        report_memory.ours, report_memory.qwen, report_memory.at_8_mb, report_memory.by_bytes,
        report_memory.at_equal_tokens, report_memory.snapshots,
    ),
    "weights_": (
        report_weights.cost, report_weights.quantised, report_weights.places, report_weights.roundings,
        report_weights.unseen, report_weights.qwen, report_weights.build_8b,
    ),
}.items():  # fmt: skip
    for make in made:
        TABLES[prefix + make.__name__] = lambda make=make: table(*make())


def render(text: str) -> str:
    """Return a document with its tables generated again."""

    def fill(match: re.Match[str]) -> str:
        return f"<!-- {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- (\w+) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    """Write or check the documents."""
    stale = []
    for path in DOCUMENTS:
        text = path.read_text()
        fresh = render(text)
        if fresh != text:
            stale.append(path.relative_to(ROOT))
            if "--check" not in sys.argv:
                path.write_text(fresh)
    print("\n".join(f"{'stale' if '--check' in sys.argv else 'written'}: {name}" for name in stale) or "up to date")
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
