"""The model card of a published artifact, made from its manifest alone."""

from __future__ import annotations

from typing import Any

from ligerexport.artifact.artifact import Manifest
from ligerexport.console import format_bytes
from ligerexport.errors import quoted


def model_card(manifest: Manifest, repository: str) -> str:
    """Return the README.md of a repository with an artifact: facts for the hub, then a page for people.

    Args:
        manifest: The artifact's manifest.
        repository: `owner/name`.
    """
    from huggingface_hub import ModelCardData

    source, shape, size = manifest.source, manifest.model, manifest.bytes
    hub: dict[str, Any] = {"base_model": source.model} if source.model.count("/") == 1 else {}
    tags = ["ligerexport", "linear-attention", manifest.target]
    data = ModelCardData(
        license=source.license and source.license.lower(), library_name="ligerexport", tags=tags,
        pipeline_tag="text-generation", **hub,
    )  # fmt: skip
    chats = {"chat_template.jinja", "chat.json"} & manifest.files.keys()
    prompt = '"What is gravity?" --chat' if chats else '"Once upon a time"'
    name = repository.rpartition("/")[2]
    rows = {
        "made from": f"{source.model}{f' ({source.revision})' if source.revision else ''}",
        "family": f"{manifest.family}, {shape.layers} layers, {shape.parameters / 1e6:,.0f} million parameters",
        "weights": f"{manifest.precision}, {format_bytes(size.weights)}",
        "state of a sequence": format_bytes(size.state_per_sequence) + (
            f", and {format_bytes(manifest.growth)} a token" if manifest.growth else ", whatever its length"
        ),
        "KV cache of the original is larger": _crossover(manifest),
        "runs with": ", ".join(f"{runtime} {version}" for runtime, version in manifest.requires.items())
        or manifest.target,
        "lowering": manifest.lowerings,
        "compared with torch": _verdict(manifest),
        "cost of the precision": _quality(manifest),
        "trained after the conversion": "yes" if manifest.recovery else "no",
        "built with": f"ligerexport {manifest.ligerexport}",
    }  # fmt: skip
    table = "\n".join(f"| {key} | {value.replace('|', ' ')} |" for key, value in rows.items() if value)
    return f"""---
{data.to_yaml()}
---

# {name}

{source.model} as a recurrent model: a bounded memory replaces its attention, so memory and time per token do not grow
with the text.

```
pip install 'ligerexport[hub]'
ligerexport pull {quoted(repository)} -o {quoted(name)}
ligerexport run {quoted(name)} {prompt}
```

| what | value |
|---|---|
{table}

The licence is that of the original model. `manifest.json` has all settings, and the SHA-256 of every file.
"""


def _crossover(manifest: Manifest) -> str:
    return f"from {manifest.crossover:,} tokens on" if manifest.crossover else ""


def _verdict(manifest: Manifest) -> str:
    found = manifest.verification
    if not found.get("passed"):
        return "no"
    return f"{found.get('tokens', 0):,} tokens, largest difference of a logit {found.get('max_logit_error', 0):.1e}"


def _quality(manifest: Manifest) -> str:
    found = manifest.quality
    if found is None:
        return ""
    return f"{found['nll'] - found['nll_float32']:+.3f} nats per token on {found['tokens']} tokens of text"
