"""Devices, sums and shards for one process or several, launched by `torchrun` or `accelerate launch`.

Every process sees every batch and takes its share, so no sampler is needed. LoRA's gradients are small enough that one
sum per step replaces a wrapper around the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ligerexport.layers.mixer import LigerMixer


@dataclass(frozen=True)
class Group:
    """The processes of a run.

    Attributes:
        device: Device of this process.
        rank: Rank of this process, from 0.
        size: Number of processes.
        sharded: Whether the weights are split among the processes (FSDP2).
    """

    device: torch.device
    rank: int = 0
    size: int = 1
    sharded: bool = False

    @classmethod
    def join(cls, shard: bool = False) -> Group:
        """Join the processes that the launcher started; without a launcher this is the only one."""
        from accelerate import PartialState

        state = PartialState(cpu=not torch.accelerator.is_available())  # several CPU processes must be requested
        return cls(state.device, state.process_index, state.num_processes, shard and state.num_processes > 1)

    @property
    def main(self) -> bool:
        """Whether this process writes files and messages."""
        return self.rank == 0

    def sum(self, tensors: list[Tensor]) -> None:
        """Replace tensors of one dtype by their sums over all processes, in one call."""
        if self.size == 1 or not tensors:
            return
        flat = torch.cat([x.flatten() for x in tensors])
        torch.distributed.all_reduce(flat)
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors]), strict=True):
            x.copy_(total.view_as(x))

    def wait(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            torch.distributed.barrier()


class Root(nn.Module):
    """The root module of a sharded model; inside `forward`, all of the root's own weights are complete.

    A phase may call single layers, and the output projection chunk by chunk. FSDP2 gathers only the weights of the
    module that is called.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Any, *args: Any) -> Any:
        """Return `function(model, *args)`."""
        return function(self.model, *args)


def place(model: Any, group: Group) -> Root:
    """Put a model on the device, in shards if the group is sharded. Attention, layer and root are FSDP2 units."""
    root = Root(model)
    if not group.sharded:
        return root.to(group.device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(group.device.type, (group.size,))
    for layer in model.model.layers:
        if isinstance(layer.self_attn, LigerMixer):  # alignment calls it by itself
            fully_shard(layer.self_attn, mesh=mesh)
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)
    return root.to(group.device)


def whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return complete copies on the CPU, gathered from all processes; every process must call this."""
    return {
        name: (x.full_tensor() if hasattr(x, "full_tensor") else x).detach().to("cpu", copy=True).contiguous()
        for name, x in tensors.items()
    }


def fill(target: Tensor, value: Tensor) -> None:
    """Copy a complete tensor into one that may be sharded."""
    with torch.no_grad():
        target.copy_(as_part(target, value))


def as_part(like: Any, value: Tensor) -> Tensor:
    """Return a complete tensor on the device and in the shards of `like`."""
    value = value.to(device=like.device, dtype=like.dtype)
    if not hasattr(like, "device_mesh"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, like.device_mesh, like.placements)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the trainable parameters by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return all gradients, with zeros for those that a phase does not reach, on every process."""
    found = []
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        found.append(parameter.grad)
    return found
