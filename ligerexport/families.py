"""The families of checkpoints: which transformers classes they are, and the few facts that others need of them.

A new family is a row of `FAMILIES`. Nothing here imports torch before a row is used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from ligerexport.errors import CheckpointError, close_matches

if TYPE_CHECKING:
    import torch

PREFIX = "liger_"
"""What a converted checkpoint's `model_type` starts with."""

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings whose frequencies do not depend on the length of the text."""


class Norms(NamedTuple):
    """Names of a layer's norms by their place, None where a family has none.

    Attributes:
        before_attention: Of what enters attention.
        after_attention: Of what attention adds to the residual stream.
        before_mlp: Of what enters the MLP.
        after_mlp: Of what the MLP adds to the residual stream.
    """

    before_attention: str | None
    after_attention: str | None
    before_mlp: str | None
    after_mlp: str | None


BEFORE = Norms("input_layernorm", None, "post_attention_layernorm", None)
AFTER = Norms(None, "post_attention_layernorm", None, "post_feedforward_layernorm")


class Attention(NamedTuple):
    """What the softmax of one layer is, as the family has it.

    Attributes:
        scale: On the products of queries and keys; YaRN's factor on cosine and sine is squared into it.
        inv_freq: `[R]`, radians a token; zeros in a layer without rotary embedding.
        window: Most recent tokens seen, the current one included; None is all.
    """

    scale: float
    inv_freq: tuple[float, ...]
    window: int | None


@dataclass(frozen=True)
class Scaling:
    """Factors on what flows through a model.

    Attributes:
        softmax: On the products of queries and keys; None is d_k ** -0.5.
        embedding: On what enters the first layer.
        residual: On what attention and MLP add to the residual stream.
        logits: On the logits.
    """

    softmax: float | None = None
    embedding: float = 1.0
    residual: float = 1.0
    logits: float = 1.0


@dataclass(frozen=True)
class Family:
    """One family of decoder-only Transformers in transformers.

    Attributes:
        model_type: Value of `model_type` in its config.json.
        prefix: What its classes' names start with.
        doc: What sets it apart.
        norms: Of a layer.
        qk_norm: What queries and keys are normed over before rotary embedding: each head, or all heads at once.
        scaling: Factors, from the configuration.
        nope: Whether its `no_rope_layers` says which layers have rotary embedding (1) and which have none (0).
        packed: Whether `qkv_proj` holds query, key and value, and `gate_up_proj` gate and up.
    """

    model_type: str
    prefix: str
    doc: str = ""
    norms: Norms = BEFORE
    qk_norm: Literal["head", "all"] | None = None
    scaling: Callable[[Any], Scaling] = lambda config: Scaling()
    nope: bool = False
    packed: bool = False

    def attribute(self, suffix: str) -> Any:
        """Return the family's class whose name ends in `suffix`, such as `ForCausalLM` or `RotaryEmbedding`."""
        package = f"transformers.models.{self.model_type}"
        module = "configuration" if suffix == "Config" else "modeling"
        return getattr(import_module(f"{package}.{module}_{self.model_type}"), self.prefix + suffix)

    def attention(self, config: Any) -> tuple[Attention, ...]:
        """Return what the softmax of each layer is.

        Raises:
            CheckpointError: The rotary frequencies depend on the length of the text.
        """
        width, types = head_dim(config), getattr(config, "layer_types", None)
        scale = self.scaling(config).softmax
        inv_freq, factor = self._rotary(config)
        layers = []
        for layer in range(config.num_hidden_layers):
            turns = not self.nope or config.no_rope_layers[layer]
            local = types is None or types[layer] == "sliding_attention"
            layers.append(Attention(
                scale=(width**-0.5 if scale is None else scale) * factor**2,
                inv_freq=inv_freq if turns else (0.0,) * (width // 2),
                window=getattr(config, "sliding_window", None) if local else None,
            ))  # fmt: skip
        return tuple(layers)

    def _rotary(self, config: Any) -> tuple[tuple[float, ...], float]:
        """Return the rotary frequencies, and the factor on cosine and sine."""
        kind = config.rope_parameters["rope_type"]
        if kind not in STATIC_ROPE:
            raise CheckpointError(
                f"rotary embedding of type '{kind}' changes with the length of the text",
                hint=f"supported: {', '.join(STATIC_ROPE)}",
            )
        embedding = self.attribute("RotaryEmbedding")(config)
        return tuple(embedding.inv_freq.float().tolist()), float(embedding.attention_scaling)


def head_dim(config: Any) -> int:
    """Return the width of a head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def output_head(model: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what makes logits `[..., V]` of a model's last hidden states `[..., hidden]`, converted or not."""
    scaling = get_family(model.config.model_type).scaling(model.config)
    return model.lm_head if scaling.logits == 1 else lambda hidden: model.lm_head(hidden) * scaling.logits


def _granite(config: Any) -> Scaling:
    return Scaling(
        softmax=config.attention_multiplier, embedding=config.embedding_multiplier,
        residual=config.residual_multiplier, logits=1 / config.logits_scaling,
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
    )
}


def get_family(model_type: str) -> Family:
    """Return the family of a checkpoint, converted or not.

    Args:
        model_type: Value of `model_type` in config.json.

    Raises:
        CheckpointError: No such family; the hint names close matches.
    """
    name = model_type.removeprefix(PREFIX)
    if name not in FAMILIES:
        raise CheckpointError(f"unknown family '{name}'", hint=close_matches(name, FAMILIES))
    return FAMILIES[name]
