"""The page of `serve` and that of Gradio in a browser, and OpenAI's client for JavaScript."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import toy
from serving import Address, serving

sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = pytest.mark.system

LONG = 300_000
"""Milliseconds after which a browser is considered to hang."""
CLIENT = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "any", maxRetries: 0 });
const asked = { model: "toy", messages: [{ role: "user", content: "hello" }], max_tokens: 8, temperature: 0 };
const whole = await client.chat.completions.create(asked);
const stream = client.chat.completions.stream(asked);
const final = await stream.finalChatCompletion();
const response = await client.responses.create({ model: "toy", input: "hello", max_output_tokens: 8, temperature: 0 });
const refused = await client.chat.completions.create({ ...asked, model: "other" }).catch((error) => error);
for await (const chunk of await client.chat.completions.create({ ...asked, max_tokens: 1e9, stream: true }))
  if (chunk.choices[0].delta.content) break;
console.log(JSON.stringify({
  texts: [whole.choices[0].message.content, final.choices[0].message.content, response.output_text],
  refused: [refused.constructor.name, refused.status, refused.code],
}));
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Address]:
    with serving(toy.build(tmp_path_factory.mktemp("page") / "toy")) as found:
        yield found


@pytest.fixture
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield opened
        opened.close()


@pytest.fixture
def page(browser: Any, server: Address) -> Iterator[Any]:
    """The page; afterwards all requests must have been local, and the console empty."""
    opened, asked, complaints = browser.new_page(), list[str](), list[str]()
    opened.set_default_timeout(LONG)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("console", lambda message: complaints.append(message.text))
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(server.url)
    opened.wait_for_selector("#model option", state="attached")
    yield opened
    assert complaints == [] and asked and all(url.startswith((server.url, "data:")) for url in asked)


def test_chats_are_edited_branched_and_kept(page: Any) -> None:
    def done() -> None:
        page.wait_for_selector("#send:enabled")
        assert page.locator("article.assistant").count() == 1

    page.click("summary")
    page.fill("#most", "12")
    page.fill("#prompt", "hello")
    page.keyboard.press("Enter")
    done()
    assert "tokens read" in page.inner_text("article.assistant") and "at any length" not in page.inner_text("#memory")
    page.get_by_role("button", name="Answer again").click()
    done()
    assert "2 of 2" in page.inner_text("article.assistant")
    page.get_by_role("button", name="Previous version").click()
    assert "1 of 2" in page.inner_text("article.assistant")
    page.get_by_role("button", name="Edit this message").click()
    page.get_by_role("textbox", name="Edited message").fill("<b>hi</b>")
    page.keyboard.press("Enter")
    done()
    assert "2 of 2" in page.inner_text("article.user") and page.inner_text("article.user .body") == "<b>hi</b>"
    page.get_by_role("button", name="Branch: continue").last.click()
    assert page.locator("#chats li").count() == 2
    page.reload()
    done()
    assert page.locator("#chats li").count() == 2 and page.inner_text("article.user .body") == "<b>hi</b>"
    page.get_by_role("button", name="Delete chat: hello (branch)").click()
    assert page.locator("#chats li").count() == 1


def test_an_answer_can_be_stopped(page: Any, server: Address) -> None:
    page.click("summary")
    page.fill("#most", "1000000000")
    page.fill("#prompt", "hello")
    page.click("#send")
    page.wait_for_selector("article.assistant .body:not(:empty)")
    page.keyboard.press("Escape")
    page.wait_for_selector("#status:text('Stopped.')")
    while server.engine.stats()["running"]:
        pass


def test_gradio(browser: Any, server: Address, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chat in Gradio's own page, whose second turn goes on from the state of the first one."""
    gradio = pytest.importorskip("gradio", reason="needs gradio")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    chat = gradio.load_chat(f"{server.url}/v1", model="toy", token="any")
    _, address, _ = chat.launch(prevent_thread_lock=True, quiet=True)
    opened, stats = browser.new_page(), [server.engine.stats()]
    try:
        opened.set_default_timeout(LONG)
        opened.goto(address)
        for question in ("hello " * 200, "hello"):
            opened.fill("textarea", question)
            opened.keyboard.press("Enter")
            while (now := server.engine.stats())["read"] == stats[-1]["read"] or now["reading"] or now["running"]:
                opened.wait_for_timeout(50)
            stats.append(now)
        opened.wait_for_function("document.querySelectorAll('.message.bot').length == 2")
        assert all(opened.locator(".message.bot").all_inner_texts())
    finally:
        chat.close()
    assert stats[2]["cached"] - stats[1]["cached"] > 1000 > stats[2]["read"] - stats[1]["read"]


def test_openai_for_javascript(server: Address, tmp_path: Path) -> None:
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    install = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", "openai@6.49.0"]
    subprocess.run(install, cwd=tmp_path, check=True, capture_output=True)
    (tmp_path / "client.mjs").write_text(CLIENT)
    done = subprocess.run(["node", "client.mjs", server.url], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(set(found["texts"])) == 1 and found["texts"][0]
    assert found["refused"] == ["NotFoundError", 404, "model_not_found"]
    while server.engine.stats()["running"]:
        pass
