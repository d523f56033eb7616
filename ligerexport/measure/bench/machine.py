"""Read the machine: memory of this process, energy, bandwidth, names."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

STREAM = 1 << 28
"""Size in bytes of the buffer for measuring bandwidth: several times any cache."""
RAPL = Path("/sys/class/powercap")


def memory() -> dict[str, int]:
    """Return bytes of this process: resident, the private part of that (no mapped files), and the largest resident."""
    status = Path("/proc/self/status")
    if not status.is_file():  # macOS has only the largest, in bytes
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"rss": peak, "private": peak, "peak": peak}
    fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
    names = {"rss": "VmRSS", "private": "RssAnon", "peak": "VmHWM"}
    return {key: int(fields[name].split()[0]) * 1024 for key, name in names.items()}


def effort() -> dict[str, float]:
    """Return the CPU seconds of this process so far, and its page faults that waited for the disk."""
    import resource

    return {"cpu_s": time.process_time(), "faults": resource.getrusage(resource.RUSAGE_SELF).ru_majflt}


def cpu_seconds() -> float | None:
    """Return the seconds that all CPUs worked so far, for any process or virtual machine; None outside Linux."""
    stat = Path("/proc/stat")
    if not stat.is_file():
        return None
    user, nice, system, _, _, *rest = (int(ticks) for ticks in stat.read_text().split("\n", 1)[0].split()[1:9])
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK")


def device_memory() -> int | None:
    """Return the bytes that this process's torch holds on a GPU; None if it uses none."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return int(torch.cuda.memory_reserved())


def bandwidth(threads: int, device: str = "cpu") -> float | None:
    """Return the bandwidth of reading memory in bytes per second, the best of several tries; None without a GPU."""
    if device != "cpu":
        return _device_bandwidth(device)
    parts = np.array_split(np.ones(STREAM // 4, np.float32), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(lambda part: np.dot(part, part), parts))
            rates.append(STREAM / (time.perf_counter() - start))
    return max(rates)


def _device_bandwidth(device: str) -> float | None:
    import torch

    if not torch.cuda.is_available():
        return None

    data, rates = torch.ones(STREAM, dtype=torch.uint8, device=device), []
    other = torch.empty_like(data)
    for _ in range(8):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(8):
            other.copy_(data)  # reads and writes
        torch.cuda.synchronize()
        rates.append(16 * STREAM / (time.perf_counter() - start))
    return max(rates)


class Energy:
    """The energy counters of this machine that can be read: CPU packages (RAPL) and GPUs (NVML)."""

    def __init__(self) -> None:
        packages = sorted(RAPL.glob("intel-rapl:?")) if RAPL.is_dir() else []
        self._packages = [path for path in packages if os.access(path / "energy_uj", os.R_OK)]
        self._nvml: Any = None
        self._gpus: list[ctypes.c_void_p] = []
        try:
            self._nvml = ctypes.CDLL("libnvidia-ml.so.1")
            self._find_gpus()
        except OSError:
            return

    def _find_gpus(self) -> None:
        count, energy = ctypes.c_uint(), ctypes.c_ulonglong()
        if self._nvml.nvmlInit_v2() or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return
        for index in range(count.value):
            handle = ctypes.c_void_p()
            found = self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(handle))
            if found == 0 and self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy)) == 0:
                self._gpus.append(handle)

    @property
    def source(self) -> str | None:
        """The counters that are measured; None if none can be read."""
        names = [f"{len(self._packages)} CPU packages"] * bool(self._packages) + [f"{len(self._gpus)} GPUs"] * bool(
            self._gpus
        )
        return " and ".join(names) or None

    def read(self) -> list[tuple[float, float]]:
        """Return each counter in joules, and the value at which it wraps around (0 for never)."""
        counters = [
            (_number(path / "energy_uj") / 1e6, _number(path / "max_energy_range_uj") / 1e6) for path in self._packages
        ]
        for handle in self._gpus:
            energy = ctypes.c_ulonglong()
            self._nvml.nvmlDeviceGetTotalEnergyConsumption(handle, ctypes.byref(energy))
            counters.append((energy.value / 1e3, 0.0))
        return counters

    def since(self, before: list[tuple[float, float]]) -> float | None:
        """Return the joules used since an earlier `read`; None without counters."""
        if not before:
            return None
        spent = 0.0
        for (now, limit), (then, _) in zip(self.read(), before, strict=True):
            spent += now - then if now >= then else now - then + limit
        return spent


def _number(path: Path) -> float:
    return float(path.read_text())


def cpu_name() -> str:
    """Return the processor's name."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    named = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def describe(threads: int) -> dict[str, Any]:
    """Return processor, cores and memory."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": threads, "memory": total}
