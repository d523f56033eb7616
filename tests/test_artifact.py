"""Artifacts are written completely or not at all, and are checked before an engine reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import pytest
import toy

import ligerexport as lx
from ligerexport import staging
from ligerexport.artifact import pieces
from ligerexport.artifact.artifact import MANIFEST, ArtifactWriter, Manifest, open_artifact
from ligerexport.errors import ArtifactError, LigerError, MissingDependency, UsageError

Edit = Callable[[Path], None]


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return toy.build(tmp_path / "artifact")


def names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def edit_manifest(artifact: Path, **changes: object) -> None:
    file = artifact / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_what_is_written_is_read(artifact: Path) -> None:
    found = open_artifact(artifact)
    assert found.graph == artifact / "model.onnx"
    assert set(found.manifest.files) == names(artifact) - {MANIFEST}
    written = json.loads((artifact / MANIFEST).read_text())
    assert Manifest.from_dict(written) == found.manifest
    assert json.loads(json.dumps(found.manifest.to_dict())) == written
    assert next(iter(written)) == "format_version"


def test_keys_of_a_later_minor_version_are_ignored(artifact: Path) -> None:
    edit_manifest(artifact, colour="green")
    assert open_artifact(artifact).manifest.target == "onnx"


def test_crossover_is_the_first_length_at_which_the_cache_is_larger() -> None:
    manifest = toy.manifest()
    growth, fixed, per_token = manifest.growth, manifest.bytes.state_per_sequence, manifest.bytes.kv_per_token
    tokens = manifest.crossover
    assert tokens is not None and growth == 4 * toy.WIDTH
    assert per_token * tokens > fixed + growth * tokens
    assert per_token * (tokens - 1) <= fixed + growth * (tokens - 1)


def test_fingerprint_is_of_the_model_not_of_the_file_it_is_in() -> None:
    same = toy.manifest(lowering="portable", target="trt")
    assert same.fingerprint == toy.manifest().fingerprint != toy.manifest(liger={}).fingerprint


def test_refuses_what_is_in_the_way(tmp_path: Path, artifact: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        toy.build(tmp_path / "file")
    with pytest.raises(UsageError, match="not empty") as caught:
        toy.build(artifact)
    assert "--force" in str(caught.value.hint)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="will not replace"):
        toy.build(tmp_path / "mine", force=True)
    assert names(tmp_path) == {"file", "artifact", "mine"}
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_an_empty_directory_and_new_parents_will_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    open_artifact(toy.build(tmp_path / "empty"))
    open_artifact(toy.build(tmp_path / "a" / "b"))
    assert names(tmp_path) == {"empty", "a"}


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_the_old_one_at_the_end(artifact: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda one, other: False)
    with ArtifactWriter(artifact, force=True) as writer:
        toy.write_files(writer.directory)
        assert open_artifact(artifact).manifest.precision == "float32"
        writer.commit(toy.manifest(precision="float16"))
    assert open_artifact(artifact).manifest.precision == "float16"
    assert names(artifact.parent) == {"artifact"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_one_and_nothing_else(artifact: Path, error: type[BaseException]) -> None:
    def fail() -> None:
        with ArtifactWriter(artifact, force=True) as writer:
            toy.write_files(writer.directory)
            raise error

    with pytest.raises(error):
        fail()
    open_artifact(artifact)
    assert names(artifact.parent) == {"artifact"}


def test_a_block_without_a_manifest_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="manifest"), ArtifactWriter(tmp_path / "new") as writer:
        toy.write_files(writer.directory)
    assert names(tmp_path) == set()


def test_killed_between_two_renames_is_mended_by_the_next_run(artifact: Path) -> None:
    artifact.rename(artifact.with_name(".artifact.old"))
    with pytest.raises(UsageError, match="not empty"):
        toy.build(artifact)
    open_artifact(artifact)
    assert names(artifact.parent) == {"artifact"}


WRITER = """
import sys, time; sys.path.insert(0, {tests!r})
import toy
from ligerexport.artifact.artifact import ArtifactWriter
with ArtifactWriter({path!r}, force=True) as writer:
    toy.write_files(writer.directory)
    print("half", flush=True)
    time.sleep(3600)
"""


@pytest.mark.parametrize("old", [True, False])
def test_kill_9_in_the_middle(tmp_path: Path, old: bool) -> None:
    path = tmp_path / "artifact"
    if old:
        toy.build(path)
    code = WRITER.format(tests=str(Path(__file__).parent), path=str(path))
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == "half\n"
        half = names(tmp_path) - {"artifact"}
        assert len(half) == 1
        with ArtifactWriter(tmp_path / "other") as other:  # another destination: the running one is left alone
            toy.write_files(other.directory)
            other.commit(toy.manifest())
        if not old:
            toy.build(path)  # so is one for the same destination, while it runs
        assert half <= names(tmp_path)
        writer.send_signal(signal.SIGKILL)
    open_artifact(path)
    assert half <= names(tmp_path)
    toy.build(path, force=True, precision="float16")
    assert open_artifact(path).manifest.precision == "float16"
    assert names(tmp_path) == {"artifact", "other"}


def test_disk_full(tmp_path: Path) -> None:
    code = f"""
import resource, sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import signal, toy
from ligerexport.errors import LigerError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (8000, 8000))
try:
    toy.build({str(tmp_path / "artifact")!r}, force=True)
except LigerError as error:
    print(error.message, "|", error.hint)
"""
    toy.build(tmp_path / "artifact")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "no space left" in done.stdout and "free some space" in done.stdout, done.stderr
    open_artifact(tmp_path / "artifact")
    assert names(tmp_path) == {"artifact"}


def test_disk_full_for_real(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a small disk here")
    try:
        toy.build(disk / "artifact")
        with pytest.raises(LigerError, match="no space left"), ArtifactWriter(disk / "artifact", force=True) as writer:
            (writer.directory / "model.onnx.data").write_bytes(bytes(400_000))
        open_artifact(disk / "artifact")
        assert names(disk) == {"artifact"}
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LigerError, match="cannot write"):
        toy.build(tmp_path / "file" / "artifact")


def _flip(artifact: Path, file: str = "model.onnx") -> None:
    data = bytearray((artifact / file).read_bytes())
    data[len(data) // 2] ^= 1
    (artifact / file).write_bytes(data)


def _truncate(artifact: Path) -> None:
    os.truncate(artifact / "model.onnx", 100)


def _link_out(artifact: Path) -> None:
    shutil.move(artifact / "config.json", artifact.parent / "config.json")
    (artifact / "config.json").symlink_to(artifact.parent / "config.json")


def _put_inside(artifact: Path) -> None:
    (artifact / "engine").mkdir()
    (artifact / MANIFEST).rename(artifact / "engine" / MANIFEST)
    (artifact / "config.json").unlink()


def _rename(old: str, new: str) -> Edit:
    def edit(artifact: Path) -> None:
        files = json.loads((artifact / MANIFEST).read_text())["files"]
        files[new] = files.pop(old)
        edit_manifest(artifact, files=files)

    return edit


def _set(**changes: object) -> Edit:
    return lambda artifact: edit_manifest(artifact, **changes)


@pytest.mark.parametrize(
    ("edit", "message", "hint"),
    [
        (_flip, r"model\.onnx was changed after the build", "build"),
        (_truncate, r"model\.onnx has 100 bytes where \d+ were written", "build"),
        (lambda a: (a / "tokenizer.json").unlink(), r"tokenizer\.json is missing", "build"),
        (lambda a: (a / MANIFEST).unlink(), "is not an artifact", "ligerexport build"),
        (_put_inside, "is not an artifact", "did you mean"),
        (lambda a: (a / MANIFEST).write_text("{"), "is not JSON", "build"),
        (lambda a: (a / MANIFEST).write_text("[]"), "holds no JSON object", "build"),
        (_set(format_version=4), "format 4 is newer", "pip install --upgrade"),
        (_set(format_version="x"), "is damaged", "build"),
        (_set(state=[{"past": "x"}]), "is damaged", "build"),
        (_set(model=None), "is damaged", "build"),
        (_set(requires={"onnxruntime": ">=99"}), "built for onnxruntime >=99, found", "pip install 'onnxruntime>=99'"),
        (_set(requires={"onnxruntime": "new"}), "is damaged", "build"),
        (_rename("config.json", "../config.json"), "outside the artifact", "do not use"),
        (_rename("config.json", "/etc/passwd"), "outside the artifact", "do not use"),
        (_rename("config.json", "C:\\config.json"), "outside the artifact", "do not use"),
        (_rename("model.onnx", "config2.json"), "does not list the graph", "build"),
        (_link_out, "link to a place outside", "cp -rL"),
    ],
)
def test_bad_artifacts(artifact: Path, edit: Edit, message: str, hint: str) -> None:
    edit(artifact)
    with pytest.raises(ArtifactError, match=message) as caught:
        lx.load(artifact)
    assert hint in str(caught.value.hint)
    assert "\n" not in caught.value.message


def test_hashing_can_be_switched_off_but_sizes_cannot(artifact: Path) -> None:
    _flip(artifact)
    open_artifact(artifact, hashes=False)
    _truncate(artifact)
    with pytest.raises(ArtifactError, match="100 bytes"):
        open_artifact(artifact, hashes=False)


def test_large_files_are_hashed_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE", 1000)
    artifact = toy.build(tmp_path / "artifact")
    manifest, weights = open_artifact(artifact).manifest, artifact / "model.onnx"
    content = weights.read_bytes()
    expected = [hashlib.sha256(content[at : at + 1000]).hexdigest() for at in range(0, len(content), 1000)]
    assert list(manifest.files[weights.name].pieces) == expected and len(expected) > 10
    assert manifest.files["config.json"].pieces == ()
    for changed in (content[:-1] + b"x", content[:5000] + b"x" + content[5001:]):
        weights.write_bytes(changed)
        with pytest.raises(ArtifactError, match="was changed after the build"):
            open_artifact(artifact)
    weights.write_bytes(content)
    entry = asdict(manifest.files[weights.name]) | {"pieces": expected[:-1]}
    edit_manifest(artifact, files=json.loads((artifact / MANIFEST).read_text())["files"] | {weights.name: entry})
    with pytest.raises(ArtifactError, match="was changed after the build"):
        open_artifact(artifact)


def test_runtime_that_is_not_there(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edit_manifest(artifact, requires={"onnxruntime": ">=1"})

    def nothing(name: str) -> str:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", nothing)
    with pytest.raises(MissingDependency, match="onnxruntime") as caught:
        open_artifact(artifact)
    assert caught.value.hint == "pip install 'onnxruntime>=1'"
    open_artifact(artifact, runtime=False)

    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.30"
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "version", version)
    open_artifact(artifact)


def test_a_graph_that_does_not_load(artifact: Path) -> None:
    with ArtifactWriter(artifact, force=True) as writer:
        toy.write_files(writer.directory)
        (writer.directory / "model.onnx").write_bytes(b"no graph")
        writer.commit(toy.manifest())
    with pytest.raises(ArtifactError, match="not the graph of its manifest"):
        lx.load(artifact)


def test_a_graph_that_is_not_the_manifests(artifact: Path) -> None:
    graph = json.loads((artifact / MANIFEST).read_text())["graph"]
    edit_manifest(artifact, graph=graph | {"outputs": graph["outputs"][::-1]})
    with pytest.raises(ArtifactError, match="outputs"):
        lx.load(artifact)


def test_a_target_without_a_runtime_here(artifact: Path) -> None:
    edit_manifest(artifact, target="onxn", requires={})
    with pytest.raises(ArtifactError, match="onxn") as caught:
        lx.load(artifact)
    assert caught.value.hint == "did you mean onnx?"


def test_a_slow_writer_is_not_taken_for_a_killed_one(tmp_path: Path) -> None:
    with ArtifactWriter(tmp_path / "artifact") as first:
        toy.write_files(first.directory)
        before = first.directory.stat().st_mtime - 10 * 86400
        os.utime(first.directory, (before, before))
        with pytest.raises(ValueError, match="mistake"), ArtifactWriter(tmp_path / "artifact"):
            raise ValueError("mistake")
        first.commit(toy.manifest())
    open_artifact(tmp_path / "artifact")


@pytest.mark.parametrize("file", ["model.onnx", "model.onnx.data"])
def test_load_answers_for_no_changed_file(
    built: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """No engine reads a changed graph; an engine with changed weights is discarded, even if it raises another error."""
    copy = tmp_path / "copy"
    shutil.copytree(built[1], copy)
    _flip(copy, file)
    made: list[object] = []

    def engine(artifact: object, **settings: object) -> None:
        made.append(artifact)
        raise RuntimeError("the engine does not like these numbers")

    monkeypatch.setattr("ligerexport.exporters.onnx.session.OnnxSession", engine)
    with pytest.raises(ArtifactError, match=f"{file} was changed after the build"):
        lx.load(copy)
    assert bool(made) == (file == "model.onnx.data")
    monkeypatch.undo()
    with pytest.raises(ArtifactError, match=f"{file} was changed after the build"):
        lx.load(copy)
