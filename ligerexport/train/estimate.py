"""Estimate parameters, steps and memory of a recovery from headers and settings alone, without loading weights.

The memory is for the fused kernels, and off by a few tenths at most; benchmarks/results/recovery.md lists its terms.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from ligerexport.checkpoint.checkpoint import CheckpointInfo
from ligerexport.dtypes import BY_KERNEL
from ligerexport.train.config import RecoverConfig
from ligerexport.train.model import target_shapes

LOGIT_CHUNK = 1024
"""Number of positions whose logits exist at a time."""


@dataclass(frozen=True)
class Estimate:
    """Estimated numbers of a recovery; bytes are per process.

    Attributes:
        trainable_parameters: Number of LoRA's parameters.
        parameters: Number of the frozen model's parameters.
        steps: Number of optimizer steps.
        tokens: Number of tokens in all steps, padding included.
        weight_bytes: Bytes of frozen weights, the teacher's included.
        lora_bytes: Bytes of LoRA in fp32 with its gradient and the two moments of AdamW.
        activation_bytes: Bytes of activations kept for the backward pass.
        logit_bytes: Bytes of a chunk of logits in fp32, for student and teacher.
    """

    trainable_parameters: int
    parameters: int
    steps: int
    tokens: int
    weight_bytes: int
    lora_bytes: int
    activation_bytes: int
    logit_bytes: int

    @property
    def memory_bytes(self) -> int:
        """Total bytes."""
        return self.weight_bytes + self.lora_bytes + self.activation_bytes + self.logit_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self) | {"memory_bytes": self.memory_bytes}


def estimate(info: CheckpointInfo, config: RecoverConfig, processes: int = 1, shard: bool = False) -> Estimate:
    """Estimate a recovery.

    Args:
        processes: Number of processes that share the batch.
        shard: Whether they share the weights as well.
    """
    shapes = target_shapes(info, config.targets)
    lora = sum(config.rank * (shape[0] + shape[1]) for shape in shapes.values())
    parameters = sum(prod(tensor.shape) for tensor in info.tensors.values())
    width = BY_KERNEL[config.dtype].nbytes
    models, parts = 2 if config.row.needs_teacher else 1, processes if shard else 1
    layers = info.config["num_hidden_layers"]
    layer = max(1, sum(prod(t.shape) for name, t in info.tensors.items() if ".layers." in name) // layers)
    outside = parameters - layers * layer
    # complete at a time: the current layer, the next one, and the weights of the root module, such as the embedding
    gathered = models * width * (2 * layer + outside) if shard else 0

    per_layer, boundary = _activations(info.config, width)
    tokens = config.micro_batch_tokens or max(config.length, config.batch_tokens // processes)
    kept = layers * boundary + per_layer if config.gradient_checkpointing else layers * per_layer
    return Estimate(
        trainable_parameters=lora,
        parameters=parameters,
        steps=config.num_steps,
        tokens=config.num_steps * config.batch_tokens,
        weight_bytes=models * parameters * width // parts + gathered,
        lora_bytes=lora * 16 // parts,
        activation_bytes=tokens * kept,
        logit_bytes=4 * 4 * LOGIT_CHUNK * info.config["vocab_size"],
    )


def _activations(config: Any, width: int) -> tuple[int, int]:
    """Return the bytes of activations per token in a layer, and those of the layer's input alone."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads
    head = config.get("head_dim") or hidden // q_heads
    norms = 2 * (4 + width) * hidden
    attention = 2 * width * (2 * q_heads + 2 * kv_heads) * head  # projections and output, plain and padded
    return norms + attention + width * (3 * inner + 2 * hidden), width * hidden
