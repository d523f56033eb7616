"""Directories and files that appear whole or not at all: written beside their destination, synced, renamed.

Artifacts, checkpoints and states are all made this way. A killed run leaves a directory that no process has locked; the
next run for the same destination removes it.
"""

from __future__ import annotations

import ctypes
import errno
import glob
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from ligerexport.errors import LigerError, UsageError

# Windows has no such locks: the directory of a killed run stays there until somebody deletes it.
fcntl: Any = import_module("fcntl") if os.name == "posix" else None

CACHE_HINT = "set LIGEREXPORT_CACHE to a directory that can be written"
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def cache_dir() -> Path:
    """Return the directory for fetched models and compiled operators.

    That is `LIGEREXPORT_CACHE`, or `ligerexport` in the user's cache directory if that is not set.

    Raises:
        LigerError: The user has no home directory, and no variable names a directory.
    """
    own = os.environ.get("LIGEREXPORT_CACHE")
    try:
        if own:
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "ligerexport"
    except RuntimeError as error:
        raise LigerError("there is no home directory for a cache", hint=CACHE_HINT) from error


def check_destination(destination: Path | str, *, force: bool = False, marker: str) -> None:
    """Refuse a destination if files would be lost. Remains of killed runs there are removed or completed.

    Args:
        destination: Directory to be written.
        force: Whether an older output of the same kind may be replaced.
        marker: File that distinguishes such an output from any other directory.

    Raises:
        UsageError: The destination is a file or not empty, or `force` would replace files that this program did not
            write or may not write.
    """
    path = Path(os.path.abspath(destination))
    remove_leftovers(path)
    backup = path.with_name(f"{_prefix(path)}old")
    if (backup / marker).is_file() and not path.exists():  # killed between the two renames of `_replace`
        backup.rename(path)
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} is a file, a directory was expected", hint="choose another place with -o")
    if not any(path.iterdir()):
        return
    if not force:
        raise UsageError(f"{path} exists and is not empty", hint="choose another place with -o, or add --force")
    if not (path / marker).is_file():
        raise UsageError(
            f"{path} holds other files (no {marker}), so --force will not replace it",
            hint="choose another place with -o",
        )
    if not os.access(path, os.W_OK | os.X_OK):  # it could be renamed but not removed
        raise UsageError(f"{path} is not writable, so --force cannot replace it", hint="choose another place with -o")


@contextmanager
def staged_directory(destination: Path | str, *, force: bool = False, marker: str) -> Iterator[Path]:
    """Yield a temporary directory that becomes `destination` when the block ends without an exception.

    The old directory, if `force` lets it be replaced, stays until the new one is whole and synced. Where the system
    can exchange two names (Linux), one of them exists at every moment. After any exception the new files are removed.

    Args:
        destination: Directory to make; its parents are made as needed.
        force: Whether an older output of the same kind may be replaced.
        marker: See `check_destination`.

    Raises:
        UsageError: See `check_destination`.
        LigerError: The disk is full, or the place is not writable.
    """
    path = Path(os.path.abspath(destination))
    check_destination(path, force=force, marker=marker)
    with _staged(path) as stage:
        yield stage
        _sync(stage)
        check_destination(path, force=force, marker=marker)
        _replace(stage, path)


@contextmanager
def staged_file(destination: Path | str, *, hint: str = "choose another place") -> Iterator[Path]:
    """Yield a path for a file that replaces `destination` when the block ends without an exception.

    Args:
        destination: File to make; its parents are made as needed.
        hint: What to do if it cannot be written.

    Raises:
        LigerError: The disk is full, or the place is not writable.
    """
    path = Path(os.path.abspath(destination))
    with _staged(path, hint) as stage:
        yield stage / path.name
        _sync(stage)
        (stage / path.name).replace(path)
        _sync_names(path.parent)


@contextmanager
def _staged(path: Path, hint: str = "choose another place") -> Iterator[Path]:
    """Yield a temporary directory beside `path` that is removed at the end; explain errors of the disk.

    In messages, `path` replaces the temporary directory, which the reader does not know.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        stage, lock = _make_stage(path)
    except OSError as error:
        raise LigerError(f"cannot write {path}: {error.strerror}", hint=hint) from error
    try:
        yield stage
    except Exception as error:
        error.args = tuple(_final(x, stage, path) if isinstance(x, str) else x for x in error.args)
        if isinstance(error, LigerError):
            error.message, error.hint = (
                _final(error.message, stage, path),
                error.hint and _final(error.hint, stage, path),
            )
            raise
        number = _error_number(error)
        if number in FULL:
            raise LigerError(
                f"no space left for {path} ({shutil.disk_usage(path.parent).free / 1e6:.0f} MB free), or a limit on "
                "the size of files",
                hint="free some space, or choose another disk",
            ) from error
        place = getattr(error, "filename", None) or path
        if number is None or not Path(final := _final(str(place), stage, path)).is_relative_to(path):
            raise  # the error concerns a file that is read
        raise LigerError(f"cannot write {final}: {os.strerror(number)}", hint=hint) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


def _final(text: str, stage: Path, path: Path) -> str:
    """Return text with the final names of files instead of their temporary ones."""
    return text.replace(str(stage / path.name), str(path)).replace(str(stage), str(path))


def _error_number(error: Exception) -> int | None:
    """Return the system's number of an error; safetensors gives it only in the text."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _prefix(path: Path) -> str:
    return f".{path.name}."


def _make_stage(path: Path) -> tuple[Path, int]:
    """Make a temporary directory beside `path` and hold its lock, which dies with this process."""
    while True:
        stage = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".partial", dir=path.parent))
        if fcntl is None:
            return stage, os.open(os.devnull, os.O_RDONLY)
        lock = os.open(stage, os.O_RDONLY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if stage.exists():  # otherwise another run removed it before it was locked
                stage.chmod(0o777 & ~_umask())
                return stage, lock
        except BlockingIOError:
            pass
        os.close(lock)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def remove_leftovers(path: Path) -> None:
    """Remove the directories that killed runs for `path` left beside it: those that no process has locked."""
    if fcntl is None:
        return
    for stage in path.parent.glob(f"{glob.escape(_prefix(path))}*.partial"):
        with suppress(OSError):  # it is in use, belongs to another user, or is gone
            lock = os.open(stage, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(stage, ignore_errors=True)
            finally:
                os.close(lock)


def remove_directory(path: Path) -> None:
    """Remove a directory if it exists; a run that is killed here leaves all of it or nothing under its name."""
    going = path.with_name(f"{_prefix(path)}{os.getpid()}.partial")
    shutil.rmtree(going, ignore_errors=True)
    with suppress(OSError):
        path.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Sync every file and directory below `directory` to the disk."""
    if os.name != "posix":
        return
    for root, _, files in os.walk(directory, topdown=False):
        for name in [*files, "."]:
            _sync_one(os.path.join(root, name))


def _replace(stage: Path, path: Path) -> None:
    """Give `stage` the name `path`; a directory that had this name gets the name of `stage` or is removed."""
    if not path.exists():
        stage.rename(path)
    elif not _exchange(stage, path):
        backup = path.with_name(f"{_prefix(path)}old")
        shutil.rmtree(backup, ignore_errors=True)
        path.rename(backup)
        stage.rename(path)
        shutil.rmtree(backup, ignore_errors=True)
    _sync_names(path.parent)


def _sync_names(directory: Path) -> None:
    """Sync the names in a directory to the disk."""
    if os.name == "posix":
        _sync_one(directory)


def _sync_one(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step, if the system and the file system can."""
    at_fdcwd, rename_exchange = -100, 2
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):
        return False
    arguments = (at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange)
    return renameat2(*arguments) == 0
