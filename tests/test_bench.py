"""`bench`: its figures are those of the models, the parity check holds, and disturbances are reported."""

from __future__ import annotations

import ctypes
import io
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import toy
from checkpoints import MEMORY, make_checkpoint, make_transformer

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.checkpoint.gguf import read_header
from ligerexport.cli import main
from ligerexport.cli.bench import counts
from ligerexport.errors import LigerError, UsageError, VerificationError
from ligerexport.exporters.onnx.spec import ModelSpec
from ligerexport.exporters.onnx.weights import WeightStorage
from ligerexport.measure.bench import machine
from ligerexport.measure.bench.bench import (
    _effort,
    _of_same_conversion,
    _row,
    _Turn,
    bench,
    crossover,
    disagreeing,
    disturbed,
    gate,
    prompt,
    quantile,
    ratio_of,
)
from ligerexport.measure.bench.report import check_output, markdown, save
from ligerexport.measure.bench.settings import Settings
from ligerexport.measure.bench.worker import Worker, serve
from ligerexport.measure.opened import open_model

Built = tuple[Path, Path]

hybrid = pytest.mark.parametrize("built", [(1,)], indirect=True, ids=["hybrid"])
"""The kind with a layer whose cache grows, for tests that need only one kind."""


@pytest.fixture(scope="module")
def result(built: Built) -> dict[str, Any]:
    """The result for the artifact of a tiny model and the Transformer that it was converted from."""
    liger, artifact = built
    settings = Settings((24, 40), (2,), blocks=2, tokens=3, threads=1, read_up_to=32)
    return bench(str(artifact), str(liger.parent / "source"), checkpoint=str(liger), settings=settings)


@hybrid
def test_rows_hold_what_was_measured(result: dict[str, Any], built: Built) -> None:
    manifest = open_artifact(built[1]).manifest
    assert [(r["batch"], r["context"], r["kind"]) for r in result["rows"]] == [
        (batch, context, kind) for batch in (2,) for context in (24, 40) for kind in ("artifact", "transformer")
    ]
    (parity,) = result["parity"].values()
    assert parity["passed"] and parity["by"].startswith("torch, compared now") and parity["tokens"] > 0
    for row in result["rows"]:
        seen = row["context"] + 3 * 3  # the warm-up too
        if row["kind"] == "transformer":
            assert row["state_bytes"] == row["batch"] * seen * manifest.bytes.kv_per_token
            assert (row["ttft_s"] is None) == (row["context"] > 32)
        else:
            grown = row["batch"] * (seen * manifest.growth + manifest.bytes.state_per_sequence)
            assert row["state_bytes"] == grown and row["ttft_s"] > 0
        assert row["ms_low"] <= row["ms"] <= row["ms_high"] and row["ms_p50"] <= row["ms_p95"]
        assert 0 < row["private"] <= row["rss"] <= row["peak"] and row["device_bytes"] is None
        assert row["floor_ms"] * result["machine"]["bytes_per_s"]["cpu"] == pytest.approx(
            1e3 * (row["weight_bytes"] + row["state_bytes"])
        )
        assert row["of_floor"] == pytest.approx(row["floor_ms"] / row["ms"])


def test_figures_of_known_times() -> None:
    facts = {"kind": "artifact", "precision": "float32", "device": "cpu", "weight_bytes": 1}
    last = dict.fromkeys(("state_bytes", "rss", "private", "peak", "device"), 1)
    worker = SimpleNamespace(facts=facts)
    turn = _Turn(worker, [], [0.25, 0.5, 0.75], [[0.001, 0.003, 0.002], [0.004, 0.006, 0.008]], last=last)
    row = _row("m", turn, 2, 24)
    assert row["ttft_s"] == 0.5 and (row["ms"], row["ms_low"], row["ms_high"]) == (4, 2, 6)
    assert (row["ms_p50"], row["ms_p95"]) == (3, 8) and row["tokens_per_s"] == pytest.approx(2 * 6 / 0.024)


@hybrid
def test_the_table_says_what_the_rows_say(result: dict[str, Any]) -> None:
    text = markdown(result)
    assert text.count("\n| engine") + text.count("\n| onnx") + text.count("\n| source") == len(result["rows"])
    assert "not read" in text and "compared now with" in text
    assert [text.count(f"the ratio is {row['median']:.2f}") > 0 for row in result["ratios"]] == [True, True]
    slowest = max(result["rows"], key=lambda row: row["ms_p95"])
    assert f"| {slowest['ms_p95']:.1f} ms |" in text


@hybrid
def test_what_is_unknown_is_said(result: dict[str, Any]) -> None:
    row = {**result["rows"][0], "of_floor": None, "joules": 0.5, "device_bytes": 2_000_000}
    machine_ = result["machine"] | {"bytes_per_s": {"cuda": None}, "energy": "1 GPUs"}
    text = markdown(result | {"rows": [row], "ratios": [], "machine": machine_})
    assert "| 2 MB | 0.5 J | unknown |" in text and "cuda unknown" in text and "Energy: 1 GPUs" in text


@hybrid
def test_the_gate_compares_with_torch_or_asks_the_manifest(built: Built, tmp_path: Path) -> None:
    liger, artifact = built
    assert gate(str(artifact))["by"].startswith("its manifest")
    assert _of_same_conversion(str(artifact), str(liger)) == str(liger)
    assert _of_same_conversion(str(artifact), str(liger.parent / "source")) is None
    unverified = toy.build(tmp_path / "toy", verification={"passed": False, "skipped": True})
    with pytest.raises(VerificationError, match="never compared"):
        bench(str(unverified), str(unverified))


def test_an_artifact_of_an_older_rule_for_bits_runs_and_is_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = make_checkpoint(tmp_path / "liger", MEMORY, num_hidden_layers=8)
    bits = WeightStorage.bits

    def older(storage: WeightStorage, spec: ModelSpec, name: str) -> int:
        return 4 if "gate_proj" in name or "up_proj" in name else bits(storage, spec, name)

    with monkeypatch.context() as before:
        before.setattr(WeightStorage, "bits", older)
        artifact = lx.build(checkpoint, tmp_path / "old", lowering="native", weights="int4", verify=False)
    new = lx.build(checkpoint, tmp_path / "new", lowering="native", weights="int4", verify=False)
    assert lx.load(artifact).prefill([1, 2, 3]).shape == lx.load(new).prefill([1, 2, 3]).shape
    assert gate(str(new), str(checkpoint))["passed"]
    with pytest.raises(VerificationError, match="bytes of weights") as caught:
        gate(str(artifact), str(checkpoint))
    assert caught.value.hint is not None and "build it again" in caught.value.hint


@hybrid
def test_vocabularies_must_be_one(built: Built, tmp_path: Path) -> None:
    other = make_checkpoint(tmp_path / "other", MEMORY)
    with pytest.raises(UsageError, match="vocabularies have 131 and 259"):
        bench(str(built[1]), str(other), settings=Settings((8,), blocks=1, tokens=1))


@pytest.mark.parametrize("which", ["artifact", "converted", "transformer"])
def test_engines_write_the_same_in_one_call_and_in_many(built: Built, which: str) -> None:
    paths = {"artifact": built[1], "converted": built[0], "transformer": built[0].parent / "source"}
    engine = open_model(str(paths[which]), device="cpu", threads=1)
    assert engine.kind == which and engine.state_bytes >= 0
    ids = prompt(40, toy.VOCAB)
    whole = engine.advance([ids])
    pieces = engine.sibling()
    assert [pieces.advance([ids[:7]]), pieces.advance([ids[7:39]]), pieces.advance([ids[39:]])][-1] == whole
    pair = engine.sibling(2)
    assert pair.advance([ids, ids]) == whole * 2
    assert pair.state_bytes == 2 * engine.state_bytes > 0
    if which != "transformer":
        with pytest.raises(UsageError, match="without reading"):
            engine.fill(8)


@hybrid
@pytest.mark.parametrize(("given", "found"), [(None, 2), (1, 1)])
def test_torch_takes_no_more_threads_than_there_are_cores(
    built: Built, monkeypatch: pytest.MonkeyPatch, given: int | None, found: int
) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr("ligerexport.measure.opened.default_threads", lambda: 2)
    try:
        torch.set_num_threads(3)
        open_model(str(built[0].parent / "source"), device="cpu", threads=given)
        assert torch.get_num_threads() == found
    finally:
        torch.set_num_threads(before)


@hybrid
def test_a_worker_keeps_sessions_apart_and_says_why_it_fails(built: Built) -> None:
    worker = Worker(str(built[1]), threads=1)
    try:
        one = worker("prefill", "one", ids=[prompt(20, toy.VOCAB)])
        worker("prefill", "two", ids=[[5, 6, 7]])
        again = worker("prefill", "three", ids=[prompt(20, toy.VOCAB)])
        assert again["tokens"] == one["tokens"]
        first = worker("decode", "one", tokens=one["tokens"], count=4)
        assert worker("decode", "three", tokens=again["tokens"], count=4)["tokens"] == first["tokens"]
        assert len(first["seconds"]) == 4 and first["rss"] > 0
        with pytest.raises(LigerError, match="token id 9999"):
            worker("prefill", "one", ids=[[9999]])
        worker("close", "one")
        worker._process.kill()
        with pytest.raises(LigerError, match="ended with -9"):
            worker("decode", "two", tokens=[1])
    finally:
        worker.close()
    with pytest.raises(LigerError, match="built-in model 'absent'"):
        Worker("absent")


def test_crossovers_and_quantiles() -> None:
    def rows(ours: list[float], theirs: list[float]) -> list[dict[str, Any]]:
        return [
            {"model": name, "context": context, "ms": value}
            for name, values in (("a", ours), ("b", theirs))
            for context, value in zip((100, 200, 400), values, strict=True)
        ]

    assert crossover(rows([5, 5, 5], [1, 3, 7]), "ab", "ms") == 300
    assert crossover(rows([5, 5, 5], [6, 7, 8]), "ab", "ms") == 100
    assert crossover(rows([5, 5, 5], [6, 7, 4]), "ab", "ms") is None
    assert [quantile([1, 2, 3, 4], share) for share in (0.5, 0.75, 0.95)] == [2, 3, 4]
    assert quantile([7], 0.5) == 7


def test_energy_is_what_the_counters_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, energy in enumerate((5_000_000, 9_000_000)):
        package = tmp_path / f"intel-rapl:{index}"
        package.mkdir()
        (package / "energy_uj").write_text(str(energy))
        (package / "max_energy_range_uj").write_text("10000000")
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    meter = machine.Energy()
    before = meter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("8000000")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("1000000")  # began again
    assert "2 CPU packages" in str(meter.source)
    assert meter.since(before) == pytest.approx(3 + 2)
    assert meter.since([]) is None


@hybrid
def test_the_command(
    built: Built, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    liger, artifact = built
    words = ["bench", artifact, "--against", liger.parent / "source", "--context", "8", "--blocks", "1", "--tokens",
             "2", "-o", tmp_path / "out"]  # fmt: skip
    with pytest.raises(SystemExit, match="0"):
        main([str(word) for word in words])
    out = capfd.readouterr().out
    last = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert out == markdown(last) == (tmp_path / "out" / "bench.md").read_text() and out.startswith("| model |")
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert made == {"bench.json", "bench.md", "latency.svg", "latency.png", "memory.svg", "memory.png"}
    assert "crossover" in last and "tokens of context" in (tmp_path / "out" / "latency.svg").read_text()
    for wrong in (["--context", "0"], ["--batch", "1,x"]):
        with pytest.raises(SystemExit, match="2"):
            main([str(word) for word in words] + wrong)
    assert "write numbers" in capfd.readouterr().err and counts("16,8, 16", "--context") == (16, 8)


@hybrid
def test_disturbances_are_told(result: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def row(model: str, context: int, others: float | None, faults: float = 0.0) -> dict[str, Any]:
        return {"model": model, "context": context, "others": others, "faults": faults}

    calm = [row("a", 8, 0.15), row("b", 8, 0.1)]
    assert not disturbed(calm, 2, 2, 9.0) and not disturbed([row("a", 8, 10.0)], 16, 64, 0.0)
    assert "kept 1.2 of 2 cores busy" in disturbed([*calm, row("a", 16, 1.2)], 2, 2, 0.0)[0]
    assert "kept 9.0 of 2 cores busy" in disturbed([row("a", 8, None)], 2, 2, 9.0)[0]
    [told] = disturbed([*calm, row("b", 16, 0.0, 1.0), row("b", 32, 0.0, 40.0)], 2, 2, 0.0)
    assert told.startswith("b waited for the disk 40 times per token at 32 tokens")
    assert f"\nWarning: {told}.\n" in markdown(result | {"warnings": [told]})
    assert "Warning" not in markdown({key: value for key, value in result.items() if key != "warnings"})
    assert all(row["others"] >= 0 and row["faults"] >= 0 for row in result["rows"])


def test_turns_that_disagree_are_told() -> None:
    steady = {"batch": 1, "context": 8} | ratio_of([[1, 2, 9], [3], [4], [5]], [[4], [5, 6, 7], [8], [9]])
    assert steady == {"batch": 1, "context": 8, "low": 0.5, "median": 0.5, "high": 0.5}
    apart = steady | {"context": 1024, "low": 0.3}
    assert disagreeing([steady, steady | {"low": 0.45}]) == []
    [told] = disagreeing([steady, apart])
    assert "at 1,024 tokens" in told and "0.30 to 0.50 times" in told


@hybrid
def test_the_figures_alone_are_one_file(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"
    check_output(file)
    assert json.loads(save(result, file).read_text()) == json.loads(json.dumps(result))
    check_output(file, force=True)
    with pytest.raises(UsageError, match="exists"):
        check_output(file)
    (tmp_path / "directory.json").mkdir()
    with pytest.raises(UsageError, match="a file was expected"):
        check_output(tmp_path / "directory.json", force=True)


class Llama:
    """What `bench` takes of llama.cpp's package: the next token is the sum of the tokens so far."""

    def __init__(self, path: str, n_ctx: int, n_threads: int, n_threads_batch: int, **others: Any) -> None:
        if n_ctx == 13:
            raise ValueError("Failed to load model")
        assert n_threads == n_threads_batch == 2 and others == {"n_gpu_layers": 0, "verbose": False}
        self.room, self.model, self.ctx, self.seen = n_ctx, self, self, list[int]()

    def n_vocab(self) -> int:
        return toy.VOCAB + 1

    def eval(self, tokens: list[int]) -> None:
        self.seen += tokens
        if len(self.seen) > self.room:
            raise RuntimeError("llama_decode returned 1")

    def reset(self) -> None:
        self.seen = []


def llama_cpp() -> ModuleType:
    """A stand-in for the package, which takes minutes to compile."""
    module: Any = ModuleType("llama_cpp")
    module.Llama = Llama
    module.llama_model_n_ctx_train = lambda model: 77
    module.llama_state_seq_get_size = lambda context, sequence: 10 * len(context.seen)

    def describe(model: Llama, text: Any, size: int) -> None:
        text.value = b"llama 1.2K Q4_K - Medium"

    def logits(context: Llama, which: int) -> Any:
        values = np.zeros(context.n_vocab(), np.float32)
        values[sum(context.seen) % len(values)] = 1 - 2 * (which != -1)
        return values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))

    module.llama_model_desc, module.llama_get_logits_ith = describe, logits
    return module


@pytest.fixture
def model_gguf(tmp_path: Path) -> Path:
    gguf_files = pytest.importorskip("gguf_files", exc_type=ImportError)
    made = make_transformer(tmp_path / "model", vocab_size=toy.VOCAB + 1, intermediate_size=64)
    return gguf_files.write_gguf(made, tmp_path / "model.gguf")


def test_llama_cpp_is_timed_like_the_others(model_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llama_cpp", llama_cpp())
    requests = [
        {"do": "prefill", "ids": [[1, 2]]}, {"do": "restart"}, {"do": "prefill", "ids": [[5, 6, 7]]},
        {"do": "decode", "tokens": [18], "count": 2}, {"do": "decode", "tokens": [1], "count": 2},
    ]  # fmt: skip
    lines = "".join(json.dumps({"session": ""} | request) + "\n" for request in requests)

    def told(**options: int) -> list[dict[str, Any]]:
        serve(
            {"model": str(model_gguf), "batch": 1, "threads": 2} | options, io.StringIO(lines), answers := io.StringIO()
        )
        return [json.loads(line) for line in answers.getvalue().splitlines()]

    facts, first, _, again, decoded, full = told(length=6)
    weights = {name: tensor.nbytes for name, tensor in read_header(model_gguf).tensors.items()}
    assert facts["kind"] == "llama.cpp" and facts["precision"] == "Q4_K - Medium" and facts["trained_length"] == 77
    assert facts["vocab_size"] == toy.VOCAB + 1 and facts["weight_bytes"] == (
        sum(weights.values()) - weights["token_embd.weight"]
    )
    assert first["tokens"] == [3] and again["tokens"] == [18] and decoded["tokens"] == [[36], [72]]
    assert decoded["state_bytes"] == 50 and len(decoded["seconds"]) == 2 and "llama_decode" in full["error"]
    [refused] = told(length=13)
    assert "cannot load" in refused["error"] and "--upgrade llama-cpp-python" in refused["hint"]
    [refused] = told(length=6, batch=2)
    assert refused["exit_code"] == 2 and "--batch 1" in refused["hint"]


@hybrid
def test_a_gguf_file_without_llama_cpp(
    built: Built, model_gguf: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ligerexport.measure.bench.llama.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="4"):
        main(["bench", str(built[1]), "--against", str(model_gguf)])
    assert capfd.readouterr().err.splitlines()[-1] == "hint: pip install llama-cpp-python"


def test_what_others_take_is_all_without_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: Any = {name: SimpleNamespace(last={"cpu_s": 2.0, "faults": 3}) for name in "ab"}
    monkeypatch.setattr(machine, "cpu_seconds", lambda: 50.0)
    found = _effort(turns)
    assert found["all"] == 50 and found["ours"] > 4 and found["faults"] == {"a": 3, "b": 3}
    monkeypatch.undo()
    before = machine.cpu_seconds()
    assert (before is None) == (not Path("/proc/stat").is_file()) and machine.effort()["cpu_s"] > 0


def test_bandwidth_is_that_of_memory_and_not_of_a_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    rate = machine.bandwidth(1)
    assert rate is not None and 1e8 < rate < 1e12
    assert machine.memory()["peak"] >= machine.STREAM
    monkeypatch.setattr("platform.processor", lambda: "x")
    assert machine.describe(3)["threads"] == 3 and machine.cpu_name()


def test_without_counters_nothing_is_invented(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "RAPL", tmp_path)
    monkeypatch.setattr(machine, "ctypes", SimpleNamespace(CDLL=_absent))
    meter = machine.Energy()
    assert meter.source is None and meter.since(meter.read()) is None


def _absent(name: str) -> Any:
    raise OSError(name)
