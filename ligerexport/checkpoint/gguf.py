"""GGUF files: read their headers, and write what they hold as an ordinary checkpoint in float32.

transformers loads the weights and makes the tokenizer. It ignores some of the settings in a file, such as a scaling of
the rotary embedding; they are added here, so that the checkpoint is the model that the file describes. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from math import log, prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from ligerexport.console import no_bars
from ligerexport.errors import CheckpointError, LigerError, SourceError, first_line
from ligerexport.model.families import FAMILIES, get_family

if TYPE_CHECKING:
    import numpy as np

_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY = 8, 9
_AGAIN = "it is cut off or damaged; download it again"
_ORIGINAL = "convert the model's safetensors instead"
_FACTORS = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
"""Tensors with a divisor for each rotary frequency: of Llama 3, and of Phi-3 for short and long texts."""


class Tensor(NamedTuple):
    """A tensor in a GGUF file: sizes in torch's order, number of its type, first byte and bytes."""

    shape: tuple[int, ...]
    kind: int
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """The header of a GGUF file whose tensors lie within the file."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, Tensor]

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting of the architecture, by its key without the architecture's name."""
        return self.fields.get(f"{self.fields['general.architecture']}.{key}", default)

    def values(self, name: str) -> np.ndarray:
        """Return a tensor of type F32."""
        import numpy as np

        tensor = self.tensors[name]
        if tensor.kind != 0:
            raise SourceError(f"{name} in {self.path} is of type {tensor.kind}, expected F32 (0)", hint=_AGAIN)
        return np.fromfile(self.path, "<f4", prod(tensor.shape), offset=tensor.start)


class _Reader:
    """Reads values one after the other; an end of the file within a value is a `struct.error`."""

    def __init__(self, data: Any) -> None:
        self.data, self.place = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from(form, self.data, self.place)
        self.place += struct.calcsize(form)
        return value

    def text(self) -> str:
        end = self.place + 8 + self.number("<Q")
        if end > len(self.data):
            raise struct.error("a text is cut off")
        text, self.place = bytes(self.data[self.place : end]).decode("utf-8", "replace"), end
        return text

    def value(self, kind: int) -> Any:
        """Return a number, a text, or an array of either as a list."""
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY:
            return self.number(_SCALARS[kind])
        kind, count = self.number("<I"), self.number("<Q")
        if kind == _STRING:
            return [self.text() for _ in range(count)]
        form = _SCALARS[kind]
        if count * struct.calcsize(form) > len(self.data) - self.place:
            raise struct.error("an array is cut off")
        values = struct.unpack_from(f"<{count}{form[1]}", self.data, self.place)
        self.place += count * struct.calcsize(form)
        return list(values)


def read_header(path: Path) -> Header:
    """Read a file's header, and check that its tensors lie within the file.

    Raises:
        SourceError: The file is no GGUF file, is cut off or damaged, or is one part of several.
    """
    import numpy as np

    with path.open("rb") as file:
        start = file.read(4)
    if start != b"GGUF":
        raise SourceError(f"{path} is not a GGUF file: it begins with {start!r}", hint="download the file itself")
    try:
        reader = _Reader(np.memmap(path, mode="r"))
        reader.place = 4
        version, tensors, settings = reader.number("<I"), reader.number("<Q"), reader.number("<Q")
        fields = {}
        for _ in range(settings):
            key, kind = reader.text(), reader.number("<I")
            fields[key] = reader.value(kind)
        found = [_tensor(reader) for _ in range(tensors)]
    except (struct.error, KeyError, ValueError, OverflowError, MemoryError) as error:
        raise SourceError(f"{path} has a header that cannot be read ({error})", hint=_AGAIN) from None
    if version not in (2, 3) or not isinstance(fields.get("general.architecture"), str):
        raise SourceError(f"{path} is GGUF {version} of no architecture, expected GGUF 2 or 3", hint=_AGAIN)
    if fields.get("split.count", 0) > 1:
        raise SourceError(
            f"{path.name} is one of {fields['split.count']} parts of a model",
            hint="join them with llama.cpp: llama-gguf-split --merge FIRST_PART model.gguf",
        )
    block = fields.get("general.alignment", 32)
    first = -(-reader.place // block) * block
    placed = {name: Tensor(shape, kind, first + start, size) for name, shape, kind, start, size in found}
    end, size = max((x.start + x.nbytes for x in placed.values()), default=0), path.stat().st_size
    if end > size:
        raise SourceError(f"{path} has {size:,} bytes, its header announces {end:,}", hint=_AGAIN)
    return Header(path, fields, placed)


def _tensor(reader: _Reader) -> tuple[str, tuple[int, ...], int, int, int]:
    """Read one entry of the table of tensors: name, shape, type, first byte of the data, bytes."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    name = reader.text()
    shape = tuple(reader.number("<Q") for _ in range(reader.number("<I")))[::-1]
    kind, start = reader.number("<I"), reader.number("<Q")
    elements, nbytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return name, shape, kind, start, prod(shape) // elements * nbytes


def write_checkpoint(path: Path, directory: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file as a checkpoint in float32.

    Args:
        path: The file.
        directory: Directory to create.

    Raises:
        SourceError: The file is damaged, or transformers cannot read it.
        CheckpointError: The family is not supported.
    """
    header = read_header(path)
    try:
        with no_bars():
            _write(header, directory)
    except LigerError:
        raise
    except Exception as error:
        raise SourceError(f"transformers cannot read {path}: {first_line(error)}", hint=_ORIGINAL) from error


def _write(header: Header, directory: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    config, load = _config(header), cast(Any, AutoModelForCausalLM.from_pretrained)
    # Without `dequantize` the weights may stay packed, depending on which other packages are installed.
    model, found = load(
        header.path.parent, gguf_file=header.path.name, config=config, dtype=torch.float32, output_loading_info=True,
        quantization_config=GgufConfig(dequantize=True),
    )  # fmt: skip
    held = [name for name in model.state_dict() if not (name == "lm_head.weight" and config.tie_word_embeddings)]
    read = [name for name in header.tensors if name not in _FACTORS]
    if len(held) != len(read) or found["missing_keys"]:
        raise SourceError(
            f"{header.path} has {len(read)} weights, the {config.model_type} model that it describes has {len(held)}",
            hint=_ORIGINAL,
        )
    # The loader leaves its quantizer attached, and `save_pretrained` refuses quantized models.
    model.hf_quantizer = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    ids = [header.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    if len(ends := list(dict.fromkeys(token for token in ids if token is not None))) > 1:
        model.generation_config.eos_token_id = ends
    tokenizer = AutoTokenizer.from_pretrained(header.path.parent, gguf_file=header.path.name)
    tokenizer.model_max_length = config.max_position_embeddings
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _config(header: Header) -> Any:
    """Return the configuration as transformers reads it, with the settings that it ignores.

    Source of their meaning: `convert_hf_to_gguf.py` and `llama-model.cpp` of llama.cpp.
    """
    from transformers import CONFIG_MAPPING
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    name = header.fields["general.architecture"]
    try:
        config = load_gguf_checkpoint(str(header.path), return_tensors=False)["config"]
        family = get_family(config["model_type"])
    except (ValueError, CheckpointError) as error:
        raise SourceError(
            f"{header.path} holds a model of the architecture '{name}' ({error})",
            hint=f"supported, if transformers reads them from GGUF: {', '.join(FAMILIES)}",
        ) from error
    # a default of the family's class would be taken for what the file does not have
    config = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None} | config
    if (width := header.get("attention.key_length")) is not None:
        config["head_dim"] = width
    if family.model_type in ("mistral", "phi3"):
        config["sliding_window"] = header.get("attention.sliding_window")
    if name == "gemma3":  # all sizes but the largest, of 62 layers, scale by the width of a head
        largest = header.get("block_count") == 62
        config["query_pre_attn_scalar"] = (
            header.get("embedding_length") // header.get("attention.head_count") if largest else width
        )
    config["rope_parameters"] = _rotary(header, config)
    config.pop("rope_theta", None)
    return CONFIG_MAPPING[family.model_type].from_dict(config)


def _rotary(header: Header, config: dict[str, Any]) -> dict[str, Any]:
    """Return the `rope_parameters` that a file describes."""
    kind, factor = header.get("rope.scaling.type") or "none", header.get("rope.scaling.factor")
    length, amount = header.get("rope.scaling.original_context_length"), header.get("rope.scaling.attn_factor", 1.0)
    rotary: dict[str, Any] = {"rope_type": "default", "rope_theta": header.get("rope.freq_base", 10000.0)}
    names = [name for name in _FACTORS if name in header.tensors]
    if names:
        rotary |= {
            "rope_type": "longrope",
            "short_factor": header.values(names[0]).tolist(),
            "long_factor": header.values(names[-1]).tolist(),
            "attention_factor": amount,
            "original_max_position_embeddings": length or config["max_position_embeddings"],
        }
    elif kind == "linear":
        rotary |= {"rope_type": kind, "factor": factor}
    elif kind == "yarn":
        rotary |= {
            "rope_type": kind,
            "factor": factor,
            "attention_factor": amount * (0.1 * log(factor) + 1),
            "original_max_position_embeddings": length,
        }
    elif kind != "none":
        raise SourceError(
            f"{header.path} has a rotary embedding of type '{kind}'", hint="supported: linear, yarn, and factors"
        )
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if (turned := header.get("rope.dimension_count", width)) != width:
        rotary["partial_rotary_factor"] = turned / width
    if header.fields["general.architecture"] == "gemma3":
        local = {"rope_type": "default", "rope_theta": header.get("rope.freq_base_swa", 10000.0)}
        return {"full_attention": rotary, "sliding_attention": local}
    return rotary
