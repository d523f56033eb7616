"""Find TensorRT, the CUDA driver and GPUs by asking the libraries themselves, without importing a Python package."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from importlib import metadata
from typing import NamedTuple

MAJORS = (11, 10, 9, 8)
_DISTRIBUTIONS = ("tensorrt", "tensorrt-cu13", "tensorrt-cu12", "tensorrt-cu11")
_RTX = ("tensorrt-rtx", "tensorrt-rtx-cu13-bindings", "tensorrt-rtx-cu12-bindings")
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


class Driver(NamedTuple):
    """The CUDA driver: its CUDA version, such as 13.0, and the compute capability of each GPU, 90 for 9.0."""

    version: str
    sms: tuple[int, ...]


def python_module(*, rtx: bool = False) -> str | None:
    """Return name and version of the installed Python package of TensorRT, or of TensorRT-RTX."""
    for name in _RTX if rtx else _DISTRIBUTIONS:
        with suppress(metadata.PackageNotFoundError):
            return f"{name} {metadata.version(name)}"
    return None


def library() -> str | None:
    """Return name and version of the libnvinfer that the loader finds."""
    for major in MAJORS:
        with suppress(OSError, AttributeError):
            name = f"libnvinfer.so.{major}"
            number = ctypes.CDLL(name).getInferLibVersion()
            # 8502 is 8.5.2, 101300 is 10.13.0
            parts = (number // 1000, number // 100 % 10) if major < 10 else (number // 10000, number // 100 % 100)
            return f"{name}, version {parts[0]}.{parts[1]}.{number % 100}"
    return None


def driver() -> Driver | None:
    """Return the CUDA driver's version and GPUs; None if there is no driver."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        number, count = ctypes.c_int(), ctypes.c_int()
        if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return Driver(version, ())
    gpus = range(count.value)
    return Driver(version, tuple(10 * _attribute(cuda, i, _MAJOR) + _attribute(cuda, i, _MINOR) for i in gpus))


def _attribute(cuda: ctypes.CDLL, device: int, attribute: int) -> int:
    value = ctypes.c_int()
    cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    return value.value
