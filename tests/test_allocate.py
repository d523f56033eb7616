"""Allocation: the memories that are tried, the distribution of a total, and a run from a checkpoint to a new memory."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import toy

import ligerexport as lx
from ligerexport.checkpoint.convert import convert_in_memory, load_model
from ligerexport.cli import main
from ligerexport.console import silent
from ligerexport.errors import LigerError, UsageError
from ligerexport.model.config import MEMORY, LigerConfig, get_preset, read_memory
from ligerexport.train.allocate import AllocatePlan, as_fields, measure_layers, memories, share_out
from tests.checkpoints import FORESIGHT, make_checkpoint

EVICTED = replace(FORESIGHT, recurrence_weight=1.0, recurrence="evicted", keep_softmax=(1,))
SMALL = {"length": 48, "windows": 2, "trials": 2, "distance": 40}


@pytest.fixture(scope="module")
def liger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_checkpoint(tmp_path_factory.mktemp("allocate") / "liger", EVICTED, vocab_size=toy.VOCAB)
    toy.tokenizer().save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": toy.TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Chats and prose."""
    place, rng = tmp_path_factory.mktemp("texts"), random.Random(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "and", "ran", "off"]
    rows = [{"prompt": rng.choice(words), "response": " ".join(rng.choices(words, k=8))} for _ in range(12)]
    (place / "chats.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    (place / "prose.txt").write_text(" ".join(rng.choices(words, k=60)))
    return place / "chats.jsonl", place / "prose.txt"


def test_memories_of_a_layer() -> None:
    config = get_preset("evicted")
    sizes = [(memory.window, *dict(memory.slots).values()) for memory in memories(config)]
    assert sizes == [
        (60, 28, 36), (16, 9, 11), (28, 14, 18), (124, 56, 72), (252, 112, 144), (380, 56, 72), (124, 112, 272)
    ]  # fmt: skip
    assert [memory.num_slots for memory in memories(config)] == [128, 40, 64, 256, 512, 512, 512]
    assert all(replace(memory, window=60, slots=config.slots) == config for memory in memories(config))


def test_memories_that_cannot_be_are_not_tried() -> None:
    assert all(memory.window <= 200 for memory in memories(replace(get_preset("evicted"), max_distance=200)))
    many_sinks = LigerConfig(window=2, sinks=40, slots=(("novelty", 1),))
    assert [memory.num_slots for memory in memories(many_sinks)] == [43, 86, 172, 172, 172]
    tiny = memories(LigerConfig(window=1, slots=(("novelty", 1),)))
    assert len(set(tiny)) == len(tiny) and tiny[0].num_slots == 2


def test_shared_out_as_by_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(50):
        layers = [rng.randrange(1, 5) for _ in range(4)]
        sizes = [[rng.randrange(1, 12) for _ in range(count)] for count in layers]
        costs = [[rng.uniform(-1, 1) for _ in range(count)] for count in layers]
        least = sum(map(min, sizes))
        budget = rng.randrange(least, least + 20)

        def total(table: list[list[Any]], chosen: Any) -> Any:
            return sum(row[option] for row, option in zip(table, chosen, strict=True))

        possible = [c for c in product(*map(range, layers)) if total(sizes, c) <= budget]
        chosen = share_out(sizes, costs, budget)
        assert total(sizes, chosen) <= budget
        assert total(costs, chosen) == pytest.approx(min(total(costs, c) for c in possible))


def test_the_most_frequent_memory_is_everybodys() -> None:
    own, small, *_ = memories(EVICTED)
    fields = as_fields(EVICTED, {0: small, 2: own, 3: small})
    config = replace(EVICTED, **fields)
    assert fields["window"] == small.window and [layer for layer, *_ in fields["layer_memory"]] == [2]
    assert [config.for_layer(layer).num_slots for layer in (0, 2, 3)] == [c.num_slots for c in (small, own, small)]


def test_a_layer_is_measured_as_if_it_were_converted_so(liger: Path) -> None:
    model: Any = load_model(liger).eval()
    own, *others = memories(EVICTED.for_layer(2))
    ids, before = torch.randint(0, toy.VOCAB, (1, 60)), model.model.layers[2].self_attn
    seen: list[torch.Tensor] = []

    def measure(model: Any) -> dict[str, float]:
        with torch.no_grad():
            seen.append(model(ids, use_cache=False).logits)
        return {"kl": 1.0 + len(seen), "once_nll": 1.0}

    rows = measure_layers(model, {2: [own, *others]}, measure, silent)[2]  # type: ignore[arg-type]
    assert [row["cost"] for row in rows] == pytest.approx([i / 2 for i in range(len(rows))])
    assert model.model.layers[2].self_attn is before
    for memory, logits in zip([own, *others], seen, strict=True):
        same = convert_in_memory(model, replace(EVICTED, layer_memory=((2, memory.window, memory.slots),)))
        with torch.no_grad():
            torch.testing.assert_close(same(ids, use_cache=False).logits, logits)


@pytest.mark.parametrize("slots", [10, 24])
def test_from_a_checkpoint_to_one_with_another_memory(
    liger: Path, texts: tuple[Path, Path], tmp_path: Path, slots: int
) -> None:
    file = lx.allocate(liger, *texts, tmp_path / "new" / "memory.json", slots=slots, **SMALL)
    found = json.loads(file.read_text())
    record = found["record"]
    assert [row["layer"] for row in record["measured"]] == [0, 2]  # 1 is kept as softmax
    tried = [row["memories"] for row in record["measured"]]
    assert all(rows[0]["cost"] == 0 and rows[0]["kl"] == tried[0][0]["kl"] > 0 for rows in tried)
    assert any(row["cost"] for rows in tried for row in rows)
    assert record["base"] == EVICTED.to_dict() and record["budget"] == 2 * slots and record["versions"]["torch"]

    again = lx.convert(liger, tmp_path / "again", memory=file)
    config = LigerConfig.from_dict(json.loads((again / "config.json").read_text())["liger"])
    assert config == replace(EVICTED, **{name: found[name] for name in MEMORY})
    total = sum(config.for_layer(layer).num_slots for layer in (0, 2))
    assert total == record["total"] <= 2 * slots
    logits = load_model(again)(torch.tensor([[1, 2, 3]])).logits
    assert torch.isfinite(logits).all()
    named = read_memory(file, "foresight", sinks=1)
    assert not named.recurrent and (named.sinks, named.window) == (1, found["window"])


def test_the_command(liger: Path, texts: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def command(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as caught:
            main([str(argument) for argument in arguments])
        said = capfd.readouterr()
        return int(caught.value.code or 0), said.out, said.err

    file, again = tmp_path / "memory.json", tmp_path / "again"
    options = [x for name, value in SMALL.items() for x in (f"--{name}", value)]
    allocate = ["allocate", liger, "--data", texts[0], "--text", texts[1], "-o", file, *options, "--json"]
    code, out, err = command(*allocate, "--dry-run")
    plan = json.loads(out)
    assert code == 0 and "would write" in err and not file.exists()
    count = 1 + 2 * (len(memories(EVICTED)) - 1)
    assert (plan["layers"], plan["measurements"], plan["budget"]) == (2, count, 2 * EVICTED.num_slots)
    assert plan["tokens"] == 2 * 48 + count * (2 * 48 + 2 * 40)

    code, out, err = command(*allocate)
    assert code == 0 and json.loads(out) == {"path": str(file)} | json.loads(file.read_text())
    assert "measuring layers" in err and f"ligerexport convert {liger} --memory {file} -o OTHER" in err
    assert command(*allocate)[0] == 2 and command(*allocate, "--force")[0] == 0
    assert command("convert", liger, "--memory", file, "-o", again)[0] == 0

    for option, value in (("window", 9), ("slots", "recent_use=3"), ("layer-memory", "0:window=8,recent_use=3")):
        code, _, err = command("convert", liger, "--memory", file, "-o", tmp_path / "no", f"--{option}", value)
        assert code == 2 and f"both --memory and --{option}" in err


@pytest.mark.parametrize(
    "content",
    [None, "", "[]", '{"window": 4}', '{"window": 4, "slots": [["novelty", 0]], "layer_memory": []}',
     '{"window": "a", "slots": [], "layer_memory": []}', '{"window": 4, "slots": [3], "layer_memory": []}'],
)  # fmt: skip
def test_a_file_that_holds_no_memory(liger: Path, tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "memory.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match="holds no memory") as caught:
        lx.convert(liger, tmp_path / "out", memory=file)
    assert "ligerexport allocate" in str(caught.value.hint) and not (tmp_path / "out").exists()


def test_a_file_without_a_record_changes_a_preset(tmp_path: Path) -> None:
    file = tmp_path / "memory.json"
    file.write_text('{"window": 8, "slots": [["novelty", 2]], "layer_memory": [[1, 4, [["novelty", 6]]]]}')
    assert read_memory(file).for_layer(1) == get_preset("memory", window=4, slots=(("novelty", 6),))


@pytest.mark.parametrize(
    ("settings", "message", "hint"),
    [
        ({"slots": 3}, "3 slots per layer", "--slots 8"),
        ({"slots": 0}, "slots 0", "at least 1"),
        ({"length": 20}, "windows of 20 tokens fit into 26 slots", "--length"),
        ({"distance": 100_000}, "the text has", "--distance"),
        ({"text": []}, "the text has 0 tokens", "--text"),
        ({"text": "absent"}, "no file or directory absent", "--text"),
        ({"data": "absent"}, "no file or directory .absent", "hub"),
        ({"dtype": "float31"}, "unknown dtype", "float32"),
        ({"device": "abacus"}, "unknown device", "cpu"),
    ],
)
def test_mistakes(liger: Path, texts: tuple[Path, Path], settings: dict[str, Any], message: str, hint: str) -> None:
    settings = {"data": texts[0], "text": texts[1]} | SMALL | settings
    data, text = settings.pop("data"), settings.pop("text")
    with pytest.raises(LigerError, match=message) as caught:
        AllocatePlan(liger, data, text, "memory.json", **settings)
    assert hint in str(caught.value.hint)


def test_a_recovered_checkpoint_needs_its_transformer(texts: tuple[Path, Path], liger: Path, tmp_path: Path) -> None:
    recovered = shutil.copytree(liger, tmp_path / "recovered")
    config = json.loads((liger / "config.json").read_text())
    (recovered / "config.json").write_text(json.dumps(config | {"liger_recovery": {}}))
    with pytest.raises(UsageError, match="already recovered") as caught:
        AllocatePlan(recovered, *texts, "memory.json", **SMALL)
    assert "--against MODEL" in str(caught.value.hint)


def test_models_without_slots_to_share_out(texts: tuple[Path, Path], liger: Path, tmp_path: Path) -> None:
    plain = make_checkpoint(tmp_path / "plain", replace(EVICTED, slots=()), vocab_size=toy.VOCAB)
    (plain / "tokenizer.json").write_bytes((liger / "tokenizer.json").read_bytes())
    with pytest.raises(UsageError, match="no pools") as caught:
        AllocatePlan(plain, *texts, "memory.json", **SMALL)
    assert "--preset evicted" in str(caught.value.hint)
    config = json.loads((plain / "config.json").read_text())
    del config["liger"]
    (plain / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="not converted yet"):
        AllocatePlan(plain, *texts, "memory.json", **SMALL)
