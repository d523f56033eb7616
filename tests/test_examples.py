"""The apps of examples/ give the same tokens as `generate`, and their tokenizers the ids of the tokenizers library.

An app whose tools (a compiler, Node, a browser) are missing is skipped; `.ci/run` installs them.
"""

from __future__ import annotations

import json
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
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import ligerexport as lx
from ligerexport.artifact.artifact import ArtifactWriter
from ligerexport.text.tokenizer import TextModel
from tests.checkpoints import FORESIGHT, make_checkpoint
from tests.test_text import MAKERS, cuts, spellings
from tests.test_text_special import TEMPLATES, letters, write
from tests.toy import EOS, VOCAB, build, manifest, tokenizer, write_files

pytestmark = pytest.mark.system

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
PROMPT = "Ünïcode, 12345 numbers,   spaces\n\tand more than one chunk of 🙂 text; " * 2
TOKENS = 24
REAL, INT4 = ROOT / "build" / "smollm2-fp32", ROOT / "build" / "smollm2-onnx"

App = Callable[..., list[int]]
"""Function from an artifact, a prompt, a number of tokens and maybe a saved state to an app's ids."""


def run(*command: str | Path, **options: Any) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def expected(artifact: Path, prompt: str, tokens: int, state: Path | None = None) -> list[int]:
    session = lx.load(artifact)
    if state is not None:
        session.restore(lx.Snapshot.load(state))
    return [chunk.token for chunk in lx.generate(session, prompt, max_new_tokens=tokens, fresh=state is None)]


def options(prompt: str, tokens: int, state: Path | None = None) -> list[str | Path]:
    return [prompt, "--tokens", str(tokens), "--ids", *(["--state", state] if state else [])]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An artifact whose state grows and whose tokenizer adds BOS, and one for each lowering."""
    root = tmp_path_factory.mktemp("artifacts")
    checkpoint = make_checkpoint(root / "checkpoint", FORESIGHT, vocab_size=VOCAB, eos_token_id=EOS)
    tokenizer().save(str(checkpoint / "tokenizer.json"))
    made = {"toy": build(root / "toy")}
    for lowering in ("ort", "portable"):
        made[lowering] = lx.build(checkpoint, root / lowering, lowering=lowering)
    return made


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
        return lambda artifact, *words: ids(run(program, artifact, *options(*words)))
    needs_packages(request.param)
    if request.param == "node":
        script = EXAMPLES / "node" / "run.mjs"
        return lambda artifact, *words: ids(run("node", script, artifact, *options(*words)))
    chromium = request.getfixturevalue("browser")
    return lambda *words: Page(chromium, words[0]).write(*words[1:])


def ids(text: str) -> list[int]:
    return [int(word) for word in text.split()]


def python(artifact: Path, *words: Any) -> list[int]:
    """Run examples/python, and make sure that it does not load torch."""
    code = "import runpy, sys; runpy.run_path(sys.argv[0], run_name='__main__'); assert 'torch' not in sys.modules"
    given = [EXAMPLES / "python" / "run.py", artifact, *options(*words)]
    return ids(run(sys.executable, "-c", f"import sys; sys.argv = sys.argv[1:]; {code}", *given, cwd=ROOT))


class Page:
    """examples/web in a browser; all its requests must be local, and its console must stay empty."""

    def __init__(self, browser: Any, artifact: Path) -> None:
        sys.path.insert(0, str(EXAMPLES / "web"))
        from serve import Handler, server

        Handler.log_message = lambda *_: None
        self.server = server(artifact)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.home = f"http://127.0.0.1:{self.server.server_port}/"
        self.page = browser.new_page()
        self.page.set_default_timeout(300_000)
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(self.home)
        self.wait()

    def wait(self) -> None:
        self.page.wait_for_selector("#write:enabled")

    def start(self, prompt: str, tokens: int, state: Path | None = None) -> None:
        self.page.set_input_files("#state", [state] if state else [])
        self.page.fill("#prompt", prompt)
        self.page.fill("#tokens", str(tokens))
        self.page.click("#write")

    def ids(self) -> list[int]:
        return ids(self.page.get_attribute("#text", "data-ids") or "")

    def write(self, prompt: str, tokens: int, state: Path | None = None) -> list[int]:
        self.start(prompt, tokens, state)
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
        pytest.skip("needs `make examples`")
    prompt = "The capital of France is"
    assert app(REAL, prompt, 20) == expected(REAL, prompt, 20)


@pytest.mark.real
def test_the_program_in_cpp_loads_int4_at_the_level_that_was_verified(liger_run: Path) -> None:
    """At another level it writes "New Haven" in the place of "Nova Haven"."""
    if not INT4.is_dir() or lx.load(INT4).artifact.manifest.lowering != "native":
        pytest.skip("needs `make quickstart` with a C++ compiler")
    library = run(sys.executable, "-m", "ligerexport", "native").split()[-1]
    prompt = "Once upon a time"
    found = run(liger_run, INT4, *options(prompt, 24), "--library", library)
    assert ids(found) == expected(INT4, prompt, 24)


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
    """Cut texts anywhere into a prompt and a continuation; return both, and the expected stream."""
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
    """It writes bytes at once, which together are the text, up to an end that only the tokenizer names."""
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
    """Texts with everything that splits words: cases, scripts, kinds of digits, white space, marks, special tokens."""
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


def pieces() -> Tokenizer:
    """Return a SentencePiece vocabulary whose pieces may be several words, in the format of older files."""
    names = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=names, show_progress=False)
    made.train([str(ROOT / "README.md")], trainer)
    made.pre_tokenizer = None
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return Tokenizer.from_str(json.dumps(json.loads(made.to_str()) | {"added_tokens": []}))


@pytest.fixture(scope="module", params=[("map", ""), ("decoder", ""), ("decoder", "LlamaTokenizer")], ids="-".join)
def completed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """An artifact whose tokenizer is only partly in the checkpoint's tokenizer.json, and transformers' tokenizer."""
    layout, name = request.param
    root = tmp_path_factory.mktemp("completed")
    (root / "source").mkdir()
    kind = {"tokenizer_class": name or "PreTrainedTokenizerFast"}
    source = write(root / "source", "llama", layout, TEMPLATES["llama"], pieces() if name else letters(), **kind)
    auto = AutoTokenizer.from_pretrained(source)
    checkpoint = make_checkpoint(root / "checkpoint", FORESIGHT, vocab_size=len(auto))
    weights = load_file(checkpoint / "model.safetensors")
    silent = [index for token, index in auto.get_vocab().items() if token.startswith("<0x") or token == "</s>"]
    weights["lm_head.weight"][silent] = 0  # bytes at random are no text
    save_file(weights, checkpoint / "model.safetensors", {"format": "pt"})
    shutil.copytree(source, checkpoint, ignore=shutil.ignore_patterns("config.json"), dirs_exist_ok=True)
    return lx.build(checkpoint, root / "artifact", verify=False, genai=True), auto


ENCODE = """
import { readFileSync } from "node:fs";
import { Tokenizer } from "@huggingface/tokenizers";
const tokenizer = new Tokenizer(JSON.parse(readFileSync(process.argv[1] + "/tokenizer.json")), {});
for (const line of readFileSync(0, "utf8").trim().split("\\n"))
  console.log(JSON.stringify(tokenizer.encode(JSON.parse(line)).ids));
"""


@pytest.mark.parametrize("program", ["cpp", "node"])
def test_tokens_that_only_other_files_name(
    program: str, completed: tuple[Path, Any], request: pytest.FixtureRequest
) -> None:
    """tokenizer.json alone gives the ids of transformers, and a program gives the text of `generate`."""
    artifact, auto = completed
    if program == "cpp":
        command = [request.getfixturevalue("liger_run")]
        encode = [*command, artifact, "--encode"]
    else:
        needs_packages("node")
        command = ["node", EXAMPLES / "node" / "run.mjs"]
        encode = ["node", "--input-type=module", "-e", ENCODE, artifact]
    model = TextModel(artifact)
    tokens = [*model.special_ids, "<think>", " ", "  ", "▁", "Hi", " convert", "é", "\n"]
    texts = corpus()[:300] + ["".join(random.choices(tokens, k=6)) for _ in range(300)]
    found = run(*encode, input="".join(json.dumps(text) + "\n" for text in texts), cwd=EXAMPLES / "node").splitlines()
    for text, line in zip(texts, found, strict=True):
        assert json.loads(line) == model.encode(text) == auto.encode(text), ascii(text)
    for prompt in (PROMPT, "<s><|user|>Hi <think> there<|eot|>", "<s>"):
        chunks = list(lx.generate(lx.load(artifact), auto.encode(prompt), max_new_tokens=TOKENS))
        done = subprocess.run([*command, artifact, prompt, "--tokens", str(TOKENS)], capture_output=True, check=True)
        text = done.stdout.decode(errors="replace").removesuffix("\n")
        assert text == "".join(chunk.text for chunk in chunks) and len(set(text)) > 3
        before, whole = (
            auto.decode(ids, skip_special_tokens=True)
            for ids in (auto.encode(prompt), auto.encode(prompt) + [chunk.token for chunk in chunks])
        )
        assert whole == before + text


def test_onnxruntime_genai_reads_them_too(completed: tuple[Path, Any]) -> None:
    """It puts a space before each part of a text of pieces, so only the beginning of such a text is equal."""
    genai = pytest.importorskip("onnxruntime_genai")
    artifact, auto = completed
    tokenizer = genai.Tokenizer(genai.Model(str(artifact)))
    special = "" if "<0x00>" in auto.get_vocab() else "<|user|>Hi <think><|more|> there<|eot|>"
    for text in (f"Hi there{special}", f"한 é{special}"):
        assert tokenizer.encode(text).tolist() == auto.encode(text)


BYTES = {"model": {"type": "BPE", "byte_fallback": True, "vocab": {}, "merges": []}}
SPACES = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
JOINED = {"type": "Sequence", "decoders": [
    {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
]}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre_tokenizer": {"type": "Metaspace"}}, "no pre-tokenizer Metaspace"),
        ({"normalizer": {"type": "Lowercase"}}, 'no normalizer "Lowercase"'),
        ({"decoder": None}, "no decoder but ByteLevel"),
        (BYTES, 'byte fallback with the pre-tokenizer {"add_prefix_space"'),
        (BYTES | {"pre_tokenizer": SPACES | {"split": True}}, 'byte fallback with the pre-tokenizer {"prepend_scheme"'),
        (BYTES | {"pre_tokenizer": SPACES}, 'byte fallback with the decoder {"add_prefix_space"'),
        (BYTES | {"pre_tokenizer": SPACES, "decoder": JOINED}, "byte fallback without a token for each byte"),
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
