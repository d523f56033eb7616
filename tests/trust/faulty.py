"""One try of `tests/trust/faults.py`: run a command in a process that gets a fault, and judge the files that it leaves.

The process is forked from this one, which has imported the command's modules, so a try takes a fraction of a second;
or it is a fresh `python -m ligerexport`. The faults themselves are defined elsewhere.
"""

from __future__ import annotations

import ctypes
import fcntl
import gc
import hashlib
import importlib
import json
import math
import mmap
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ligerexport.artifact.artifact import MANIFEST, open_artifact
from ligerexport.cli import main

TIMED = {"mtime_ns", "seconds", "tokens_per_second", "build_seconds"}
"""Keys of JSON that differ between two good runs."""
DRAWN = {".md", ".png", ".svg"}
"""Endings of files that are generated from the JSON beside them, including times."""

ROUNDING = 0.01
"""Tolerance for numbers in JSON: a product without memory for its workspace rounds differently."""

PATIENCE = 300.0
"""Seconds after which a process that is not killed counts as hung."""

Signature = dict[str, Any]


@dataclass(frozen=True)
class Command:
    """A verb as a user types it, with `{inputs}` and `{out}` to fill in.

    Attributes:
        name: Name of the row in the results.
        line: The command line.
        older: Options added to `line` to make the older output that it replaces.
        force: Option added if there is an older output.
        timed: Whether all its numbers are times.
        most: Largest number of tries per fault and way, given its running time.
    """

    name: str
    line: str
    older: str
    force: str = "--force"
    timed: bool = False
    most: int = 10**6

    def arguments(self, inputs: Path, out: Path, *more: str) -> list[str]:
        """Return the command's arguments; the last of equal options counts."""
        return [part.format(inputs=inputs, out=out) for part in (*self.line.split(), *" ".join(more).split())]


@dataclass(frozen=True)
class Fault:
    """Something that goes wrong in a process.

    Attributes:
        inside: Called in the process before the command.
        around: Makes a context from the directory that the command writes to; it ends before the next run.
        after: Seconds after which the process is killed.
        fresh: Whether it is a new process instead of a fork.
    """

    inside: Callable[[], None] = lambda: None
    around: Callable[[Path], AbstractContextManager[Any]] = nullcontext
    after: float | None = None
    fresh: bool = False


@dataclass
class Ended:
    """How a process ended: exit code (negative for a signal), output, seconds, and whether it had to be killed."""

    code: int
    said: str
    seconds: float
    hung: bool


@dataclass
class Bench:
    """The place of the tries.

    Attributes:
        work: An empty directory.
        inputs: The commands' inputs.
        usual: Files that libraries keep in the temporary directory.
        counted: Number of file changes that the last forked process made, or tried to make.
    """

    work: Path
    inputs: Path
    references: dict[tuple[str, bool], tuple[Signature, float]] = field(default_factory=dict)
    usual: set[str] = field(default_factory=set)
    _shared: Any = field(default_factory=lambda: ctypes.c_long.from_buffer(mmap.mmap(-1, mmap.PAGESIZE)))

    @property
    def place(self) -> Path:
        """Directory that commands write to."""
        return self.work / "place"

    @property
    def out(self) -> Path:
        """Output of the commands."""
        return self.place / "out"

    @property
    def counted(self) -> int:
        return int(self._shared.value)

    def arm(self, at: int = 0, code: int = 0, everything: bool = False) -> None:
        """Count file changes in this process, and begin with faults at one of them; see faults.c."""
        shim = ctypes.CDLL(None)
        where = os.fsencode(self.place)
        shim.fault_arm(where, ctypes.c_long(at), code, everything, ctypes.byref(self._shared))

    def prepare(self, command: Command) -> None:
        """Make the older output, run the command successfully in both ways, and import the modules that it imported."""
        older = self._older(command)
        if older.exists():
            return
        self.clear()
        self._good(command.arguments(self.inputs, self.out, command.older))
        self.out.rename(older)
        for replace in (False, True, False, True):  # in the second round everything is imported
            self.clear(older if replace else None)
            ended = self._good(command.arguments(self.inputs, self.out, command.force if replace else ""))
            self.usual |= set(os.listdir(tempfile.gettempdir()))
            self.references[command.name, replace] = self._signature(command), ended.seconds
        gc.freeze()  # otherwise each process would scan and copy all imported modules
        assert self._signature(command) != signature(older, command.timed) or command.timed

    def count_changes(self, command: Command, replace: bool) -> int:
        """Return the number of file changes in a successful run."""
        self.clear(self._older(command) if replace else None)
        self._good(command.arguments(self.inputs, self.out, command.force if replace else ""), Fault(inside=self.arm))
        return self.counted

    def seconds(self, command: Command, replace: bool) -> float:
        """Return the duration of a successful run."""
        return self.references[command.name, replace][1]

    def attempt(self, command: Command, fault: Fault, replace: bool) -> Counter[str]:
        """Let one fault happen, judge the result, run again without cleaning up, and judge again.

        Returns:
            Counts of 1: how the process ended, which output it left, and what was wrong.
        """
        older = self._older(command) if replace else None
        self.clear(older)
        arguments = command.arguments(self.inputs, self.out, command.force if replace else "")
        with fault.around(self.place):
            ended = self.run(arguments, fault)
            left = self._judge(command, older)
        found = Counter({"injected": 1, left: 1, _manner(ended): 1})
        again = command.arguments(self.inputs, self.out, command.force if self.out.exists() else "")
        next_run = self.run(again)
        found["next run failed"] += next_run.code != 0 or self._judge(command, older) != "new"
        found["strays after the next run"] += bool(self._strays())
        if bad := [key for key in BAD if found[key]]:
            print(f"{command.name}: {bad}\n{ended}\n{next_run}\n{self._strays()}", file=sys.stderr)
        return +found

    def run(self, arguments: list[str], fault: Fault | None = None) -> Ended:
        """Run a command, with a fault if one is given."""
        fault = fault or Fault()
        start = time.perf_counter()
        mine, theirs = os.pipe2(os.O_NONBLOCK)  # not a file, because one of the faults limits the size of files
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 1 << 20)
        if fault.fresh:
            line = [sys.executable, "-m", "ligerexport", *arguments]
            pid = subprocess.Popen(line, stdout=theirs, stderr=theirs, start_new_session=True).pid
        else:
            pid = self._fork(arguments, fault, theirs)
        watched = select.poll()
        watched.register(pidfd := os.pidfd_open(pid), select.POLLIN)
        hung = not watched.poll((fault.after or PATIENCE) * 1e3)
        if hung:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seconds = time.perf_counter() - start
        with suppress(ProcessLookupError):  # the processes that it started
            os.killpg(pid, signal.SIGKILL)
        os.close(theirs)
        with os.fdopen(mine, "rb") as talk:
            said = (talk.read() or b"").decode(errors="replace")
        os.close(pidfd)
        return Ended(code, said, seconds, hung and fault.after is None)

    def call(self, function: Callable[[], Any]) -> None:
        """Call a function in another process, since threads that it starts do not survive a fork."""
        if (pid := os.fork()) == 0:
            try:
                function()
                os._exit(0)
            finally:
                traceback.print_exc()
                os._exit(1)
        if os.waitpid(pid, 0)[1]:
            raise RuntimeError(f"{function} failed")

    def _fork(self, arguments: list[str], fault: Fault, talk: int) -> int:
        self._shared.value = 0
        if pid := os.fork():
            return pid
        code = 99
        try:
            os.setsid()
            os.dup2(talk, 1)
            os.dup2(talk, 2)
            fault.inside()
            main(arguments)
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 99
        except BaseException:
            traceback.print_exc()
        finally:
            with suppress(BaseException):
                (self.work / "modules").write_text("\n".join(sys.modules))
            os._exit(code)

    def _good(self, arguments: list[str], fault: Fault | None = None) -> Ended:
        ended = self.run(arguments, fault)
        if ended.code:
            raise RuntimeError(f"{arguments} ended with {ended.code}: {ended.said}")
        for name in (self.work / "modules").read_text().splitlines():
            if name not in sys.modules:
                with suppress(ImportError):
                    importlib.import_module(name)
        return ended

    def clear(self, older: Path | None = None) -> None:
        """Empty the place, or put a copy of an older output there."""
        if self.place.is_mount():
            subprocess.run(["umount", self.place], check=True)
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        if older is not None:
            (shutil.copytree if older.is_dir() else shutil.copyfile)(older, self.out)

    def _older(self, command: Command) -> Path:
        return self.work / f"older-{command.name}"

    def _signature(self, command: Command) -> Signature:
        return signature(self.out, command.timed)

    def _judge(self, command: Command, older: Path | None) -> str:
        """Return a word for the state of the output."""
        if not self.out.exists():
            return "none" if older is None else "lost"
        if older is not None and plain(self.out) == plain(older):
            return "old"
        try:
            if (self.out / MANIFEST).is_file():
                open_artifact(self.out)
            whole = alike(self._signature(command), self.references[command.name, False][0])
        except Exception:
            traceback.print_exc()
            whole = False
        return "new" if whole else "mixture"

    def _strays(self) -> list[str]:
        """Return the names of files beside the output."""
        return [*set(os.listdir(self.place)) - {self.out.name}, *set(os.listdir(tempfile.gettempdir())) - self.usual]


BAD = ("lost", "mixture", "hung", "traceback", "called a bug", "next run failed", "strays after the next run")
"""Results that must not occur."""


def _manner(ended: Ended) -> str:
    """Return how a process ended, in the words of the results."""
    if ended.hung:
        return "hung"
    if "Traceback" in ended.said:
        return "traceback"
    if "this is a bug" in ended.said:
        return "called a bug"
    if ended.code == 0:
        return "done"
    if ended.code == -signal.SIGKILL:
        return "killed"
    if ended.code < 0:
        return f"died of {signal.Signals(-ended.code).name}"
    return "explained" if "error: " in ended.said else f"silent, exit code {ended.code}"


def plain(path: Path) -> Signature:
    """Return the bytes below a path, by name."""
    return {str(file.relative_to(path)): file.read_bytes() for file in _files(path)}


def signature(path: Path, timed: bool = False) -> Signature:
    """Return, by file name, the content that successful runs share: numbers that are times are left out."""
    return {str(file.relative_to(path)): _signature(file, timed) for file in _files(path)}


def alike(one: Any, other: Any) -> bool:
    """Return whether two signatures are equal except for rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, rel_tol=ROUNDING, abs_tol=1e-6)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    return bool(one == other)


def _files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def _signature(file: Path, timed: bool) -> Any:
    if file.suffix in DRAWN:
        return file.stat().st_size > 0
    content = file.read_bytes()
    if content[:1] == b"{":
        return _untimed(json.loads(content), timed)
    header = {}
    if content[8:9] == b"{":  # a safetensors file, whose metadata can be in any order
        end = 8 + int.from_bytes(content[:8], "little")
        header, content = json.loads(content[8:end]), content[end:]
    return header, hashlib.sha256(content).hexdigest()


def _untimed(value: Any, timed: bool) -> Any:
    if isinstance(value, dict):
        return {key: _untimed(x, timed) for key, x in value.items() if key not in TIMED}
    if isinstance(value, list):
        return [_untimed(x, timed) for x in value]
    return None if timed and not isinstance(value, str) else value
