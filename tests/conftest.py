"""Fixtures for all tests: fixed seeds, the built-in model, and rules for skipping."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

# Before anything imports huggingface_hub: no test may reach a hub.
os.environ["HF_HUB_OFFLINE"] = "1"

# A shell starts what runs in the background with Ctrl-C ignored, and the processes of tests would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

import numpy as np
import pytest
import torch
from filelock import FileLock

if "PYTEST_XDIST_WORKER" in os.environ:  # one of several processes
    torch.set_num_threads(1)
if not torch.cuda.is_available():  # before anything imports triton: its interpreter runs the kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")

if find_spec("hypothesis"):  # which is not needed to run the other tests
    from hypothesis import HealthCheck, settings

    # A busy machine is slow: no test may fail for that.
    settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("patient")

from ligerexport.checkpoint.sources import resolve
from ligerexport.console import progress, set_quiet

ROOT = Path(__file__).parents[1]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take more than a minute")


LONG = (
    "test_real.py", "test_hostile.py", "test_faults.py", "test_planted.py", "test_fused_linear.py", "test_recover.py",
    "test_trt_plugin.py", "test_trt_session.py", "test_fused_prefill.py", "test_bench.py",
)  # fmt: skip
"""Files whose tests take longest. They come first, so that no process works on one alone at the end."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    cuda = torch.cuda.is_available()
    reasons = {
        "gpu": None if cuda else "no CUDA device",
        "trt": None if cuda and find_spec("tensorrt") else "no TensorRT or no CUDA device",
        "system": None if "system" in config.getoption("-m") else "make system runs it",
        "clients": None if "clients" in config.getoption("-m") else "make clients runs it",
        "slow": None if config.getoption("--slow") or "slow" in config.getoption("-m") else "slow; run with --slow",
    }
    for item in items:
        for marker, reason in reasons.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _loud() -> None:
    """Undo `--quiet` of a command that an earlier test ran in this process."""
    set_quiet(False)


@pytest.fixture
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty home for the processes that a test starts; their environment has only the path of programs."""
    for name in set(os.environ) - {"PATH", "PYTHONPATH", "LD_LIBRARY_PATH", "TMPDIR", "ORT_HOME"}:
        monkeypatch.delenv(name)
    directory = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("HOME", str(directory))
    monkeypatch.setenv("XDG_CACHE_HOME", str(directory / ".cache"))
    return directory


Once = Callable[[str, Callable[[Path], object]], Path]


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Once:
    """A function that makes what is slow to make: one directory of a name for all processes of a run."""
    place = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
        place = place.parent

    def make_once(name: str, make: Callable[[Path], object]) -> Path:
        directory, made = place / name, place / f"{name}.made"
        with FileLock(place / f"{name}.lock"):
            if not made.exists():
                shutil.rmtree(directory, ignore_errors=True)
                directory.mkdir()
                make(directory)
                made.touch()
        return directory

    return make_once


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """Directory of the built-in model; mark the tests that use it `real`."""
    return resolve("smollm2-135m", progress=progress).path


@pytest.fixture(scope="session", params=[(), (1,)], ids=["recurrent", "hybrid"])
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama with random weights, converted, and the artifact built from it."""
    import toy  # not at the top: the tests of kernels run without onnx too
    from transformers import LlamaConfig, LlamaForCausalLM

    import ligerexport as lx

    torch.manual_seed(0)
    directory = tmp_path_factory.mktemp("tiny")
    config = LlamaConfig(
        vocab_size=toy.VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory / "source")
    toy.tokenizer().save(str(directory / "source" / "tokenizer.json"))
    liger = {"window": 8, "sinks": 2, "slots": (("peak_use", 4), ("novelty", 4)), "keep_softmax": request.param}
    lx.convert(directory / "source", directory / "liger", preset="liger", **liger)
    return directory / "liger", lx.build(directory / "liger", max_chunk=16)


@pytest.fixture(scope="session")
def ort_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release of ONNX Runtime: ORT_HOME, or the library of the Python package with the headers in `tests/ort`."""
    if "ORT_HOME" in os.environ:
        return Path(os.environ["ORT_HOME"])
    library = next(Path(find_spec("onnxruntime").origin).parent.glob("capi/libonnxruntime.so.1*"), None)
    if library is None:
        pytest.skip("needs ONNX Runtime's shared library: set ORT_HOME")
    made = tmp_path_factory.mktemp("ort")
    (made / "lib").mkdir()
    for name in ("libonnxruntime.so", "libonnxruntime.so.1"):
        (made / "lib" / name).symlink_to(library)
    (made / "include").symlink_to(ROOT / "tests" / "ort")
    return made


@pytest.fixture(scope="session")
def liger_run(tmp_path_factory: pytest.TempPathFactory, ort_home: Path) -> Path:
    """The program of examples/cpp with the operator of `native` in it."""
    if not shutil.which("cmake") or not shutil.which("c++"):
        pytest.skip("needs cmake and a C++ compiler")
    made = tmp_path_factory.mktemp("cpp")
    operator = ROOT / "ligerexport" / "exporters" / "onnx" / "native"
    options = [f"-DORT_HOME={ort_home}", f"-DLIGER_NATIVE={operator}"]
    configured = subprocess.run(
        ["cmake", "-S", ROOT / "examples" / "cpp", "-B", made / "build", "-DCMAKE_BUILD_TYPE=Debug", *options],
        capture_output=True,
        text=True,
    )
    for library, package in (("ICU", "libicu-dev"), ("nlohmann_json", "nlohmann-json3-dev")):
        if configured.returncode and f"Find{library}" in configured.stderr + configured.stdout:
            pytest.skip(f"needs {package}")
    assert configured.returncode == 0, configured.stderr
    compiled = subprocess.run(["cmake", "--build", made / "build", "--parallel"], capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stderr
    return made / "build" / "liger-run"
