"""A GGUF file in llama.cpp, through its Python package, so that `bench` times it as it times other models."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ligerexport.checkpoint.gguf import read_header
from ligerexport.checkpoint.sources import is_gguf
from ligerexport.errors import MissingDependency, SourceError, UsageError
from ligerexport.measure.opened import Timed

PACKAGE = "llama-cpp-python"


def in_llama_cpp(model: str) -> bool:
    """Return whether `bench` runs this model in llama.cpp."""
    return is_gguf(Path(model).expanduser())


def check_llama_cpp() -> None:
    """Fail before the work if the package is not there.

    Raises:
        MissingDependency: It is not installed.
    """
    if find_spec("llama_cpp") is None:
        raise MissingDependency(f"{PACKAGE}, which runs GGUF files,", hint=f"pip install {PACKAGE}")


class LlamaCpp(Timed):
    """One sequence in llama.cpp on the CPU, with the keys and values in fp16, as llama.cpp has them by default.

    Args:
        path: GGUF file.
        length: Most tokens that the sequence may have; llama.cpp allocates memory for them at once. With None this one
            only tells facts, and each sibling is a new sequence of up to the trained length.
        batch: Number of sequences, which must be 1.
        threads: Number of threads, for prompts too.

    Raises:
        SourceError: The file is damaged, or llama.cpp does not know the model.
        UsageError: More than one sequence was asked for.
    """

    kind, device, runtime, grows = "llama.cpp", "cpu", "llama.cpp", True

    def __init__(self, path: Path, length: int | None, batch: int, threads: int) -> None:
        import llama_cpp

        if batch != 1:
            raise UsageError(
                f"--batch {batch} with a GGUF file", hint="llama.cpp is timed with one sequence: --batch 1"
            )
        self._path, self._length, self._threads = path, length, threads
        self._tensors = read_header(path).tensors
        try:
            self._llama: Any = llama_cpp.Llama(
                str(path), n_ctx=length or 8, n_threads=threads, n_threads_batch=threads, n_gpu_layers=0, verbose=False
            )
        except (ValueError, RuntimeError) as error:
            raise SourceError(
                f"llama.cpp cannot load {path}: {error}", hint=f"pip install --upgrade {PACKAGE}"
            ) from error
        self._api, self.batch = llama_cpp, batch
        self.vocab_size = self._llama.n_vocab()
        self.trained_length = llama_cpp.llama_model_n_ctx_train(self._llama.model)
        self.room = length or self.trained_length
        about = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self._llama.model, about, len(about))
        self.precision = about.value.decode().split(" ", 2)[-1]  # family, size, type

    @property
    def weight_bytes(self) -> int:
        """See `Timed.weight_bytes`; if the output has its own weights, one row of the embedding is read per token."""
        unread = "token_embd.weight" if "output.weight" in self._tensors else None
        return sum(tensor.nbytes for name, tensor in self._tensors.items() if name != unread)

    @property
    def state_bytes(self) -> int:
        """Bytes of the keys and values of the tokens so far."""
        return int(self._api.llama_state_seq_get_size(self._llama.ctx, 0))

    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        self._llama.eval(ids[0])
        logits = self._api.llama_get_logits_ith(self._llama.ctx, -1)
        return [int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())]

    def sibling(self, batch: int = 1) -> LlamaCpp:
        """Return this sequence, emptied, so that only one has memory; see `length`."""
        if self._length is None:
            return LlamaCpp(self._path, self.trained_length, batch, self._threads)
        self._llama.reset()
        return self
