"""Every command of README and guides runs on a tiny model: long ones with `--dry-run`, the others unchanged."""

from __future__ import annotations

import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import toy
from checkpoints import make_checkpoint
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import ligerexport as lx
from ligerexport.checkpoint import recall
from ligerexport.checkpoint.recall import Effort
from ligerexport.cli import main
from ligerexport.model.config import MEMORY, PRESETS, LigerConfig

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"recover", "allocate", "eval"}
NOT_HERE = {
    "--adapter shipped": "make quickstart runs it: it is of the built-in model",
    "--target trt-rtx": "tests/test_trt.py builds such an engine",
    "native --target": "tests/test_native_library.py runs it: it takes a minute and a cross compiler",
    ".gguf": "tests/test_gguf.py converts such files",
    "owner/": "tests/test_hub.py runs a hub",
    "book.": "tests/test_exchange.py continues a state of torch in artifacts",
    "--tasks": "the data of lm-eval's tasks is on a hub",
    "demo": "tests of the page and of bench run them",
    "bench": "tests of the page and of bench run them",
    "ligerexport serve": "tests/test_serve_process.py runs it",
    "--server": "tests/test_serve_http.py runs it",
}


SAME = {"smollm2-135m": "MODEL", "build/smollm2-liger": "liger", "build/smollm2-onnx": "engine", " --force": ""}
"""Words of a command that change nothing here, where these directories are copies."""


def meaning(command: str) -> str:
    """Return a form that is the same for commands that do the same."""
    for words, same in SAME.items():
        command = command.replace(words, same)
    return re.sub(r"/?(\s+|$)", " ", command)


def commands() -> list[tuple[str, str]]:
    """Return each command in a code block that does something else, and the first document that has it."""
    found: dict[str, tuple[str, str]] = {}
    for document in DOCUMENTS:
        for block in re.findall(r"^```(?:\w*)\n(.*?)^```", document.read_text(), re.DOTALL | re.MULTILINE):
            for line in block.replace("\\\n", " ").splitlines():
                for part in re.split(r"\s{3,}(?=ligerexport )", line.strip()):
                    if part.startswith("ligerexport "):
                        text = re.sub(r"\s+#.*", "", part)
                        command = re.sub(r"\[([^\]|]*)(?:\|[^\]]*)?\]", r"\1", text)
                        found.setdefault(meaning(command), (document.name, command))
    return list(found.values())


@pytest.fixture(scope="module")
def sandbox(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that the commands name: a Transformer, its conversions and artifacts, and texts."""
    place = tmp_path_factory.mktemp("sandbox")
    sizes = {
        "vocab_size": toy.VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192,
    }  # fmt: skip
    torch.manual_seed(0)  # a module's fixture comes before the seeds of its tests
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(place / "MODEL")
    tokenizer = toy.tokenizer()
    tokenizer.save(str(place / "MODEL" / "tokenizer.json"))
    (place / "MODEL" / "chat_template.jinja").write_text(toy.TEMPLATE)
    lx.convert(place / "MODEL", place / "liger", preset="memory", max_distance=256)
    for name in ("recovered", "shared"):
        shutil.copytree(place / "liger", place / name)
    lx.build(place / "liger", place / "engine")
    shutil.copytree(place / "engine", place / "build" / "smollm2-onnx")
    shutil.copytree(place / "liger", place / "build" / "smollm2-liger")
    shutil.copytree(place / "engine", place / "liger" / "onnx")
    words = " ".join(f"word{i % 97}" for i in range(40_000))
    for name in ("texts", "prose", "speeches"):
        (place / name).mkdir()
        (place / name / "one.txt").write_text(words)
    chat = [{"role": "user", "content": words[:200]}, {"role": "assistant", "content": words[:300]}]
    (place / "question.txt").write_text(words[:200])
    (place / "person.json").write_text('{"enum": [{"name": "Ada"}]}')
    (place / "rules.gbnf").write_text('root ::= "one" | "two"')
    (place / "chats.jsonl").write_text((json.dumps({"messages": chat}) + "\n") * 300)
    shutil.copy(place / "chats.jsonl", place / "recall.jsonl")
    config = LigerConfig.from_dict(json.loads((place / "liger" / "config.json").read_text())["liger"])
    fields = config.to_dict()
    (place / "memory.json").write_text(json.dumps({name: fields[name] for name in MEMORY}))
    learned = make_checkpoint(place / "learned", PRESETS["foresight"].config, **sizes)
    tensors = load_file(learned / "model.safetensors")
    save_file({name: x for name, x in tensors.items() if "score" in name}, place / "scores.safetensors")
    shutil.copy(place / "scores.safetensors", place / "liger" / "model-00002-of-00002.safetensors")
    rows = [{"passage": words[i : i + 200], "question": "word?", "answer": "word1"} for i in range(40)]
    (place / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    library = place / "build" / "trt" / "plugin" / "libligerexport_trt.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"")
    return place


@pytest.mark.parametrize(("document", "command"), commands(), ids=lambda text: text[:70])
def test_command(
    document: str, command: str, sandbox: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if reason := next((why for words, why in NOT_HERE.items() if words in command), None):
        pytest.skip(reason)
    place = tmp_path / "here"
    shutil.copytree(sandbox, place)
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    monkeypatch.setattr(recall, "SHORT", Effort(1, 100, 1, 100, 1, 100))
    words = shlex.split(re.sub(r'"\$\(cat [^)]*\)([^"]*)"', r'"words \1"', command))[1:]
    words = ["MODEL" if word == "smollm2-135m" else word for word in words]
    if words[0] in LONG or {"--calibrate", "recall", "trt"} & set(words):
        words += [] if "--dry-run" in words or words[0] in ("doctor", "list") else ["--dry-run"]
    outputs = [Path(words[words.index("-o") + 1])] if "-o" in words else [Path(*words[1:2], "onnx")]
    for output in outputs if words[0] in LONG | {"convert", "build"} else ():
        if output.is_file():
            output.unlink()
        shutil.rmtree(output, ignore_errors=True)
    if words[0] == "run":
        words[1:1] = ["--max-new-tokens", "3"]
    with pytest.raises(SystemExit) as done:
        main(words)
    expected = {0, 4} if words[0] == "doctor" or "trt" in words else {0}  # 4: TensorRT is not here, which is said
    assert done.value.code in expected, capsys.readouterr().err


def test_there_are_commands() -> None:
    assert len(commands()) > 30 and {text.split()[1] for _, text in commands()} >= {
        "convert",
        "build",
        "run",
        "recover",
    }
