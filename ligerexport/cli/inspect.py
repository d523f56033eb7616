"""`inspect`: describe a directory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.artifact.artifact import MANIFEST, open_artifact
from ligerexport.checkpoint.checkpoint import check_checkpoint, checkpoint_config
from ligerexport.checkpoint.describe import describe_heads
from ligerexport.cli import options
from ligerexport.cli.options import Json, verb
from ligerexport.cli.prompting import build_command, first_command
from ligerexport.console import data, data_table, format_bytes
from ligerexport.dtypes import DTYPES
from ligerexport.errors import ArtifactError, CheckpointError, LigerError, UsageError, quoted
from ligerexport.exporters.targets import get_target
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import get_family
from ligerexport.versions import require

REASONS = 5
"""Largest number of reasons that the table of providers shows; `--json` has all."""


@verb(verbose=False)
def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact or a checkpoint.")] = Path("."),
    providers: Annotated[
        bool, typer.Option("--providers", help="Show which nodes each execution provider takes.")
    ] = False,
    json: Json = False,
) -> None:
    """Describe an artifact or checkpoint: whether it is supported, its state, its bytes, and what was verified."""
    if providers:
        return _providers(path, json)
    facts = _artifact(path) if (path / MANIFEST).is_file() else _checkpoint(path)
    if json:
        return options.finish_json(True, facts)
    liger = facts["liger"] or {}
    data(_support(facts.pop("supported"), facts.pop("why"), facts.pop("next")))
    if liger.get("heads"):  # which replace the window and the numbers of slots
        facts["heads"] = describe_heads(LigerConfig.from_dict(liger))
        liger["scores"] = [name for name, _ in liger.pop("slots")]
        del liger["window"]
    state, memories, heads = facts.pop("state"), liger.pop("layer_memory", ()), liger.pop("heads", ())
    rows = [(key.replace("_", " "), _plain(key, value)) for key, value in facts.items() if value not in (None, {})]
    options.print_table(("", ""), rows)
    if memories:
        data_table()
        options.print_table(("layers with their own memory", "window", "slots"), _group_memories(memories))
    if heads:
        data_table()
        rows = [(str(layer), words) for layer, words in enumerate(heads) if words]
        options.print_table(("layer", "window+scored slots of each KV head"), rows)
    if state:
        data_table()
        options.print_table(("state", "shape", "type", "layers", "bytes per sequence"), _of_all_layers(state))


def _support(supported: bool, why: str | None, after: str | None) -> str:
    """Return a line that says whether a model is supported, with the limit or the reason, and the next command."""
    line = "supported" if supported else "not supported"
    line += f"{' with a limit' * supported}: {why}" if why else ""
    return f"{line}; next: {after}" if supported and after else line


def _group_memories(memories: Iterable[tuple[int, int, Any]]) -> list[tuple[str, str, str]]:
    """Return one row for each memory: the layers that have it, its window, and its slots."""
    rows: dict[tuple[int, str], list[str]] = {}
    for layer, window, slots in memories:
        rows.setdefault((window, options.plain(slots)), []).append(str(layer))
    return [(", ".join(layers), str(window), slots) for (window, slots), layers in rows.items()]


def _of_all_layers(state: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str, str, str]]:
    """Return one row for each name, type and number of axes, with the sizes of an axis from and to if layers differ."""
    rows: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for row in state:
        rows.setdefault((row["name"], row["dtype"], len(row["shape"])), []).append(row)
    found = []
    for (name, dtype, _), parts in rows.items():
        axes = [list(dict.fromkeys(axis)) for axis in zip(*(part["shape"] for part in parts), strict=True)]
        shape = ", ".join(str(axis[0]) if len(axis) == 1 else f"{min(axis)} to {max(axis)}" for axis in axes)
        total = None if any(part["bytes"] is None for part in parts) else sum(part["bytes"] for part in parts)
        layers = str(sum(part["layers"] for part in parts))
        found.append((name, f"[{shape}]", dtype, layers, "grows" if total is None else format_bytes(total)))
    return found


def _plain(key: str, value: Any) -> str:
    if isinstance(value, dict):
        equals = "" if key == "requires" else "="  # which are ranges of versions, such as >=1.29
        shown = {name: x for name, x in value.items() if not isinstance(x, dict) and x is not None}
        return "  ".join(f"{name}{equals}{_plain(name, x)}" for name, x in shown.items())
    if isinstance(value, (list, tuple)):
        return options.plain(value)
    if isinstance(value, int) and not isinstance(value, bool) and "bytes" in key:
        return format_bytes(value)
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _conversion(liger: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a conversion if they are such.

    Raises:
        ArtifactError: A value is of the wrong type.
        UsageError: A setting is unknown, or a value is out of range.
    """
    try:
        LigerConfig.from_dict(liger)
    except (TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{MANIFEST} is damaged: {error} where the settings of a conversion were expected", hint="build it again"
        ) from error
    return liger


def _artifact(path: Path) -> dict[str, Any]:
    manifest, why = open_artifact(path, runtime=False).manifest, None
    try:
        open_artifact(path, hashes=False)
    except LigerError as error:
        why = error.message
    return {
        "supported": why is None,
        "why": why or ("it was not verified" if manifest.verification.get("skipped") else None),
        "next": None if why else first_command(path, manifest.target),
        "kind": "artifact",
        "target": f"{manifest.target}, {manifest.lowerings} lowering, {manifest.precision}",
        "source": {k: v for k, v in vars(manifest.source).items() if v and k != "files"},
        "family": manifest.family,
        "liger": _conversion(manifest.liger),
        "model": vars(manifest.model),
        "weight_bytes": manifest.bytes.weights,
        "state_bytes": manifest.bytes.state_per_sequence,
        "state_bytes_per_token": manifest.growth or None,
        "kv_cache_larger_from": manifest.crossover,
        "max_chunk": manifest.graph.max_chunk,
        "adapters": f"up to rank {manifest.lora}" if manifest.lora else None,
        "requires": manifest.requires,
        "device": manifest.device,
        "verification": manifest.verification,
        "written_by": f"ligerexport {manifest.ligerexport}, format {manifest.format_version}",
        "files": len(manifest.files) + 1,
        "state": _group((t.past.rpartition(".")[2], t.shape[1:], t.dtype) for t in manifest.state),
    }


def _providers(path: Path, json: bool) -> None:
    """Print which nodes of an artifact's graph each execution provider takes."""
    artifact = open_artifact(path, hashes=False, runtime=False)
    if not get_target(artifact.manifest.target).onnxruntime:
        raise UsageError(f"--providers with an artifact of the target {artifact.manifest.target}",
                         hint="only artifacts for ONNX Runtime have execution providers")  # fmt: skip
    require("build")
    import onnx_ir as ir

    from ligerexport.exporters.onnx.providers import operators, place
    from ligerexport.exporters.onnx.screen import check_graph

    check_graph(artifact)
    graph = ir.load(artifact.graph).graph
    rows = {name: vars(place(graph, name)) for name in operators()}
    if json:
        return options.finish_json(True, rows)
    options.print_table(("provider", "nodes", "on the CPU", "partitions", "why"), [
        (name, str(row["taken"]), str(sum(row["fallback"].values())), str(row["partitions"]),
         _most_frequent(row["fallback"])) for name, row in rows.items()
    ])  # fmt: skip


def _most_frequent(reasons: dict[str, int]) -> str:
    """Return the reasons that most nodes share, and the number of the others."""
    shown = sorted(reasons.items(), key=lambda row: -row[1])[:REASONS]
    more = len(reasons) - len(shown)
    return "  ".join([*(f"{reason} ({count})" for reason, count in shown), *([f"and {more} more"] if more else [])])


def _group(tensors: Iterable[tuple[str, Sequence[int | str], str]]) -> list[dict[str, Any]]:
    """Return one row for each tensor, with the number of layers that have it."""
    rows: dict[tuple[str, tuple[int | str, ...], str], int] = {}
    for name, shape, dtype in tensors:
        key = (name, tuple(shape), dtype)
        rows[key] = rows.get(key, 0) + 1
    found = []
    for (name, shape, dtype), layers in rows.items():
        count: int | None = DTYPES[dtype].nbytes * layers
        for size in shape:
            count = count * size if isinstance(size, int) and count is not None else None
        found.append({"name": name, "shape": list(shape), "dtype": dtype, "layers": layers, "bytes": count})
    return found


def _checkpoint(path: Path) -> dict[str, Any]:
    require("build")
    from ligerexport.checkpoint.support import support

    facts: dict[str, Any]
    model_type = checkpoint_config(path)["model_type"]
    try:
        get_family(model_type)
    except CheckpointError as error:
        reason = f"{error.message}; {error.hint}"
        facts = {"supported": False, "why": reason, "next": None, "kind": "checkpoint", "family": model_type}
        return facts | {"liger": None, "state": []}
    info = check_checkpoint(path)
    config, (supported, why) = info.config, support(info)
    after = build_command(path) if "liger" in config else f"ligerexport convert {quoted(path)} -o liger"
    facts = {
        "supported": supported,
        "why": why,
        "next": after if supported else None,
        "kind": "converted checkpoint" if "liger" in config else "checkpoint",
        "family": str(config["model_type"]).removeprefix("liger_"),
        "liger": config.get("liger"),
        "layers": config.get("num_hidden_layers"),
        "weight_bytes": info.bytes,
        "weight_types": list(info.dtypes),
        "tied": info.tied,
        "files": len(info.files),
        "state": [],
    }
    if "liger" in config:
        from ligerexport.layers.mixer import layer_specs, read_config

        specs = layer_specs(read_config(config))
        tensors = [(t.name, t.shape, "float32" if t.dtype == "activation" else t.dtype)
                   for spec in specs if spec for t in spec.state()]  # fmt: skip
        facts["state"] = _group(tensors)
        facts["state_bytes"] = sum(row["bytes"] for row in facts["state"])
    return facts
