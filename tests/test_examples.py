"""The apps of examples/ give the tokens that `generate` gives, and their tokenizers the ids of the tokenizers library.

An app whose tools (a compiler, Node, a browser) are missing is skipped; `.ci/run` installs them.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

import ligerexport as lx
from ligerexport.artifact import ArtifactWriter
from ligerexport.text import TextModel
from tests.checkpoints import FORESIGHT, make_checkpoint
from tests.test_text import MAKERS, cuts, spellings
from tests.toy import EOS, VOCAB, build, manifest, tokenizer, write_files

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROMPT = "Ünïcode, 12345 numbers,   spaces\n\tand more than one chunk of 🙂 text; " * 2
TOKENS = 24
REAL = ROOT / "build" / "smollm2-onnx"

App = Callable[[Path, str, int], list[int]]
"""Ids that an app gives for an artifact, a prompt and a number of tokens."""


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(artifact: Path, prompt: str, tokens: int) -> list[int]:
    return [chunk.token for chunk in lx.generate(lx.load(artifact), prompt, max_new_tokens=tokens)]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A graph whose state grows and whose tokenizer adds BOS, and one for each lowering."""
    root = tmp_path_factory.mktemp("artifacts")
    checkpoint = make_checkpoint(root / "checkpoint", FORESIGHT, vocab_size=VOCAB, eos_token_id=EOS)
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    made = {"toy": build(root / "toy")}
    for lowering in ("ort", "portable"):
        made[lowering] = lx.build(checkpoint, root / lowering, lowering=lowering)
    return made


@pytest.fixture(scope="module")
def liger_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ program, against ORT_HOME or else the library of the Python package."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    made = tmp_path_factory.mktemp("cpp")
    options = [f"-DORT_HOME={os.environ.get('ORT_HOME', made)}"]
    if "ORT_HOME" not in os.environ:
        package = Path(find_spec("onnxruntime").origin).parent
        library = next(package.glob("capi/libonnxruntime.so.1*"), None)
        if library is None:
            pytest.skip("needs ONNX Runtime's shared library: set ORT_HOME")
        (made / "lib").mkdir()
        for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
            (made / "lib" / name).symlink_to(library)
        options.append(f"-DORT_INCLUDE={ROOT / 'tests' / 'ort'}")
    configured = subprocess.run(
        ["cmake", "-S", EXAMPLES / "cpp", "-B", made / "build", "-DCMAKE_BUILD_TYPE=Debug", *options],
        capture_output=True,
        text=True,
    )
    for library, package in (("ICU", "libicu-dev"), ("nlohmann_json", "nlohmann-json3-dev")):
        if configured.returncode and f"Find{library}" in configured.stderr + configured.stdout:
            pytest.skip(f"needs {package}")
    assert configured.returncode == 0, configured.stderr
    run("cmake", "--build", made / "build", "--parallel")
    return made / "build" / "liger-run"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not find_spec("playwright") or not chromium:
        pytest.skip("needs playwright and chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )


def needs_packages(app: str) -> None:
    if not shutil.which("node") or not (EXAMPLES / app / "node_modules").is_dir():
        pytest.skip("needs Node.js and `make examples`")


@pytest.fixture(params=["python", "cpp", "node", "web"])
def app(request: pytest.FixtureRequest) -> App:
    if request.param == "python":
        return python
    if request.param == "cpp":
        program = request.getfixturevalue("liger_run")
        return lambda *words: ids(run(program, words[0], words[1], "--tokens", str(words[2]), "--ids"))
    needs_packages(request.param)
    if request.param == "node":
        script = EXAMPLES / "node" / "run.mjs"
        return lambda *words: ids(run("node", script, words[0], words[1], "--tokens", str(words[2]), "--ids"))
    chromium = request.getfixturevalue("browser")
    return lambda *words: Page(chromium, words[0]).write(*words[1:])


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def python(artifact: Path, prompt: str, tokens: int) -> list[int]:
    """Run examples/python, and make sure that it does not load torch."""
    code = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    words = [str(EXAMPLES / "python" / "run.py"), str(artifact), prompt, "--tokens", str(tokens), "--ids"]
    return ids(run(sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {code}", *words, cwd=ROOT))


class Page:
    """examples/web in a browser; all that it asks for must come from here, and its console must stay empty."""

    def __init__(self, browser: Any, artifact: Path) -> None:
        sys.path.insert(0, str(EXAMPLES / "web"))
        from serve import Handler, server

        Handler.log_message = lambda *_: None
        self.server = server(artifact)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.home = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.home)
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("#write:enabled", timeout=180_000)

    def start(self, prompt: str, tokens: int) -> None:
        self.page.fill("#prompt", prompt)
        self.page.fill("#tokens", str(tokens))
        self.page.click("#write")

    def ids(self) -> list[int]:
        return ids(self.page.get_attribute("#text", "data-ids") or "")

    def write(self, prompt: str, tokens: int) -> list[int]:
        self.start(prompt, tokens)
        self.wait()
        assert self.complaints == []
        assert all(url.startswith((self.home, f"blob:{self.home}")) for url in self.requests)
        self.server.shutdown()
        return self.ids()


@pytest.mark.parametrize("kind", ["toy", "ort", "portable"])
def test_every_app_gives_the_same_tokens(app: App, artifacts: dict[str, Path], kind: str) -> None:
    artifact = artifacts[kind]
    assert app(artifact, PROMPT, TOKENS) == expected(artifact, PROMPT, TOKENS)


@pytest.mark.parametrize("app", ["python", "cpp", "node"], indirect=True)
def test_no_app_leaves_a_device_id(app: App, artifacts: dict[str, Path], home: Path) -> None:
    assert len(app(artifacts["toy"], "hi", 2)) == 2
    assert [path for path in home.rglob("*") if path.is_file()] == []


@pytest.mark.real
def test_every_app_gives_the_tokens_of_the_real_model(app: App) -> None:
    if not REAL.is_dir():
        pytest.skip("needs `make quickstart`")
    prompt = "The capital of France is"
    assert app(REAL, prompt, 20) == expected(REAL, prompt, 20)


def test_the_page_stops(browser: Any, artifacts: dict[str, Path]) -> None:
    needs_packages("web")
    page = Page(browser, artifacts["portable"])
    page.start("a", 100_000)
    page.page.wait_for_selector("#text[data-ids*=' ']")
    page.page.click("#stop")
    page.wait()
    assert 1 < len(page.ids()) < 100_000
    assert f"state of {lx.load(artifacts['portable']).state_bytes / 1e6:.2f} MB" in page.page.inner_text("#status")


STREAM = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
import { Detokenizer } from "../web/liger.mjs";
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[1])), {});
for (const [context, ids] of JSON.parse(readFileSync(0))) {
  const stream = new Detokenizer(tokenizer, context);
  console.log(JSON.stringify(ids.map((id) => stream.push(id)).join("") + stream.flush()));
}
"""


def parts(model: TextModel) -> list[tuple[list[int], list[int], str]]:
    """Cut texts anywhere into a prompt and what follows; give both, and what a stream of it must be."""
    tokens, cases = spellings(model), []
    for _ in range(300):
        pieces = cuts(
            tokens, "".join(random.choices("한국어 뷁នៅកម្ពុជា日本語€👩\u200d👧. ,", k=12)).encode(), random.choice
        )
        start, end = sorted(random.choices(range(len(pieces) + 1), k=2))
        before, after = b"".join(pieces[:start]).decode(errors="ignore"), b"".join(pieces[:end])
        ids = [tokens[piece] for piece in pieces[:end]]
        whole = after.decode(errors="replace")
        whole = whole[len(before) :] if before or model.byte_ids == frozenset() else whole.removeprefix(" ")
        cases.append((ids[:start], ids[start:], whole))
    return cases


@pytest.mark.parametrize("name", ["toy", "qwen", "llama"])
def test_a_stream_in_javascript(name: str, tmp_path: Path) -> None:
    needs_packages("node")
    MAKERS[name]().save(str(tmp_path / "tokenizer.json"))
    cases = parts(TextModel(tmp_path))
    command = ["node", "--input-type=module", "-e", STREAM, tmp_path / "tokenizer.json"]
    asked = json.dumps([case[:2] for case in cases])
    found = run(*command, input=asked, cwd=EXAMPLES / "node").splitlines()
    for (context, new, expected), line in zip(cases, found, strict=True):
        assert json.loads(line) == expected, (context, new)


def test_a_stream_in_cpp(liger_run: Path, tmp_path: Path) -> None:
    """It writes bytes as they come, all together the text, up to an end that only the tokenizer names."""
    first = [chunk.token for chunk in lx.generate(lx.load(build(tmp_path / "toy")), PROMPT, max_new_tokens=TOKENS)]
    end = first.index(first[-1])
    made = json.loads(tokenizer().to_str())
    letter = next(letter for letter, index in made["model"]["vocab"].items() if index == first[end])
    with ArtifactWriter(tmp_path / "artifact") as writer:
        write_files(writer.directory)
        (writer.directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": letter}))
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        made["added_tokens"].append({"id": first[end], "content": letter, **flags})
        (writer.directory / "tokenizer.json").write_text(json.dumps(made))
        writer.commit(manifest())
    chunks = list(lx.generate(lx.load(tmp_path / "artifact"), PROMPT, max_new_tokens=TOKENS))
    assert [chunk.token for chunk in chunks] == first[: end + 1]
    done = subprocess.run([liger_run, tmp_path / "artifact", PROMPT, "--tokens", str(TOKENS)], capture_output=True)
    assert done.stdout.decode(errors="replace") == "".join(chunk.text for chunk in chunks) + "\n"


LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace("{1,3}", "")


def pre_tokenizer(*steps: dict[str, Any], regex: bool = False) -> dict[str, Any]:
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": regex}
    return {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*steps, last]}}


def pattern(text: str, behavior: str = "Isolated", invert: bool = False) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": text}, "behavior": behavior, "invert": invert}


VARIANTS: dict[str, dict[str, Any]] = {
    "byte level": {},
    "digits": pre_tokenizer({"type": "Digits", "individual_digits": True}, regex=True),
    "llama 3": pre_tokenizer(pattern(LLAMA3)),
    "qwen": pre_tokenizer(pattern(QWEN)) | {"normalizer": {"type": "NFC"}},
    "only matches": pre_tokenizer(pattern(LLAMA3, "Removed", True)),
    "space in front": {"pre_tokenizer": pre_tokenizer(regex=True)["pre_tokenizer"]["pretokenizers"][0] | {
        "add_prefix_space": True}},
}  # fmt: skip


def corpus() -> list[str]:
    """Texts with all that splits words: cases, scripts, digits of many kinds, white space, marks, special tokens."""
    texts = [
        "", "it's we'LL I'd", "1234567 89,5", " a  b\n\n c \r\n\td  ", "e\u0301 \u1e9b\u0323 \u1100\u1161", "x" * 300,
        "a\u00a0b\u2003c\u3000d\u0085e\u180ef\u200bg\ufeff", "²³½ Ⅷ ٣٤", "\x00\x01\x7f", "🙂👩\u200d👧 🇩🇪",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start", "日本語のテキスト、漢字 Привет مرحبا 한국어",
    ]  # fmt: skip
    ranges = [(32, 127), (32, 127), (9, 14), (0xA0, 0x250), (0x300, 0x320), (0x370, 0x600), (0x905, 0x9FB),
              (0x2000, 0x2190), (0x3000, 0x3100), (0x4E00, 0x4F00), (0x1F300, 0x1F400)]  # fmt: skip
    return texts + [
        "".join(chr(random.randrange(*random.choice(ranges))) for _ in range(random.randint(1, 60)))
        for _ in range(1500)
    ]


@pytest.mark.real
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tokenizer_in_cpp(variant: str, liger_run: Path, smollm2: Path, tmp_path: Path) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(json.loads((smollm2 / "tokenizer.json").read_text()) | VARIANTS[variant]))
    texts = corpus()
    found = run(liger_run, tmp_path, "--encode", input="".join(json.dumps(text) + "\n" for text in texts))
    library = Tokenizer.from_file(str(file))
    for text, line in zip(texts, found.splitlines(), strict=True):
        assert json.loads(line) == library.encode(text).ids, ascii(text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Metaspace"}}, "no pre-tokenizer Metaspace"),
        ({"normalizer": {"type": "Lowercase"}}, 'no normalizer "Lowercase"'),
        ({"decoder": None}, "no decoder but ByteLevel"),
    ],
)
def test_the_tokenizer_in_cpp_refuses(
    change: dict[str, Any], message: str, liger_run: Path, artifacts: dict[str, Path], tmp_path: Path
) -> None:
    data = json.loads((artifacts["toy"] / "tokenizer.json").read_text()) | change
    (tmp_path / "tokenizer.json").write_text(json.dumps(data))
    done = subprocess.run([liger_run, tmp_path, "--encode"], capture_output=True, text=True, input="")
    assert done.returncode == 1
    assert message in done.stderr
