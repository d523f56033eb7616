"""A session's state as data: to go back to, to copy into another session of the same model, to keep in a file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ligerexport.errors import LigerError

_FORMAT = "1"


@dataclass(frozen=True)
class Snapshot:
    """All that a session knows about the tokens it has seen. It is the same for every target and lowering.

    Attributes:
        model: `Manifest.fingerprint` of the model whose state this is.
        position: Tokens seen, `[B]` int64; negative while padding on the left lasts.
        tensors: State by the names of the graph's `past.*` inputs, with their leading batch axis.
    """

    model: str
    position: np.ndarray
    tensors: dict[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def save(self, path: Path | str) -> None:
        """Write the state to one file (safetensors), whole or not at all."""
        from safetensors.numpy import save

        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            header = {"ligerexport.snapshot": _FORMAT, "model": self.model}
            partial.write_bytes(save({"position": self.position, **self.tensors}, metadata=header))
            partial.replace(target)
        except OSError as error:
            raise LigerError(f"cannot write {target}: {error.strerror}", hint="choose another place") from error
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path | str) -> Snapshot:
        """Read what `save` wrote.

        Raises:
            LigerError: There is no such file or it is no snapshot.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="numpy") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        except (OSError, SafetensorError) as error:
            raise LigerError(f"cannot read a state from {path}: {error}") from error
        if header.get("ligerexport.snapshot") != _FORMAT:
            raise LigerError(f"{path} is not a saved state", hint="give a file that /save or Snapshot.save wrote")
        return cls(header["model"], tensors.pop("position"), tensors)
