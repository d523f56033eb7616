"""The fit of cells: clusters of a layer's keys, by the logits that queries give them.

Two keys are as far apart as the logits of queries differ between them, as a root mean square over the queries of a
text. k-means finds the centres of clusters by this distance, and a linear map of a key finds the nearest centre.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ligerexport.checkpoint.calibrate import FIRST
from ligerexport.checkpoint.fitted import score_names
from ligerexport.checkpoint.watch import attention, watched
from ligerexport.console import ProgressFactory, silent
from ligerexport.kernels.evicted import slow_rotation
from ligerexport.kernels.memory_attention import rotary_table, rotate
from ligerexport.model.config import LigerConfig
from ligerexport.model.families import get_family

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ligerexport.layers.mixer import LigerMixer

KEYS = 1 << 13
"""About as many keys of each head as are clustered."""
ROUNDS = 20
"""Number of rounds of k-means."""


def fit_cells(
    model: PreTrainedModel,
    windows: Tensor,
    liger: LigerConfig,
    *,
    batch: int = 1,
    progress: ProgressFactory | None = None,
) -> dict[str, Tensor]:
    """Fit the maps that choose the cells of evicted tokens.

    Args:
        model: The untouched Transformer, of a family in `FAMILIES`, in evaluation mode.
        windows: Token ids `[N, T]`.
        liger: The conversion.
        batch: Number of windows at a time.

    Returns:
        Weight `[H_kv, M, d_k]` and bias `[H_kv, M]` of each layer that the conversion changes, fp32 on the CPU, by
        their names in a checkpoint.
    """
    from ligerexport.layers.mixer import LigerMixer, layer_specs

    config: Any = deepcopy(model.config)
    config.liger = liger.to_dict()
    decoder: Any = model.model
    rows = zip(decoder.layers, layer_specs(config), get_family(config.model_type).attention(config), strict=True)
    found = {
        layer: _Seen(LigerMixer(module.self_attn, spec, softmax.inv_freq))
        for layer, (module, spec, softmax) in enumerate(rows)
        if spec is not None and spec.config.celled
    }
    step = max(1, windows.numel() // KEYS)

    def attend(
        layer: int, hidden: Tensor, query: Tensor, key: Tensor, value: Tensor, sliding_window: int | None
    ) -> Tensor:
        if layer in found:
            found[layer].add(hidden, step)
        return attention(query, key, value, sliding_window, lambda *_: None)

    with (
        torch.no_grad(),
        watched(model, attend),
        (progress or silent)("fitting the cells", len(windows), "steps") as advance,
    ):
        for ids in windows.split(batch):
            decoder(input_ids=ids.to(model.device), use_cache=False)
            advance(len(ids))
        tensors: dict[str, Tensor] = {}
        for layer, seen in found.items():
            maps = cluster(torch.cat(seen.keys, dim=1), seen.moment, liger.cells)
            tensors |= dict(zip(score_names(layer, "cell_proj"), maps, strict=True))
    return tensors


class _Seen:
    """What a fit keeps of one layer's keys and queries, before rotary embedding.

    Attributes:
        keys: Some keys of each window, `[H_kv, n, d_k]`.
        moment: `[H_kv, d_k, d_k]`, sum of the products of channels of the queries that read evicted tokens.
    """

    def __init__(self, mixer: LigerMixer) -> None:
        self.mixer, self.keys, spec = mixer, list[Tensor](), mixer.spec
        self.moment = torch.zeros((), dtype=torch.float64)
        table = rotary_table(torch.tensor(mixer.inv_freq), spec.max_distance, 1)
        (self.cos, self.sin), _ = slow_rotation(table, spec)

    def add(self, hidden: Tensor, step: int) -> None:
        """Add windows `[B, T, hidden]`: all of their queries, and one of `step` keys."""
        query, key, _ = self.mixer.project(hidden)
        self.keys.append(key[:, FIRST::step].double().flatten(0, 1).transpose(0, 1))
        phi = rotate(query.double(), self.cos.to(query.device), self.sin.to(query.device)) * self.mixer.spec.scale
        phi = phi.unflatten(2, (key.shape[2], -1)).movedim(2, 0).flatten(1, 3)
        self.moment = self.moment + phi.mT @ phi


def cluster(keys: Tensor, moment: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return a linear map to `count` numbers, the largest of which is that of the nearest centre of k-means.

    Args:
        keys: `[H, n, d]` fp64.
        moment: `[H, d, d]` fp64, sum of the products of channels of queries; a factor on it changes nothing.
        count: Number of clusters of each head.

    Returns:
        Weight `[H, count, d]` and bias `[H, count]`, fp32 on the CPU.
    """
    values, axes = torch.linalg.eigh(moment / moment.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None])
    metric = axes * values.clamp_min(0).sqrt()[:, None]
    x = keys @ metric
    generator = torch.Generator(x.device).manual_seed(0)

    def row(chance: Tensor) -> Tensor:  # [H, n] to [H, 1, d]
        index = torch.multinomial(chance, 1, generator=generator)
        return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))

    centre = row(torch.ones_like(x[..., 0]))
    while centre.shape[1] < count:  # k-means++: a far key is likely to be a centre
        centre = torch.cat([centre, row(torch.cdist(x, centre).amin(dim=-1).square() + 1e-30)], dim=1)
    for _ in range(ROUNDS):
        member = torch.nn.functional.one_hot(torch.cdist(x, centre).argmin(dim=-1), count).to(x)
        size = member.sum(dim=1)[..., None]
        centre = torch.where(size > 0, member.mT @ x / size.clamp_min(1), centre)
    return (2 * centre @ metric.mT).float().cpu(), -centre.square().sum(dim=-1).float().cpu()
