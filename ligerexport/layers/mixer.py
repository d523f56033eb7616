"""Converted models for transformers: attention modules replaced by `LigerMixer`, and a cache of constant size.

The family's own projections, norms, MLPs and `generate` stay. There is no modeling code per family or gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from inspect import signature
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig
from transformers.cache_utils import Cache, DynamicLayer
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from ligerexport.errors import CheckpointError, LigerError, UsageError
from ligerexport.kernels.library.dispatch import fused
from ligerexport.kernels.library.mixer_step import mixer_step
from ligerexport.kernels.memories import route
from ligerexport.kernels.ops import BLOCK, liger_mixer, rotary_table
from ligerexport.layers.cache import LigerLayer as LigerLayer
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import (
    FAMILIES,
    PREFIX,
    Family,
    described,
    get_family,
    harmless,
    head_dim,
    rotary_distance,
)
from ligerexport.model.state import FORGOTTEN, MixerSpec
from ligerexport.versions import TRIED, warn_if_untried

warn_if_untried("torch")
warn_if_untried("transformers")

LONGEST = 1 << 21
"""Largest rotary distance in tokens; a table has a row for each."""
_SIZES = {"num_hidden_layers": 1 << 12, "num_attention_heads": 1 << 12, "num_key_value_heads": 1 << 12,
          "head_dim": 1 << 12, "hidden_size": 1 << 20, "intermediate_size": 1 << 24, "vocab_size": 1 << 28,
          "max_position_embeddings": 1 << 40}  # fmt: skip
"""Largest sizes in a configuration, checked before anything is built from it."""
CACHE = "cache" if "cache" in signature(LlamaForCausalLM.forward).parameters else "past_key_values"
"""The name of the cache in transformers, as an argument and in an output: `cache` since 5.24."""
IGNORED = {
    "attention_mask",  # a mixer is causal, and positions account for padding
    "position_embeddings", "cache_position",  # a mixer computes its own from `position_ids`
    "use_cache", "num_items_in_batch",  # for the model itself, like the outputs that it collects
    "output_attentions", "output_hidden_states", "output_router_logits", "return_dict",
}  # fmt: skip
"""Arguments that transformers passes to an attention module and that change nothing in a mixer."""
_BODY = ("input_ids", "attention_mask", "position_ids", CACHE, "inputs_embeds", "use_cache")
"""Arguments of a model without its head, in order."""
_PACKED = {"cu_seq_lens_k", "max_length_k", "seq_idx"}
"""Arguments that repeat `cu_seq_lens_q` and `max_length_q` for packed documents; not accepted without these two."""
ONE_LAUNCH = 32_768
"""Largest number of elements in one head's slot keys for a step in one launch, which holds them in registers."""


def read_config(content: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the configuration of a checkpoint, converted or not, from the content of its config.json.

    Raises:
        CheckpointError: The family is not supported, or the content describes no model of it.
    """
    family = get_family(content["model_type"])
    converted = content["model_type"].startswith(PREFIX)
    for name in _SIZES:
        if (size := content.get(name)) is not None and (type(size) is not int or not 1 <= size <= _SIZES[name]):
            raise CheckpointError(
                f"config.json has {name} {size!r:.60}", hint=f"a whole number from 1 to {_SIZES[name]} was expected"
            )
    made = model_classes(family)[0] if converted else family.attribute("Config")
    with described():
        return made.from_dict(harmless(content))


@described()
def layer_specs(config: PreTrainedConfig) -> list[MixerSpec | None]:
    """Return what the op needs to know about each layer of a converted checkpoint; None for a layer kept as softmax.

    Raises:
        UsageError: `keep_softmax` or `layer_memory` names a layer that does not exist, `keep_window` one without a
            window, or `heads` has another number of layers or heads; or the rotary embedding is for shorter distances.
        CheckpointError: The family or its rotary embedding is not supported, or the configuration describes no model.
    """
    liger = LigerConfig.from_dict(config.liger)
    distance = rotary_distance(config, liger.max_distance, bool(liger.keep_softmax))
    if max(config.max_position_embeddings, distance) > LONGEST:
        raise UsageError(
            f"a rotary distance of {liger.max_distance or config.max_position_embeddings} tokens",
            hint=f"{LONGEST} are the most that a table is made for: --max-distance",
        )
    layers, width = config.num_hidden_layers, head_dim(config)
    sized = [layer for layer, _, _ in liger.layer_memory]
    if liger.heads and len(liger.heads) != layers:
        raise UsageError(f"heads has sizes for {len(liger.heads)} layers", hint=f"the model has {layers}")
    for name, named in (("keep_softmax", liger.keep_softmax), ("layer_memory", sized)):
        if not set(named) <= set(range(layers)):
            raise UsageError(f"{name} {list(named)}", hint=f"layers are 0 to {layers - 1}")
    spec = MixerSpec(
        config=LigerConfig(),
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        d_k=width,
        d_v=width,
        scale=1.0,
        max_distance=distance,
    )
    family = get_family(config.model_type)
    attention = family.attention(config)
    local = family.local_layers(attention) if liger.keep_window is None else liger.keep_window
    specs: list[MixerSpec | None] = []
    for layer in local:
        if not 0 <= layer < layers or attention[layer].window is None:
            raise UsageError(f"keep_window {list(local)}", hint=f"layer {layer} has no sliding window")
        if layer in sized:
            raise UsageError(f"layer {layer} keeps its own window", hint="leave it out of layer_memory")
    for layer, softmax in enumerate(attention):
        if layer in liger.keep_softmax:
            specs.append(None)
        elif layer in local:
            assert softmax.window is not None
            memory = LigerConfig(window=softmax.window, attention_weight=1.0, recurrence_weight=0.0)
            specs.append(replace(spec, config=memory, scale=softmax.scale, max_distance=softmax.window))
        else:
            specs.append(replace(spec, config=liger.for_layer(layer), scale=softmax.scale))
    return specs


@lru_cache(maxsize=8)
def shared_table(inv_freq: tuple[float, ...], max_distance: int, device: torch.device) -> Tensor:
    """Return one rotary table for all layers of a model."""
    with torch.inference_mode(False):  # a table made in inference mode could not be used in training later
        return rotary_table(torch.tensor(inv_freq), max_distance, BLOCK, turns=True).to(device)


class LigerMixer(nn.Module):
    """An attention module of the family whose softmax over all tokens is replaced by `liger_mixer`.

    Parameters keep their names, so checkpoints load as before. `score_proj` exists for a pool kept by `learned`,
    `cell_proj` for cells.

    Attributes:
        routing: Logits of the memories `[B, T, H_kv, M]` of the last call in training, for the loss that balances them.
    """

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    qkv_proj: nn.Linear
    o_proj: nn.Linear
    q_norm: nn.Module
    k_norm: nn.Module
    score_proj: nn.Linear
    cell_proj: nn.ParameterDict
    routing: Tensor | None = None

    def __init__(self, attention: nn.Module, spec: MixerSpec, inv_freq: tuple[float, ...]):
        super().__init__()
        for name, module in attention.named_children():
            self.add_module(name, module)
        self.layer_idx = cast(int, attention.layer_idx)
        self.spec = spec
        self.inv_freq = inv_freq
        if spec.config.foresees and not hasattr(self, "score_proj"):
            self.score_proj = nn.Linear(self.o_proj.out_features, spec.kv_heads)
        if spec.config.celled and not hasattr(self, "cell_proj"):
            rows = spec.kv_heads, spec.config.cells
            self.cell_proj = nn.ParameterDict({"weight": torch.randn(*rows, spec.d_k), "bias": torch.zeros(rows)})

    def forward(
        self,
        hidden_states: Tensor,
        position_ids: Tensor,
        cache: Cache | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: Tensor | None = None,
        max_length_q: int | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens with those before them, with one sequence per row or with packed documents.

        Args:
            hidden_states: `[B, T, hidden]`.
            position_ids: `[B or 1, T]`, consecutive, and negative on padding; unused for packed documents.
            cache: State to continue from.
            past_key_values: The same, by its name before transformers 5.24.
            cu_seq_lens_q: `[N + 1]`, the bounds of the documents among the `B T` tokens, as transformers'
                `DataCollatorWithFlattening` makes them; they must cover all tokens.
            max_length_q: Length of the longest document, or more.
            **others: Arguments that a mixer does not need: `IGNORED`, and `_PACKED` for packed documents.

        Raises:
            TypeError: An argument is unknown; ignoring it might change the result.
            ValueError: There are two caches, or packed documents come with a cache or without their largest length.
        """
        ignored = IGNORED if cu_seq_lens_q is None else IGNORED | _PACKED
        if unknown := [name for name, value in others.items() if value is not None and name not in ignored]:
            raise TypeError(f"a converted attention layer does not know the argument {unknown[0]}")
        cache = _one_cache(cache, past_key_values)
        batch, length, _ = hidden_states.shape
        spec = self.spec
        query, key, value = self.project(hidden_states)
        if self.training and spec.config.routed:
            self.routing = route(key, spec.config.memories)
        score = self.learned_score(hidden_states, position_ids) if spec.config.foresees else None
        if cu_seq_lens_q is not None:
            if cache is not None or max_length_q is None:
                raise ValueError("packed documents need max_length_q and keep no cache: pass use_cache=False")
            mixed = self._mix_packed(query, key, value, score, cu_seq_lens_q, max_length_q)
            return self.o_proj(mixed.flatten(2)), None

        layer = None if cache is None else cast(LigerLayer, cache.layers[self.layer_idx])
        state = None if layer is None else layer.state
        if state is None:
            state = spec.initial_state(batch, hidden_states.dtype, hidden_states.device)
        position = position_ids[:, 0].expand(batch)
        rotary = shared_table(self.inv_freq, spec.max_distance, hidden_states.device)
        one_token = length == 1 and layer is not None and fused(query) and not torch.is_grad_enabled()
        one_token = one_token and FORGOTTEN not in state
        one_launch = spec.config.fuses and spec.config.num_slots * spec.d_k <= ONE_LAUNCH
        if one_token and (one_launch or spec.splits):
            q, k, v, now = query[:, 0], key[:, 0], value[:, 0], None if score is None else score[:, 0]
            output = mixer_step(q, k, v, position, state, spec, rotary, score=now)[:, None]  # in the cache, in place
        else:
            output, state = liger_mixer(query, key, value, position, state, spec, rotary, score, self._router())
        if layer is not None:
            layer.advance(state, length)
        return self.o_proj(output.flatten(2)), None

    def project(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value `[B, T, H, d]` of `[B, T, hidden]`, before rotary embedding."""
        spec = self.spec
        if hasattr(self, "qkv_proj"):
            widths = [spec.q_heads * spec.d_k, spec.kv_heads * spec.d_k, spec.kv_heads * spec.d_v]
            query, key, value = self.qkv_proj(hidden_states).split(widths, dim=-1)
        else:
            query, key, value = self.q_proj(hidden_states), self.k_proj(hidden_states), self.v_proj(hidden_states)
        if hasattr(self, "q_norm"):
            query, key = _normed(self.q_norm, query), _normed(self.k_norm, key)
        query = query.unflatten(-1, (spec.q_heads, spec.d_k))
        key = key.unflatten(-1, (spec.kv_heads, spec.d_k))
        return query, key, value.unflatten(-1, (spec.kv_heads, spec.d_v))

    def learned_score(self, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        """Return the score of each token for a `learned` pool, `[B, T, H_kv]` fp32, without a gradient.

        Args:
            hidden_states: `[B, T, hidden]`.
            position_ids: `[B or 1, T]`; unused here, but an override may need it.
        """
        # in bf16, to which autocast would round, too many tokens would tie
        dtype = torch.promote_types(hidden_states.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(hidden_states.device.type, enabled=False):
            weight, bias = self.score_proj.weight.to(dtype), self.score_proj.bias.to(dtype)
            return nn.functional.linear(hidden_states.to(dtype), weight, bias)

    def _router(self) -> Tensor | None:
        """Return the map that chooses the cell of a key, `[H_kv, M, d_k + 1]`; None without cells."""
        if not self.spec.config.celled:
            return None
        return torch.cat([self.cell_proj["weight"], self.cell_proj["bias"][..., None]], dim=-1).detach()

    def _mix_packed(
        self, query: Tensor, key: Tensor, value: Tensor, score: Tensor | None, bounds: Tensor, longest: int
    ) -> Tensor:
        """Mix each document by itself, as rows `[N, longest]` padded on the left. Nothing is read back from a GPU."""
        shape, device, spec = query.shape, query.device, self.spec
        ends, token = bounds[1:].long(), torch.arange(query.shape[0] * query.shape[1], device=query.device)
        document = torch.searchsorted(ends, token, right=True)
        place = (document + 1) * longest - ends[document] + token
        rows = len(ends)

        def unpack(x: Tensor) -> Tensor:
            x = x.flatten(0, 1)
            return x.new_zeros(rows * longest, *x.shape[1:]).index_copy(0, place, x).unflatten(0, (rows, longest))

        state = spec.initial_state(rows, query.dtype, device)
        rotary = shared_table(self.inv_freq, spec.max_distance, device)
        position = ends - bounds[:-1] - longest
        query, key, value = unpack(query), unpack(key), unpack(value)
        score = None if score is None else unpack(score)
        output, _ = liger_mixer(query, key, value, position, state, spec, rotary, score, self._router())
        return output.flatten(0, 1).index_select(0, place).unflatten(0, shape[:2])


def _one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; pass one of them")
    return past_key_values if cache is None else cache


def _has_gaps(mask: Tensor) -> bool:
    """Return whether a mask `[B, S]` hides tokens between others, such as padding of an earlier call."""
    return bool((nn.functional.pad(mask.long(), (1, 0)).diff(dim=1) > 0).sum(dim=1).gt(1).any())


def _jumps(position_ids: Tensor, mask: Tensor | None) -> bool:
    """Return whether positions `[B, T]` do not count up one by one, apart from padding by a mask `[B, S]`."""
    if position_ids.shape[-1] == 1 or (position_ids.is_cuda and torch.cuda.is_current_stream_capturing()):
        return False  # nothing may be read back from a GPU while a graph is captured
    jumps = position_ids.diff(dim=-1) != 1
    if mask is not None:
        text = mask[:, -position_ids.shape[-1] :].bool()
        jumps = jumps & text[:, 1:] & text[:, :-1]
    return bool(jumps.any())


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Norm each head of `[B, T, H * d]`, or all heads at once, depending on the width of the norm."""
    width = cast(Tensor, norm.weight).shape[0]
    return norm(x.unflatten(-1, (-1, width))).flatten(-2)


class LigerCache(Cache):
    """A transformers cache of constant size: a `LigerLayer` for each mixer, and a growing layer where softmax was kept.

    Attributes:
        due: Tokens that every layer must have seen at the end of the current call.
    """

    due = 0

    def __init__(self, config: PreTrainedConfig):
        specs = layer_specs(config)
        hybrid = any(spec is None for spec in specs)
        super().__init__(layers=[DynamicLayer() if spec is None else LigerLayer(hybrid) for spec in specs])


def _under_one_name(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of a call, with a cache under the name that transformers has for it."""
    cache = _one_cache(given.pop("cache", None), given.pop("past_key_values", None))
    return args, given if cache is None else given | {CACHE: cache}


def _prepared(body: Any, args: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a call of a converted model's layers, with positions and a cache of constant size.

    Left padding in `attention_mask` `[B, S]` is honoured.

    Raises:
        UsageError: The mask hides more than padding, positions jump, or the cache is of another class.
    """
    _, given = _under_one_name(body, (), dict(zip(_BODY, args, strict=False)) | given)
    cache = given.get(CACHE)
    if cache is not None and not isinstance(cache, LigerCache):
        raise UsageError(
            f"a converted model keeps a state, which a {type(cache).__name__} cannot hold",
            hint="leave the cache out, or pass ligerexport.layers.mixer.LigerCache(model.config)",
        )
    if given.get("use_cache") is None:
        packed = given.get("cu_seq_lens_q") is not None
        given["use_cache"] = body.config.use_cache and not body.training and not packed
    if given["use_cache"] and cache is None:
        cache = LigerCache(body.config)
    ids, mask, position_ids = given.get("input_ids"), given.get("attention_mask"), given.get("position_ids")
    tokens = given.get("inputs_embeds") if ids is None else ids
    length = 0 if tokens is None else tokens.shape[1]  # without tokens, the model itself reports what is missing
    seen = 0 if cache is None else cache.get_seq_length()
    if mask is not None and (
        not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] != seen + length or _has_gaps(mask)
    ):
        raise UsageError(
            "a converted model is causal and follows no other attention mask",
            hint="pass a mask [B, S] that is 0 on left padding and 1 after it, for all tokens up to now, or none",
        )
    if position_ids is not None and given.get("cu_seq_lens_q") is None and _jumps(position_ids, mask):
        raise UsageError(
            "position_ids are not consecutive, and a converted model reads one text a row",
            hint="of packed documents, pass cu_seq_lens_q and max_length_q too: "
            "DataCollatorWithFlattening(return_flash_attn_kwargs=True)",
        )
    if mask is not None:
        columns = torch.arange(mask.shape[1], device=mask.device)[-length:]
        given["position_ids"] = columns - mask.long().argmax(dim=1)[:, None]
    if cache is not None:
        cache.due = seen + length
    return (), given | {CACHE: cache}


def _check_state(body: Any, args: tuple[Any, ...], given: dict[str, Any], output: Any) -> None:
    """Check that the cache of a call reached every layer.

    Raises:
        LigerError: The cache missed a layer, which may happen with an untried release of transformers.
    """
    cache = given.get(CACHE)
    if cache is not None and not body.training and any(x.get_seq_length() != cache.due for x in cache.layers):
        raise LigerError(
            "transformers passed the cache to only some layers, so the state of the others is lost",
            hint=f"pip install 'transformers=={TRIED['transformers'][1]}.*'",
        )


class _LigerModel:
    """Additions of a converted model to the family's `ForCausalLM`."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        with torch.device("cpu"):  # real numbers even if the model is built on the meta device
            attention, specs = get_family(config.model_type).attention(config), layer_specs(config)
        for layer, softmax, spec in zip(self.model.layers, attention, specs, strict=True):  # type: ignore[attr-defined]
            if spec is not None:
                layer.self_attn = LigerMixer(layer.self_attn, spec, softmax.inv_freq)
        self.register_forward_pre_hook(_under_one_name, with_kwargs=True)  # type: ignore[attr-defined]
        self.model.register_forward_pre_hook(_prepared, with_kwargs=True)  # type: ignore[attr-defined]
        self.model.register_forward_hook(_check_state, with_kwargs=True)  # type: ignore[attr-defined]
        liger = LigerConfig.from_dict(config.liger)
        if liger.foresees or liger.celled:  # as in the file, whatever type the model is loaded in
            self._keep_in_fp32_modules_strict = {"score_proj", "cell_proj"}

    # that of Phi3 drops the cache when its rotary embedding changes, which it never does here
    prepare_inputs_for_generation = GenerationMixin.prepare_inputs_for_generation

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        super()._validate_model_kwargs(_under_one_name(self, (), model_kwargs)[1])  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        cache = _one_cache(model_kwargs.pop("cache", None), model_kwargs.pop("past_key_values", None))
        if cache is None and generation_config.use_cache is not False:
            model_kwargs[CACHE] = LigerCache(self.config)  # type: ignore[attr-defined]
            return None
        if cache is not None:
            model_kwargs[CACHE] = cache
        return super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)  # type: ignore[misc]


@lru_cache
def model_classes(family: Family) -> tuple[type[PreTrainedConfig], type[Any]]:
    """Return the configuration and model class of a converted family, created and registered once."""
    names = f"Liger{family.prefix}Config", f"Liger{family.prefix}ForCausalLM"
    base_config, base_model = family.attribute("Config"), family.attribute("ForCausalLM")
    config_class = type(names[0], (base_config,), {"model_type": PREFIX + family.model_type, "__module__": __name__})
    model_class = type(names[1], (_LigerModel, base_model), {"config_class": config_class, "__module__": __name__})
    AutoConfig.register(PREFIX + family.model_type, config_class, exist_ok=True)
    AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
    return config_class, model_class


for _family in FAMILIES.values():
    model_classes(_family)
