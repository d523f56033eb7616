"""A layer of a transformers cache that holds the state of a mixer instead of keys and values."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from ligerexport.model.state import FADE, MixerState, fade


class LigerLayer(CacheLayerMixin):
    """The state of one mixer in a transformers cache.

    Attributes:
        state: Tensors by the names of `MixerSpec.state`; None before the first token.
        seen: Tokens seen, padding included.
    """

    def __init__(self, needs_mask: bool):
        super().__init__()
        self.state: MixerState | None = None
        self.seen = 0
        self.needs_mask = needs_mask

    def advance(self, state: MixerState, tokens: int) -> None:
        """Replace the state by that after `tokens` more tokens."""
        seen = self.seen + tokens
        if times := seen // FADE - self.seen // FADE:
            state = fade(state, times)
        self.state, self.seen, self.is_initialized = state, seen, True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the mixer makes the first state."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuse keys and values: a mixer keeps a state."""
        raise TypeError("a converted layer keeps a state, not keys and values; see LigerLayer.advance")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the sizes of the mask for layers kept as softmax; without such layers it does not grow."""
        return (self.seen + query_length if self.needs_mask else query_length), 0

    def get_seq_length(self) -> int:
        """Return the tokens seen."""
        return self.seen

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    get_max_cache_shape = get_max_length  # its name before transformers 5.20

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.seen, self.is_initialized = None, 0, False

    def crop(self, tokens_to_remove: int) -> None:
        """Refuse, because a state cannot be rolled back; copy the cache beforehand instead."""
        raise NotImplementedError("a recurrent state cannot be cropped; go back to a copy.deepcopy of the cache")

    def _map(self, change: Any) -> None:
        if self.state is not None:
            self.state = {name: change(tensor) for name, tensor in self.state.items()}

    def offload(self) -> None:
        """Move the state to the CPU."""
        self._map(lambda x: x.to("cpu", non_blocking=True))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Permute sequences for beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices`, `[B']`."""
        self._map(lambda x: x.index_select(0, indices.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sequence."""
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))
