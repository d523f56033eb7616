"""Tables of the TensorRT engines, as header and rows; run as a script, it draws steps against context."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Table = tuple[list[str], list[list[str]]]
BIG = {
    "qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336), "head": (128256, 4096),
}  # fmt: skip
"""Weights of the 8B shape."""


def _result(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def verified() -> Table:
    """Engines with the plugin against torch."""
    rows, data = [], _result("trt")
    models = product((("smollm2", "SmolLM2-135M"), ("8b", "8B shape")), (1, 16))
    runs = {f"{model}, {batch}": data[key][f"batch {batch}"] for (key, model), batch in models}
    runs |= {f"SmolLM2-135M, 1; {name}": x["batch 1"] for name, x in data["presets"].items() if name != "note"}
    for name, x in runs.items():
        half = x["torch_in_half"]
        worst, of_torch = (max(y["state_error"][kind] for kind in ("slot_key", "slot_value")) for y in (x, half))
        rows.append([
            name, f"{x['tokens_alike']} of {x['of']}", f"{x['steps']}", f"{x['divergence']['mean']:.1e}",
            f"{half['divergence']['mean']:.1e}", f"{x['state_error']['slots_alike']:.2%}",
            f"{worst:.3f} ({of_torch:.3f})",
        ])  # fmt: skip
    header = [
        "model, sequences", "greedy tokens as torch in fp32", "steps compared", "mean nats from torch's fp32",
        "torch in fp16 from its own fp32", "slots with the same token", "keys and values off by (torch in fp16)",
    ]  # fmt: skip
    return header, rows


def products() -> Table:
    """Products of one row and of 16, alone."""
    data = _result("trt")["tiles"]
    rows = []
    for name in ("qkv", "o", "gate_up", "down", "head"):
        one, few = (data[f"8b {m} {name}"][0]["us"] for m in (1, 16))
        small = data[f"smollm2 1 {name}"][0]["us"]
        outputs, inputs = BIG[name]
        rate = 2 * outputs * inputs / one / 1e6
        rows.append(
            [name, f"{outputs:,} x {inputs:,}", f"{one:.1f} µs, {rate:.2f} TB/s", f"{few:.1f} µs", f"{small:.1f} µs"]
        )
    return ["8B shape", "weight", "1 row", "16 rows", "1 row of SmolLM2-135M"], rows


def _floor(batch: int) -> float:
    """Return the minimum milliseconds of a step of the 8B shape: weights and slots read once at the copy bandwidth."""
    big, transformer = _result("trt")["8b"], _result("transformer_gpu")
    state = big["batch 16"]["state_bytes"] / 16 * batch
    return (big["weight_bytes_read"] + state) / transformer["bandwidth"]["copy"] * 1e3


def _transformers(what: str) -> dict[tuple[int, int], dict[str, Any]]:
    """Return the Transformer's rows by batch and context."""
    return {(x["batch"], x["context"]): x for x in _result("transformer_gpu")["rows"] if x["what"] == what}


def _milliseconds(times: dict[str, float]) -> str:
    return f"{times['median_ms']:.2f} ({times['p10_ms']:.2f}-{times['p90_ms']:.2f})"


def _best(row: dict[str, Any]) -> dict[str, float]:
    """Return the faster of the two attention kernels."""
    return min((row["flash"], row["cudnn"]), key=lambda times: times["median_ms"])


def goals() -> Table:
    """Steps against their floors and goals."""
    data = _result("trt")
    big, small = data["8b"], data["smollm2"]
    one, many = (big[f"batch {n}"] for n in (1, 16))
    share = one["mixers_ms"] / one["layers_ms"]
    over = many["step"]["median_ms"] / _floor(16)
    return ["one H100, fp16", "milliseconds, 10-90%", "goal", "reached"], [
        ["8B shape, a step of 1 sequence", _milliseconds(one["step"]), "85% of the floor",
         f"{_floor(1) / one['step']['median_ms']:.0%} of {_floor(1):.2f}"],
        ["8B shape, a step of 16", _milliseconds(many["step"]), "1.25 times the floor",
         f"{over:.2f} times {_floor(16):.2f}"],
        ["SmolLM2-135M, a step of 1", _milliseconds(small["batch 1"]["step"]), "0.6 ms", ""],
        ["SmolLM2-135M, a step of 16", _milliseconds(small["batch 16"]["step"]), "", ""],
        ["8B shape, the mixers' share of a step, by layers", "", "10%", f"{share:.1%}"],
    ]  # fmt: skip


def contexts() -> Table:
    """Steps of the 8B shape against the Transformer's, by context."""
    big, rows = _result("trt")["8b"], []
    steps = _transformers("step")
    for context in sorted({context for _, context in steps}):
        cells = [f"{context:,}"]
        for batch in (1, 16):
            ours, theirs = big[f"batch {batch}"], steps[batch, context]
            cells.append(f"{ours['step']['median_ms']:.2f} ms, {ours['device_bytes'] / 1e9:.1f} GB")
            if "error" in theirs:
                cells.append(theirs["error"])
                continue
            weights_and_cache = steps[1, 1024]["device_bytes"] - steps[1, 1024]["kv_bytes"] + theirs["kv_bytes"]
            cells.append(f"{_best(theirs)['median_ms']:.2f} ms, {weights_and_cache / 1e9:.1f} GB")
        rows.append(cells)
    return ["tokens of context", "1 sequence", "Transformer", "16 sequences", "Transformer"], rows


def recall() -> Table:
    """Steps with heads of their own sizes beside equal heads, on one GPU."""
    data, rows = _result("trt_recall"), []
    for batch in (1, 16, 64):
        ours, equal = (data[f"8 layers, {preset}"][f"batch {batch}"] for preset in ("recall", "memory"))
        ratio = ours["step"]["median_ms"] / equal["step"]["median_ms"]
        states = [f"{x['state_bytes'] / batch / 1e6:.1f} MB" for x in (ours, equal)]
        cells = [f"{_milliseconds(x['step'])}, {state}" for x, state in zip((ours, equal), states, strict=True)]
        rows.append([f"8 layers of the 8B shape, {batch}", *cells, f"{ratio:.2f}"])
    for title, name, batch in (
        ("SmolLM2-135M", "smollm2", 1), ("SmolLM2-135M", "smollm2", 4), ("Qwen2.5-Coder-1.5B", "qwen2.5-coder-1.5b", 1)
    ):  # fmt: skip
        row = data[name][f"batch {batch}"]
        state = f"{row['state_bytes'] / batch / 1e6:.1f} MB"
        rows.append([f"{title}, {batch}", f"{_milliseconds(row['step'])}, {state}", "", ""])
    return ["model, sequences", "`recall`, ms and state of one", "`memory`", "ratio"], rows


def row_codes() -> Table:
    """Loss of weights in 8 bits."""
    rows = []
    for row in _result("row_codes")["rows"]:
        change = f"{row['nll_change']:+.4f} ± {row['nll_change_error']:.4f}" if rows else f"{row['nll']:.3f} in all"
        rows.append([row["form"], change, f"{row['largest_row_error']:.1%}"])
    return ["weights", "NLL above fp32, nats per token", "largest error of a row"], rows


def in_torch() -> Table:
    """Prompts and steps of a converted model in torch beside the Transformer."""
    rows = []
    for row in _result("torch_prefill")["rows"]:
        sides = [name for name in row if name.startswith("session")]
        best = min(sides, key=lambda name: row[name]["ms"])
        ours, theirs, plain = (row[name]["ms"] for name in (best, "transformer", "converted"))
        title = f"{row['shape']}, a prompt of {row['tokens']:,} tokens"
        rows.append([title, f"{ours:.1f} ms", f"{plain:.1f} ms", f"{theirs:.1f} ms", f"{theirs / ours:.2f} times"])
    for row in _result("torch_decode")["rows"] + _result("torch_decode_8b")["rows"]:
        ours, theirs, plain = (row[name]["ms"] for name in ("graph", "transformer", "direct"))
        title = f"{row['shape']}, a step of {row['sequences']} after {row['tokens']:,} tokens"
        rows.append([title, f"{ours:.2f} ms", f"{plain:.1f} ms", f"{theirs:.1f} ms", f"{theirs / ours:.1f} times"])
    return ["shape", "session with CUDA graphs", "without", "Transformer", "as fast as the Transformer"], rows


def prompts() -> Table:
    """Prompts of the 8B shape and of SmolLM2."""
    data, theirs = _result("trt"), _transformers("prefill")
    rows = []
    for x in data["8b"]["batch 1"]["prefill"]:
        peer = _best(theirs[1, x["tokens"]])
        cells = [f"{x['median_ms']:.0f} ms", f"{peer['median_ms']:.0f} ms"]
        rows.append([f"8B shape, {x['tokens']:,} tokens", *cells, f"{peer['median_ms'] / x['median_ms']:.2f} times"])
    for x in data["smollm2"]["batch 1"]["prefill"]:
        rows.append([f"SmolLM2-135M, {x['tokens']:,} tokens", f"{x['median_ms']:.1f} ms", "", ""])
    return ["prompt", "engine", "Transformer", "faster"], rows


def builds() -> Table:
    """Cost of building."""
    data = _result("trt")
    engine, small = data["8b"]["engine"], data["smollm2"]["batch 1"]
    return ["engine", "built in", "host memory"], [
        ["8B shape, calls of 8,192 tokens, up to 16 sequences", f"{engine['build_seconds']:.0f} s",
         f"{engine['peak_host_bytes'] / 1e9:.0f} GB"],
        ["SmolLM2-135M, calls of 1,024 tokens, up to 16 sequences", f"{small['build_seconds']:.0f} s", ""],
    ]  # fmt: skip


def primitives() -> Table:
    """Two layers of the 8B shape with the plugin's mixers or TensorRT's own operators."""
    both = [_result("trt")["primitives"][name] for name in ("plugin", "TensorRT's operators")]
    mixers = [sum(time for name, time in x["layers"].items() if _of_mixer(name)) for x in both]
    more = both[1]["step"]["median_ms"] - both[0]["step"]["median_ms"]
    rows = [["a step, ms", *(_milliseconds(x["step"]) for x in both), _times(*(x["step"]["median_ms"] for x in both))]]
    prompts = [x["prefill"][0] for x in both]
    title = f"a prompt of {prompts[0]['tokens']} tokens, ms"
    rows.append([title, *map(_milliseconds, prompts), _times(*(x["median_ms"] for x in prompts))])
    by_difference = mixers[0], mixers[0] + more
    for title, times in (("mixers, by layers, ms", mixers), ("mixers, by what a step takes, ms", by_difference)):
        rows.append([title, *(f"{x:.3f}" for x in times), _times(*times)])
    rows.append(["built in", *(f"{x['build_seconds']:.0f} s" for x in both), ""])
    return ["8B shape, two layers", "plugin", "TensorRT's operators", ""], rows


def _of_mixer(layer: str) -> bool:
    """Return whether a layer of a profile is neither a product, nor the embedding, nor the last token."""
    return not any(word in layer for word in ("LigerLinear", "embed_tokens", "Reshape_2_copy_input"))


def _times(ours: float, theirs: float) -> str:
    return f"{theirs / ours:.1f} times"


def overlap() -> Table:
    """Steps whose launches overlap or follow each other."""
    rows = []
    for name, x in _result("trt")["overlap"].items():
        if "batch" in name:
            model, _, batch = name.partition(" batch ")
            title = {"8b": "8B shape", "smollm2": "SmolLM2-135M"}[model]
            cells = [_milliseconds(x[how]) for how in ("one after the other", "overlap")]
            rows.append([f"{title}, a step of {batch}", *cells])
    return ["milliseconds, 10-90%", "one after the other", "overlapping"], rows


def layer() -> Table:
    """A layer of the 8B shape while it reads a prompt."""
    rows = []
    for tokens, x in _result("trt")["prompt of one layer"].items():
        if not tokens.isdigit():
            continue
        ours = [f"{x[name]:.2f} ({x[f'cublas {name}']:.2f})" for name in ("qkv", "o", "gate_up", "down")]
        rows.append([f"{int(tokens):,}", *ours, f"{x['norm and learned score']:.2f}", f"{x['mixer']:.2f}"])
    header = ["tokens", "qkv", "o", "gate_up, with the gated unit", "down", "norm and learned score", "mixer"]
    return header, rows


def plot(file: Path) -> None:
    """Draw steps of the 8B shape against context."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "trt"
    from matplotlib import pyplot

    big, steps = _result("trt")["8b"], _transformers("step")
    contexts = sorted({context for _, context in steps})
    figure, axis = pyplot.subplots(figsize=(7, 3.5), layout="constrained")
    for batch, style, who in ((1, "-", "1 sequence"), (16, "--", "16 sequences")):
        found = [(n, _best(steps[batch, n])["median_ms"]) for n in contexts if "error" not in steps[batch, n]]
        axis.plot(*zip(*found, strict=True), f"C1{style}", marker="o", label=f"Transformer, {who}")
        axis.plot(contexts, [big[f"batch {batch}"]["step"]["median_ms"]] * len(contexts), f"C0{style}", marker="o",
                  label=f"ligerexport, {who}")  # fmt: skip
    axis.set(xlabel="tokens of context", ylabel="milliseconds a step", xscale="log", ylim=(0, None))
    axis.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
    axis.minorticks_off()
    axis.legend(frameon=False)
    figure.savefig(file, metadata={"Date": None})


if __name__ == "__main__":
    plot(RESULTS.parent.parent / "docs" / "images" / "steps.svg")
