"""What a recovery will take, from headers and settings alone: parameters, steps, bytes of memory. Loads no weight.

The memory is that of the fused kernels, off by a few tenths at most; docs/guides/recover.md has its terms.
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
"""Positions whose logits exist at a time."""


@dataclass(frozen=True)
class Estimate:
    """Numbers of a recovery; bytes are those of each process.

    Attributes:
        trainable_parameters: Parameters of LoRA.
        parameters: Parameters of the frozen model.
        steps: Optimizer steps.
        tokens: Tokens of all steps, padding included.
        weight_bytes: Frozen weights, the teacher's included.
        lora_bytes: LoRA in fp32 with its gradient and the two moments of AdamW.
        activation_bytes: Activations that are kept for the backward pass.
        logit_bytes: Logits of a chunk in fp32, of student and teacher.
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
        """Bytes of all of them together."""
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
    # whole at a time: the layer at work, the next one, and what the root of the shards holds, such as the embedding
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
    """Return the bytes a token keeps in a layer, and those of the layer's input alone."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q_heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or q_heads
    head = config.get("head_dim") or hidden // q_heads
    norms = 2 * (4 + width) * hidden
    attention = 2 * width * (2 * q_heads + 2 * kv_heads) * head  # projections and output, and as padded rows
    return norms + attention + width * (3 * inner + 2 * hidden), width * hidden
