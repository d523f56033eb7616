"""Other programs that run the original Transformer, with the interface of `Opened`: onnxruntime-genai and llama.cpp.

They are peers for timing only: neither is scored, and both read one sequence at a time.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ligerexport.errors import CheckpointError, MissingDependency, UsageError
from ligerexport.measure.opened import Opened
from ligerexport.threads import default_threads

if TYPE_CHECKING:
    from torch import Tensor

GENAI = "genai_config.json"
"""File that the model builder of onnxruntime-genai writes beside a model."""
LLAMA = "llama.cpp:"
"""What stands before the path of a GGUF file that llama.cpp is to run."""


def is_peer(model: str | Path) -> bool:
    """Return whether another program is to run a model."""
    return str(model).startswith(LLAMA) or (Path(model).expanduser() / GENAI).is_file()


def open_peer(model: str | Path, batch: int, threads: int | None) -> Opened:
    """Open a model with the program that it is for.

    Args:
        model: Directory with `GENAI`, or `LLAMA` and the path of a GGUF file.
        batch: Number of sequences; only 1 is possible.
        threads: Number of threads; None takes the physical cores.

    Raises:
        MissingDependency: The program is not installed.
        UsageError: Several sequences are asked for.
        CheckpointError: The program cannot open the model.
    """
    if batch != 1:
        raise UsageError(f"{batch} sequences of {model}", hint="other programs are timed with one: --batch 1")
    count = threads or default_threads()
    if str(model).startswith(LLAMA):
        return LlamaModel(Path(str(model).removeprefix(LLAMA)).expanduser(), count)
    return GenAIModel(Path(model).expanduser(), count)


class _Peer(Opened):
    """What both programs have in common: a KV cache with room for the trained length, filled from its start."""

    kind, device, batch, grows = "transformer", "cpu", 1, True

    _token_bytes: int
    _seen = 0

    @property
    def sequence_bytes(self) -> None:
        return None

    @property
    def state_bytes(self) -> int:
        """Bytes of the filled part of the cache; the program has allocated the rest too."""
        return self._seen * self._token_bytes

    def read(self, ids: Tensor, state: Any, last: int, *, keep: bool = True) -> tuple[Tensor, Any]:
        raise UsageError(f"{self.name} can only be timed", hint="evaluate the checkpoint that it was made from")

    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        self._seen += len(ids[0])
        if self._seen > self.trained_length:
            raise UsageError(f"{self.name} has room for {self.trained_length:,} tokens", hint="take a shorter context")
        return [int(self._logits(list(ids[0])).argmax())]

    @abstractmethod
    def _logits(self, ids: list[int]) -> np.ndarray:
        """Read ids and return the logits after the last, `[V]`."""


class GenAIModel(_Peer):
    """A model of onnxruntime-genai's builder.

    Args:
        path: Directory that the builder wrote.
        threads: Number of threads.
        like: Another sequence of the model, whose weights are shared.
    """

    def __init__(self, path: Path, threads: int, like: GenAIModel | None = None) -> None:
        try:
            import onnxruntime_genai as genai
        except ImportError as error:
            raise MissingDependency("onnxruntime-genai", hint="pip install onnxruntime-genai") from error
        settings = json.loads((path / GENAI).read_text(encoding="utf-8"))["model"]
        self.path, self.name, self._threads = path, path.name, threads
        self.runtime = f"onnxruntime-genai {version('onnxruntime-genai')}"
        self.vocab_size, self.trained_length = settings["vocab_size"], settings["context_length"]
        self._generator: Any = None  # it has a whole cache, so the first call makes it
        if like is not None:
            self._model: Any = like._model
            self._token_bytes, self.precision = like._token_bytes, like.precision
            return
        config = genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self._model = genai.Model(config)
        decoder = settings["decoder"]
        trial = self._generate(max_length=8)
        trial.append_tokens([0])
        cache = np.asarray(trial.get_output(decoder["outputs"]["present_key_names"] % 0)).dtype
        values = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        self._token_bytes = values * cache.itemsize
        graph = (path / decoder["filename"]).read_bytes()  # quantised weights have their bits in their names
        self.precision = next((f"int{bits}" for bits in (4, 8) if f"weight_Q{bits}".encode() in graph), str(cache))

    def _generate(self, max_length: int) -> Any:
        import onnxruntime_genai as genai

        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=max_length)
        return genai.Generator(self._model, parameters)

    @property
    def weight_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.glob("*.onnx*"))

    def _logits(self, ids: list[int]) -> np.ndarray:
        self._generator = self._generator or self._generate(self.trained_length)
        self._generator.append_tokens(ids)
        return np.asarray(self._generator.get_logits()).reshape(-1)

    def sibling(self, batch: int = 1) -> GenAIModel:
        return GenAIModel(self.path, self._threads, self)


class LlamaModel(_Peer):
    """A GGUF file in llama.cpp, through the package llama-cpp-python; its cache is fp16.

    Args:
        path: The file.
        threads: Number of threads.
    """

    def __init__(self, path: Path, threads: int) -> None:
        try:
            from llama_cpp import Llama
        except ImportError as error:
            raise MissingDependency("llama-cpp-python", hint="pip install llama-cpp-python") from error
        self.path, self.name, self._threads = path, path.name, threads
        self.runtime = f"llama.cpp, by llama-cpp-python {version('llama-cpp-python')}"
        try:
            facts = Llama(str(path), vocab_only=True, verbose=False).metadata
        except (ValueError, OSError) as error:
            raise CheckpointError(f"llama.cpp cannot open {path}", hint="name a GGUF file that it reads") from error
        self._model: Any = None  # it has a whole cache, so the first call makes it
        family, self.precision = facts["general.architecture"], path.stem.rpartition(".")[2] or "GGUF"
        self.vocab_size = int(facts[f"{family}.vocab_size"])
        self.trained_length = int(facts[f"{family}.context_length"])
        width = facts.get(f"{family}.attention.key_length")
        heads = int(facts[f"{family}.attention.head_count"])
        width = int(width) if width else int(facts[f"{family}.embedding_length"]) // heads
        kv_heads = int(facts.get(f"{family}.attention.head_count_kv", heads))
        self._token_bytes = 2 * 2 * int(facts[f"{family}.block_count"]) * kv_heads * width

    @property
    def weight_bytes(self) -> int:
        return self.path.stat().st_size

    def _logits(self, ids: list[int]) -> np.ndarray:
        from llama_cpp import Llama, llama_get_logits_ith

        self._model = self._model or Llama(
            str(self.path), n_ctx=self.trained_length, n_threads=self._threads, n_threads_batch=self._threads,
            verbose=False,
        )  # fmt: skip
        self._model.eval(ids)
        return np.ctypeslib.as_array(llama_get_logits_ith(self._model.ctx, -1), (self.vocab_size,))

    def sibling(self, batch: int = 1) -> LlamaModel:
        return LlamaModel(self.path, self._threads)
