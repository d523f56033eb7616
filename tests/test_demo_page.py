"""The demo's page in a browser: nothing comes from other servers, nothing jumps, and answers can be stopped."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import toy

from ligerexport.artifact.artifact import Manifest, open_artifact
from ligerexport.console import format_bytes
from ligerexport.demo.host import Demo
from ligerexport.demo.sweep import POINTS

pytest.importorskip("gradio")
sync_api = pytest.importorskip("playwright.sync_api")
pytestmark = [pytest.mark.system, pytest.mark.parametrize("built", [()], indirect=True, ids=["recurrent"])]

LONG = 300_000
"""Milliseconds after which a browser is considered to hang."""
TOKENS = 40


@dataclass
class Served:
    """The page of a tiny artifact and the Transformer that it was converted from.

    An answer continues only after a browser has shown its beginning, which a slow browser would miss: see `seen`.
    """

    address: str
    demo: Demo
    manifest: Manifest
    browser: Any
    seen: threading.Semaphore
    pages: list[Page] = field(default_factory=list)

    def open(self, **context: Any) -> Page:
        """Open the page in a separate window."""
        self.pages.append(Page(self, context))
        return self.pages[-1]


class Page:
    """The actions of a user, and the browser's errors and requests."""

    def __init__(self, served: Served, context: dict[str, Any]) -> None:
        self.context = served.browser.new_context(**{"viewport": {"width": 1180, "height": 1000}} | context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(LONG)
        self.seen = served.seen
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(served.address)
        self.page.wait_for_selector("#theirs section")

    def slide(self, name: str, value: int) -> None:
        field = self.page.locator(f"#{name} input[type=number]")
        field.fill(str(value))
        field.press("Tab")

    def ask(self, prompt: str, context: int = 0, tokens: int = TOKENS) -> None:
        self.page.fill("#prompt textarea", prompt)
        self.slide("context", context)
        self.slide("most", tokens)
        self.begin(lambda: self.page.click("#run"))

    def begin(self, do: Callable[[], None]) -> None:
        """Do an action that starts an answer."""
        do()
        self.page.wait_for_selector("#stop:enabled")
        self.seen.release()

    def wait(self) -> None:
        self.page.wait_for_selector("#run:enabled")

    def until(self, what: Callable[[], bool]) -> None:
        while not what():
            self.page.wait_for_timeout(100)

    def fact(self, side: str, name: str) -> str:
        return str(self.page.get_attribute(f"#{side} section", f"data-{name}"))

    def text(self, side: str) -> str:
        return str(self.page.inner_text(f"#{side} .lx-text"))

    def places(self) -> list[Any]:
        return [self.page.locator(part).bounding_box() for part in ("#run", "#ours", "#theirs", "#plots")]


@pytest.fixture(scope="module")
def served(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if not chromium:
        pytest.skip("needs chromium")
    from ligerexport.demo.app import launch

    liger, artifact = built
    shutil.copytree(artifact, chats := tmp_path_factory.mktemp("page") / "engine")
    (chats / "chat_template.jinja").write_text(toy.TEMPLATE)
    demo = Demo(str(chats), str(liger.parent / "source"), threads=1)
    run, seen = demo.run, threading.Semaphore(0)

    def when_seen(*arguments: Any) -> Iterator[dict[str, Any]]:
        changes = run(*arguments)
        yield next(changes)
        seen.acquire()
        yield from changes

    demo.run = when_seen  # type: ignore[method-assign]
    blocks, address = launch(demo)
    assert address.startswith("http://127.0.0.1:")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-background-networking"]
        )
        yield Served(address, demo, open_artifact(artifact).manifest, browser, seen)
        browser.close()
    blocks.close()
    demo.close()


@pytest.fixture
def page(served: Served) -> Iterator[Page]:
    """A page; afterwards all requests of a test's pages must be local, and their consoles empty."""
    yield served.open()
    for opened in served.pages:
        assert opened.complaints == []
        assert opened.requests and all(url.startswith(served.address) for url in opened.requests)
        opened.context.close()
    served.pages.clear()


def test_both_answer_and_nothing_jumps(page: Page) -> None:
    before = page.places()
    page.ask("Why is the sky blue?", context=1024, tokens=512)
    while page.page.locator("#run:disabled").count():
        assert page.places() == before
    assert page.places() == before
    for side in ("ours", "theirs"):
        assert page.fact(side, "finish") in ("length", "eos") and page.text(side)
        assert float(page.fact(side, "ms")) > 0
    drawn = page.page.locator("#plots .lx-chart").evaluate_all("charts => charts.map(x => +x.dataset.points)")
    assert len(drawn) == 2 and min(drawn) > 20
    assert page.page.locator("#plots polyline[points*=' ']").count() == 4
    assert "Finished" in page.page.inner_text("#status [role=status]")
    assert page.page.locator("#runs tbody tr").count() == 1


def test_the_slider_grows_the_cache_and_not_the_state(page: Page, served: Served) -> None:
    caches = []
    for context in (0, 1024):
        page.ask("Why?", context)
        page.wait()
        ours, theirs = (int(page.fact(side, "state")) for side in ("ours", "theirs"))
        assert ours == served.manifest.bytes.state_per_sequence
        assert theirs == served.manifest.bytes.kv_per_token * int(page.fact("theirs", "seen"))
        assert int(page.fact("theirs", "resident")) > 10_000_000
        caches.append(theirs)
    assert caches[1] - caches[0] == served.manifest.bytes.kv_per_token * (1024 + len("\n\n"))
    assert page.page.locator("#runs tbody tr").count() == 2


def test_a_stop_ends_an_answer_within_a_turn(page: Page, served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, after = [0], []
    work, stop = served.demo.pair.work, served.demo.stop

    def counted(*words: Any, **arguments: Any) -> dict[str, Any]:
        turns[0] += 1
        return work(*words, **arguments)

    monkeypatch.setattr(served.demo.pair, "work", counted)
    monkeypatch.setattr(served.demo, "stop", lambda session: (stop(session), after.append(turns[0])))
    page.ask("Why?", context=32_768)
    page.page.wait_for_selector("#theirs progress")
    page.page.click("#stop")
    page.wait()
    assert turns[0] - after[0] <= 1
    assert page.fact("theirs", "finish") == "stopped" and "Stopped" in page.page.inner_text("#status")
    page.ask("And now?")
    page.wait()
    assert page.fact("theirs", "finish") in ("length", "eos")


def test_a_stop_reaches_an_answer_while_the_page_measures(page: Page, served: Served) -> None:
    page.ask("Why?", context=32_768)
    page.page.wait_for_selector("#theirs progress")
    page.page.get_by_role("tab", name="Growth").click()
    page.slide("longest", 32_768)
    page.page.click("#measure")
    page.until(lambda: len(served.demo._stops) == 2)
    page.page.get_by_role("tab", name="Compare").click()
    page.page.click("#stop")
    page.wait()
    assert page.fact("theirs", "finish") == "stopped"
    page.until(lambda: not served.demo._stops)


def test_curves_fill_and_a_measurement_can_be_stopped(page: Page, served: Served) -> None:
    page.page.get_by_role("tab", name="Growth").click()
    assert page.page.is_disabled("#halt")
    page.slide("longest", 512)
    page.page.click("#measure")
    page.page.wait_for_selector("#halt:enabled")
    page.page.wait_for_selector("#measure:enabled")
    drawn = page.page.locator("#growth .lx-chart").evaluate_all("charts => charts.map(x => +x.dataset.points)")
    assert drawn == [2 * POINTS, 2 * POINTS] and "Measured" in page.page.inner_text("#progress")
    page.slide("longest", 32_768)
    page.page.click("#measure")
    page.page.wait_for_selector("#progress progress")
    page.page.click("#halt:enabled")
    page.page.wait_for_selector("#halt:disabled")
    assert not served.demo._stops and "Stopped" in page.page.inner_text("#progress")


def test_a_chat_has_turns_and_constant_memory(page: Page, served: Served) -> None:
    page.page.get_by_role("tab", name="Chat").click()
    before = page.page.locator("#message").bounding_box()
    for turn in (1, 2):
        page.page.fill("#message textarea", f"Question {turn}")
        page.page.press("#message textarea", "Enter")
        page.until(lambda turn=turn: page.page.locator("#turns .bot, #turns .user").count() >= 2 * turn)
        page.page.wait_for_selector("#memory svg:not([data-points='0'])")
        page.page.wait_for_selector("#send:enabled")
        assert page.page.locator("#message").bounding_box() == before
    size = format_bytes(served.manifest.bytes.state_per_sequence)
    assert page.page.inner_text("#memory dl div:nth-child(2) dd") == size
    assert "Question 1" in page.page.inner_text("#turns")
    page.page.click("#clear")
    page.until(lambda: "Question" not in page.page.inner_text("#turns"))
    assert not served.demo.talks._talks and not served.demo._stops


def test_two_pages_stay_apart(page: Page, served: Served) -> None:
    other, questions = served.open(), {"page": "What is one?", "other": "Quite another question, 2 + 2"}
    alone = {}
    for opened, name in ((page, "page"), (other, "other")):
        opened.ask(questions[name])
        opened.wait()
        alone[name] = opened.text("ours"), opened.text("theirs")
    page.ask(questions["page"], tokens=TOKENS)
    other.ask(questions["other"], tokens=TOKENS)
    page.wait()
    other.wait()
    assert (page.text("ours"), page.text("theirs")) == alone["page"] != alone["other"]
    assert (other.text("ours"), other.text("theirs")) == alone["other"]
    page.ask("Why?", context=32_768)
    page.page.wait_for_selector("#theirs progress")
    other.ask(questions["other"])
    page.page.click("#stop")
    other.wait()
    assert (other.text("ours"), other.text("theirs")) == alone["other"]


@pytest.mark.parametrize("how", ["close", "reload"])
def test_a_page_that_goes_ends_its_answer(page: Page, served: Served, how: str) -> None:
    gone = served.open()
    gone.ask("Why?", context=32_768)
    gone.page.wait_for_selector("#theirs progress")
    assert len(served.demo._stops) == 1
    getattr(gone.page, how)()
    gone.complaints.clear()  # of what the page had asked for when it went
    page.until(lambda: not served.demo._stops)
    page.ask("Why?")
    page.wait()
    assert page.text("theirs")


def test_the_pass_key_preset_says_whether_it_was_recalled(page: Page) -> None:
    page.page.get_by_label("Find a pass key").check()
    page.page.wait_for_selector("#depth")
    assert page.page.locator("#prompt textarea").is_disabled()
    page.slide("context", 256)
    page.begin(lambda: page.page.click("#run"))
    page.wait()
    for side in ("ours", "theirs"):
        assert "recall" in page.page.inner_text(f"#{side} section b")
    key = page.page.locator("#asked mark").text_content()
    assert key and len(key) == 5 and key.isdigit()


def test_mistakes_show_as_messages(page: Page) -> None:
    page.page.fill("#prompt textarea", " ")
    page.begin(lambda: page.page.click("#run"))
    page.page.wait_for_selector("#status [role=alert]")
    assert "There is no question" in page.page.inner_text("#status")
    page.wait()


def test_the_keyboard_is_enough(page: Page) -> None:
    page.page.focus("#prompt textarea")
    page.page.keyboard.press("Control+A")
    page.page.keyboard.type("Typed?")
    page.begin(lambda: page.page.keyboard.press("Shift+Enter"))
    page.wait()
    reached = set()
    for _ in range(30):
        page.page.keyboard.press("Tab")
        reached.add(page.page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"run", "lx-text", "lx-table"} <= reached


@pytest.mark.parametrize(("width", "height"), [(1280, 800), (768, 1024), (390, 844)])
def test_answers_are_in_view_and_nothing_scrolls_sideways(page: Page, width: int, height: int) -> None:
    """A wide screen has the question beside the answers; a narrow one scrolls to them, and a phone has one column."""
    page.page.set_viewport_size({"width": width, "height": height})
    page.ask("Why?", tokens=8)
    page.wait()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= width
    run, ours, theirs, plots = page.places()
    assert 0 <= page.page.locator("#status").bounding_box()["y"] < height
    assert ours["y"] >= 0 and ours["y"] + ours["height"] <= height
    if width < 500:
        assert theirs["y"] >= ours["y"] + ours["height"]
    else:
        assert theirs["x"] >= ours["x"] + ours["width"] and theirs["y"] == ours["y"]
    assert (ours["x"] >= run["x"] + run["width"]) == (width > 1000)
    assert plots["y"] >= theirs["y"] + theirs["height"]
    page.page.get_by_text("All that both models read").click()
    assert "Why?" in page.page.inner_text("#asked .lx-held")


def test_light_and_dark_have_contrast(page: Page) -> None:
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        page.page.reload()
        page.page.wait_for_selector("#theirs section")
        page.page.wait_for_function(f"document.body.classList.contains('dark') == {str(scheme == 'dark').lower()}")
        page.page.evaluate("document.getAnimations().forEach(x => x.finish())")
        paper = luminance(page, ".lx-card", "backgroundColor")
        assert (paper < 0.2) == (scheme == "dark")
        parts = (".lx-card strong", ".lx-card dt", "#ours dd", "#theirs dd", ".lx-line", "#status p", ".max_value")
        for part in parts:
            ink = luminance(page, part, "color")
            assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5, (scheme, part)


def luminance(page: Page, part: str, what: str) -> float:
    """Return the relative luminance of a colour (WCAG)."""
    colour = page.page.eval_on_selector(part, f"e => getComputedStyle(e).{what}")
    parts = [int(float(x)) / 255 for x in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_the_other_tabs(page: Page) -> None:
    page.ask("Why?", context=256, tokens=8)
    page.wait()
    page.page.get_by_role("tab", name="What it still holds").click()
    page.page.wait_for_selector("#held mark.lx-held5")
    assert "Why?" in page.page.inner_text("#held .lx-held")
    assert "unknown how much of the attention" in page.page.inner_text("#held aside")
    page.slide("layer", 1)
    page.slide("head", 2)
    page.page.wait_for_function("document.querySelector('#held .lx-note').innerText.startsWith('This head')")
    page.page.get_by_role("tab", name="Model card").click()
    assert "compared with PyTorch" in page.page.inner_text("#card")
    page.page.get_by_role("tab", name="Growth").click()
    assert "ligerexport bench" in page.page.inner_text("#measured")


def test_answers_forbid_what_is_elsewhere(page: Page, served: Served) -> None:
    answer = page.page.request.get(served.address)
    assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert page.page.request.get(served.address, headers={"Host": "elsewhere.example"}).status == 400
