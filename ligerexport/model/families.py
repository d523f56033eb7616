"""The families of checkpoints: their classes in transformers, and the few facts about them that other code needs.

A new family is a row of `FAMILIES`. This module does not import torch before a row is used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ligerexport.errors import CheckpointError, LigerError, UsageError

if TYPE_CHECKING:
    import torch

PREFIX = "liger_"
"""Prefix of a converted checkpoint's `model_type`."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""
BOUNDED_ROPE = ("dynamic", "longrope")
"""Rotary embeddings with other frequencies for long texts; a memory of bounded distance uses those for short ones."""


class Norms(NamedTuple):
    """Names of a layer's norms by their place; None where a family has no norm.

    Attributes:
        before_attention: Norm of the input of attention.
        after_attention: Norm of the output of attention, before the residual stream.
        before_mlp: Norm of the input of the MLP.
        after_mlp: Norm of the output of the MLP, before the residual stream.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")
AROUND = Norms("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")


class Attention(NamedTuple):
    """The softmax of one layer as the family computes it.

    Attributes:
        scale: Factor on the products of queries and keys; it contains the square of YaRN's factor on cosine and sine.
        inv_freq: `[R]`, radians per token; zeros in a layer without rotary embedding.
        window: Number of most recent tokens that are seen, including the current one; None for all.
    """

    scale: float
    inv_freq: tuple[float, ...]
    window: int | None


@dataclass(frozen=True)
class Scaling:
    """Factors by which a model multiplies its values.

    Attributes:
        softmax: Factor on the products of queries and keys; None for d_k ** -0.5.
        embedding: Factor on the input of the first layer.
        residual: Factor on the outputs of attention and MLP, before the residual stream.
        logits: Factor on the logits.
        logit_cap: c if the logits x become c tanh(x / c) after their factor; None if they do not.
    """

    softmax: float | None = None
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0
    logit_cap: float | None = None


@dataclass(frozen=True)
class Family:
    """One family of decoder-only Transformers in transformers.

    Attributes:
        model_type: Value of `model_type` in its config.json.
        prefix: Prefix of the names of its classes.
        doc: What distinguishes it from other families.
        norms: The norms of a layer.
        qk_norm: Whether queries and keys are normed before rotary embedding, each head or all heads at once.
        scaling: Returns the factors for a configuration.
        unit_norms: Whether a norm multiplies by 1 + its weight.
        nope: Whether `no_rope_layers` in its configuration marks layers with rotary embedding (1) and without (0).
        packed: Whether `qkv_proj` holds query, key and value, and `gate_up_proj` gate and up.
        keeps_windows: Whether layers with a sliding window keep it, and only layers without are converted.
        refused: Settings of its configuration that must be off.
    """

    model_type: str
    prefix: str
    doc: str = ""
    norms: Norms = BEFORE
    qk_norm: Literal["head", "all"] | None = None
    scaling: Callable[[Any], Scaling] = lambda config: Scaling()
    unit_norms: bool = False
    nope: bool = False
    packed: bool = False
    keeps_windows: bool = False
    refused: tuple[str, ...] = ()

    def attribute(self, suffix: str) -> Any:
        """Return the family's class whose name ends in `suffix`, such as `ForCausalLM` or `RotaryEmbedding`."""
        from transformers import CONFIG_MAPPING

        config = CONFIG_MAPPING[self.model_type]
        if suffix == "Config":
            return config
        return getattr(import_module(config.__module__.replace(".configuration_", ".modeling_")), self.prefix + suffix)

    def attention(self, config: Any) -> tuple[Attention, ...]:
        """Return the softmax of each layer.

        Raises:
            CheckpointError: The type of rotary embedding is unknown, or a setting is refused.
        """
        for setting in self.refused:
            if getattr(config, setting, None):
                raise CheckpointError(
                    f"{setting} {getattr(config, setting)} in config.json is not supported",
                    hint=f"models of the family {self.model_type} without it are",
                )
        _check_rotary(config)
        width, types = head_dim(config), getattr(config, "layer_types", None)
        scale, embedding = self.scaling(config).softmax, self.attribute("RotaryEmbedding")(config)
        layers = []
        for layer in range(config.num_hidden_layers):
            turns = not self.nope or config.no_rope_layers[layer]
            local = types is None or types[layer] == "sliding_attention"
            inv_freq, factor = _rotary(config, embedding, types and types[layer])
            layers.append(Attention(
                scale=(width**-0.5 if scale is None else scale) * factor**2,
                inv_freq=inv_freq if turns else (0.0,) * (width // 2),
                window=getattr(config, "sliding_window", None) if local else None,
            ))  # fmt: skip
        return tuple(layers)

    def local_layers(self, attention: Sequence[Attention]) -> tuple[int, ...]:
        """Return the layers that keep their sliding window; `attention` is the result of the method of that name."""
        windows = [softmax.window for softmax in attention] if self.keeps_windows else []
        return tuple(layer for layer, window in enumerate(windows) if window is not None)

    def weights(self, config: Mapping[str, Any]) -> tuple[Mapping[str, tuple[int, ...]], re.Pattern[str]]:
        """Return the shapes of the Transformer's weights by name, and a pattern of names that transformers skips.

        Args:
            config: Content of config.json, converted or not.
        """
        return _weights(self, json.dumps(self.plain(config), sort_keys=True))

    def plain(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config.json of the Transformer in a checkpoint, converted or not."""
        kept = {key: value for key, value in harmless(config).items() if not key.startswith("liger")}
        return kept | {"model_type": self.model_type, "architectures": [f"{self.prefix}ForCausalLM"]}


@lru_cache(maxsize=8)
def _weights(family: Family, config: str) -> tuple[Mapping[str, tuple[int, ...]], re.Pattern[str]]:
    import torch

    with described(), torch.device("meta"):
        model = family.attribute("ForCausalLM")(family.attribute("Config").from_dict(json.loads(config)))
    # the last two as in `PreTrainedModel._adjust_missing_and_unexpected_keys`
    skipped = [*(model._keys_to_ignore_on_load_unexpected or ()), r"rotary_emb\.inv_freq", r"(^|\.)position_ids$"]
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}, re.compile("|".join(skipped))


@contextmanager
def described() -> Iterator[None]:
    """Turn any exception that a configuration causes in transformers into a `CheckpointError`."""
    try:
        yield
    except LigerError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"config.json describes no model: {error or type(error).__name__}",
            hint="take config.json from where the model came from",
        ) from error


def harmless(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of a config.json without keys that make transformers run other code or read other files."""
    return {key: value for key, value in config.items() if key not in _NOT_TAKEN}


_NOT_TAKEN = {
    "auto_map", "trust_remote_code", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
    "experts_implementation", "use_kernels", "quantization_config", "transformers_weights", "gguf_file", "device_map",
    "_name_or_path", "name_or_path", "base_model_tp_plan", "base_model_pp_plan", "torchscript",
}  # fmt: skip


def _rotary_rows(config: Any) -> list[Mapping[str, Any]]:
    """Return the parameters of rotary embedding: one row, or one for each type of layer."""
    found = config.rope_parameters
    return [found] if "rope_type" in found else list(found.values())


def _check_rotary(config: Any) -> None:
    for row in _rotary_rows(config):
        if row["rope_type"] not in STATIC_ROPE + BOUNDED_ROPE:
            raise CheckpointError(
                f"rotary embedding of type '{row['rope_type']}' is not supported",
                hint=f"supported: {', '.join(STATIC_ROPE + BOUNDED_ROPE)}",
            )


def rotary_distance(config: Any, wanted: int | None, keeps_softmax: bool) -> int:
    """Return the largest rotary distance of a converted model in tokens.

    A rotary embedding of `BOUNDED_ROPE` keeps its frequencies for short texts: of `longrope` the short factors, for
    distances up to the length before the context was extended, and of `dynamic` those of the trained length.

    Args:
        wanted: The distance that a user asks for; None for the largest that the frequencies are for.
        keeps_softmax: Whether some layers keep softmax, in which distances have no bound.

    Raises:
        UsageError: The frequencies are for shorter distances.
    """
    length = config.max_position_embeddings
    rows = [row for row in _rotary_rows(config) if row["rope_type"] in BOUNDED_ROPE]
    end = min((row.get("original_max_position_embeddings") or length for row in rows), default=length)
    end = min(end, length)
    if rows and (wanted or 0) > end:
        raise UsageError(
            f"a rotary distance of {wanted} tokens, while this model changes its frequencies beyond {end}",
            hint=f"--max-distance {end}, or leave it out",
        )
    if rows and keeps_softmax:
        raise UsageError(
            "layers that keep softmax, with a rotary embedding that changes with the length of the text",
            hint="convert every layer: --keep-softmax none",
        )
    return wanted or end


def _rotary(config: Any, embedding: Any, layer_type: str | None) -> tuple[tuple[float, ...], float]:
    """Return the rotary frequencies of a layer, and the factor on cosine and sine."""
    prefix = "" if "rope_type" in config.rope_parameters else f"{layer_type}_"
    inv_freq = getattr(embedding, f"{prefix}inv_freq")
    return tuple(inv_freq.float().tolist()), float(getattr(embedding, f"{prefix}attention_scaling"))


def head_dim(config: Any) -> int:
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def output_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a function from last hidden states `[..., hidden]` to logits `[..., V]`, for a model converted or not."""
    scaling = get_family(model.config.model_type).scaling(model.config)
    factor, cap = scaling.logits, scaling.logit_cap
    if cap is not None:
        return lambda hidden: cap * (model.lm_head(hidden) * (factor / cap)).tanh()
    return model.lm_head if factor == 1 else lambda hidden: model.lm_head(hidden) * factor


def _granite(config: Any) -> Scaling:
    return Scaling(
        softmax=config.attention_multiplier, embedding=config.embedding_multiplier,
        residual=config.residual_multiplier, logits=1 / config.logits_scaling,
    )  # fmt: skip


def _gemma3(config: Any) -> Scaling:
    return Scaling(
        softmax=config.query_pre_attn_scalar**-0.5, embedding=config.hidden_size**0.5,
        logit_cap=config.final_logit_softcapping,
    )  # fmt: skip


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("llama", "Llama"),
        Family("mistral", "Mistral"),
        Family("qwen2", "Qwen2"),
        Family("qwen3", "Qwen3", "query and key norm", qk_norm="head"),
        Family("olmo2", "Olmo2", "norms after attention and MLP, query and key norm", norms=AFTER, qk_norm="all"),
        Family("granite", "Granite", "multipliers", scaling=_granite),
        Family("smollm3", "SmolLM3", "layers without rotary embedding", nope=True),
        Family("phi3", "Phi3", "packed projections, partly rotated heads", packed=True),
        Family(
            "gemma3_text",
            "Gemma3",
            "four norms a layer, query and key norm, layers that keep a sliding window",
            norms=AROUND,
            qk_norm="head",
            scaling=_gemma3,
            unit_norms=True,
            keeps_windows=True,
            refused=("attn_logit_softcapping", "use_bidirectional_attention"),
        ),
    )
}


def get_family(model_type: str) -> Family:
    """Return the family of a checkpoint, converted or not.

    Args:
        model_type: Value of `model_type` in config.json.

    Raises:
        CheckpointError: There is no such family; the hint names all.
    """
    name = model_type.removeprefix(PREFIX)
    if name not in FAMILIES:
        raise CheckpointError(
            f"models of the family '{name}' cannot be converted",
            hint=f"those of these can: {', '.join(sorted(FAMILIES))}",
        )
    return FAMILIES[name]
