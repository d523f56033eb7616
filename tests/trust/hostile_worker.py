"""Inputs in a separate process, forked from one that has everything loaded, with limits and watches.

An audit hook sees what Python does; inotify sees what native code opens outside the input's directory.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import select
import signal
import sys
import sysconfig
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hostile_mutate import MARK

SECONDS = 5
"""Seconds of processor time that an input may take."""
PATIENCE = 300.0
"""Seconds of wall time after which an input counts as hung; a busy machine makes everything slow."""
MEMORY = 4 << 30
"""Bytes of address space above those that the process has at its start."""
GROWTH = 1 << 30
"""Bytes by which an input may make resident memory grow."""
AGAIN = b"again\n"
BATCH = 100
"""Number of inputs per fork."""
_ROOTS = tuple(
    str(Path(path).resolve())
    for path in (
        Path(__file__).parents[2],
        sysconfig.get_path("stdlib"),
        sysconfig.get_path("purelib"),
        sys.base_prefix,
        sys.prefix,
        "/proc",
        "/sys",
        "/dev",
        "/etc/localtime",
        "/usr/share/zoneinfo",
        "/usr/lib",
        "/lib",
    )
)


@dataclass(frozen=True)
class Outcome:
    """The result of an input: `refused`, `valid`, or a finding with its text; seconds, and bytes of growth."""

    kind: str
    what: str
    seconds: float
    growth: int


class Watch:
    """Reports whether a file in a directory was opened, by any code."""

    def __init__(self, directory: Path) -> None:
        events = 0x20 | 0x2 | 0x4 | 0x100 | 0x200 | 0x80  # open, modify, attributes, create, delete, move
        libc = ctypes.CDLL(None, use_errno=True)
        self._file = libc.inotify_init1(os.O_NONBLOCK)
        if libc.inotify_add_watch(self._file, os.fsencode(directory), events) < 0:
            raise OSError(ctypes.get_errno(), "inotify")

    def seen(self) -> bool:
        """Return whether something happened since the last call."""
        found = False
        while select.select([self._file], [], [], 0)[0]:
            found = bool(os.read(self._file, 65536))
        return found


def run(inputs: Iterable[int], one: Callable[[int], Callable[[], None]], place: Path) -> Iterator[tuple[int, Outcome]]:
    """Try inputs one after the other in a fork, and continue in a new fork if one ends it.

    Args:
        inputs: Numbers of the inputs.
        one: Puts an input in place, and returns a function that uses it as a user would.
        place: Directory of the input.

    Yields:
        Each number and its result.
    """
    left = list(inputs)
    while left:
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _child(left[:BATCH], one, place, writer)
        os.close(writer)
        with os.fdopen(reader, "rb", buffering=0) as answers:
            tried = left[:BATCH]
            for number in tried:
                line = _line(answers)
                if line == AGAIN:
                    break
                if line:
                    yield number, Outcome(*json.loads(line))
                    left.remove(number)
                    continue
                os.kill(pid, signal.SIGKILL)
                break
        _, status, _ = os.wait4(pid, 0)
        if left and left[0] in tried and line != AGAIN:
            died = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "it left without a word"
            late = died in ("SIGXCPU", "SIGKILL")
            yield left.pop(0), Outcome("finding", f"{'hang' if late else 'crash'}: {died}", 2.0 * SECONDS, 0)


def _line(answers: Any) -> bytes:
    """Return the next answer; empty if none comes in time, or the process ended."""
    said, end = b"", time.monotonic() + PATIENCE
    while not said.endswith(b"\n") and select.select([answers], [], [], max(0, end - time.monotonic()))[0]:
        part = answers.read(1)
        if not part:
            return b""
        said += part
    return said if said.endswith(b"\n") else b""


def _child(numbers: list[int], one: Callable[[int], Callable[[], None]], place: Path, writer: int) -> NoReturn:
    """Try inputs under limits, and write the result of each."""
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.chdir(place)
    watch, hook = Watch(place / "outside"), _Hook(place)
    sys.addaudithook(hook)
    for number in numbers:
        try:
            action = one(number)
        except BaseException:  # memory from earlier inputs may be too much
            os.write(writer, AGAIN if number != numbers[0] else traceback.format_exc().encode() + b"\n")
            os._exit(1)
        watch.seen()  # clear events of the mutation itself
        begin = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
        resource.setrlimit(resource.RLIMIT_CPU, (int(begin) + SECONDS + 1, resource.RLIM_INFINITY))
        Path("/proc/self/clear_refs").write_text("5")  # peak memory counts from here
        before = _peak()
        hook.seen, hook.armed = [], True
        kind, what = _answer(action)
        hook.armed = False
        seconds, growth = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - begin, _peak() - before
        problems = list(hook.seen)
        if growth > GROWTH:
            problems.append(f"memory grew by {growth >> 20} MiB")
        if watch.seen():
            problems.append("a file outside was opened")
        maps = Path("/proc/self/maps").read_text().splitlines()
        problems += [f"code of the input was mapped: {x}" for x in maps if str(place) in x and "x" in x.split()[1]]
        if problems:
            kind, what = "finding", f"{problems[0]}; {what}"
        os.write(writer, json.dumps((kind, what[:1000], seconds, growth)).encode() + b"\n")
    os._exit(0)


def _peak() -> int:
    """Return the largest resident memory in bytes since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _answer(action: Callable[[], None]) -> tuple[str, str]:
    from ligerexport.errors import LigerError

    try:
        action()
        return "valid", ""
    except LigerError as error:
        text = f"{type(error).__name__}: {error.message}"
        if any(not x.isprintable() for x in error.message + (error.hint or "")) or len(error.message) > 2000:
            return "finding", f"not one line: {text[:300]!r}"
        if not error.hint:
            return "finding", f"no hint: {text}"
        if any(word in error.message for word in ("bad_alloc", "allocate memory", "Unable to allocate")):
            return "finding", f"memory: {text}"
        return "refused", text
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [x for x in frames if "/ligerexport/" in x.filename or "/exporters/" in x.filename] or frames
        at = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        return "finding", f"{type(error).__name__} at {at}: {str(error)[:300]}"


class _Hook:
    """Records events that an input must not cause."""

    def __init__(self, place: Path) -> None:
        self._place = str(place.resolve())
        self.seen: list[str] = []
        self.armed = False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        self.armed = False
        try:
            if what := self._judge(event, arguments):
                self.seen.append(what)
        finally:
            self.armed = True

    def _judge(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        match event:
            case "open" | "os.listdir" | "os.scandir" | "os.mkdir" | "os.rename" | "os.remove" | "shutil.copyfile":
                for path in arguments[: 2 if event in ("os.rename", "shutil.copyfile") else 1]:
                    if isinstance(path, str | bytes | os.PathLike) and not self._allowed(path):
                        return f"{event} of {path!r}"
            case "compile" | "exec" if MARK in str(arguments[0])[:100000]:
                return f"{event} of the payload"
            case "pickle.find_class":
                return f"{event} {arguments[1:]}"
            case "os.system" | "os.exec" | "os.posix_spawn" | "os.spawn" | "socket.connect" | "socket.getaddrinfo":
                return f"{event} {arguments!r}"[:300]
            case "subprocess.Popen" if not _ours(arguments):
                return f"{event} {arguments[:2]!r}"[:300]
            case "ctypes.dlopen" if "/" in str(arguments[0]) and self._inside_input(arguments[0]):
                return f"{event} {arguments[0]!r}"
            case "import" if arguments[1] and not self._allowed(arguments[1]):
                return f"import of {arguments[1]!r}"
        return None

    def _inside_input(self, path: Any) -> bool:
        return os.path.realpath(os.fsdecode(path)).startswith(self._place)

    def _allowed(self, path: Any) -> bool:
        real = os.path.realpath(os.fsdecode(path))
        return real.startswith((self._place, *_ROOTS)) and not real.startswith(f"{self._place}/outside")


def _ours(arguments: tuple[Any, ...]) -> bool:
    """Return whether a process is the product's own process for chat templates."""
    command = [str(x) for x in arguments[1]]
    return command[0] == sys.executable and command[3].endswith("/ligerexport/text/render.py")
