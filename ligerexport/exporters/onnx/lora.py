"""LoRA at run time: the two low-rank matrices of each linear map are inputs of the graph, one pair for each sequence.

An artifact built with a rank adds `x @ A @ B` to every product with a weight of attention and MLP. Zeros, which stand
for no adapter, add nothing. Maps of one input share a pair: their A lie side by side, their B on a diagonal of blocks.
Source: LoRA, https://arxiv.org/abs/2106.09685, section 4.1.
"""

from __future__ import annotations

import re
from collections.abc import Container
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ligerexport.artifact.artifact import Manifest, TensorInfo
from ligerexport.errors import ArtifactError, UsageError
from ligerexport.reading import read_json

if TYPE_CHECKING:
    from ligerexport.exporters.onnx.spec import ModelSpec

JOINT = {"self_attn.qkv_proj": ("q", "k", "v"), "mlp.gate_up_proj": ("gate", "up")}
"""Maps of one input, by their joint name."""
_PREFIX = "lora."
_PLACE = re.compile(r"layers\.\d+\.(self_attn\.(q|k|v|o|qkv)|mlp\.(gate|up|down|gate_up))_proj")
_SAVED = "save it with PEFT's save_pretrained"


def adapter_inputs(spec: ModelSpec, layout: Container[str], rank: int) -> tuple[TensorInfo, ...]:
    """Return the inputs A `[B, in, r]` and B `[B, r, out]` of each product; r is the sum of joint maps' ranks.

    Args:
        spec: The checkpoint.
        layout: Names of the stored weights, from `data_layout`.
        rank: Largest rank of an adapter; 0 for none.
    """
    found: list[TensorInfo] = []
    names = [name.removesuffix(".weight") for name in spec.weights if rank and _PLACE.search(name)]
    for name in dict.fromkeys(_product(name, layout) for name in names if f"{name}.weight" in spec.weights):
        parts = [part for part in names if _product(part, layout) == name]
        shapes = [spec.weights[f"{part}.weight"].shape for part in parts]
        total, (_, width) = rank * len(parts), shapes[0]
        found.append(TensorInfo(f"{_PREFIX}{name}.a", "float32", ("B", width, total)))
        found.append(TensorInfo(f"{_PREFIX}{name}.b", "float32", ("B", total, sum(rows for rows, _ in shapes))))
    return tuple(found)


def _product(name: str, layout: Container[str]) -> str:
    """Return the name of the product that a map is part of: its own, or the joint one."""
    for joint, kinds in JOINT.items():
        room, _, _ = joint.partition(".")
        for kind in kinds:
            if name.endswith(f".{room}.{kind}_proj"):
                whole = name.removesuffix(f"{room}.{kind}_proj") + joint
                return whole if f"{whole}.weight" in layout else name
    return name


def adapters_of(manifest: Manifest) -> tuple[TensorInfo, ...]:
    """Return the inputs of an artifact's graph that take adapters."""
    return manifest.graph.inputs[2 + len(manifest.state) :]


def read_adapter(path: Path | str, manifest: Manifest) -> dict[str, np.ndarray]:
    """Read a PEFT adapter with LoRA, for a row of an artifact.

    Args:
        path: Directory that PEFT or `recover --adapter` wrote.
        manifest: The artifact's.

    Returns:
        The numbers of each input without its axis B, fp32; inputs that the adapter does not change are missing.

    Raises:
        ArtifactError: The adapter is damaged, of another kind or for another model.
        UsageError: The artifact takes only smaller ranks.
    """
    directory = Path(path).expanduser()
    pairs, scale = _pairs(directory)
    rank = max(a.shape[0] for a, _ in pairs.values())
    if rank > manifest.lora:
        raise UsageError(
            f"{path} has rank {rank}, this artifact takes up to {manifest.lora}", hint=f"build it with --lora {rank}"
        )
    found: dict[str, np.ndarray] = {}
    shapes = {info.name: info.sizes for info in adapters_of(manifest)}
    for name in [name.removesuffix(".a") for name in shapes if name.endswith(".a")]:
        module = name.removeprefix(_PREFIX)
        parts = _parts(module, shapes[f"{name}.a"], manifest)
        if not any(part in pairs for part, _ in parts):
            continue
        a, b = (np.zeros(shapes[f"{name}.{x}"], np.float32) for x in "ab")
        column, place = 0, 0
        for part, width in parts:
            if part in pairs:
                low, high = pairs.pop(part)
                if low.shape[1] != a.shape[0] or high.shape != (width or b.shape[1], low.shape[0]):
                    raise ArtifactError(
                        f"{path} has LoRA of {list(low.shape)} and {list(high.shape)} for {part}",
                        hint="use an adapter of the model that the artifact was built from",
                    )
                a[:, place : place + len(low)] = low.T
                b[place : place + len(low), column : column + len(high)] = scale * high.T
            column, place = column + width, place + manifest.lora
        found |= {f"{name}.a": a, f"{name}.b": b}
    if pairs:
        raise ArtifactError(
            f"{path} changes {next(iter(pairs))}, which this artifact does not let adapters change",
            hint="merge it before the build: ligerexport convert MODEL --merge ADAPTER -o DIRECTORY",
        )
    return found


def _parts(module: str, shape: tuple[int, ...], manifest: Manifest) -> list[tuple[str, int]]:
    """Return the maps of a product and how many columns of B each has; 0 for a single map, which has all."""
    _, total = shape
    for joint, kinds in JOINT.items():
        if module.endswith(joint) and total == len(kinds) * manifest.lora:
            model = manifest.model
            rows = {"q": model.q_heads * model.d_k, "k": model.kv_heads * model.d_k, "v": model.kv_heads * model.d_v}
            width = next(x.sizes[1] for x in adapters_of(manifest) if x.name == f"{_PREFIX}{module}.b")
            base = module.removesuffix(joint) + joint.partition(".")[0]
            return [(f"{base}.{kind}_proj", rows.get(kind) or width // 2) for kind in kinds]
    return [(module, 0)]


def _pairs(directory: Path) -> tuple[dict[str, tuple[np.ndarray, np.ndarray]], float]:
    """Return A `[r, in]` and B `[out, r]` by the name of the map, and the factor on their product."""
    from safetensors import SafetensorError, deserialize

    config = read_json(directory / "adapter_config.json", ArtifactError, _SAVED)
    try:
        stored = deserialize((directory / "adapter_model.safetensors").read_bytes())
        tensors = {name: _float32(**tensor) for name, tensor in stored}
        plain = not any(config.get(key) for key in ("use_dora", "rank_pattern", "alpha_pattern", "fan_in_fan_out"))
        scale = config["lora_alpha"] / (sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    except (OSError, KeyError, TypeError, ValueError, ArithmeticError, SafetensorError) as error:
        raise ArtifactError(f"{directory} holds no LoRA that can be read ({error})", hint=_SAVED) from None
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        module, _, rest = name.removeprefix("base_model.model.").rpartition(".lora_")
        halves.setdefault(module, {})[rest] = tensor
    both = {"A.weight", "B.weight"}
    whole = all(pair.keys() == both and all(half.ndim == 2 for half in pair.values()) for pair in halves.values())
    if not plain or not halves or not whole:
        raise ArtifactError(
            f"{directory} holds more than LoRA of one scale", hint="merge it before the build: convert --merge"
        )
    return {module: (pair["A.weight"], pair["B.weight"]) for module, pair in halves.items()}, float(scale)


def _float32(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    """Return a tensor as safetensors stores it in fp32. numpy has no bfloat16, which is the upper half of fp32.

    Raises:
        KeyError: The type is not a floating-point type of at most 32 bits.
    """
    if dtype == "BF16":
        return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(shape)
    return np.frombuffer(data, {"F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float32).reshape(shape)
