"""A session's state as data: to restore, to copy into another session of the same model, or to keep in a file."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ligerexport.errors import LigerError, UsageError
from ligerexport.staging import staged_file

_FORMAT = "2"
"""Format that is written. Format 1, which is also read, has neither `identity` nor a hash."""
_HINT = "give a file that /save, --prompt-cache or Snapshot.save wrote; this one was left as it is"


@dataclass(frozen=True)
class Snapshot:
    """Everything that a session knows about the tokens it has seen, the same for every target and lowering.

    Attributes:
        model: `Manifest.fingerprint` of the model, with the precision of its weights, whose state this is.
        position: Number of tokens seen, `[B]` int64; negative inside padding on the left.
        tensors: State by the names of the graph's `past.*` inputs, batch axis first.
        ids: Tokens of one sequence that led to the state, `[T]` int64; None if they are not kept with it.
        identity: `Manifest.identity` of the model in any precision; None if an older version wrote the state.
        logits: Logits after the last token, `[V]` fp32, from which the next one can be chosen; None if they are not
            kept with it.
    """

    model: str
    position: np.ndarray
    tensors: dict[str, np.ndarray]
    ids: np.ndarray | None = None
    identity: str | None = None
    logits: np.ndarray | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the state, and of the logits that are kept with it."""
        kept = 0 if self.logits is None else self.logits.nbytes
        return kept + sum(tensor.nbytes for tensor in self.tensors.values())

    def sequence(self, row: int) -> Snapshot:
        """Return one sequence of a batch.

        Raises:
            UsageError: The batch has no such row.
        """
        if not 0 <= row < len(self.position):
            raise UsageError(f"row {row}", hint=f"this state has {len(self.position)} sequences")
        tensors = {name: tensor[row : row + 1].copy() for name, tensor in self.tensors.items()}
        return Snapshot(self.model, self.position[row : row + 1].copy(), tensors, identity=self.identity)

    @classmethod
    def stack(cls, snapshots: Sequence[Snapshot]) -> Snapshot:
        """Return all sequences as one batch; their lengths may differ.

        Raises:
            UsageError: The list is empty, or the states belong to different models.
        """
        if len({snapshot.model for snapshot in snapshots}) != 1:
            raise UsageError("states of one model were expected", hint="stack snapshots of sessions of one artifact")
        first, names = snapshots[0], snapshots[0].tensors
        tensors = {name: _stacked([snapshot.tensors[name] for snapshot in snapshots]) for name in names}
        position = np.concatenate([snapshot.position for snapshot in snapshots])
        return cls(first.model, position, tensors, identity=first.identity)

    def save(self, path: Path | str) -> None:
        """Write the state to one file (safetensors) that every runtime reads, whole or not at all.

        Raises:
            LigerError: The disk is full, or the file cannot be written.
        """
        from safetensors.numpy import save_file

        more = {name: x for name, x in (("ids", self.ids), ("logits", self.logits)) if x is not None}
        tensors = {"position": self.position, **more, **{name: widened(x) for name, x in self.tensors.items()}}
        header = {"ligerexport.snapshot": _FORMAT, "model": self.model, "sha256": digest(tensors)}
        if self.identity is not None:
            header["identity"] = self.identity
        with staged_file(path) as file:
            file.touch()
            mode = file.stat().st_mode
            save_file(tensors, file, metadata=header)
            file.chmod(mode)  # safetensors writes 0600

    @classmethod
    def load(cls, path: Path | str) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            LigerError: The file does not exist or is no snapshot.
        """
        from safetensors import safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                version = header.get("ligerexport.snapshot", "")
                if version.isdecimal() and int(version) > int(_FORMAT):
                    raise ValueError(f"its format {version:.9} is newer than this program reads ({_FORMAT})")
                if version not in ("1", _FORMAT) or "model" not in header:
                    raise ValueError("it is not a saved state")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            if version != "1" and header.get("sha256") != digest(tensors):
                raise ValueError("it was changed after it was written")
            position, ids, logits = tensors.pop("position"), tensors.pop("ids", None), tensors.pop("logits", None)
            for name, array, dtype in (("position", position, np.int64), ("ids", ids, np.int64),
                                       ("logits", logits, np.float32)):  # fmt: skip
                if array is not None and (array.ndim != 1 or array.dtype != dtype):
                    raise ValueError(f"its {name} are {list(array.shape)} of {array.dtype}")
        except Exception as error:  # safetensors raises several kinds for damaged files
            raise LigerError(f"cannot read a state from {path}: {error}", hint=_HINT) from error
        return cls(header["model"], position, tensors, ids, header.get("identity"), logits)


def digest(tensors: dict[str, np.ndarray]) -> str:
    """Return the sha256 of all names and their bytes, in the order of the names, in hex."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensors[name]).data)
    return digest.hexdigest()


def widened(x: np.ndarray) -> np.ndarray:
    """Return fp32 for bits of bfloat16, which few readers know."""
    return (x.astype(np.uint32) << 16).view(np.float32) if x.dtype == np.uint16 else x


def _stacked(parts: list[np.ndarray]) -> np.ndarray:
    """Concatenate rows. Tensors that grow, `[B, H_kv, P, d]`, end with the newest token, so zeros go in front."""
    if len({part.shape[1:] for part in parts}) > 1:
        longest = max(part.shape[2] for part in parts)
        parts = [np.pad(part, ((0, 0), (0, 0), (longest - part.shape[2], 0), (0, 0))) for part in parts]
    return np.concatenate(parts)
