"""Conversion of a Transformer's checkpoint, or of a loaded model.

The weights keep their bytes; only config.json changes. A learned score adds a file of its own, from the fit in
`ligerexport.checkpoint.calibrate` or from an earlier fit.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.checkpoint.adapter import RECORD, RECOVERY, read_record, write_recovered
from ligerexport.checkpoint.checkpoint import CheckpointInfo, check_checkpoint, copy_companions
from ligerexport.checkpoint.describe import describe_checkpoint, describe_fit
from ligerexport.checkpoint.fitted import is_fitted
from ligerexport.checkpoint.gguf import read_header
from ligerexport.checkpoint.loading import check_finite, check_loadable, write_plain
from ligerexport.checkpoint.loading import load_model as load_model
from ligerexport.checkpoint.loading import load_transformer as load_transformer
from ligerexport.checkpoint.scores import DATA, WINDOWS, Fitting, find_scores, packaged, write_weights
from ligerexport.checkpoint.seal import write_seal
from ligerexport.checkpoint.sizes import describe_sizes, equal_sizes, fitted_sizes
from ligerexport.checkpoint.sources import BUILTIN_MODELS, Source, fetched, find_adapter, is_gguf, no_model, resolve
from ligerexport.console import ProgressFactory, silent
from ligerexport.errors import CheckpointError, UsageError, quoted
from ligerexport.model.config import DEFAULT_PRESET, MEMORY, OPEN_PRESET, LigerConfig, get_preset, read_memory
from ligerexport.model.families import PREFIX, described, get_family, harmless
from ligerexport.reading import as_path
from ligerexport.staging import check_destination, staged_directory
from ligerexport.text.corpus import text_files
from ligerexport.versions import require

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

SIZED = "recall"
"""The preset whose sizes are chosen for a number of bytes."""

FREE = ("sinks", "keep_softmax", "keep_window", "max_distance")
"""Fields of `LigerConfig` that leave a conversion at the default preset."""

SHIPPED = "shipped"
"""Name of the adapter that ships with a built-in model."""


def convert(
    model: str | Path,
    output: str | Path,
    *,
    preset: str | None = None,
    memory: str | Path | None = None,
    calibrate: Sequence[str | Path] | None = None,
    scores: str | Path | None = None,
    windows: int = WINDOWS,
    state_bytes: int | None = None,
    fit: bool = True,
    adapter: str | Path | None = None,
    merge: str | Path | None = None,
    force: bool = False,
    progress: ProgressFactory | None = None,
    **changes: Any,
) -> Path:
    """Convert a checkpoint of a family in `FAMILIES`, and check that it computes what the Transformer computed.

    On a text that fits into the memory, both must give the same output after every layer; see
    `ligerexport.checkpoint.fidelity`. The check runs each model once on a short text, and needs memory for one layer
    in fp32 in addition to the mapped weights.

    Weights are hard links to the source's files if the file system supports them, and copies otherwise. Quantised
    weights that transformers can dequantise, weights with an adapter beside them and weights under other names are
    rewritten, which needs memory for the whole model. A `learned` pool takes its scores from the first available of:
    a fit on text, a file, the source, the scores that ship with a built-in model.

    Args:
        model: A directory, a GGUF file, a hub id or a built-in model.
        output: Directory to write.
        preset: Row of `PRESETS`. None takes the conversion in which `memory` was measured, or the one that the adapter
            was trained on if there are no changes; else `recall`, or `memory` if there are changes to what `recall`
            chooses: gate, mix, or sizes. `recall` fits sizes and score to the model, which takes minutes.
        memory: File with windows and pools of all layers, from `allocate`.
        calibrate: Text files, or directories of them, to fit the learned score on; the Transformer reads them.
        scores: Safetensors file of scores from an earlier fit.
        windows: Number of windows of text that a fit of the presets `foresight` and `evicted` reads.
        state_bytes: Bytes of state of the converted layers, which the preset `recall` shares out over KV heads; None
            takes 654 tokens for each head, which are 8 MB for SmolLM2-135M.
        fit: Whether `recall` fits scores and sizes. Without a fit, every head has a window of the same size.
        adapter: LoRA that `recover` trained on exactly this conversion, to merge into its weights: a directory, or
            `shipped` for the one that ships with a built-in model for the preset `recall` or `evicted`.
        merge: PEFT adapter of the Transformer to merge into its weights before the conversion: a directory or a hub id.
        force: Whether an older converted checkpoint in `output` may be replaced.
        progress: Reports downloads, copies and the fit; silent by default.
        **changes: Fields of `LigerConfig` that differ from the preset; None leaves the preset's value.

    Returns:
        `output`.

    Raises:
        UsageError: A setting makes no sense for this model, or `output` is in use.
        SourceError: There is no such model.
        CheckpointError: The model is incomplete, damaged, already recovered, quantised in a way that cannot be undone,
            or of an unsupported family; or the adapter belongs to another conversion.
        VerificationError: A layer's output differs from the Transformer's; nothing is written.
    """

    return ConvertPlan(
        model, output, Fitting(calibrate, scores, windows, state_bytes, fit), preset=preset, memory=memory,
        adapter=adapter, merge=merge, force=force, **changes,
    ).run(progress)  # fmt: skip


class ConvertPlan:
    """A conversion whose arguments, those of `convert`, are checked. Nothing is fetched and no checkpoint is read.

    Attributes:
        liger: The conversion that was chosen; `run` adds the sizes that it chooses.
        sized: Whether sizes are chosen for a number of bytes.
        texts: Files to fit a learned score on.

    Raises:
        UsageError: A setting makes no sense, or `output` is in use.
        CheckpointError: The adapter is not from `recover`.
    """

    def __init__(
        self,
        model: str | Path,
        output: str | Path,
        fitting: Fitting | None = None,
        *,
        preset: str | None = None,
        memory: str | Path | None = None,
        adapter: str | Path | None = None,
        merge: str | Path | None = None,
        force: bool = False,
        **changes: Any,
    ) -> None:
        packed = is_gguf(Path(model).expanduser()) or (str(model) in BUILTIN_MODELS and not fetched(str(model)))
        require("builtin" if packed else "build")
        output, self.fitting = Path(output), fitting or Fitting()
        self.liger = liger = _choose_conversion(model, preset, memory, adapter, changes)
        self.preset = preset = _choose_preset(preset, memory, adapter, changes)
        self.sized = preset == SIZED and adapter is None
        if changes.get("memories") and not liger.routed:
            raise UsageError(
                f"{liger.memories} memories, but the recurrence has no weight", hint="--preset mom, or liger"
            )
        _check_size_options(self.fitting, preset, memory, adapter, changes)
        self.texts = _check_score_options(liger, self.fitting)
        if output.resolve() == Path(model).expanduser().resolve():
            raise UsageError(f"{output} is the model itself", hint="choose another place with -o")
        config = output / "config.json"
        if config.is_file() and '"liger"' not in config.read_text():  # it may be the only copy
            raise UsageError(f"{output} holds a checkpoint that is not converted", hint="choose another place with -o")
        check_destination(output, force=force, marker="config.json")
        self.model, self.output, self.adapter, self.force = model, output, adapter, force
        self.merge = merge
        if merge is not None and (Path(merge).expanduser() / RECORD).is_file():
            raise UsageError(f"{merge} was trained by recover on a converted model", hint=f"--adapter {quoted(merge)}")

    def describe(self) -> dict[str, Any]:
        """Return facts about what `run` would write and need, without fetching anything.

        Raises:
            CheckpointError: The model is a directory that cannot be converted.
            SourceError: There is no such model.
        """
        path, name = Path(self.model).expanduser(), str(self.model)
        if self.sized and (place := path if name and path.is_dir() else fetched(name)):
            return self._describe_sizes(check_checkpoint(place))
        if name and path.is_dir():
            check_loadable(path)
            facts = describe_checkpoint(path, self.liger) | {"path": str(self.output), "from": str(path)}
        elif name in BUILTIN_MODELS:
            facts = {"path": str(self.output), "from": BUILTIN_MODELS[name].doc, "peak_memory_bytes": None}
        elif is_gguf(path):
            read_header(path)
            facts = {"path": str(self.output), "from": str(path)}
        elif "/" in name:
            facts = {"path": str(self.output), "from": f"{name} on the hub"}
        else:
            raise no_model(name)
        return facts | ({} if self.sized else describe_fit(path, self.texts, self.fitting.windows))

    def _describe_sizes(self, info: CheckpointInfo) -> dict[str, Any]:
        check_loadable(info.path)
        liger = LigerConfig.from_dict(converted_config(dict(info.config), self.liger)["liger"])
        if self.fitting.fit:
            facts = describe_sizes(info, liger, self.fitting.state_bytes)
        else:
            facts = describe_checkpoint(info.path, equal_sizes(info.config, liger, self.fitting.state_bytes))
        return facts | {"path": str(self.output), "from": str(info.path)}

    def run(self, progress: ProgressFactory | None = None) -> Path:
        """Convert, and return `output`. Errors as for `convert`."""
        from ligerexport.checkpoint.fidelity import check_fidelity

        progress = progress or silent
        source = resolve(self.model, progress=progress)
        info = original = self._with_adapter(check_checkpoint(source.path), progress)
        _check_not_recovered(info, source)
        config = converted_config(dict(info.config), self.liger)
        liger = LigerConfig.from_dict(config["liger"])
        config["liger_source"] = {"model": source.name, "revision": source.revision, "license": source.license}
        config["liger_source"] |= _made_plain(info) | ({} if self.merge is None else {"adapter": str(self.merge)})
        lora = None if self.adapter is None else _find_adapter(source, self.adapter, self.preset)
        with staged_directory(self.output, force=self.force, marker="config.json") as stage:
            aside = stage / "plain"
            if not info.plain:
                with progress("writing plain weights", info.bytes) as advance:
                    info = write_plain(info, aside)
                    advance(info.bytes)
                config["tie_word_embeddings"] = info.tied
            found = None
            if self.sized and self.fitting.fit:
                liger, found = fitted_sizes(source, info, liger, self.fitting, self.texts, progress)
            elif self.sized:
                liger = equal_sizes(info.config, liger, self.fitting.state_bytes)
            elif liger.foresees or liger.celled:
                found = find_scores(source, info, liger, self.texts, self.fitting, progress)
            self.liger, config["liger"] = liger, liger.to_dict()
            if found is not None:
                config["liger_scores"] = found.facts
            (stage / "config.json").write_text(json.dumps(config, indent=2) + "\n")
            copy_companions(source.path, stage)
            write_weights(stage, info, found, progress)
            _seal(stage, source, progress)
            shutil.rmtree(aside, ignore_errors=True)
            check_fidelity(original, stage, progress)
            if lora is not None:
                write_recovered(stage, check_checkpoint(stage), lora, progress)
        return self.output

    def _with_adapter(self, info: CheckpointInfo, progress: ProgressFactory) -> CheckpointInfo:
        """Return the checkpoint with the adapter that the user named."""
        if self.merge is None:
            return info
        if info.adapter is not None or "liger" in info.config:
            what = f"has an adapter, {info.adapter.name}" if info.adapter else "is converted"
            raise UsageError(f"--merge with {info.path}, which {what}", hint="give a Transformer without one")
        return replace(info, adapter=find_adapter(self.merge, progress))


def _choose_conversion(
    model: str | Path, preset: str | None, memory: str | Path | None, adapter: str | Path | None,
    changes: Mapping[str, Any],
) -> LigerConfig:  # fmt: skip
    """Return the conversion that the options ask for."""
    if memory is not None:
        return read_memory(memory, preset, **changes)
    changed = any(value is not None for value in changes.values())
    if adapter is None or changed or (preset and adapter != SHIPPED):
        return get_preset(_choose_preset(preset, memory, adapter, changes), **changes)
    place = _shipped(str(model), preset or DEFAULT_PRESET) if adapter == SHIPPED else as_path(adapter)
    return LigerConfig.from_dict(read_record(place)["liger"])


def _choose_preset(
    preset: str | None, memory: str | Path | None, adapter: str | Path | None, changes: Mapping[str, Any]
) -> str:
    """Return the preset that is named, or the one that is meant."""
    own = any(value is not None for name, value in changes.items() if name not in FREE)
    return preset or (OPEN_PRESET if own or memory is not None or adapter not in (None, SHIPPED) else DEFAULT_PRESET)


def _shipped(model: str, preset: str) -> Path:
    """Return where the adapter of a built-in model for a preset is.

    Raises:
        UsageError: None ships.
    """
    place = DATA / "adapters" / f"{model}.{preset}"
    if model not in BUILTIN_MODELS or not place.exists():
        raise _none_ships(model, preset)
    return place


def _none_ships(model: str, preset: str) -> UsageError:
    hint = "convert it without, then train one: ligerexport recover LIGER --data FILE --adapter"
    if (name := Path(model).name) in BUILTIN_MODELS and name != model:
        hint = f"adapters ship for names: ligerexport convert {quoted(name)} --adapter {SHIPPED} -o liger"
    return UsageError(f"no adapter ships for {Path(model).name} with the preset {preset}", hint=hint)


def _check_size_options(
    fitting: Fitting, preset: str | None, memory: str | Path | None, adapter: str | Path | None,
    changes: Mapping[str, Any],
) -> None:  # fmt: skip
    """Check the options of the preset whose sizes are chosen for a number of bytes."""
    options = {"--state-bytes": fitting.state_bytes is not None, "--no-fit": not fitting.fit}
    asked = [option for option, given in options.items() if given]
    if preset != SIZED:
        if asked:
            raise UsageError(f"{asked[0]} is for sizes that are chosen for you", hint=f"--preset {SIZED}")
        return
    if adapter == SHIPPED and asked:
        raise UsageError(f"{asked[0]} with the adapter that ships, which has sizes of its own", hint="leave one out")
    sizes = {"memory": memory, "adapter": None if adapter == SHIPPED else adapter}
    sizes |= {name: changes.get(name) for name in MEMORY}
    if given := [name.replace("_", "-") for name, value in sizes.items() if value is not None]:
        raise UsageError(
            f"--{given[0]} with the preset {SIZED}, which chooses sizes and scores",
            hint="say how large the state may be: --state-bytes",
        )
    if not fitting.fit and (fitting.calibrate or fitting.scores):
        option = "--calibrate" if fitting.calibrate else "--scores"
        raise UsageError(f"both {option} and --no-fit", hint="use a fit, or go without one")
    if changes.get("recurrence") == "cells":
        raise UsageError(f"cells with the preset {SIZED}, which does not fit them", hint="--preset evicted")


def _check_score_options(liger: LigerConfig, fitting: Fitting) -> list[Path]:
    """Check where the learned scores come from, and return the text files to fit them on."""
    calibrate, scores = fitting.calibrate, fitting.scores
    if (calibrate or scores) and not (liger.foresees or liger.celled):
        raise UsageError(
            f"{'--calibrate' if calibrate else '--scores'} is for a learned score or cells, which are not used",
            hint="--preset foresight, --slots learned=COUNT, or --recurrence cells --recurrence-weight 1",
        )
    if calibrate and scores:
        raise UsageError("both --calibrate and --scores", hint="fit a score, or give one from an earlier fit")
    if fitting.windows < 1:
        raise UsageError(f"{fitting.windows} windows", hint="a fit reads at least one; 64 is a good number")
    if scores is not None and not Path(scores).is_file():
        raise UsageError(f"no file {scores}", hint="give a safetensors file, or text to fit on: --calibrate TEXT")
    return text_files(calibrate or (), "--calibrate")


def _find_adapter(source: Source, adapter: str | Path, preset: str) -> Path:
    if adapter != SHIPPED:
        return as_path(adapter)
    found = packaged(source, _shipped(source.name, preset))
    if found is None:  # a directory has the name of the built-in model
        raise _none_ships(source.name, preset)
    return found


def _seal(place: Path, source: Source, progress: ProgressFactory) -> None:
    """Check that every weight of a conversion is finite, and record size, time and hash of its files."""
    info = check_checkpoint(place, tokenizer=False)
    same = [file for file in info.files if (source.path / file.name).exists()]
    same = [file for file in same if file.samefile(source.path / file.name)]
    known = {file.name: source.sha256[file.name] for file in same if file.name in source.sha256}
    hashed = sum(file.stat().st_size for file in info.files if file.name not in known)
    with progress("checking the weights", info.bytes + hashed) as advance:
        check_finite(replace(info, path=source.path), advance)  # errors name the directory that the user gave
        write_seal(place, info.files, known, advance)


def _made_plain(info: CheckpointInfo) -> dict[str, str]:
    """Return the changes made to the source's weights: dequantised, adapter merged."""
    facts = {"dequantised": info.quantised, "adapter": info.adapter and info.adapter.name}
    return {key: value for key, value in facts.items() if value}


def _check_not_recovered(info: CheckpointInfo, source: Source) -> None:
    """Refuse weights that were trained for another conversion."""
    if RECOVERY in info.config:
        origin = info.config.get("liger_source")
        origin = origin.get("model", "MODEL") if isinstance(origin, dict) else "MODEL"
        raise CheckpointError(
            f"{source.name} was recovered, so its weights belong to the conversion that it has",
            hint=f"build it as it is: ligerexport build {quoted(info.path)}; or convert its origin: "
            f"ligerexport convert {quoted(origin)} -o DIRECTORY",
        )


@described()
def converted_config(config: dict[str, Any], liger: LigerConfig) -> dict[str, Any]:
    """Return the config.json of the converted checkpoint, complete and checked against the limits of the op.

    Raises:
        UsageError: A setting makes no sense for this model.
        CheckpointError: The family or its rotary embedding is not supported.
    """
    if "model_type" not in config:
        raise CheckpointError("config.json names no model_type", hint="save it with transformers' save_pretrained")
    family = get_family(config["model_type"])
    config = {key: value for key, value in harmless(config).items() if key != "liger_scores"} | {
        "model_type": PREFIX + family.model_type,
        "architectures": [f"Liger{family.prefix}ForCausalLM"],
    }
    from ligerexport.layers.mixer import layer_specs, read_config

    found: Any = read_config(config)
    if liger.keep_window is None:
        liger = replace(liger, keep_window=family.local_layers(family.attention(found)) or None)
    found.liger = config["liger"] = liger.to_dict()
    layer_specs(found)
    return config


def convert_in_memory(
    model: PreTrainedModel, liger: LigerConfig, scores: Mapping[str, Tensor] | None = None
) -> PreTrainedModel:
    """Return a converted model that shares the weights of a loaded one, for comparing conversions.

    Args:
        model: A Transformer of a family in `FAMILIES`, or a converted model.
        liger: The conversion, which replaces one that `model` already has.
        scores: Results of a fit by their names in a checkpoint, for a `learned` pool or cells; None takes the model's
            own.

    Raises:
        UsageError: A setting makes no sense for this model, or it lacks what a fit adds.
        CheckpointError: The family or its rotary embedding is not supported.
    """
    import torch

    from ligerexport.layers.mixer import model_classes

    _, model_class = model_classes(get_family(model.config.model_type))
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    content = model.config.to_dict() | {"tie_word_embeddings": tied}
    config = model_class.config_class.from_dict(converted_config(content, liger))
    with torch.device("meta"):
        converted = model_class(config)
    weights = model.state_dict() | {name: tensor.to(model.device) for name, tensor in (scores or {}).items()}
    wanted = converted.state_dict()
    if missing := [name for name in wanted if is_fitted(name) and name not in weights]:
        raise UsageError(f"this conversion needs {missing[0]}", hint="pass scores=, such as the tensors of a fit")
    weights = {name: tensor for name, tensor in weights.items() if name in wanted or not is_fitted(name)}
    converted.load_state_dict(weights, assign=True, strict=True)
    for name, module in model.named_modules():  # buffers that no file has, such as rotary frequencies
        for buffer in module._non_persistent_buffers_set:
            setattr(converted.get_submodule(name), buffer, getattr(module, buffer))
    converted.tie_weights()
    return converted.eval()
