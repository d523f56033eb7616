"""Files and directories are written completely or not at all; for artifacts: test_artifact.py, test_faults.py."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.errors import LigerError, UsageError
from ligerexport.staging import check_destination, remove_directory, staged_directory, staged_file


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_a_file_takes_its_place_at_the_end(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with staged_file(tmp_path / "made" / "file") as file:
            file.write_text(content)
            assert content == "old" or (tmp_path / "made" / "file").read_text() == "old"
        assert (tmp_path / "made" / "file").read_text() == content
    with pytest.raises(KeyboardInterrupt), staged_file(tmp_path / "made" / "file") as file:
        raise KeyboardInterrupt(file.write_text("half"))
    assert (tmp_path / "made" / "file").read_text() == "new" and names(tmp_path / "made") == {"file"}


WRITER = """
import sys, time
from ligerexport.staging import staged_file
with staged_file(sys.argv[1]) as file:
    file.write_text("half")
    print("half", flush=True)
    time.sleep(3600)
"""


def test_kill_9_while_a_state_is_written_leaves_nothing_for_ever(tmp_path: Path) -> None:
    snapshot = Snapshot("model", np.array([3]), {"past.0.state": np.ones((1, 4), np.float32)})
    snapshot.save(tmp_path / "state")
    line = [sys.executable, "-c", WRITER, str(tmp_path / "state")]
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        half = names(tmp_path) - {"state"}
        snapshot.save(tmp_path / "state")
        assert len(half) == 1 and half <= names(tmp_path)  # it is in use
        writer.send_signal(signal.SIGKILL)
    assert half <= names(tmp_path)
    snapshot.save(tmp_path / "state")
    assert names(tmp_path) == {"state"} and Snapshot.load(tmp_path / "state").position == 3


@pytest.mark.parametrize("out", ["out", "out[1]*"])
def test_what_killed_runs_left_is_removed_where_the_output_is_refused_too(tmp_path: Path, out: str) -> None:
    for name in (out, f".{out}.123.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("")
    with pytest.raises(UsageError, match="not empty"):
        check_destination(tmp_path / out, marker="file")
    assert names(tmp_path) == {out}


def test_a_directory_goes_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_directory(tmp_path / "absent")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "file").write_text("")

    with monkeypatch.context() as patch:
        patch.setattr("ligerexport.staging.shutil.rmtree", lambda path, ignore_errors: None)  # killed before
        remove_directory(tmp_path / "state")
    assert len(names(tmp_path)) == 1 and not (tmp_path / "state").exists()
    check_destination(tmp_path / "state", marker="file")
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(errno.ENOSPC, "full"), "no space left"),
        (OSError(errno.EIO, "broken"), "cannot write .*: Input/output error"),  # of a write or a sync: no file's name
        (ValueError("I/O error: No space left on device (os error 28)"), "no space left"),  # as safetensors says it
    ],
)
def test_what_a_disk_says_is_explained(tmp_path: Path, error: Exception, said: str) -> None:
    with pytest.raises(LigerError, match=said), staged_directory(tmp_path / "out", marker="file"):
        raise error
    assert names(tmp_path) == set()


def test_other_errors_keep_what_they_say(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staged_file(tmp_path / "out"):
        (tmp_path / "absent").read_text()
    with pytest.raises(ValueError, match="zero"), staged_file(tmp_path / "out"):
        raise ValueError("zero")


@pytest.mark.parametrize("kind", [LigerError, OSError, ValueError])
@pytest.mark.parametrize("stage", [staged_file, partial(staged_directory, marker="file")])
def test_no_error_names_a_temporary_place(tmp_path: Path, kind: type[Exception], stage: Any) -> None:
    def work() -> None:
        with stage(tmp_path / "out") as place:
            if kind is OSError:
                (place / "absent" / "file").write_text("")
            hint = {"hint": f"look at {place}"} if kind is LigerError else {}
            raise kind(f"{place} is wrong", **hint)

    with pytest.raises(Exception, match="out") as caught:
        work()
    said = f"{caught.value} {getattr(caught.value, 'hint', '')}"
    assert ".partial" not in said and str(tmp_path / "out") in said
    assert isinstance(caught.value, ValueError if kind is ValueError else LigerError)


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="takes another user's directory")
def test_an_output_of_another_user_is_refused_first(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").write_text("")
    for place in [tmp_path, *tmp_path.parents]:
        if place == Path(tempfile.gettempdir()):
            break
        place.chmod(0o777)
    if (pid := os.fork()) == 0:
        os.setuid(65534)
        try:
            check_destination(tmp_path / "out", force=True, marker="file")
        except UsageError:
            os._exit(2)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2
