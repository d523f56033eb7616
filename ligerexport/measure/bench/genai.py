"""A Transformer in onnxruntime-genai, from its model builder, so that it is timed as other models are."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from ligerexport.artifact.artifact import is_artifact
from ligerexport.errors import MissingDependency, UsageError
from ligerexport.measure.opened import Timed
from ligerexport.threads import default_threads

PACKAGE = "onnxruntime-genai"
CONFIG = "genai_config.json"
"""File that the model builder writes beside a model."""


def in_genai(model: str) -> bool:
    """Return whether onnxruntime-genai is to run this model. Our artifacts may have its file too."""
    return not is_artifact(model) and (Path(model).expanduser() / CONFIG).is_file()


class GenAI(Timed):
    """One sequence in onnxruntime-genai on the CPU.

    Args:
        path: Directory that the builder wrote.
        batch: Number of sequences, which must be 1.
        threads: Number of threads; None takes the physical cores.
        like: Another sequence of the model, whose weights are shared.

    Raises:
        MissingDependency: The package is not installed.
        UsageError: More than one sequence was asked for.
    """

    kind, device, grows = "onnxruntime-genai", "cpu", True

    def __init__(self, path: Path, batch: int, threads: int | None, like: GenAI | None = None) -> None:
        try:
            import onnxruntime_genai as genai
        except ImportError as error:
            raise MissingDependency(PACKAGE, hint=f"pip install {PACKAGE}") from error
        if batch != 1:
            raise UsageError(f"--batch {batch} in {PACKAGE}", hint="it is timed with one sequence: --batch 1")
        settings = json.loads((path / CONFIG).read_text(encoding="utf-8"))["model"]
        self._path, self._threads, self.batch = path, threads or default_threads(), batch
        self.runtime = f"{PACKAGE} {version(PACKAGE)}"
        self.vocab_size, self.trained_length = settings["vocab_size"], settings["context_length"]
        self.room, self._seen = self.trained_length, 0
        self._sequence: Any = None  # it has a whole cache, so the first call makes it
        self._token_bytes: int
        if like is not None:
            self._model: Any = like._model
            self._token_bytes, self.precision = like._token_bytes, like.precision
            return
        config, decoder = genai.Config(str(path)), settings["decoder"]
        options = {"intra_op_num_threads": self._threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": options}}}))
        self._model = genai.Model(config)
        trial = self._generator(8)
        trial.append_tokens([0])
        cache = np.asarray(trial.get_output(decoder["outputs"]["present_key_names"] % 0)).dtype
        values = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
        self._token_bytes = values * cache.itemsize
        graph = (path / decoder["filename"]).read_bytes()  # quantised weights have their bits in their names
        self.precision = next((f"int{bits}" for bits in (4, 8) if f"weight_Q{bits}".encode() in graph), str(cache))

    def _generator(self, length: int) -> Any:
        import onnxruntime_genai as genai

        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(max_length=length)
        return genai.Generator(self._model, parameters)

    @property
    def weight_bytes(self) -> int:
        """Bytes of the files, in which a tied embedding may stand twice."""
        return sum(file.stat().st_size for file in self._path.glob("*.onnx*"))

    @property
    def state_bytes(self) -> int:
        """Bytes of the keys and values of the tokens so far; the program allocates the trained length at once."""
        return self._seen * self._token_bytes

    def advance(self, ids: Sequence[Sequence[int]]) -> list[int]:
        if self._seen + len(ids[0]) > self.trained_length:
            raise UsageError(f"{self._path.name} has room for {self.trained_length:,} tokens",
                             hint="take a shorter context")  # fmt: skip
        self._seen += len(ids[0])
        self._sequence = self._sequence or self._generator(self.trained_length)
        self._sequence.append_tokens(list(ids[0]))
        return [int(np.asarray(self._sequence.get_logits()).argmax())]

    def sibling(self, batch: int = 1) -> GenAI:
        return GenAI(self._path, batch, self._threads, self)
