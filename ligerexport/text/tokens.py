"""Build the tokenizer that transformers' `AutoTokenizer` reads from tokenizer.json and the files beside it.

`tokenizer` encodes texts and conversations with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ligerexport.errors import ArtifactError
from ligerexport.reading import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

HINT = "copy the model's own files there again"
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_DEFAULTS = {
    "LlamaTokenizer": {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"},
    "GemmaTokenizer": {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
                       "mask_token": "<mask>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>"),
    "GPT2Tokenizer": dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>"),
}  # fmt: skip
"""Special tokens of transformers' classes, for models whose files do not name them."""
_ALWAYS = {"mistral": "", "granite": "", "olmo2": "", "phi3": "", "qwen2": "Qwen2Tokenizer"}
"""Class that transformers uses for a model regardless of its files; an empty name uses tokenizer.json as it is."""
_UNNAMED = {"qwen3": "Qwen2Tokenizer", "gemma3_text": "GemmaTokenizer"}
"""Class that transformers uses if no file names one."""


def read_config(file: Path) -> dict[str, Any]:
    """Return the object in a model's JSON file; an empty one if there is no file."""
    return read_json(file, ArtifactError, HINT) if file.is_file() else {}


@dataclass(frozen=True)
class _Named:
    """The tokens in the files beside tokenizer.json."""

    names: dict[str, AddedToken | str]
    extra: list[AddedToken | str]
    added: dict[int, AddedToken]


def complete(tokenizer: Tokenizer, directory: Path) -> dict[str, str]:
    """Give a tokenizer the tokens and the pipeline that it has in transformers.

    Args:
        tokenizer: Tokenizer from tokenizer.json, which is changed.
        directory: Directory of tokenizer.json and the files beside it.

    Returns:
        The special tokens by name (`bos_token` and the like), as chat templates see them.

    Raises:
        TypeError: A token's description is neither a text nor its flags.
        ValueError: An id is not a number.
    """
    from tokenizers import AddedToken

    config = read_config(directory / "tokenizer_config.json")
    kind = _kind(tokenizer, config, read_config(directory / "config.json"))
    found = _named(config, directory)
    names = _DEFAULTS.get(kind, {}) | found.names
    if kind == "LlamaTokenizer":
        _as_llama(tokenizer, config)
    present = tokenizer.get_added_tokens_decoder().values()
    described = {repr(token) for token in present}
    new: list[AddedToken | str] = [token for _, token in sorted(found.added.items()) if repr(token) not in described]
    known = {token.content for token in present} | {str(token) for token in new}
    for token in (*names.values(), *found.extra):
        if str(token) not in known:
            known.add(str(token))
            new.append(token)
    special = {str(token) for token in names.values()}
    for index, token in enumerate(new):
        if isinstance(token, str):
            new[index] = AddedToken(token, special=True)
        elif str(token) in special:
            token.special = True
    tokenizer.add_tokens(new)
    tokenizer.encode_special_tokens = bool(config.get("split_special_tokens", False))
    return {name: str(token) for name, token in names.items()}


def _named(config: dict[str, Any], directory: Path) -> _Named:
    values = {name: config[name] for name in config if name.endswith("_token")}
    extra: Any = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        values, extra = values | extra, []
    added = {int(index): _token(token) for index, token in (config.get("added_tokens_decoder") or {}).items()}
    if "added_tokens_decoder" not in config:  # only older files have these two beside them
        for name, value in read_config(directory / "special_tokens_map.json").items():
            if name.endswith("_token"):
                values[name] = value | {"special": True} if isinstance(value, dict) else value
            elif name == "extra_special_tokens" and isinstance(value, dict):
                values |= value
            elif name == "extra_special_tokens" or (name == "additional_special_tokens" and not extra):
                extra = [*extra, *value]
        for content, index in read_config(directory / "added_tokens.json").items():
            special = content in {str(_token(value)) for value in (*values.values(), *extra)}
            added[int(index)] = _token({"content": content, "normalized": not special, "special": special})
    tokens = {name: _token(value) for name, value in values.items() if isinstance(value, str | dict)}
    order = [name for name in _NAMES if name in tokens]  # tokens without an id get one in this order
    by_content = {str(token): token for token in added.values()}
    return _Named(
        {name: by_content.get(str(tokens[name]), tokens[name]) for name in (*order, *(tokens.keys() - set(order)))},
        [_token(value) for value in extra],
        added,
    )


def _token(value: Any) -> Any:
    from tokenizers import AddedToken

    if isinstance(value, dict):
        return AddedToken(**{flag: value[flag] for flag in _FLAGS if flag in value})
    if not isinstance(value, str):
        raise TypeError(f"a token is described as {value!r:.60}")
    return value


def _kind(tokenizer: Tokenizer, config: dict[str, Any], model: dict[str, Any]) -> str:
    """Return the name of the class that transformers uses; empty if it uses tokenizer.json as it is."""
    family = str(model.get("model_type", "")).removeprefix("liger_")
    name = config.get("tokenizer_class") or model.get("tokenizer_class") or _UNNAMED.get(family, "")
    name = str(name).removesuffix("Fast")
    if name == "LlamaTokenizer" and "ByteLevel" in f"{tokenizer.pre_tokenizer}{tokenizer.decoder}":
        return ""
    return _ALWAYS.get(family, name)


def _as_llama(tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """Replace the file's pipeline by that of transformers' class: only a whole text gets a space, not each part."""
    from tokenizers import decoders, pre_tokenizers

    space = config.get("add_prefix_space")
    scheme = "never" if space is False else "always" if config.get("legacy") else "first"
    tokenizer.normalizer = None  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(steps if space is False else [*steps, decoders.Strip(" ", 1, 0)])  # type: ignore[assignment]
