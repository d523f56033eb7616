"""The hub, served on loopback: models and adapters by id, artifacts that are published and fetched, and all errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
from checkpoints import make_transformer
from hub_server import Hub
from huggingface_hub import constants, hf_api
from transformers import AutoModelForCausalLM

import ligerexport as lx
from ligerexport.artifact.artifact import MANIFEST, open_artifact
from ligerexport.artifact.card import model_card
from ligerexport.artifact.hub import pull, push
from ligerexport.checkpoint.sources import resolve
from ligerexport.errors import ArtifactError, CheckpointError, LigerError, SourceError, UsageError
from ligerexport.exporters.prepare import is_model, prepare

SIZES = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_hidden_layers": 2}


def files(place: Path) -> dict[str, bytes]:
    return {path.relative_to(place).as_posix(): path.read_bytes() for path in place.rglob("*") if path.is_file()}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Run a hub, and direct huggingface_hub to it with an empty cache and an accepted token."""
    server = Hub()
    template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
    for name, value in {
        "ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_DISABLE_XET": True, "HF_HUB_OFFLINE": False, "DOWNLOAD_CHUNK_SIZE": 1000,
    }.items():  # fmt: skip
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(hf_api.api, "endpoint", server.url)
    monkeypatch.setenv("HF_TOKEN", "hf_accepted")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_transformer(tmp_path / "model", **SIZES)


@pytest.fixture
def artifact(tmp_path: Path) -> Path:
    return toy.build(tmp_path / "toy-artifact")


def test_convert_by_id(hub: Hub, model: Path, tmp_path: Path) -> None:
    """Only files that a checkpoint needs are fetched; a large one by a redirect, and in two parts if it is cut off."""
    card = b"---\nlicense: mit\n---\n"
    commit = hub.add("owner/tiny", files(model) | {"README.md": card, "run.py": b"1/0", "pytorch_model.bin": b"x"})
    hub.cut = 1
    liger = lx.convert("owner/tiny", tmp_path / "liger", window=16)
    origin = json.loads((liger / "config.json").read_text())["liger_source"]
    assert origin == {"model": "owner/tiny", "revision": commit, "license": "mit"}
    assert (liger / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()
    asked = {path.rpartition("/")[2] for _, path, _ in hub.log}
    assert "model.safetensors" in asked and not asked & {"run.py", "pytorch_model.bin"}
    resumed = [part for _, path, part in hub.log if path.startswith("/blobs/") and part]
    assert len(resumed) == 1 and int(resumed[0].removeprefix("bytes=").removesuffix("-")) >= 1000


def test_revision_and_cache(hub: Hub) -> None:
    first = hub.add("owner/tiny", {"config.json": b"1"})
    second = hub.add("owner/tiny", {"config.json": b"2"})
    for name, commit, content in (("owner/tiny", second, "2"), (f"owner/tiny@{first}", first, "1")):
        source = resolve(name)
        assert (source.name, source.revision) == ("owner/tiny", commit)
        assert (source.path / "config.json").read_text() == content
    hub.log.clear()
    resolve(f"owner/tiny@{first}")
    assert not [path for _, path, _ in hub.log if "/resolve/" in path]


@pytest.mark.parametrize(
    ("name", "message", "hint"),
    [
        ("owner/gated", "asks for its terms to be accepted", "hf auth login"),
        ("owner/missing", "no directory 'owner/missing' here, and there is no repository", "spelling"),
        ("owner/text", "owner/text has no config.json", "GGUF"),
        ("owner/tiny@other", "owner/tiny has no revision 'other'", "leave"),
    ],
)
def test_refusals(hub: Hub, monkeypatch: pytest.MonkeyPatch, name: str, message: str, hint: str) -> None:
    monkeypatch.delenv("HF_TOKEN")
    hub.add("owner/tiny", {"config.json": b"{}"})
    hub.add("owner/text", {"README.md": b"no model"})
    hub.add("owner/gated", {"config.json": b"{}"}, gated=True)
    with pytest.raises(SourceError, match=message) as caught:
        resolve(name)
    assert hint in str(caught.value.hint)


def test_truncated(hub: Hub) -> None:
    hub.add("owner/tiny", {"config.json": b"{}" * 50})
    hub.shrink = True
    with pytest.raises(SourceError, match="did not arrive whole") as caught:
        resolve("owner/tiny")
    assert "again" in str(caught.value.hint)


def test_repository_without_a_model(hub: Hub, tmp_path: Path) -> None:
    hub.add("owner/images", {"config.json": b'{"model_type": "vit"}', "model.safetensors": b"no"})
    with pytest.raises(LigerError):
        lx.convert("owner/images", tmp_path / "liger")
    assert not (tmp_path / "liger").exists()


@pytest.fixture
def adapter(model: Path, tmp_path: Path) -> Path:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(model)
    wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    wrapped.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("where", ["here", "hub"])
def test_merge(hub: Hub, model: Path, adapter: Path, tmp_path: Path, where: str) -> None:
    from peft import PeftModel

    if where == "hub":
        hub.add("owner/lora", files(adapter))
    name = str(adapter) if where == "here" else "owner/lora"
    liger = lx.convert(model, tmp_path / "liger", merge=name, window=16, attention_weight=1.0, recurrence_weight=0.0)
    merged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), adapter)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(lx.load_model(liger)(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
    assert json.loads((liger / "config.json").read_text())["liger_source"]["adapter"] == name


def test_merge_is_refused(hub: Hub, model: Path, adapter: Path, tmp_path: Path) -> None:
    for given, kind, message in (
        ("absent", SourceError, "no directory absent"),
        (model, CheckpointError, "holds no adapter_model.safetensors"),
        ("owner/lora", SourceError, "there is no repository owner/lora"),
    ):
        with pytest.raises(kind, match=message):
            lx.convert(model, tmp_path / "liger", merge=given)
    other = make_transformer(tmp_path / "other", **SIZES | {"hidden_size": 64})
    with pytest.raises(CheckpointError, match="does not fit the model"):
        lx.convert(other, tmp_path / "liger", merge=adapter)
    with pytest.raises(CheckpointError, match="is a LoRA adapter") as caught:
        lx.convert(shutil.copytree(adapter, tmp_path / "alone"), tmp_path / "liger")
    assert "config.json" in str(caught.value) or "--merge" in str(caught.value.hint)
    shutil.copytree(adapter, model, dirs_exist_ok=True)
    with pytest.raises(UsageError, match="which has an adapter"):
        lx.convert(model, tmp_path / "liger", merge=adapter)
    (adapter / "recovery.json").touch()
    with pytest.raises(UsageError, match="trained by recover") as caught:
        lx.convert(model, tmp_path / "liger", merge=adapter)
    assert "--adapter" in str(caught.value.hint)


def test_push_and_pull(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    hub.add("owner/toy", {"old.bin": b"old", ".gitattributes": b""})
    commit = push(artifact, "owner/toy")
    assert commit.endswith(hub.repositories["owner/toy"].head)
    stored = hub.repositories["owner/toy"].commits[hub.repositories["owner/toy"].head]
    assert stored.keys() == {*files(artifact), "README.md", ".gitattributes"}
    assert files(artifact).items() <= stored.items()
    place = pull("owner/toy", tmp_path / "pulled")
    assert files(place) == files(artifact)  # and nothing that the manifest does not name
    assert open_artifact(place).manifest == open_artifact(artifact).manifest


def test_card(hub: Hub, artifact: Path) -> None:
    from huggingface_hub import ModelCard

    push(artifact, "owner/toy")
    card = ModelCard(hub.repositories["owner/toy"].commits[hub.repositories["owner/toy"].head]["README.md"].decode())
    manifest = open_artifact(artifact).manifest
    assert card.data.library_name == "ligerexport" and manifest.target in card.data.tags
    assert "ligerexport pull owner/toy -o toy" in card.text and f"| lowering | {manifest.lowering} |" in card.text
    assert 'ligerexport run toy "Once upon a time"\n' in card.text
    for name in ("chat_template.jinja", "chat.json"):
        more = manifest.files | {name: manifest.files["config.json"]}
        assert 'run toy "What is gravity?" --chat\n' in model_card(replace(manifest, files=more), "owner/toy")


def test_pull_and_push_are_refused(hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("owner/model", {"config.json": b"{}"})
    push(artifact, "owner/damaged")
    stored = hub.repositories["owner/damaged"].commits[hub.repositories["owner/damaged"].head]
    name = next(name for name in stored if name.endswith(".onnx"))
    hub.add("owner/damaged", stored | {name: stored[name][:-1] + b"?"})
    hub.add("owner/part", {MANIFEST: stored[MANIFEST]})
    outside = stored[MANIFEST].replace(f'"{name}"'.encode(), b'"../stolen"')
    hub.add("owner/outside", stored | {MANIFEST: outside})
    for given, kind, message in (
        ("name", UsageError, "not the name of a repository"),
        ("owner/model", ArtifactError, "holds no artifact"),
        ("owner/damaged", ArtifactError, "was changed after the build"),
        ("owner/part", ArtifactError, "is missing from the repository"),
        ("owner/outside", LigerError, "outside"),
        ("owner/missing", SourceError, "there is no repository owner/missing"),
    ):
        with pytest.raises(kind, match=message):
            pull(given, tmp_path / "pulled")
        assert not (tmp_path / "pulled").exists() and not (tmp_path / "stolen").exists()
    with pytest.raises(UsageError, match="has a revision"):
        push(artifact, "owner/toy@main")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(SourceError, match="the hub refused owner/toy") as caught:
        push(artifact, "owner/toy")
    assert "hf auth login" in str(caught.value.hint)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="could not be reached"):
        push(artifact, "owner/toy")


def test_commands(hub: Hub, artifact: Path, tmp_path: Path) -> None:
    """A process of its own reads `HF_ENDPOINT`, and needs no torch."""
    settings = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1",
                "HF_HUB_OFFLINE": "0", "PYTHONPATH": str(Path(lx.__file__).parents[1])}  # fmt: skip
    for arguments in (["push", artifact, "owner/toy", "--private"], ["pull", "owner/toy", "--json"]):
        code = "import sys; from ligerexport.cli import main\ntry: main(sys.argv[1:])\n"
        code += "finally: assert 'torch' not in sys.modules"
        command = [sys.executable, "-c", code, *map(str, arguments)]
        done = subprocess.run(command, cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["path"] == "toy" and files(tmp_path / "toy") == files(artifact)


def test_prepare_fetches_an_artifact(hub: Hub, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIGEREXPORT_CACHE", str(tmp_path / "cache"))
    hub.add("owner/built", files(artifact))
    assert is_model("owner/built") and files(prepare("owner/built")) == files(artifact)
    hub.log.clear()
    prepare("owner/built")
    assert not [
        path for _, path, _ in hub.log if "/resolve/" in path and not path.endswith(("manifest.json", "config.json"))
    ]
