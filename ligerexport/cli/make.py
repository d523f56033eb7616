"""`convert` and `build`: from a pretrained Transformer to a verified artifact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.checkpoint.convert import SHIPPED, WINDOWS, check_score_options, choose_conversion
from ligerexport.cli import common
from ligerexport.cli.common import Debug, DryRun, Force, Json, Quiet, Verbose
from ligerexport.cli.computing import Threads, computes
from ligerexport.console import card, format_bytes, progress
from ligerexport.errors import UsageError, close_matches, quoted
from ligerexport.exporters.targets import BLOCK, WEIGHTS, get_precision, get_target
from ligerexport.exporters.tensorrt.package import Gpu, choose_gpu
from ligerexport.model.config import DEFAULT_PRESET, PRESETS, RECURRENCES, LigerConfig
from ligerexport.model.gates import GATES
from ligerexport.model.scores import SCORES


@computes
def convert(
    model: Annotated[str, typer.Argument(help="A directory, a hub id, or a built-in model such as smollm2-135m.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.")],
    preset: Annotated[
        str | None,
        typer.Option(help=f"One of: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}, or that of a memory or adapter."),
    ] = None,
    memory: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Windows and pools of all layers, from `allocate`.")
    ] = None,
    gate: Annotated[str | None, typer.Option(help=f"One of: {', '.join(GATES)}.")] = None,
    sinks: Annotated[int | None, typer.Option(help="First tokens kept exactly for ever.")] = None,
    window: Annotated[int | None, typer.Option(help="Most recent tokens kept exactly.")] = None,
    slots: Annotated[
        str | None,
        typer.Option(metavar="SCORE=COUNT,...", help=f"Tokens kept by a score: {', '.join(SCORES)}; or none."),
    ] = None,
    attention_weight: Annotated[float | None, typer.Option(help="Weight of the softmax over the slots.")] = None,
    recurrence_weight: Annotated[float | None, typer.Option(help="Weight of the recurrence; 0 leaves it out.")] = None,
    recurrence: Annotated[str | None, typer.Option(help=f"One of: {', '.join(RECURRENCES)}.")] = None,
    recurrence_distance: Annotated[
        int | None, typer.Option(help="Distance in tokens at which evicted tokens are read.")
    ] = None,
    layer_memory: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER,...:window=TOKENS,SCORE=COUNT,...", help="Layers with a memory of another size; repeatable."
        ),
    ] = None,
    keep_softmax: Annotated[str | None, typer.Option(metavar="LAYER,...", help="Layers left as they are.")] = None,
    max_distance: Annotated[int | None, typer.Option(help="Largest rotary distance; default: trained length.")] = None,
    calibrate: Annotated[
        list[Path] | None,
        typer.Option(metavar="TEXT", help="Fit the learned score on .txt files or directories of them; repeatable."),
    ] = None,
    scores: Annotated[Path | None, typer.Option(metavar="FILE", help="Learned scores that were fitted before.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of 2,048 tokens that a fit reads.")] = WINDOWS,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help=f"Merge what `recover --adapter` wrote; {SHIPPED}: what comes with a built-in model."
        ),
    ] = None,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Make a Transformer recurrent; takes seconds, minutes with --calibrate.

    Its attention is swapped for a gated recurrence and a bounded exact memory. No weight changes without --adapter.
    """
    common.begin(quiet, debug, verbose)
    changes: dict[str, Any] = {
        "gate": gate, "sinks": sinks, "window": window, "slots": common.parse_slots(slots),
        "attention_weight": attention_weight, "recurrence_weight": recurrence_weight,
        "recurrence": recurrence, "recurrence_distance": recurrence_distance,
        "layer_memory": common.parse_layer_memory(layer_memory),
        "keep_softmax": common.parse_layers(keep_softmax), "max_distance": max_distance,
    }  # fmt: skip
    config = choose_conversion(model, preset, memory, adapter, changes)
    texts = check_score_options(config, calibrate, scores, windows)
    if output.resolve() == Path(model).expanduser().resolve():
        raise UsageError(f"{output} is the model itself", hint="choose another place with -o")
    _check_output(output, force, "config.json")
    common.announce("convert", model=model, output=output, preset=preset, threads=threads, **vars(config))
    if dry_run:
        plan = _plan_convert(model, output, config)
        return _finish(json, f"would write {output}", plan | _plan_fit(model, texts, windows), None)
    from ligerexport.checkpoint.convert import convert as convert_model

    path = convert_model(model, output, preset=preset, memory=memory, calibrate=calibrate, scores=scores,
                         windows=windows, adapter=adapter, force=force, progress=progress, **changes)  # fmt: skip
    _finish(json, "converted", _describe(Path(path), config), f"ligerexport build {quoted(path)} --target onnx")


def _check_output(output: Path, force: bool, marker: str) -> None:
    from ligerexport.staging import check_destination

    check_destination(output, force=force, marker=marker)


def _finish(json: bool, title: str, facts: dict[str, Any], next_command: str | None) -> None:
    """End with the card and, if wanted, JSON."""
    common.finish_json(json, facts)
    labels = {"path": "where", "weight_bytes": "weights"}
    rows = []
    for key, value in facts.items():
        if key == "kv_cache_larger_from":
            rows.append(common.crossover_row(value))
        elif value is not None:
            text = format_bytes(value) if key.endswith("bytes") else str(value)
            if key == "scores_explain":
                text = f"{value:.0%} of the variance"
            rows.append((labels.get(key, key.removesuffix("_bytes").replace("_", " ")), text))
    card(title, rows, next_command=next_command)


def _plan_convert(model: str, output: Path, config: LigerConfig) -> dict[str, Any]:
    """Return what a conversion would do, without fetching anything."""
    from ligerexport.checkpoint.loading import check_loadable
    from ligerexport.checkpoint.sources import BUILTIN_MODELS

    path = Path(model).expanduser()
    if path.is_dir():
        check_loadable(path)
        return _describe(path, config) | {"path": str(output), "from": str(path)}
    if model in BUILTIN_MODELS:
        return {"path": str(output), "from": BUILTIN_MODELS[model].doc, "peak_memory_bytes": None}
    if "/" in model:
        return {"path": str(output), "from": f"{model} on the hub"}
    raise UsageError(f"no model '{model}'", hint=close_matches(model, BUILTIN_MODELS))


def _plan_fit(model: str, texts: list[Path], windows: int) -> dict[str, Any]:
    """Return what fitting a learned score would take; nothing where there is no text to fit on."""
    if not texts:
        return {}
    plan: dict[str, Any] = {"fit_text_bytes": sum(file.stat().st_size for file in texts)}
    path = Path(model).expanduser()
    if not path.is_dir():
        return plan | {"fit": f"{windows} windows, of {len(texts)} text files"}
    from ligerexport.checkpoint.calibrate import window_length
    from ligerexport.checkpoint.checkpoint import check_checkpoint

    info = check_checkpoint(path)
    length, weights = window_length(info.config), sum(math.prod(tensor.shape) for tensor in info.tensors.values())
    squares = 8 * info.config["num_hidden_layers"] * info.config["hidden_size"] ** 2
    return plan | {
        "fit": f"{windows} windows of {length:,} tokens, of {len(texts)} text files",
        "fit_tflop": round(2e-12 * weights * windows * length, 1),
        "fit_memory_bytes": 4 * weights + squares,
    }


def _describe(path: Path, config: LigerConfig) -> dict[str, Any]:
    """Return facts about a checkpoint under a conversion."""
    from ligerexport.checkpoint.checkpoint import check_checkpoint
    from ligerexport.layers.mixer import layer_specs, read_config

    info = check_checkpoint(path)
    hf: Any = read_config(info.config)
    hf.liger = config.to_dict()
    specs = layer_specs(hf)
    state = sum(tensor.nbytes() for spec in specs if spec for tensor in spec.state())
    converted = [spec for layer, spec in enumerate(specs) if spec and spec.config == config.for_layer(layer)]
    saved = sum(4 * spec.kv_heads * (spec.d_k + spec.d_v) for spec in specs if spec)
    return {
        "path": str(path),
        "weight_bytes": info.bytes,
        "layers": f"{len(converted)} of {len(specs)} converted",
        "exact_slots": round(sum(spec.config.num_slots for spec in converted) / max(1, len(converted))),
        "state_bytes": state,
        "kv_cache_larger_from": state // saved + 1 if saved else None,
        "scores_explain": (info.config.get("liger_scores") or {}).get("explained"),
    }


@computes
def build(
    model: Annotated[Path, typer.Argument(help="A converted checkpoint; default: this directory.")] = Path("."),
    target: Annotated[str, typer.Option(help="See `ligerexport list targets`.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; default: TARGET inside the checkpoint.")
    ] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            help="ort: ONNX Runtime's own operators. portable: primitive ones, for any runtime. native: our own "
            "operator on the CPU, the fastest; needs a C++ compiler where it runs."
        ),
    ] = None,
    max_chunk: Annotated[
        int | None, typer.Option(help="Most tokens of one call; default: 1024 for trt, else 128.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"How weights are stored: {', '.join(WEIGHTS)}; for GPUs also what products run in. Default: fp32, "
            "for GPUs fp16."
        ),
    ] = None,
    block: Annotated[int, typer.Option(help="Weights that share a scale, for int8 and int4.")] = BLOCK,
    sm: Annotated[
        str | None,
        typer.Option(metavar="SM,...", help="Compute capabilities of GPUs, 87 for 8.7; default: all of the target's."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Most sequences on a GPU.")] = 8,
    plugin: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Library of the TensorRT plugin, to go into the artifact.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="With trt: build the engine here, or on the device.")
    ] = True,
    genai: Annotated[bool, typer.Option("--genai", help="Add what onnxruntime-genai runs.")] = False,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
    debug: Debug = False,
) -> None:
    """Export a converted checkpoint, and verify it.

    The artifact is compared with the torch model on real prompts and written only if it passes.
    """
    common.begin(quiet, debug, verbose)
    from ligerexport.artifact.artifact import MANIFEST, open_artifact

    row, sms = get_target(target), common.parse_sms(sm)
    lowering, weights = lowering or row.lowerings[0], weights or row.weights[0]
    get_precision(weights, block)
    gpu = choose_gpu(target, sms, max_batch, plugin, engine)
    output = model / target if output is None else output
    _check_output(output, force, MANIFEST)
    config = _converted(model)
    common.announce("build", model=model, target=target, output=output, lowering=lowering,
                    max_chunk=max_chunk or row.chunk, weights=weights, threads=threads,
                    block=block if get_precision(weights, block).blocked else None,
                    **(vars(gpu) if gpu else {}))  # fmt: skip
    from ligerexport.exporters.build import build as build_artifact
    from ligerexport.exporters.build import planned_weight_bytes

    if dry_run:
        planned = planned_weight_bytes(model, target=target, lowering=lowering, weights=weights, block=block)
        plan = _describe(model, config) | {"path": str(output), "weight_bytes": planned}
        plan |= _plan_gpu(model, gpu, planned) if gpu else {}
        return _finish(json, f"would write {output}", plan, None)
    path = Path(build_artifact(model, output, target=target, lowering=lowering, max_chunk=max_chunk, weights=weights,
                               block=block, sms=sms, max_batch=max_batch, plugin=plugin, engine=engine, genai=genai,
                               force=force, progress=progress))  # fmt: skip
    manifest = open_artifact(path, hashes=False).manifest
    facts = {
        "path": str(path),
        "artifact_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "weight_bytes": manifest.bytes.weights,
        "state_bytes": manifest.bytes.state_per_sequence,
        "kv_cache_larger_from": manifest.crossover,
        "verified": _verdict(manifest.verification),
        "quality": _cost(manifest.precision, manifest.quality),
        "chat": _chat(path),
        "device": manifest.device and "  ".join(f"{key}={common.plain(x)}" for key, x in manifest.device.items()),
    }
    following = {"onnx": f'ligerexport run {quoted(path)} "Once upon a time"',
                 "trt": f"liger-run {quoted(path)} --ids 1,2,3"}  # fmt: skip
    _finish(json, "built and verified", facts, following.get(target))


def _plan_gpu(model: Path, gpu: Gpu, weight_bytes: int) -> dict[str, Any]:
    """Return what a build for GPUs would take."""
    from ligerexport.exporters.onnx.spec import read_spec

    spec = read_spec(model)
    parameters = sum(math.prod(spec.weights[name].shape) for name in spec.weights)
    return {
        "sms": common.plain(gpu.sms),
        "layers_to_compile": len({layer for layer in spec.mixers if layer}) * len(gpu.sms),
        "peak_memory_bytes": 8 * parameters + 3 * weight_bytes,  # all in fp32 twice, while it is verified
    }


def _converted(model: Path) -> LigerConfig:
    """Return the conversion of a checkpoint that was converted.

    Raises:
        CheckpointError: There is no such checkpoint.
        UsageError: It was not converted.
    """
    from ligerexport.checkpoint.checkpoint import check_checkpoint

    config = check_checkpoint(model).config
    if "liger" not in config:
        raise UsageError(f"{model} is not converted yet", hint=f"ligerexport convert {quoted(model)} -o liger")
    return LigerConfig.from_dict(config["liger"])


def _cost(precision: str, quality: dict[str, Any] | None) -> str | None:
    """Say what a precision costs on the built-in text."""
    if quality is None:
        return None
    change = quality["nll"] - quality["nll_float32"]
    return f"{change:+.3f} nats a token by {precision} (KL {quality['kl']:.3f}, {quality['tokens']} tokens)"


def _chat(path: Path) -> str | None:
    """Say how `chat` will sample, where the model has a chat template."""
    from ligerexport.run.generate import text_model
    from ligerexport.run.sampling import chat_settings, describe

    if not (path / "tokenizer.json").is_file() or not text_model(path).chat_template:
        return None
    return describe(*chat_settings(path))


def _verdict(verification: dict[str, Any]) -> str:
    error = verification.get("max_logit_error")
    tokens = verification.get("tokens")
    parts = [f"{tokens:,} tokens"] if tokens else []
    parts += [f"largest logit difference {error:.1e}"] if error else []
    return ", ".join(parts) or "passed"
