"""Recovery as a whole: it learns, continues exactly after kill -9, and gives the same result with two processes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import toy

pytest.importorskip("peft")

import ligerexport as lx
from ligerexport.artifact.artifact import open_artifact
from ligerexport.checkpoint.adapter import _product, merge_adapter
from ligerexport.cli import main
from ligerexport.errors import CheckpointError, LigerError, UsageError
from ligerexport.train import phases
from ligerexport.train.loop import Step
from ligerexport.train.recipes import RECIPES
from ligerexport.train.state import KEPT
from tests.checkpoints import MEMORY, make_checkpoint

SMALL = {"length": 32, "batch_tokens": 128, "dtype": "fp32", "rate": 3e-3}
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "off", "to", "see", "some", "other", "dogs")
LOGITS_FP32 = 2e-5
"""Merged weights against LoRA beside them: the same products in another order."""


def make_liger(path: Path, **sizes: Any) -> Path:
    config = replace(MEMORY, recurrence_weight=0.2)
    make_checkpoint(path, config, **{"vocab_size": toy.VOCAB, "num_hidden_layers": 2} | sizes)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": toy.TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_liger(tmp_path_factory.mktemp("recover") / "liger")


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng, path = random.Random(0), tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [{"prompt": rng.choice(WORDS), "response": " ".join(sorted(rng.choices(WORDS, k=3)))} for _ in range(40)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Use one thread, because tiny matrices are slower on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def command(liger: Path, chats: Path, output: Path, *more: object) -> list[str]:
    options = ["--length", 32, "--batch-tokens", 128, "--dtype", "fp32", "--lr", 3e-3, *more]
    return [sys.executable, "-m", "ligerexport", *map(str, ["recover", liger, "--data", chats, "-o", output, *options])]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def curve(output: Path) -> list[float]:
    return [step["loss"] for step in json.loads((output / "report.json").read_text())["steps"]]


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_the_loss_falls(liger: Path, chats: Path, tmp_path: Path, recipe: str) -> None:
    steps: list[Step] = []
    settings = SMALL | {"rate": 3e-2}
    out = lx.recover(liger, chats, tmp_path / "out", recipe=recipe, steps=20, on_step=steps.append, **settings)
    report = json.loads((out / "report.json").read_text())
    assert [step.loss for step in steps] == curve(out) and len(steps) == 20
    assert all(step.tokens <= 128 and step.norm > 0 for step in steps)
    first = next(row for row in report["phases"] if row["steps"] >= 5)
    assert first["final_loss"] < 0.98 * first["first_loss"]
    assert [row["phase"] for row in report["phases"]] == [phase.name for phase in RECIPES[recipe].phases]
    record = json.loads((out / "config.json").read_text())["liger_recovery"]
    assert record == report["record"] == json.loads((out / "recovery.json").read_text())
    assert record["recipe"] == recipe and record["steps"] == 20 and record["tokens"] == sum(s.tokens for s in steps)
    assert record["final_loss"] == report["phases"][-1]["final_loss"] and record["versions"]["torch"]
    assert f"| {report['phases'][0]['phase']} |" in (out / "report.md").read_text()
    assert not out.with_name("out.state").exists()


def test_killed_and_resumed_is_as_if_never_stopped(liger: Path, chats: Path, tmp_path: Path) -> None:
    more = ["--steps", 14, "--save-every", 2]
    straight = subprocess.run(command(liger, chats, tmp_path / "straight", *more), env=ENVIRONMENT, capture_output=True)
    assert straight.returncode == 0 and b"Warning" not in straight.stderr, straight.stderr
    states = tmp_path / "stopped.state"
    arguments = command(liger, chats, tmp_path / "stopped", *more)[3:]
    dying = (
        "import os, signal, sys; from ligerexport.cli import main; from ligerexport.train.loop import Trainer\n"
        "step = Trainer._step\n"
        "def dies(trainer, number):\n"
        "    return os.kill(os.getpid(), signal.SIGKILL) if number == 7 else step(trainer, number)\n"
        "Trainer._step = dies; main(sys.argv[1:])"
    )
    done = subprocess.run([sys.executable, "-c", dying, *arguments], env=ENVIRONMENT, capture_output=True)
    assert done.returncode == -signal.SIGKILL and not (tmp_path / "stopped").exists(), done.stderr
    kept = sorted(int(path.name[-8:]) for path in states.glob("step-*"))
    assert kept == [6 - 2 * i for i in reversed(range(KEPT))]

    again = subprocess.run(
        command(liger, chats, tmp_path / "stopped", *more), env=ENVIRONMENT, capture_output=True, text=True
    )
    assert again.returncode == 0 and "continuing after step" in again.stderr, again.stderr
    assert curve(tmp_path / "stopped") == curve(tmp_path / "straight")
    weights = "model.safetensors"
    assert (tmp_path / "stopped" / weights).read_bytes() == (tmp_path / "straight" / weights).read_bytes()
    assert not states.exists()


@pytest.mark.parametrize("shard", [False, True], ids=["copies", "shards"])
def test_two_processes_give_the_same(liger: Path, chats: Path, tmp_path: Path, shard: bool) -> None:
    more = ["--steps", 6, "--save-every", 3, *(["--shard"] if shard else [])]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    arguments = command(liger, chats, tmp_path / "two", *more)[2:]
    done = subprocess.run([*torchrun, *arguments, "--json"], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["record"]["steps"] == 6
    lx.recover(liger, chats, tmp_path / "one", steps=6, micro_batch_tokens=32, **SMALL)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 90)[None], use_cache=False).logits


def test_merged_weights_equal_the_adapter(liger: Path, chats: Path, tmp_path: Path) -> None:
    from peft import PeftModel

    settings = SMALL | {"rate": 3e-2, "steps": 4, "targets": ("q_proj", "o_proj"), "rank": 4, "alpha": 16}
    adapter = lx.recover(liger, chats, tmp_path / "adapter", merge=False, **settings)
    merged = lx.recover(liger, chats, tmp_path / "merged", **settings)
    again = merge_adapter(liger, adapter, tmp_path / "again")
    assert (again / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    once = lx.convert(liger, tmp_path / "once", adapter=adapter)
    conversion = [json.loads((path / "config.json").read_text())["liger"] for path in (liger, once)]
    assert conversion[0] == conversion[1]
    assert (once / "model.safetensors").read_bytes() == (merged / "model.safetensors").read_bytes()
    assert json.loads((once / "config.json").read_text())["liger_recovery"]["steps"] == 4
    assert sorted(x.name for x in once.iterdir()) == sorted(x.name for x in again.iterdir())
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    with_lora = PeftModel.from_pretrained(lx.load_model(liger), adapter).eval()
    plain, whole = logits(lx.load_model(liger)), logits(lx.load_model(merged))
    assert (whole - logits(with_lora)).abs().max() <= LOGITS_FP32 * whole.abs().max()
    assert (whole - plain).abs().max() > 1e-2


def test_merged_weights_are_the_same_on_every_machine() -> None:
    """As numpy adds them up, one rank after the other."""
    b, a = torch.randn(100, 16), torch.randn(16, 300)
    ranks = b.numpy().T[:, :, None] * a.numpy()[:, None]
    assert np.array_equal(_product(b, a).numpy(), np.add.accumulate(ranks)[-1])


def test_weights_keep_their_type_and_files(chats: Path, tmp_path: Path) -> None:
    path = make_liger(tmp_path / "liger", dtype=torch.bfloat16, shard="40KB")
    out = lx.recover(path, chats, tmp_path / "out", **SMALL | {"dtype": "bf16", "steps": 2, "rate": 3e-2})
    from ligerexport.checkpoint.checkpoint import check_checkpoint

    before, after = check_checkpoint(path), check_checkpoint(out)
    assert {n: (t.dtype, t.shape, t.file.name) for n, t in before.tensors.items()} == {
        n: (t.dtype, t.shape, t.file.name) for n, t in after.tensors.items()
    }
    changed = {name for name, x in lx.load_model(path).state_dict().items()
               if not torch.equal(x, lx.load_model(out).state_dict()[name])}  # fmt: skip
    assert changed and all(name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") for name in changed)


def test_an_adapter_of_another_model(liger: Path, chats: Path, tmp_path: Path) -> None:
    adapter = lx.recover(liger, chats, tmp_path / "adapter", merge=False, steps=1, **SMALL)
    for name, sizes in (("deeper", {"num_hidden_layers": 3}), ("tuned", {"initializer_range": 0.1})):
        other = make_liger(tmp_path / name, **sizes)
        with pytest.raises(CheckpointError, match="trained on another model") as caught:
            merge_adapter(other, adapter, tmp_path / "merged")
        assert caught.value.hint and not (tmp_path / "merged").exists()
    with pytest.raises(CheckpointError, match="not an adapter"):
        merge_adapter(liger, liger, tmp_path / "merged")
    with pytest.raises(UsageError, match="no adapter ships for liger"):
        lx.convert(liger, tmp_path / "converted", adapter="shipped")
    with pytest.raises(CheckpointError, match="trained on another model"):
        lx.convert(liger, tmp_path / "converted", adapter=adapter, window=3)
    assert not (tmp_path / "converted").exists()


@pytest.fixture
def stopped(liger: Path, chats: Path, tmp_path: Path) -> Path:
    """Output of a run that was stopped after 4 of 6 steps."""

    def stop(step: Step) -> None:
        if step.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lx.recover(liger, chats, tmp_path / "out", steps=6, save_every=2, on_step=stop, **SMALL)
    return tmp_path / "out"


def test_a_state_of_another_run_is_refused(liger: Path, chats: Path, stopped: Path, tmp_path: Path) -> None:
    other = make_liger(tmp_path / "other", initializer_range=0.1)
    text = tmp_path / "text.txt"
    text.write_text("some other text " * 99)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"rank": 4}, "rank 8, not 4"), ({"model": other}, "another model"), ({"data": text}, "other data"),
    ]  # fmt: skip
    for change, message in cases:
        arguments = {"model": liger, "data": chats, "output": stopped, "steps": 6, **SMALL} | change
        with pytest.raises(CheckpointError, match=message) as caught:
            lx.recover(**arguments)
        assert "--resume never" in str(caught.value.hint)
    assert len(list(stopped.with_name("out.state").glob("step-*"))) == 2
    lx.recover(liger, chats, stopped, steps=6, resume="never", **SMALL | {"rank": 4})
    assert json.loads((stopped / "recovery.json").read_text())["rank"] == 4


def test_a_damaged_state_falls_back_to_the_one_before(
    liger: Path, chats: Path, stopped: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    newest = max(stopped.with_name("out.state").glob("step-*"))
    data = bytearray((newest / "optimizer.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "optimizer.safetensors").write_bytes(data)
    seen: list[int] = []
    lx.recover(liger, chats, stopped, steps=6, on_step=lambda step: seen.append(step.step), **SMALL)
    lx.recover(liger, chats, tmp_path / "straight", steps=6, **SMALL)
    assert seen == [3, 4, 5, 6] and curve(stopped) == curve(tmp_path / "straight")
    assert "optimizer.safetensors was changed" in capfd.readouterr().err


def test_a_loss_that_is_not_finite_stops_and_keeps_the_state(
    liger: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, calls = phases.PHASES["next_token"], []

    def breaks(student: Any, teacher: Any, batch: Any) -> torch.Tensor:
        calls.append(1)
        return plain(student, teacher, batch) * (float("nan") if len(calls) == 4 else 1.0)

    monkeypatch.setitem(phases.PHASES, "next_token", breaks)
    with pytest.raises(LigerError, match=r"loss of step 4 is nan.*last good state is in") as caught:
        lx.recover(liger, chats, tmp_path / "out", recipe="paper", steps=6, save_every=2, **SMALL)
    assert "--lr 1e-03" in str(caught.value.hint)
    assert [path.name for path in (tmp_path / "out.state").iterdir()] == ["step-00000002"]
    assert not (tmp_path / "out").exists()
    out = lx.recover(liger, chats, tmp_path / "out", recipe="paper", steps=6, **SMALL | {"rate": 1e-3})
    assert len(curve(out)) == 6


def test_out_of_memory_says_what_to_change(
    liger: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setitem(phases.PHASES, "next_token", full)
    with pytest.raises(LigerError, match="128 tokens at a time") as caught:
        lx.recover(liger, chats, tmp_path / "out", recipe="paper", steps=1, **SMALL)
    assert "--micro-batch-tokens 64 or --gradient-checkpointing" in str(caught.value.hint)


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_checkpointing_changes_no_number(liger: Path, chats: Path, tmp_path: Path, recipe: str) -> None:
    plain, saved = (
        curve(lx.recover(liger, chats, tmp_path / str(on), recipe=recipe, steps=5, gradient_checkpointing=on, **SMALL))
        for on in (False, True)
    )
    assert saved == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"recipe": "papr"}, "unknown recipe", "paper"),
        ({"targets": ("q_porj",)}, "no projection is called 'q_porj'", "q_proj"),
        ({"length": 65, "batch_tokens": 130}, "more than the 64 tokens", "--length 64"),
        ({"batch_tokens": 100}, "not a multiple of the length 32", "--batch-tokens 96"),
        ({"micro_batch_tokens": 96}, "cannot be shared", "--batch-tokens"),
        ({"tokens": 10, "steps": 10}, "both tokens and steps", "--steps"),
        ({"rank": 0}, "rank 0", "above 0"),
        ({"dtype": "fp8"}, "dtype 'fp8'", "bf16"),
        ({"recipe": "paper", "against": "smollm2-135m"}, "needs no teacher", "--against"),
        ({"resume": "maybe"}, "resume 'maybe'", "never"),
    ],
)
def test_settings_that_make_no_sense(
    liger: Path, chats: Path, tmp_path: Path, settings: dict[str, Any], message: str, hint: str
) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        lx.recover(liger, chats, tmp_path / "out", **{"steps": 1} | SMALL | settings if "tokens" not in settings
                   else SMALL | settings)  # fmt: skip
    assert hint in str(caught.value.hint) and not (tmp_path / "out").exists()


def test_teachers_that_do_not_fit(liger: Path, chats: Path, tmp_path: Path) -> None:
    from tests.test_model import make_teacher

    narrow = make_teacher(tmp_path / "narrow", vocab_size=toy.VOCAB, hidden_size=32)
    recovered = lx.recover(liger, chats, tmp_path / "recovered", steps=1, **SMALL)
    for model, against, message in (
        (liger, liger, "is converted"), (liger, narrow, "another width"), (recovered, None, "is already recovered"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=message) as caught:
            lx.recover(model, chats, tmp_path / "out", against=against, steps=1, **SMALL)
        assert "--against" in str(caught.value.hint)
    teacher = make_teacher(tmp_path / "teacher", vocab_size=toy.VOCAB, num_hidden_layers=2)
    twice = lx.recover(recovered, chats, tmp_path / "twice", against=teacher, steps=2, **SMALL)
    assert json.loads((twice / "recovery.json").read_text())["teacher"] == str(teacher)


def test_a_place_in_use_is_not_replaced(liger: Path, chats: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the model itself"):
        lx.recover(liger, chats, liger, force=True, steps=1, **SMALL)
    other = make_liger(tmp_path / "other")
    with pytest.raises(UsageError, match="holds other files"):
        lx.recover(liger, chats, other, force=True, steps=1, **SMALL)


def test_tensorboard(liger: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LigerError, match="tensorboard is needed") as caught:
        lx.recover(liger, chats, tmp_path / "out", steps=1, tensorboard=tmp_path / "tb", **SMALL)
    assert caught.value.exit_code == 4
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    lx.recover(liger, chats, tmp_path / "out", steps=2, tensorboard=tmp_path / "tb", **SMALL)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tb")).Reload()
    assert {"norm", "rate", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("norm")] == [1, 2]


def run(capfd: pytest.CaptureFixture[str], arguments: list[str]) -> tuple[int, str, str]:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    signal.signal(signal.SIGTERM, before)
    captured = capfd.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


def test_the_command_from_data_to_artifact(
    liger: Path, chats: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = command(liger, chats, tmp_path / "out", "--steps", 3)[3:]
    code, out, err = run(capfd, [*arguments, "--dry-run", "--json"])
    plan = json.loads(out)
    assert code == 0 and plan["steps"] == 3 and plan["tokens"] == 384 and plan["trainable_parameters"] == 5120
    assert plan["data"]["documents"] > 5 and plan["memory_bytes"] > plan["weight_bytes"]
    assert "would write" in err and "measured on a part of each phase (threads: 1)" in err
    assert plan["seconds"] > 0 and [path.name for path in tmp_path.iterdir()] == []

    code, out, err = run(capfd, [*arguments, "--json"])
    told = json.loads(out)
    assert code == 0 and told["merged"] and told["record"]["steps"] == 3
    for word in ("trainable parameters", "step 3 of 3", "tokens/s", "ligerexport build", "loss"):
        assert word in err
    record = json.loads((tmp_path / "out" / "config.json").read_text())["liger_recovery"]
    artifact = lx.build(tmp_path / "out", tmp_path / "engine")
    assert open_artifact(artifact).manifest.recovery == record == told["record"]
    code, out, err = run(capfd, arguments)
    assert code == 2 and "exists and is not empty" in err and not out


@pytest.mark.parametrize(
    ("arguments", "code", "error", "hint"),
    [
        (["absent", "--data", "x"], 1, "no directory absent", "config.json"),
        (["{liger}", "--data", "absent.jsonl"], 2, "no file or directory 'absent.jsonl'", "owner/name"),
        (["{liger}", "--data", "{chats}", "--tokens", "many"], 2, "--tokens many", "3M"),
        (
            ["{liger}", "--data", "{chats}", "--recipe", "destill"],
            2,
            "unknown recipe 'destill'",
            "did you mean distill",
        ),
        (["{liger}"], 2, "Missing option", "ligerexport recover --help"),
    ],
)
def test_mistakes_get_one_line_and_a_hint(
    liger: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    arguments: list[str], code: int, error: str, hint: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(liger=liger, chats=chats) for argument in arguments]
    found, out, err = run(capfd, ["recover", *filled, "-o", "out", "--length", "32", "--batch-tokens", "128"])
    lines = [line for line in err.splitlines() if line.startswith(("error: ", "hint: "))]
    assert (found, out, len(lines)) == (code, "", 2), err
    assert error in lines[0] and hint in lines[1] and not any(tmp_path.iterdir())
