"""A tiny stateful graph with the artifact's names, a byte-level tokenizer, and a session that follows a script.

It has two layers: one with a constant state (fp32 and int64), and a softmax layer whose state grows. Arithmetic is on
small integers, so fp32 is exact and any cut of a prompt gives the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from ligerexport.artifact.artifact import (
    ArtifactWriter,
    ByteCounts,
    Graph,
    Manifest,
    ModelShape,
    Source,
    StateTensor,
    TensorInfo,
    open_artifact,
)

BYTES = 256
BOS, EOS, USER = 256, 257, 258
VOCAB = 259
WIDTH = 8
TEMPLATE = (
    "{% for message in messages %}{{ '<user>' if message['role'] == 'user' else '' }}{{ message['content'] | trim }}"
    "{{ '</s>' if message['role'] == 'assistant' else '\\n' }}{% endfor %}"
)


def _graph() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    values = {
        "embedding": rng.integers(-8, 8, (VOCAB, WIDTH)).astype(np.float32),
        "head": rng.integers(-3, 4, (WIDTH, VOCAB)).astype(np.float32),
        "one": np.array(1, np.int64), "zero": np.array(0, np.int64),
        "axis1": np.array([1], np.int64), "axis2": np.array([2], np.int64), "axis12": np.array([1, 2], np.int64),
    }  # fmt: skip
    nodes = [
        ("Gather", ["embedding", "input_ids"], "x", {}),  # [B, T, D]
        ("Shape", ["input_ids"], "length1", {"start": 1}),
        ("Squeeze", ["length1"], "length", {}),
        ("Range", ["zero", "length", "one"], "index", {}),
        ("Unsqueeze", ["position", "axis1"], "first", {}),
        ("Add", ["first", "index"], "place", {}),  # [B, T]
        ("Cast", ["place"], "place_f", {"to": TensorProto.FLOAT}),
        ("Unsqueeze", ["place_f", "axis2"], "weight", {}),
        ("Mul", ["x", "weight"], "weighted", {}),
        ("ReduceSum", ["weighted", "axis1"], "arrived", {"keepdims": 0}),
        ("Add", ["past.0.recurrent_state", "arrived"], "present.0.recurrent_state", {}),
        ("Sub", ["length", "one"], "last", {}),
        ("Add", ["position", "last"], "newest", {}),
        ("Unsqueeze", ["newest", "axis1"], "newest_t", {}),
        ("Max", ["past.0.slot_position", "newest_t"], "present.0.slot_position", {}),
        ("Unsqueeze", ["x", "axis1"], "key", {}),
        ("Concat", ["past.1.key", "key"], "present.1.key", {"axis": 2}),
        ("ReduceSum", ["present.1.key", "axis12"], "seen", {"keepdims": 0}),
        ("Cast", ["present.0.slot_position"], "slot_f", {"to": TensorProto.FLOAT}),
        ("ReduceSum", ["slot_f", "axis1"], "slot_sum", {}),
        ("Add", ["present.0.recurrent_state", "seen"], "h0", {}),
        ("Add", ["h0", "slot_sum"], "h", {}),
        ("MatMul", ["h", "head"], "logits", {}),
    ]
    f32, i64 = TensorProto.FLOAT, TensorProto.INT64
    info = helper.make_tensor_value_info
    inputs = [
        info("input_ids", i64, ["B", "T"]), info("position", i64, ["B"]),
        info("past.0.recurrent_state", f32, ["B", WIDTH]), info("past.0.slot_position", i64, ["B", 2]),
        info("past.1.key", f32, ["B", 1, "P", WIDTH]),
    ]  # fmt: skip
    outputs = [
        info("logits", f32, ["B", VOCAB]), info("present.0.recurrent_state", f32, ["B", WIDTH]),
        info("present.0.slot_position", i64, ["B", 2]), info("present.1.key", f32, ["B", 1, "P2", WIDTH]),
    ]  # fmt: skip
    graph = helper.make_graph(
        [helper.make_node(op, list(args), [out], **attributes) for op, args, out, attributes in nodes],
        "toy", inputs, outputs, [numpy_helper.from_array(value, name) for name, value in values.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def tokenizer() -> Tokenizer:
    """Return a tokenizer with one token per byte, BOS from its post-processor, and two more special tokens."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(["<s>", "</s>", "<user>"])
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return made


def manifest(**changes: Any) -> Manifest:
    """Return the toy's manifest without files."""
    model = _graph()
    letters = {TensorProto.FLOAT: "float32", TensorProto.INT64: "int64"}

    def describe(values: Any) -> tuple[TensorInfo, ...]:
        return tuple(
            TensorInfo(v.name, letters[v.type.tensor_type.elem_type],
                       tuple(d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim))
            for v in values
        )  # fmt: skip

    fields: dict[str, Any] = {
        "ligerexport": "0.1.0", "target": "onnx", "lowering": "ort", "precision": "float32",
        "source": Source("toy", files={"model.safetensors": "0" * 64}), "family": "llama",
        "liger": {"gate": "gla", "window": 2},
        "model": ModelShape(2, WIDTH, VOCAB, 1, 1, WIDTH, WIDTH, 64, 4144),
        "graph": Graph("model.onnx", 16, describe(model.graph.input), describe(model.graph.output)),
        "state": (
            StateTensor("past.0.recurrent_state", "present.0.recurrent_state", ("B", WIDTH), "float32"),
            StateTensor("past.0.slot_position", "present.0.slot_position", ("B", 2), "int64", -1),
            StateTensor("past.1.key", "present.1.key", ("B", 1, "P", WIDTH), "float32", grows=True),
        ),
        "bytes": ByteCounts(16576, WIDTH * 4 + 16, 128), "requires": {"onnxruntime": ">=1.23"},
        "verification": {"passed": True},
    }  # fmt: skip
    return Manifest(**(fields | changes))


def write_files(directory: Path) -> None:
    """Write graph, tokenizer and configurations."""
    onnx.save(_graph(), directory / "model.onnx")
    tokenizer().save(str(directory / "tokenizer.json"))
    configs = {
        "config.json": {"model_type": "liger_llama"},
        "generation_config.json": {"eos_token_id": [EOS]},
        "tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": TEMPLATE},
    }
    for name, value in configs.items():
        (directory / name).write_text(json.dumps(value))


def build(destination: Path, **changes: Any) -> Path:
    """Write the toy artifact."""
    with ArtifactWriter(destination, force=bool(changes.pop("force", False))) as writer:
        write_files(writer.directory)
        writer.commit(manifest(**changes))
    return destination


class Scripted:
    """A session whose logits favour the tokens of a script, one after the other, for any input."""

    batch, chunk = 1, 16

    def __init__(self, directory: Path, script: Sequence[int]) -> None:
        self.artifact = open_artifact(directory)
        self.script = list(script)
        self.fed: list[int] = []
        self._given = 0

    @property
    def position(self) -> np.ndarray:
        return np.array([len(self.fed)])

    @property
    def state_bytes(self) -> int:
        return 0

    def _logits(self) -> np.ndarray:
        logits = np.zeros((1, VOCAB), np.float32)
        logits[0, self.script[min(self._given, len(self.script) - 1)]] = 50
        return logits

    def prefill(self, ids: Sequence[int] | np.ndarray, padding: Any = None) -> np.ndarray:
        self.fed.extend(int(i) for i in np.ravel(ids))
        return self._logits()

    def step(self, ids: Any) -> np.ndarray:
        self.fed.append(int(ids))
        self._given += 1
        return self._logits()

    def reset(self) -> None:
        self.fed.clear()
        self._given = 0
