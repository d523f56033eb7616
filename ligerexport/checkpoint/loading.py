"""Load checkpoints as torch models, converted or not, with transformers but strictly.

A missing or superfluous weight is an error. Quantised weights are dequantised, and a PEFT adapter beside the weights is
merged into them; a checkpoint for which that fails is refused.
"""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from safetensors import safe_open

from ligerexport.checkpoint.checkpoint import WRAPPERS, CheckpointInfo, check_checkpoint, not_finite, read_header
from ligerexport.checkpoint.fitted import FITTED
from ligerexport.console import no_bars, say
from ligerexport.dtypes import BY_SAFETENSORS
from ligerexport.errors import CheckpointError, LigerError, MissingDependency, quoted
from ligerexport.model.families import FAMILIES, PREFIX, get_family
from ligerexport.versions import require

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

_AGAIN = "copy or download the checkpoint again"
NO_WRAPPERS = {WRAPPERS + "(?:)" * i: "" for i in range(4)}
"""`key_mapping` for transformers: each entry removes one wrapper from the names of weights."""
_SLAB = 1 << 24
"""Number of elements checked at a time."""


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """Load a converted checkpoint as a transformers model with its attention swapped.

    Args:
        path: Directory that `convert` or `save_pretrained` wrote.
        dtype: Type of the weights; fp32 by default.

    Raises:
        CheckpointError: The checkpoint is incomplete, damaged or not converted.
        MissingDependency: The extra `build` is not installed.
    """
    require("build")
    import torch
    from transformers import AutoModelForCausalLM

    from ligerexport.layers.mixer import read_config  # makes the converted classes known to transformers

    info = check_checkpoint(path, tokenizer=False)
    if "liger" not in info.config:
        raise CheckpointError(f"{path} is not converted", hint=f"ligerexport convert {quoted(path)} -o liger")
    return _load(AutoModelForCausalLM, info, read_config(info.config), dtype or torch.float32)


def load_transformer(
    path: str | Path, config: Mapping[str, Any], dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    """Load the Transformer in a checkpoint, converted or not, with its family's own attention.

    Args:
        config: Content of its config.json.
        dtype: Type of the weights; "auto" takes the file's.
    """
    return _transformer(check_checkpoint(path, tokenizer=False), config, dtype)


def _transformer(
    info: CheckpointInfo, config: Mapping[str, Any], dtype: torch.dtype | Literal["auto"]
) -> PreTrainedModel:
    from ligerexport.layers.mixer import read_config

    family = get_family(config["model_type"])
    loaded: Any = read_config(family.plain(config) | {"tie_word_embeddings": info.tied})
    loaded._attn_implementation = "sdpa"
    base = family.attribute("ForCausalLM")
    aside = {"_keys_to_ignore_on_load_unexpected": [rf"\.{part}\." for part in FITTED], "__module__": base.__module__}
    return _load(type(base.__name__, (base,), aside), info, loaded, dtype).eval()


def load_any(info: CheckpointInfo, dtype: torch.dtype) -> PreTrainedModel:
    """Load a checkpoint: a converted model, or a Transformer of any family that transformers supports.

    Args:
        dtype: Type of the weights.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if "liger" in info.config:
        return load_model(info.path, dtype).eval()
    if info.config["model_type"] in FAMILIES:
        return load_transformer(info.path, info.config, dtype)
    config = AutoConfig.from_pretrained(info.path, trust_remote_code=False)
    return _load(AutoModelForCausalLM, info, config, dtype).eval()


def write_plain(info: CheckpointInfo, directory: Path) -> CheckpointInfo:
    """Write a Transformer's checkpoint again with plain files, without its tokenizer.

    Args:
        info: The checkpoint, all of whose weights are loaded into memory.
        directory: Directory to create.
    """
    import torch

    dtype: torch.dtype | Literal["auto"] = "auto"  # for quantised weights, the dtype in config.json
    if not info.quantised:
        dtype = BY_SAFETENSORS[info.dtypes[0]].torch if len(info.dtypes) == 1 else torch.float32
    model = _transformer(info, info.config, dtype)
    with no_bars():
        model.save_pretrained(directory)
    for file in directory.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors writes 0600
    return check_checkpoint(directory, tokenizer=False)


def check_finite(info: CheckpointInfo, advance: Callable[[float], None] = lambda amount: None) -> None:
    """Refuse a plain checkpoint with a weight that is not finite.

    Args:
        advance: Called with the number of bytes that were checked.

    Raises:
        CheckpointError: There is such a weight.
    """
    for file in info.files:
        with safe_open(file, "pt") as shard:
            for name in (name for name, tensor in info.tensors.items() if tensor.file == file):
                stored, shape = shard.get_slice(name), info.tensors[name].shape
                rows = max(1, _SLAB // max(1, shape[-1]))
                for start in range(0, shape[0], rows):
                    part = stored[start : start + rows]
                    if not part.isfinite().all():
                        raise not_finite(name, info.path)
                    advance(part.nbytes)


def _load(model_class: Any, info: CheckpointInfo, config: Any, dtype: Any) -> PreTrainedModel:
    """Load a checkpoint with `from_pretrained`, and raise an error for what it would only warn about."""
    import torch

    settings: dict[str, Any] = {}
    own = dtype
    if info.renamed or config.model_type.removeprefix(PREFIX) not in FAMILIES:
        settings["key_mapping"] = NO_WRAPPERS
    if info.adapter is not None:  # merged below; transformers would keep it separate
        settings["adapter_kwargs"] = {"subfolder": os.devnull}
    with no_bars(), _as_plain(info):
        if info.quantised:
            config.quantization_config = dequantising(info)
            own = config.dtype or torch.bfloat16
        model, found = model_class.from_pretrained(
            info.path, config=config, dtype=own, output_loading_info=True, trust_remote_code=False, **settings
        )
        if info.quantised:  # rounded to the model's own dtype even if another is requested, as in a conversion
            model = model.dequantize(dtype=own) if getattr(model, "is_quantized", False) else model
            for parameter in model.parameters():  # not the rotary frequencies, which `to` would round
                parameter.data = parameter.data.to(own if dtype == "auto" else dtype)
    for kind, problem in (("missing_keys", "is missing from"), ("unexpected_keys", "has no place in")):
        if names := sorted(found[kind]):
            raise CheckpointError(f"{names[0]} {problem} {info.path}, as transformers loads it", hint=_AGAIN)
    if info.renamed:
        vars(model).pop("_weight_conversions", None)  # with it, weights would be saved under their old names
    if info.adapter is not None:
        model = merged(model, info.adapter)
        say(f"{info.path.name}: its adapter {info.adapter.name} was merged into its weights")
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise not_finite(name, info.path)
    if info.quantised:
        say(f"{info.path.name}: {info.quantised} weights were dequantised to {str(model.dtype).removeprefix('torch.')}")
    return model


@contextmanager
def _as_plain(info: CheckpointInfo) -> Iterator[None]:
    """Turn errors that transformers raises while it makes plain weights into a `CheckpointError`."""
    try:
        yield
    except LigerError:
        raise
    except Exception as error:
        if info.quantised:
            raise _stays_quantised(info, str(error)) from error
        if info.config["model_type"].removeprefix(PREFIX) in FAMILIES:
            raise
        raise CheckpointError(f"transformers cannot load {info.path}: {error}", hint=_AGAIN) from error


def check_loadable(path: Path) -> None:
    """Check a checkpoint without loading it."""
    info = check_checkpoint(path, tokenizer=False)
    if info.quantised:
        dequantising(info)


def dequantising(info: CheckpointInfo) -> dict[str, Any]:
    """Return the `quantization_config` with which weights are dequantised on loading, or can be afterwards.

    Raises:
        CheckpointError: transformers cannot undo this method.
    """
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as CONFIGS
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as QUANTIZERS
    from transformers.quantizers.base import HfQuantizer

    raw, method = info.config.get("quantization_config"), info.quantised
    if raw is None:
        raise _stays_quantised(info, "config.json has no quantization_config")
    bits = "4bit" if raw.get("load_in_4bit") else "8bit"
    key = f"bitsandbytes_{bits}" if method == "bitsandbytes" else str(method)
    if key in CONFIGS and "dequantize" in inspect.signature(CONFIGS[key]).parameters:
        return dict(raw) | {"dequantize": True}
    quantizer: Any = QUANTIZERS.get(key, HfQuantizer)
    if quantizer._dequantize is not HfQuantizer._dequantize:
        return dict(raw)  # the loaded model's `dequantize` reads it
    raise _stays_quantised(info, "transformers cannot dequantise this method")


def _stays_quantised(info: CheckpointInfo, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{info.path} holds weights quantised by {info.quantised}, which cannot be dequantised: {reason}",
        hint="use the model that it was quantised from; `ligerexport build --weights int4` quantises the artifact",
    )


def merged(model: Any, adapter: Path) -> Any:
    """Merge a PEFT adapter into a model. Afterwards a tied output projection may differ from the embedding.

    Raises:
        MissingDependency: PEFT is not installed.
        CheckpointError: The adapter does not fit the model, or cannot be merged.
    """
    try:
        from peft import PeftModel, get_peft_model_state_dict
    except ImportError:
        raise MissingDependency("peft", extra="recover") from None

    import torch

    config, head = adapter.with_name("adapter_config.json"), model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:  # a change to one would change both
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            wrapped = PeftModel.from_pretrained(model, adapter.parent)
            known = get_peft_model_state_dict(wrapped, save_embedding_layers=False)
            extra = [name for name in read_header(adapter) if ".lora_" in name and name not in known]
            merged = wrapped.merge_and_unload()
        problems = [f"it changes {name}, which the model does not have" for name in extra]
        problems += [str(x.message) for x in said if "missing adapter keys" in str(x.message)]
    except Exception as error:
        raise _no_fit(adapter, config, str(error)) from error
    if problems:
        raise _no_fit(adapter, config, problems[0])
    return merged


def _no_fit(adapter: Path, config: Path, problem: str) -> CheckpointError:
    return CheckpointError(
        f"{adapter} does not fit the model: {problem}",
        hint=f"use an adapter of this model; to leave one out that lies beside the weights, remove {quoted(config)}",
    )
