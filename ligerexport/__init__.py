"""Linearize a pretrained Transformer (Liger, arXiv 2503.01496) and ship it as a recurrent model with constant memory.

The names below are the whole public API. They load on first use, so that importing the package loads neither torch nor
a runtime.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ligerexport.allocate import allocate as allocate
    from ligerexport.config import LigerConfig as LigerConfig
    from ligerexport.convert import convert as convert
    from ligerexport.convert import load_model as load_model
    from ligerexport.evaluate import evaluate as evaluate
    from ligerexport.exporters.build import build as build
    from ligerexport.generate import generate as generate
    from ligerexport.recover import recover as recover
    from ligerexport.runtime import Session as Session
    from ligerexport.runtime import Snapshot as Snapshot
    from ligerexport.runtime import load as load

__version__ = "0.1.0"

_NO_TELEMETRY = {
    "ORT_DISABLE_TELEMETRY": "1",  # ONNX Runtime and its generate() API, which also write a device id
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
}
for _variable, _value in _NO_TELEMETRY.items():  # before anything imports these libraries; a user's own value stays
    os.environ.setdefault(_variable, _value)

_HOMES = {
    "LigerConfig": "ligerexport.config",
    "Session": "ligerexport.runtime",
    "Snapshot": "ligerexport.runtime",
    "allocate": "ligerexport.allocate",
    "build": "ligerexport.exporters.build",
    "convert": "ligerexport.convert",
    "evaluate": "ligerexport.evaluate",
    "generate": "ligerexport.generate",
    "load": "ligerexport.runtime",
    "load_model": "ligerexport.convert",
    "recover": "ligerexport.recover",
}

__all__ = [
    "LigerConfig",
    "Session",
    "Snapshot",
    "__version__",
    "allocate",
    "build",
    "convert",
    "evaluate",
    "generate",
    "load",
    "load_model",
    "recover",
]


class _Package(ModuleType):
    """Keeps `ligerexport.convert` the function when the import system binds the module of that name."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ligerexport' has no attribute '{name}'")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
