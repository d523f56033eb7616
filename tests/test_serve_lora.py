"""Adapters that the server's models and the commands use: each answer is that of its own adapter."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from serving import Address, serving
from transformers import AutoModelForCausalLM

import ligerexport as lx
from ligerexport.cli import main
from ligerexport.errors import UsageError
from ligerexport.run.generate import Conversation
from ligerexport.run.prompt_cache import PromptCache

openai = pytest.importorskip("openai")

pytestmark = pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])
PROMPT = "the beginning that all of them read, whichever adapter they use"
MODELS = {"toy": None, "toy:a": "a", "toy:b": "b"}


@pytest.fixture(scope="module")
def place(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two adapters, and an artifact that takes them."""
    place = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(built[0].parent / "source")
        settings = LoraConfig(r=2, lora_alpha=8, target_modules=["v_proj", "up_proj"], init_lora_weights=False)
        get_peft_model(base, settings).save_pretrained(place / name)
    lx.build(built[0], place / "toy", lora=2, max_chunk=16, verify=False)
    return place


@pytest.fixture(scope="module")
def expected(place: Path) -> dict[str, str]:
    """What each model writes after the prompt, by its name in requests."""
    session, found = lx.load(place / "toy", adapters={"a": place / "a", "b": place / "b"}), {}
    for model, adapter in MODELS.items():
        session.reset()
        session.use(adapter)
        found[model] = "".join(chunk.text for chunk in lx.generate(session, PROMPT, max_new_tokens=24))
    assert len({text[:8] for text in found.values()}) == 3
    return found


def asking(server: Address) -> Callable[[str], tuple[str, int]]:
    """Return a function that asks a model, and returns its answer and how many tokens came from a state."""
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0)

    def ask(model: str) -> tuple[str, int]:
        answer = client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    return ask


def test_each_answer_is_that_of_its_adapter(
    place: Path, expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one batch and one after the other; only states of the same weights are used, also after a restart."""
    monkeypatch.setattr("ligerexport.serve.held.SHORT", 0)  # states of short prompts are written too
    adapters = {"a": place / "a", "b": place / "b"}
    with serving(place / "toy", adapters=adapters, state_dir=tmp_path / "states") as server:
        ask = asking(server)
        for model, text in expected.items():
            assert ask(model) == (text, 0)
        with ThreadPoolExecutor(6) as pool:
            for model, (text, cached) in zip([*MODELS] * 2, pool.map(ask, [*MODELS] * 2), strict=True):
                assert text == expected[model] and cached >= len(PROMPT) - 1
        listed = server.ask("/v1/models")[1]["data"]
        assert [(row["id"], row.get("parent")) for row in listed] == [("toy", None), ("toy:a", "toy"), ("toy:b", "toy")]
        for model in MODELS:
            rows = server.ask(f"/v1/states?model={model}")[1]["data"]
            assert rows and all(row["model"] == model for row in rows)
        assert server.ask("/v1/states/" + rows[0]["id"] + "?model=toy:b", method="DELETE")[0] == 200
        assert len(server.ask("/v1/states?model=toy:b")[1]["data"]) == len(rows) - 1
        assert len(server.ask("/v1/states?model=toy:a")[1]["data"]) == len(rows)
        status, answer, _ = server.ask("/v1/completions", {"model": "toy:c", "prompt": "x"})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
    with serving(place / "toy", adapters={"b": place / "a", "c": place / "b"}, state_dir=tmp_path / "states") as server:
        text, cached = asking(server)("toy:b")
        assert text == expected["toy:a"] and cached >= len(PROMPT) - 1


def test_the_commands_take_an_adapter(
    place: Path, expected: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*words: object) -> tuple[Any, Any]:
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        return ended.value.code, capsys.readouterr()

    for model, adapter in MODELS.items():
        given = ("--lora", place / adapter) if adapter else ()
        assert run("run", place / "toy", PROMPT, "-n", 24, *given)[1].out.rstrip("\n") == expected[model].rstrip("\n")
    for words, said in (
        (("run", place / "toy", "x", "--lora", place / "none"), "adapter_config.json"),
        (("run", place / "toy", "x", "--lora", place / "a", "--prompt-cache", tmp_path / "x"), "with an adapter"),
        (("chat", "--server", "http://127.0.0.1:1", "--lora", place / "a"), "--model NAME:ADAPTER"),
    ):
        code, captured = run(*words)
        assert code and said in " ".join(captured.err.split())
    session = lx.load(place / "toy", adapters={"a": place / "a"})
    session.use("a")
    with pytest.raises(UsageError, match="prompt_cache with an adapter"):
        Conversation(session, prompt_cache=PromptCache(tmp_path / "x"))
