"""`allocate`: measure each layer with other memories, then give slots to the layers that gain most.

The gain of a layer is measured without training while the other layers keep their memories, and gains are assumed to
add up over layers. `ligerexport.model.config.read_memory` reads the resulting file.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ligerexport.checkpoint.adapter import model_id
from ligerexport.checkpoint.convert import load_model
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import LigerError, UsageError, look_up
from ligerexport.layers.mixer import LigerMixer
from ligerexport.measure.evaluate.recall import ONCE, PlainTokenizer, answer_all, passkey_prompts
from ligerexport.measure.evaluate.settings import DEVICES, DTYPES
from ligerexport.measure.opened import TorchModel, pick_device
from ligerexport.model.config import MEMORY, LigerConfig, Slots
from ligerexport.staging import staged_file
from ligerexport.text.corpus import cut_windows, read_tokens, text_files
from ligerexport.text.tokenizer import TextModel
from ligerexport.train.config import RecoverConfig, given
from ligerexport.train.model import load_teacher
from ligerexport.train.recover import check_model, read_documents
from ligerexport.versions import versions

COUNTED = ("kl", "once_nll")
"""The measurements whose relative changes add up to the cost of a memory."""


@dataclass(frozen=True)
class AllocateConfig:
    """The settings of `allocate`, except model, data and paths.

    Attributes:
        slots: Average number of exact slots per converted layer; None keeps that of the checkpoint.
        length: Number of tokens in a window of `data`.
        windows: Largest number of windows.
        trials: Number of prompts with a key.
        distance: Number of tokens of prose around the key.
        device: Row of `DEVICES`.
        dtype: Row of `DTYPES`, the type of the weights.

    Raises:
        UsageError: A value makes no sense.
    """

    slots: int | None = None
    length: int = 2048
    windows: int = 8
    trials: int = 12
    distance: int = 2048
    device: str = "auto"
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("slots", "length", "windows", "trials", "distance"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} {value}", hint="give at least 1")
        look_up("device", self.device, dict.fromkeys(DEVICES))
        look_up("dtype", self.dtype, dict.fromkeys(DTYPES))


def allocate(
    model: str | Path,
    data: str | Path | Sequence[str | Path],
    text: str | Path | Sequence[str | Path],
    output: str | Path,
    *,
    against: str | Path | None = None,
    force: bool = False,
    progress: ProgressFactory | None = None,
    **settings: Any,
) -> Path:
    """Measure a converted checkpoint with other memories, layer by layer, and give slots to the layers that gain most.

    Args:
        model: Directory that `convert` or `recover` wrote; its windows and pools are where the measurement starts.
        data: Chats or text, in the forms that `recover` reads, to measure the divergence from the Transformer on.
        text: Plain prose, as files or directories of `.txt` files, in which a key is stated once and asked for.
        output: JSON file to write, for `convert(..., memory=output)`.
        against: The Transformer; None takes the checkpoint's own weights with their softmax attention.
        force: Whether an older file may be replaced.
        progress: Reports the phases; silent by default.
        **settings: Fields of `AllocateConfig`; None leaves the default.

    Returns:
        `output`.

    Raises:
        UsageError: A setting makes no sense for this model, there is too little text, or `output` exists.
        DataError: The data is damaged, empty or in another form.
        CheckpointError: A checkpoint is incomplete or damaged.
        MissingDependency: The device is not available.
        LigerError: A measurement is not finite.
    """
    plan = AllocatePlan(model, data, text, output, against=against, force=force, progress=progress, **settings)
    plan.save(plan.run(progress))
    return plan.output


class AllocatePlan:
    """The measurements of `allocate`, whose arguments it takes and checks. Texts are read, and no weight is loaded.

    Attributes:
        info: The checkpoint.
        text: The checkpoint's tokenizer.
        windows: Windows of the data, `[n, length]`.
        prose: Token ids of the prose.
        tried: The memories of each converted layer, its own first.
        budget: Total slots of all converted layers.
        asked: Model and texts as the user gave them.

    Raises:
        UsageError, DataError, CheckpointError: As for `allocate`.
    """

    def __init__(
        self,
        model: str | Path,
        data: str | Path | Sequence[str | Path],
        text: str | Path | Sequence[str | Path],
        output: str | Path,
        *,
        against: str | Path | None = None,
        force: bool = False,
        progress: ProgressFactory | None = None,
        **settings: Any,
    ) -> None:
        config, output = AllocateConfig(**given(settings)), Path(output)
        if output.is_dir() or (output.exists() and not force):
            raise UsageError(f"{output} exists", hint="choose another file with -o, or replace a file with --force")
        pick_device(config.device)
        data, texts = _several(data), _several(text)
        length = config.length
        reading = RecoverConfig("distill", length=length, batch_tokens=length, steps=config.windows)
        self.info = info = check_model(model, reading, against)
        documents = read_documents(info, data, reading, progress)
        liger = LigerConfig.from_dict(info.config["liger"])
        if not liger.slots:
            raise UsageError(f"{model} has no pools of slots to share out", hint="convert it with --preset evicted")
        layers = sorted(set(range(info.config["num_hidden_layers"])) - liger.unchanged)
        tried = {layer: memories(liger.for_layer(layer)) for layer in layers}
        budget = (
            sum(own.num_slots for own, *_ in tried.values()) if config.slots is None else config.slots * len(layers)
        )
        least = sum(min(memory.num_slots for memory in each) for each in tried.values())
        if budget < least:
            raise UsageError(
                f"{config.slots} slots per layer, but the smallest memories tried have {least / len(layers):.0f}",
                hint=f"--slots {math.ceil(least / len(layers))}, or start from a checkpoint with fewer slots",
            )
        if length <= (fewest := min(own.num_slots for own, *_ in tried.values())):
            raise UsageError(f"windows of {length} tokens fit into {fewest} slots", hint=f"--length {16 * fewest}")
        tokenizer = TextModel(info.path)
        prose = read_tokens(text_files(texts), tokenizer)
        if len(prose) <= config.distance:
            raise UsageError(
                f"the text has {len(prose):,} tokens, a key in {config.distance:,} needs more",
                hint="give more plain text: --text FILE_OR_DIRECTORY, or a smaller --distance",
            )
        self.windows = cut_windows(documents.ids.tolist(), length, config.windows, tokenizer.encode(""))
        self.asked: dict[str, Any] = {"model": str(model), "against": None if against is None else str(against)}
        self.asked |= {"data": list(map(str, data)), "text": list(map(str, texts))}
        self.text, self.prose, self.tried, self.budget = tokenizer, prose, tried, budget
        self.config, self.against, self.output = config, against, output

    @property
    def measurements(self) -> int:
        """Number of measurements of the model: one as it is, then one for each other memory of each layer."""
        return 1 + sum(len(memories) - 1 for memories in self.tried.values())

    @property
    def tokens(self) -> int:
        """Approximate number of tokens that are read; the Transformer reads the windows too."""
        windows = self.windows.numel()
        return windows + self.measurements * (windows + self.config.trials * self.config.distance)

    def describe(self) -> dict[str, Any]:
        """Return facts about what `run` would measure."""
        return {"path": str(self.output), "layers": len(self.tried), "budget": self.budget,
                "measurements": self.measurements, "tokens": self.tokens}  # fmt: skip

    def run(self, progress: ProgressFactory | None = None) -> dict[str, Any]:
        """Measure, and return the content of the file; `save` writes it."""
        info, config, tried = self.info, self.config, self.tried
        device, dtype = pick_device(config.device), getattr(torch, config.dtype)
        measure = Measure(
            load_teacher(info, self.against, dtype).to(device), self.windows, self.text, self.prose,
            distance=config.distance, trials=config.trials,
        )  # fmt: skip
        student: Any = load_model(info.path, dtype)
        measured = measure_layers(student.to(device).eval(), tried, measure, progress or silent)
        chosen = share_out(
            [[memory.num_slots for memory in each] for each in tried.values()],
            [[row["cost"] for row in rows] for rows in measured.values()],
            self.budget,
        )
        choices = dict(zip(tried, chosen, strict=True))
        sizes = {layer: tried[layer][choice] for layer, choice in choices.items()}
        record = self.asked | {
            "model_id": model_id(info), **asdict(config),
            "base": dict(info.config["liger"]), "layers": len(sizes), "budget": self.budget,
            "total": sum(memory.num_slots for memory in sizes.values()),
            "expected_cost": sum(measured[layer][choice]["cost"] for layer, choice in choices.items()),
            "measured": [{"layer": layer, "memories": rows} for layer, rows in measured.items()],
            "versions": versions("torch", "transformers"),
        }  # fmt: skip
        return as_fields(LigerConfig.from_dict(record["base"]), sizes) | {"record": record}

    def save(self, found: dict[str, Any]) -> None:
        """Write the result of `run`."""
        with staged_file(self.output) as file:
            file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def memories(config: LigerConfig) -> list[LigerConfig]:
    """Return the memories to try in a layer, its own first: totals from 5/16 to 4 times its slots.

    Pools grow with the total, and the window takes the rest. The largest total has two more variants: one with the
    pools of half the total, and one with the window of half the total and a larger last pool.
    """

    def scaled(total: float, pools: float) -> tuple[int, Slots]:
        slots = tuple((name, max(1, round(pools * count))) for name, count in config.slots)
        return round(total * config.num_slots) - config.sinks - sum(count for _, count in slots), slots

    half, full = scaled(2, 2), scaled(4, 4)
    window, (*pools, (last, count)) = full
    deep = half[0], (*pools, (last, count + window - half[0]))
    sizes = [scaled(5 / 16, 5 / 16), scaled(1 / 2, 1 / 2), half, full, scaled(4, 2), deep]
    most = config.max_distance or math.inf
    found = [replace(config, window=window, slots=slots) for window, slots in sizes if 1 <= window <= most]
    return list(dict.fromkeys([config, *found]))


def measure_layers(
    model: Any, tried: dict[int, list[LigerConfig]], measure: Measure, progress: ProgressFactory
) -> dict[int, list[dict[str, Any]]]:
    """Measure a model with each memory of each layer while its other layers stay the same.

    Args:
        model: Converted model, on its device.
        tried: Memories by layer, the layer's own first.
        measure: Function that measures the model.

    Returns:
        For each memory its sizes, its measurements, and its cost: the sum of the relative changes of `COUNTED`.
    """
    measured = {}
    with progress("measuring layers", 1 + sum(len(each) - 1 for each in tried.values()), "steps") as advance:
        base = measure(model)
        advance(1)
        for index, (own, *others) in tried.items():
            layer, rows = model.model.layers[index], [_row(own, base, base)]
            mixer = layer.self_attn
            for memory in others:
                layer.self_attn = LigerMixer(mixer, replace(mixer.spec, config=memory), mixer.inv_freq)
                rows.append(_row(memory, measure(model), base))
                advance(1)
            layer.self_attn, measured[index] = mixer, rows
    return measured


def _row(memory: LigerConfig, found: dict[str, float], base: dict[str, float]) -> dict[str, Any]:
    cost = sum(found[key] / base[key] - 1 for key in COUNTED)
    if not math.isfinite(cost):
        raise LigerError(f"a measurement is not finite: {found}", hint="try --dtype float32")
    return {"window": memory.window, "slots": memory.slots, **found, "cost": cost}


def share_out(sizes: Sequence[Sequence[int]], costs: Sequence[Sequence[float]], budget: int) -> list[int]:
    """Return each layer's option such that the sum of costs is smallest and the slots stay within a budget.

    The solution is exact, by dynamic programming over the number of slots used.

    Args:
        sizes: Slots of each layer's options.
        costs: Costs of the same options.
        budget: Largest sum of all sizes, at least the sum of the smallest ones.
    """
    best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # cost and options so far, by slots used
    for layer_sizes, layer_costs in zip(sizes, costs, strict=True):
        reached: dict[int, tuple[float, list[int]]] = {}
        for spent, (cost, options) in best.items():
            for option, (size, more) in enumerate(zip(layer_sizes, layer_costs, strict=True)):
                total = spent + size
                if total <= budget and (total not in reached or cost + more < reached[total][0]):
                    reached[total] = (cost + more, [*options, option])
        best = reached
    return min(best.values(), key=lambda found: found[0])[1]


def as_fields(liger: LigerConfig, sizes: dict[int, LigerConfig]) -> dict[str, Any]:
    """Return the fields `MEMORY` that give each layer its memory; the most frequent memory is the default."""
    pairs = {layer: (memory.window, memory.slots) for layer, memory in sizes.items()}
    (window, slots), _ = Counter(pairs.values()).most_common(1)[0]
    single = tuple((layer, *pair) for layer, pair in pairs.items() if pair != (window, slots))
    fields = replace(liger, window=window, slots=slots, layer_memory=single).to_dict()
    return {name: fields[name] for name in MEMORY}


class Measure:
    """Measures divergence from a Transformer on fixed windows of text, and recall of a key stated once in prose.

    Args:
        teacher: The Transformer.
        windows: Token ids `[n, length]`; the first eighth of each is only context, because no memory has lost a token.
        text: The tokenizer.
        prose: Token ids of the prose.
        distance: Number of tokens of prose around the key.
        trials: Number of prompts.
    """

    def __init__(
        self, teacher: Any, windows: Tensor, text: TextModel, prose: Sequence[int], *, distance: int, trials: int
    ) -> None:
        self.windows, self.last = windows, windows.shape[1] - windows.shape[1] // 8
        prefix = text.encode("")
        prompts = passkey_prompts(PlainTokenizer(text), prose, ONCE, distance, trials, seed=7)
        self.prompts = [prompt.after(prefix) for prompt in prompts]
        self.expected = [self._log_p(teacher, row).half() for row in windows]

    def __call__(self, model: Any) -> dict[str, float]:
        """Return KL(Transformer || model), the share of digits recalled, and their NLL in nats per token."""
        total = sum(
            functional.kl_div(self._log_p(model, row), expected.float(), reduction="sum", log_target=True).item()
            for row, expected in zip(self.windows, self.expected, strict=True)
        )
        share, nll = answer_all(_Uncached(model), self.prompts)
        return {"kl": total / (len(self.windows) * self.last), "once": share.mean, "once_nll": nll.mean}

    def _log_p(self, model: Any, row: Tensor) -> Tensor:
        return _Uncached(model).forced(row[None], self.last)[0].log_softmax(dim=-1)


class _Uncached(TorchModel):
    """Reads without a cache, because replaced layers would need another cache than the model's configuration makes."""

    @torch.no_grad()
    def forced(self, ids: Tensor, last: int) -> Tensor:
        return self.model(ids.to(self.model.device), use_cache=False, logits_to_keep=last).logits.float()


def _several(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, (str, Path)) else paths
