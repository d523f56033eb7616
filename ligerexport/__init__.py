"""Linearize a pretrained Transformer (Liger, arXiv 2503.01496) and ship it as a recurrent model with constant memory.

The names below are the whole public API. They load on first use, so that importing the package loads neither torch nor
a runtime.
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ligerexport.checkpoint.convert import convert as convert
    from ligerexport.checkpoint.convert import load_model as load_model
    from ligerexport.exporters.build import build as build
    from ligerexport.measure.evaluate.evaluate import evaluate as evaluate
    from ligerexport.model.config import LigerConfig as LigerConfig
    from ligerexport.run.generate import generate as generate
    from ligerexport.run.runtime import Session as Session
    from ligerexport.run.runtime import Snapshot as Snapshot
    from ligerexport.run.runtime import load as load
    from ligerexport.train.allocate import allocate as allocate
    from ligerexport.train.recover import recover as recover

__version__ = "0.3.0"

_NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime and its generate() API, which also write a device id
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
for _variable, _value in _NO_TELEMETRY.items():  # before anything imports these libraries; a user's own value stays
    os.environ.setdefault(_variable, _value)

_HOMES = {
    "LigerConfig": "ligerexport.model.config",
    "Session": "ligerexport.run.runtime",
    "Snapshot": "ligerexport.run.runtime",
    "allocate": "ligerexport.train.allocate",
    "build": "ligerexport.exporters.build",
    "convert": "ligerexport.checkpoint.convert",
    "evaluate": "ligerexport.measure.evaluate.evaluate",
    "generate": "ligerexport.run.generate",
    "load": "ligerexport.run.runtime",
    "load_model": "ligerexport.checkpoint.convert",
    "recover": "ligerexport.train.recover",
}

__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ligerexport' has no attribute '{name}'")
    try:
        value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    except ModuleNotFoundError:
        from ligerexport.versions import require

        require("build")
        raise
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
