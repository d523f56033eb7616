"""`build`: from a converted checkpoint to a verified artifact."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.cli import options
from ligerexport.cli.described import check_output, describe, finish
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.console import progress
from ligerexport.errors import UsageError, quoted
from ligerexport.exporters.targets import BLOCK, WEIGHTS, get_precision, get_target
from ligerexport.exporters.tensorrt.package import Gpu, choose_gpu
from ligerexport.model.config import LigerConfig


@verb(computes=True)
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
) -> None:
    """Export a converted checkpoint, and verify it.

    The artifact is compared with the torch model on real prompts and written only if it passes.
    """
    from ligerexport.artifact.artifact import MANIFEST, open_artifact

    row, sms = get_target(target), parse_sms(sm)
    lowering, weights = lowering or row.lowerings[0], weights or row.weights[0]
    get_precision(weights, block)
    gpu = choose_gpu(target, sms, max_batch, plugin, engine)
    output = model / target if output is None else output
    check_output(output, force, MANIFEST)
    config = _converted(model)
    options.announce("build", model=model, target=target, output=output, lowering=lowering,
                    max_chunk=max_chunk or row.chunk, weights=weights, threads=threads,
                    block=block if get_precision(weights, block).blocked else None,
                    **(vars(gpu) if gpu else {}))  # fmt: skip
    from ligerexport.exporters.build import build as build_artifact
    from ligerexport.exporters.build import planned_weight_bytes

    if dry_run:
        planned = planned_weight_bytes(model, target=target, lowering=lowering, weights=weights, block=block)
        plan = describe(model, config) | {"path": str(output), "weight_bytes": planned}
        plan |= _plan_gpu(model, gpu, planned) if gpu else {}
        return finish(json, f"would write {output}", plan, None)
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
        "device": manifest.device and "  ".join(f"{key}={options.plain(x)}" for key, x in manifest.device.items()),
    }
    following = {"onnx": f'ligerexport run {quoted(path)} "Once upon a time"',
                 "trt": f"liger-run {quoted(path)} --ids 1,2,3"}  # fmt: skip
    finish(json, "built and verified", facts, following.get(target))


def _plan_gpu(model: Path, gpu: Gpu, weight_bytes: int) -> dict[str, Any]:
    """Return what a build for GPUs would take."""
    from ligerexport.exporters.onnx.spec import read_spec

    spec = read_spec(model)
    parameters = sum(math.prod(spec.weights[name].shape) for name in spec.weights)
    return {
        "sms": options.plain(gpu.sms),
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


def parse_sms(text: str | None) -> tuple[int, ...] | None:
    """Read `86,8.9`.

    Raises:
        UsageError: It has another form.
    """
    if text is None:
        return None
    numbers = [part.strip().replace(".", "") for part in options.parts(text)]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise UsageError(f"--sm {text}", hint="write compute capabilities, as in --sm 87,89")
    return tuple(map(int, numbers))
