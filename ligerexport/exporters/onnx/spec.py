"""What the graph needs to know about a converted checkpoint, from its config.json and headers; no model is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import ModelShape
from ligerexport.checkpoint.checkpoint import CheckpointInfo, TensorInfo, check_checkpoint, check_plain
from ligerexport.errors import CheckpointError, quoted
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import PREFIX, Attention, Scaling, get_family, head_dim
from ligerexport.model.state import MixerSpec

ACTIVATIONS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
"""Activations by their names in config.json, with the method of a lowering that writes each."""


@dataclass(frozen=True)
class ModelSpec:
    """The parts of a converted checkpoint that the graph is written from.

    Attributes:
        path: The checkpoint's directory.
        family: Row of `FAMILIES`.
        liger: The conversion.
        mixers: Mixer of each layer; None for a layer that is kept as softmax.
        attention: The softmax attention of each layer.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the MLP.
        vocab_size: Rows of the embedding.
        q_heads: H_q.
        kv_heads: H_kv.
        head_dim: Width of a head.
        scaling: Factors on embedding, residual stream and logits.
        activation: Activation of the MLP's gate; key of `ACTIVATIONS`.
        norm_eps: Epsilon of every norm.
        trained_length: Longest text in training, in tokens.
        tied: Whether the output projection is the embedding.
        weights: Tensors that the checkpoint stores, by name.
    """

    path: Path
    family: str
    liger: LigerConfig
    mixers: tuple[MixerSpec | None, ...]
    attention: tuple[Attention, ...]
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    q_heads: int
    kv_heads: int
    head_dim: int
    scaling: Scaling
    activation: str
    norm_eps: float
    trained_length: int
    tied: bool
    weights: Mapping[str, TensorInfo]
    config: Mapping[str, Any]

    @property
    def used(self) -> list[str]:
        """Names of the weights that the graph uses, in the order of the file."""
        unused = {"lm_head.weight"} if self.tied else set()
        return [name for name in self.weights if not name.endswith("rotary_emb.inv_freq") and name not in unused]

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model."""
        return ModelShape(
            layers=len(self.mixers), hidden_size=self.hidden_size, vocab_size=self.vocab_size, q_heads=self.q_heads,
            kv_heads=self.kv_heads, d_k=self.head_dim, d_v=self.head_dim, trained_length=self.trained_length,
            parameters=sum(prod(self.weights[name].shape) for name in self.used),
        )  # fmt: skip

    @property
    def kv_per_token(self) -> int:
        """Bytes of one token in the Transformer's KV cache, in fp32."""
        return len(self.mixers) * 2 * self.kv_heads * self.head_dim * 4

    @property
    def evicts(self) -> bool:
        """Whether layers keep what they evict, so that the share of attention on forgotten tokens is known."""
        return any(mixer is not None and mixer.config.evicts for mixer in self.mixers)

    @property
    def ragged(self) -> bool:
        """Whether a layer has sizes for each KV head or a small type of its slots."""
        return any(mixer is not None and mixer.config.ragged for mixer in self.mixers)


def read_spec(checkpoint: str | Path | CheckpointInfo, state: str | None = None) -> ModelSpec:
    """Read a converted checkpoint.

    Args:
        checkpoint: The checkpoint.
        state: Row of `STATE_DTYPES` that replaces the conversion's type of slots.

    Raises:
        CheckpointError: The checkpoint is incomplete, not converted, or not supported by the graph.
    """
    from ligerexport.layers.mixer import layer_specs, read_config

    info = checkpoint if isinstance(checkpoint, CheckpointInfo) else check_checkpoint(checkpoint, tokenizer=False)
    if not str(info.config["model_type"]).startswith(PREFIX):
        raise CheckpointError(
            f"{info.path} is not converted (model_type '{info.config['model_type']}')",
            hint=f"ligerexport convert {quoted(info.path)} -o {quoted(info.path.resolve().name + '-liger')}",
        )
    check_plain(info)
    content = dict(info.config)
    if state is not None:
        content["liger"] = replace(LigerConfig.from_dict(content["liger"]), state_dtype=state).to_dict()  # type: ignore[arg-type]
    config: Any = read_config(content)
    family = get_family(config.model_type)
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in ACTIVATIONS:
        raise CheckpointError(f"activation '{activation}' in config.json", hint=f"supported: {', '.join(ACTIVATIONS)}")
    mixers = tuple(layer_specs(config))
    spec = ModelSpec(
        path=info.path,
        family=family.model_type,
        liger=LigerConfig.from_dict(config.liger),
        mixers=mixers,
        attention=family.attention(config),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        q_heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=head_dim(config),
        scaling=family.scaling(config),
        activation=activation,
        norm_eps=config.rms_norm_eps,
        trained_length=config.max_position_embeddings,
        tied=info.tied,
        weights=info.tensors,
        config=content,
    )
    size = sum(tensor.nbytes() for mixer in mixers if mixer is not None for tensor in mixer.state())
    if size > max(1 << 30, 4 * info.bytes):
        raise CheckpointError(
            f"the state of a sequence takes {size:,} bytes, the weights {info.bytes:,}",
            hint="convert the model with a smaller window or fewer slots",
        )
    return spec
