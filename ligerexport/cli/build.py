"""`build`: export a converted checkpoint to a verified artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ligerexport.artifact.artifact import Manifest, open_artifact
from ligerexport.checkpoint.describe import describe_checkpoint
from ligerexport.cli import options
from ligerexport.cli.options import DryRun, Force, Json, Threads, verb
from ligerexport.cli.prompting import first_command
from ligerexport.console import progress
from ligerexport.errors import UsageError
from ligerexport.exporters.backend import BuildSettings
from ligerexport.exporters.build import BuildPlan
from ligerexport.exporters.targets import BLOCK, STATES, WEIGHTS

_ANNOUNCED = ("target", "lowering", "max_chunk", "weights", "state")
_FOR_GPUS = ("sms", "max_batch", "plugin", "engine")
"""Settings that `--verbose` prints, of every build and of builds for GPUs."""


@verb(computes=True)
def build(
    model: Annotated[Path, typer.Argument(help="A converted checkpoint.")] = Path("."),
    target: Annotated[str, typer.Option(help="What to build for: a row of `ligerexport list targets`.")] = "onnx",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory to write; default: TARGET inside the checkpoint.")
    ] = None,
    lowering: Annotated[
        str | None,
        typer.Option(
            help="ort uses ONNX Runtime's own operators, portable only primitive operators of any runtime, native an "
            "operator of this project: the fastest on CPUs; where no wheel brings it, it needs a C++ compiler. With "
            "native,ort, both graphs share their weights, and ort runs where native cannot."
        ),
    ] = None,
    max_chunk: Annotated[
        int | None,
        typer.Option(help="Largest number of tokens per call; default: 1024 for trt, 128 for other targets."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help=f"How weights are stored: {', '.join(WEIGHTS)}; on GPUs also the type of products. Default: fp32, "
            "on GPUs fp16."
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(help=f"Type in which slots are kept: {', '.join(STATES)}; default: that of the conversion."),
    ] = None,
    block: Annotated[int, typer.Option(help="Number of weights that share a scale, for int8 and int4.")] = BLOCK,
    sm: Annotated[
        str | None,
        typer.Option(metavar="SM,...", help="Compute capabilities of GPUs, 87 for 8.7; default: all of the target's."),
    ] = None,
    max_batch: Annotated[int, typer.Option(help="Largest number of sequences on a GPU.")] = 8,
    plugin: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Library of the TensorRT plugin to put into the artifact.")
    ] = None,
    engine: Annotated[
        bool, typer.Option("--engine/--no-engine", help="With trt, build the engine here or on the device.")
    ] = True,
    lora: Annotated[
        int, typer.Option(metavar="R", help="Let sessions use LoRA adapters up to this rank, chosen for each sequence.")
    ] = 0,
    genai: Annotated[bool, typer.Option("--genai", help="Add the files that onnxruntime-genai needs.")] = False,
    meter: Annotated[
        bool, typer.Option("--meter", help="Let the graph also return the share of attention on forgotten tokens.")
    ] = False,
    threads: Threads = None,
    force: Force = False,
    dry_run: DryRun = False,
    json: Json = False,
) -> None:
    """Export a converted checkpoint and verify the result.

    The artifact is compared with the torch model on real prompts and written only if it passes.
    """
    settings = BuildSettings(
        target, lowering, max_chunk, weights, block, parse_sms(sm), max_batch, plugin, engine, genai,
        state=state, meter=meter, lora=lora,
    )  # fmt: skip
    plan = BuildPlan(model, output, settings, force=force)
    names = _ANNOUNCED + (_FOR_GPUS if plan.sms else ())
    chosen = {name: getattr(plan.settings, name) for name in names}
    options.announce("build", model=model, output=plan.output, threads=threads, **chosen,
                     block=plan.storage.shared)  # fmt: skip
    if dry_run:
        facts = describe_checkpoint(model, plan.spec.liger) | plan.describe()
        if plan.sms:
            facts["sms"] = options.plain(plan.sms)
        return options.finish_made(json, f"would write {plan.output}", facts, None)
    path = plan.run(progress)
    manifest = open_artifact(path, hashes=False).manifest
    facts = {
        "path": str(path),
        "artifact_bytes": sum(entry.bytes for entry in manifest.files.values()),
        "weight_bytes": manifest.bytes.weights,
        "state_bytes": manifest.bytes.state_per_sequence,
        "kv_cache_larger_from": manifest.crossover,
        "verified": _verdict(manifest.verification),
        "quality": _cost(manifest),
        "chat": _chat(path),
        "device": manifest.device and "  ".join(f"{key}={options.plain(x)}" for key, x in manifest.device.items()),
    }
    options.finish_made(json, "built and verified", facts, first_command(path, target))


def _cost(manifest: Manifest) -> str | None:
    """Return the cost of a precision on the built-in text."""
    quality, what, state = manifest.quality, manifest.precision, manifest.liger.get("state_dtype", "activation")
    if quality is None:
        return None
    what += "" if state == "activation" else f" and a state in {state}"
    change, before = quality["nll"] - quality["nll_float32"], quality["nll_float32"]
    alone = f", {quality['nll_state'] - before:+.3f} from the state" if "nll_state" in quality else ""
    return f"{change:+.3f} nats per token with {what} (KL {quality['kl']:.3f}, {quality['tokens']} tokens{alone})"


def _chat(path: Path) -> str | None:
    """Return the sampling settings of `chat`, if the model has a chat template."""
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
        UsageError: The text does not have this form.
    """
    if text is None:
        return None
    numbers = [part.strip().replace(".", "") for part in options.parts(text)]
    if not numbers or not all(number.isdigit() for number in numbers):
        raise UsageError(f"--sm {text}", hint="write compute capabilities, as in --sm 87,89")
    return tuple(map(int, numbers))
