"""Compare a conversion with its source: both read a short text, and every layer must give the same output.

transformers loads the source by itself, with its own configuration class, ties, choice of files, dequantisation and
attention. This uses none of our code for reading checkpoints, so an error in that code shows as a layer that
differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from ligerexport.checkpoint.checkpoint import CheckpointInfo, check_checkpoint
from ligerexport.checkpoint.fitted import is_fitted
from ligerexport.checkpoint.loading import NO_WRAPPERS, dequantising, load_model, merged
from ligerexport.console import ProgressFactory, no_bars, silent
from ligerexport.dtypes import BY_SAFETENSORS
from ligerexport.errors import CheckpointError, VerificationError
from ligerexport.layers.mixer import LigerMixer
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import PREFIX, get_family, harmless

LONGEST = 64
"""Length of the compared text in tokens, if that fits into the memory."""
BOUND = 1e-3
"""Largest difference of an element, relative to the root mean square of its token's vector. Both sides compute in fp32
from the same weights, so only the order of sums differs: by 3e-5 in SmolLM2, and more where attention's logits are in
the hundreds."""


def check_fidelity(source: CheckpointInfo, converted: Path, progress: ProgressFactory = silent) -> None:
    """Check that a converted checkpoint computes what its Transformer computes, on a text that fits into its memory.

    Weights stay mapped from their files in their own dtype; in addition, one layer or the output projection is in
    memory in fp32. Quantised sources need memory for their plain weights.

    Args:
        source: The Transformer. A converted checkpoint stands for the Transformer that has its weights.
        converted: Directory of the conversion, before any adapter of `recover`.
    """
    with progress("comparing with the Transformer", 2, "steps") as advance:
        transformer = load_source(source)
        model = load_model(converted, stored_dtype(check_checkpoint(converted, tokenizer=False)))
        ids = text_for(model)
        expected = source_outputs(transformer, ids)
        advance(1)
        with softmax_alone(model):
            found = outputs(model, ids)
        advance(1)
    compare(expected, found, f"the converted model does not compute what transformers computes of {source.path}")


def compare(expected: list[Tensor], found: list[Tensor], message: str) -> None:
    """Compare two lists from `outputs`.

    Raises:
        VerificationError: The lists differ; the error begins with `message`.
        CheckpointError: An expected value is not finite.
    """
    last = len(expected) - 1
    for i, (theirs, ours) in enumerate(zip(expected, found, strict=True)):
        where = {0: "the embedding", last: "the logits"}.get(i, f"layer {i - 1}")
        if not theirs.isfinite().all():
            raise CheckpointError(
                f"the output of {where} is not finite in the Transformer itself",
                hint="a weight is damaged; download the model again",
            )
        error = float("inf")
        if theirs.shape == ours.shape:
            size = theirs.square().mean(-1, keepdim=True).sqrt().clamp_min(torch.finfo(torch.float32).tiny)
            error = ((ours - theirs).abs() / size).max().item()
        if not error <= BOUND:
            differs = {0: "the embedding differs", last: "only the logits differ"}
            raise VerificationError(
                f"{message}: {differs.get(i, f'{where} is the first that differs')} (by {error:.1e} of its size, at "
                f"most {BOUND:.0e} is allowed)",
                hint="nothing was written; please report this with the model's config.json and the version of "
                "transformers",
            )


def stored_dtype(info: CheckpointInfo) -> torch.dtype:
    """Return a dtype that represents a checkpoint's weights without rounding."""
    first, *others = {tensor.dtype for name, tensor in info.tensors.items() if not is_fitted(name)}
    return torch.float32 if others or first not in BY_SAFETENSORS else BY_SAFETENSORS[first].torch


def text_for(model: PreTrainedModel) -> Tensor:
    """Return random ids `[T]` that fit into the smallest memory of a converted model's heads.

    They also fit into the sliding window of a layer that does not keep its sliding window. A layer that keeps it
    equals the Transformer's on any text.
    """
    config = model.config
    unchanged, attention = (
        LigerConfig.from_dict(config.liger).unchanged,
        get_family(config.model_type).attention(config),
    )
    length = LONGEST
    for mixer in _mixers(model):
        if mixer.layer_idx not in unchanged:
            window = attention[mixer.layer_idx].window or LONGEST
            length = min(length, *mixer.spec.slots_per_head, mixer.spec.max_distance, window)
    return torch.randint(config.vocab_size, (length,), generator=torch.Generator().manual_seed(0))


def load_source(info: CheckpointInfo) -> PreTrainedModel:
    """Load a Transformer as transformers does; for a converted checkpoint, the Transformer with the same weights.

    transformers dequantises quantised weights and rounds them to the model's dtype. PEFT merges an adapter beside the
    weights.

    Args:
        info: The checkpoint.

    Raises:
        CheckpointError: transformers cannot load it, or would initialise some weights at random. A missing output
            projection is no error, because it is the embedding.
    """
    content = json.loads((info.path / "config.json").read_text(encoding="utf-8"))
    plain = {key: value for key, value in harmless(content).items() if not key.startswith("liger")}
    plain |= {"model_type": content["model_type"].removeprefix(PREFIX)}
    dtype: Any = stored_dtype(info)
    settings: dict[str, Any] = {"key_mapping": NO_WRAPPERS} if info.renamed else {}
    if info.adapter is not None:  # merged below: transformers does not support DoRA, nor every weight of an adapter
        settings["adapter_kwargs"] = {"subfolder": os.devnull}
    if info.quantised:
        plain["quantization_config"] = dequantising(info)
    with _by_transformers(info.path):
        config = CONFIG_MAPPING[plain["model_type"]].from_dict(plain)
        if info.quantised:
            dtype = config.dtype or torch.bfloat16

        def load() -> Any:
            return AutoModelForCausalLM.from_pretrained(
                info.path, config=config, dtype=dtype, attn_implementation="eager", use_safetensors=True,
                local_files_only=True, trust_remote_code=False, output_loading_info=True, **settings,
            )  # fmt: skip

        model, found = load()
        if found["missing_keys"] == {"lm_head.weight"}:
            config.tie_word_embeddings = True
            model, found = load()
        if info.quantised:
            model = model.dequantize(dtype=dtype) if getattr(model, "is_quantized", False) else model
            for parameter in model.parameters():
                parameter.data = parameter.data.to(dtype)
        if info.adapter is not None:
            model = merged(model, info.adapter)
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(f"{missing[0]} is missing from {info.path}", hint="copy or download the model again")
    return cast("PreTrainedModel", model.eval())


def source_outputs(transformer: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Return `outputs` of what `load_source` returned."""
    with _by_transformers(str(transformer.name_or_path)):
        return outputs(transformer, ids)


@contextmanager
def _by_transformers(path: Path | str) -> Iterator[None]:
    """Turn every exception of transformers into a `CheckpointError`, and hide its warnings."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with no_bars():
            yield
    except MemoryError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"transformers cannot run {path}: {error}", hint="copy or download the model again"
        ) from error
    finally:
        logging.set_verbosity(level)


@torch.no_grad()
def outputs(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """Run a model in fp32, widening one layer at a time from the dtype that it was loaded in.

    Args:
        model: A Transformer, or a converted model.
        ids: The text, `[T]`.

    Returns:
        The residual stream before the first layer and after each, `[T, D]`, and the logits, `[T, V]`.
    """
    body: Any = model.model
    streams: list[Tensor] = []
    _widen_buffers(model)
    with ExitStack() as stack:
        for module in (body.embed_tokens, *body.layers, body.norm, model.lm_head):
            stack.enter_context(_in_fp32(module))
        hooks = [layer.register_forward_hook(lambda _, args, output: streams.append(output)) for layer in body.layers]
        hooks.append(body.layers[0].register_forward_pre_hook(lambda _, args: streams.append(args[0])))
        for hook in hooks:
            stack.callback(hook.remove)
        logits: Tensor = model(ids[None], use_cache=False).logits
    return [x[0] for x in (*streams, logits)]


def _mixers(model: nn.Module) -> list[LigerMixer]:
    return [module for module in model.modules() if isinstance(module, LigerMixer)]


@contextmanager
def softmax_alone(model: nn.Module) -> Iterator[None]:
    """Turn off the rounding of slots and the recurrences, except those over evicted tokens, which have none to read."""
    specs = {mixer: mixer.spec for mixer in _mixers(model)}
    for mixer, spec in specs.items():
        config = replace(spec.config, state_dtype="activation")
        if not config.evicts:
            config = replace(config, attention_weight=1.0, recurrence_weight=0.0)
        mixer.spec = replace(spec, config=config)
    try:
        yield
    finally:
        for mixer, spec in specs.items():
            mixer.spec = spec


@contextmanager
def _in_fp32(module: nn.Module) -> Iterator[None]:
    """Hold a module's parameters in fp32 while it runs."""
    stored = [(parameter, parameter.data) for parameter in module.parameters()]

    def widen(*_: Any) -> None:
        for parameter, data in stored:
            parameter.data = data.float()

    def restore(*_: Any) -> None:
        for parameter, data in stored:
            parameter.data = data

    hooks = [module.register_forward_pre_hook(widen), module.register_forward_hook(restore, always_call=True)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _widen_buffers(model: PreTrainedModel) -> None:
    """Recompute in fp32 the buffers that a model in half precision derives from its configuration."""
    if model.dtype == torch.float32:
        return
    with weightless():
        exact = type(model)._from_config(model.config, dtype=torch.float32)
    for name, buffer in exact.named_buffers():
        owner, _, key = name.rpartition(".")
        setattr(model.get_submodule(owner), key, buffer)


@contextmanager
def weightless() -> Iterator[None]:
    """Give models that are built inside the block parameters without memory; everything else in them is real."""

    def empty(module: nn.Module, name: str, parameter: nn.Parameter) -> Any:
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    hook = register_module_parameter_registration_hook(empty)
    try:
        yield
    finally:
        hook.remove()
