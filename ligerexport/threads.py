"""How many threads compute, and how they wait for each other, for torch, its kernels and ONNX Runtime.

torch takes one thread for each CPU, whatever the quota of a container is, and lets all of them spin at the end of
every loop until the last one arrives. If another process takes a core, that wait takes several times as long as the
work.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ligerexport.errors import UsageError

_WAITING = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "2000"}
"""Threads of OpenMP sleep after about 30 microseconds, like those of an ONNX session."""

_chosen: int | None = None


def default_threads() -> int:
    """Return the number that `use_threads` set, or the physical cores that affinity and quota leave to this process."""
    if _chosen is not None:
        return _chosen
    if not hasattr(os, "sched_getaffinity"):
        return os.cpu_count() or 1
    allowed = os.sched_getaffinity(0)
    cores = {_read(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") or str(cpu) for cpu in allowed}
    quota, _, period = _read("/sys/fs/cgroup/cpu.max").partition(" ")
    limit = max(1, int(quota) // int(period)) if quota.isdigit() else len(cores)
    return min(len(cores), limit)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


@contextmanager
def use_threads(count: int | None) -> Iterator[None]:
    """Let torch, tokenizers and new sessions compute with `count` threads inside a block.

    How threads wait can only be chosen before torch is imported, so enter this first.

    Args:
        count: Number of threads. None takes `default_threads`, divided among the processes of a launcher, and no more
            than OMP_NUM_THREADS or `torch.set_num_threads` allows.

    Raises:
        UsageError: The count is less than 1.
    """
    global _chosen
    if count is not None and count < 1:
        raise UsageError(f"{count} threads", hint="give at least 1: --threads 2")
    torch = sys.modules.get("torch")
    environment, before = dict(os.environ), _chosen
    threads = count or max(1, default_threads() // int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
    given = torch.get_num_threads() if torch else _number(os.environ.get("OMP_NUM_THREADS"))
    if count is None and given:
        threads = min(threads, given)
    changes = _WAITING if torch is None else {}
    os.environ.update({name: value for name, value in changes.items() if name not in os.environ})
    os.environ.update(OMP_NUM_THREADS=str(threads), RAYON_NUM_THREADS=str(threads))
    if torch:
        torch.set_num_threads(threads)
    _chosen = threads
    try:
        yield
    finally:
        _chosen = before
        if torch:
            torch.set_num_threads(given)
        for name in (*changes, "OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
            os.environ.pop(name, None)
            os.environ.update({name: environment[name]} if name in environment else {})


def _number(text: str | None) -> int:
    """Return the first number of a setting such as `4` or `4,2`, or 0 without one."""
    first = (text or "").partition(",")[0].strip()
    return int(first) if first.isdigit() else 0
