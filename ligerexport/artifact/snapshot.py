"""A session's state as data: to go back to, to copy into another session of the same model, to keep in a file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ligerexport.errors import LigerError, UsageError
from ligerexport.staging import staged_file

_FORMAT = "1"
_HINT = "give a file that /save, --prompt-cache or Snapshot.save wrote; this one was left as it is"


@dataclass(frozen=True)
class Snapshot:
    """All that a session knows about the tokens it has seen. It is the same for every target and lowering.

    Attributes:
        model: `Manifest.fingerprint` of the model whose state this is.
        position: Tokens seen, `[B]` int64; negative while padding on the left lasts.
        tensors: State by the names of the graph's `past.*` inputs, with their leading batch axis.
        ids: Tokens of one sequence that made it, `[T]` int64, where they are kept with it.
    """

    model: str
    position: np.ndarray
    tensors: dict[str, np.ndarray]
    ids: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def sequence(self, row: int) -> Snapshot:
        """Return one sequence of a batch.

        Raises:
            UsageError: There is no such row.
        """
        if not 0 <= row < len(self.position):
            raise UsageError(f"row {row}", hint=f"this state has {len(self.position)} sequences")
        tensors = {name: tensor[row : row + 1].copy() for name, tensor in self.tensors.items()}
        return Snapshot(self.model, self.position[row : row + 1].copy(), tensors)

    @classmethod
    def stack(cls, snapshots: Sequence[Snapshot]) -> Snapshot:
        """Return the sequences of all as one batch; they may be of different length.

        Raises:
            UsageError: None are given, or they are states of different models.
        """
        if len({snapshot.model for snapshot in snapshots}) != 1:
            raise UsageError("states of one model were expected", hint="stack snapshots of sessions of one artifact")
        names = snapshots[0].tensors
        tensors = {name: _stacked([snapshot.tensors[name] for snapshot in snapshots]) for name in names}
        return cls(snapshots[0].model, np.concatenate([snapshot.position for snapshot in snapshots]), tensors)

    def save(self, path: Path | str) -> None:
        """Write the state to one file (safetensors), whole or not at all.

        Raises:
            LigerError: The disk is full, or the place cannot be written.
        """
        from safetensors.numpy import save

        header = {"ligerexport.snapshot": _FORMAT, "model": self.model}
        ids = {} if self.ids is None else {"ids": self.ids}
        with staged_file(path) as file:
            file.write_bytes(save({"position": self.position, **ids, **self.tensors}, metadata=header))

    @classmethod
    def load(cls, path: Path | str) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            LigerError: There is no such file or it is no snapshot.
        """
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                if header.get("ligerexport.snapshot") != _FORMAT or "model" not in header:
                    raise ValueError("it is not a saved state")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            position, ids = tensors.pop("position"), tensors.pop("ids", None)
            for name, array in (("position", position), ("ids", ids)):
                if array is not None and (array.ndim != 1 or array.dtype != np.int64):
                    raise ValueError(f"its {name} are {list(array.shape)} of {array.dtype}")
        except Exception as error:  # the library raises several for what is damaged
            raise LigerError(f"cannot read a state from {path}: {error}", hint=_HINT) from error
        return cls(header["model"], position, tensors, ids)


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate rows. What grows, `[B, H_kv, P, d]`, has its newest token last: zeros go in front."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[2] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, 0), (longest - part.shape[2], 0), (0, 0))) for part in parts]
    return np.concatenate(parts)
