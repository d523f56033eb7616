"""Take the pictures of the demo for the documents, with an installed browser.

python benchmarks/screenshots.py ENGINE --against ORIGINAL -o docs/images [--metered METERED]

ENGINE is an artifact in int4 for the lowering `native`, and ORIGINAL a directory that the model builder of
onnxruntime-genai wrote for its Transformer, in int4 too; see docs/guides/demo.md. METERED is an artifact of the preset
`evicted` that was built with `--meter`; without it, its picture is not taken.
"""

from __future__ import annotations

import argparse
import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image
from playwright import sync_api

from ligerexport.demo.app import launch
from ligerexport.demo.host import Demo
from ligerexport.demo.prompts import SUMMARISE

LONG = 1_200_000
"""Milliseconds after which an answer is considered to hang."""
WIDE, PHONE = (1280, 800), (390, 844)
COLOURS = 96
"""Number of colours in the palette, which keeps the files small."""
QUESTIONS = ("What is the capital of France?", "Name three things to see there.", "How do I get there from Berlin?")


def save(page: sync_api.Page, file: Path) -> None:
    """Take a picture of what is in view."""
    page.mouse.move(0, 0)
    page.wait_for_timeout(500)
    image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, optimize=True)


def compare(page: sync_api.Page, context: int) -> None:
    """Ask both models a question about a text of `context` tokens."""
    field = page.locator("#context input[type=number]")
    sync_api.expect(field).to_have_value(str(SUMMARISE.context))
    field.fill(str(context))
    field.press("Tab")
    page.click("#run")
    page.wait_for_selector("#stop:enabled")
    page.wait_for_selector("#run:enabled", timeout=LONG)


def held(page: sync_api.Page) -> None:
    """Show what the first model holds."""
    page.get_by_role("tab", name="What it still holds").click()
    page.wait_for_selector("#held mark.lx-held5")


def chat(page: sync_api.Page) -> None:
    """Have a short conversation."""
    page.get_by_role("tab", name="Chat").click()
    for question in QUESTIONS:
        page.fill("#message textarea", question)
        page.press("#message textarea", "Enter")
        page.wait_for_selector("#hush:enabled")
        page.wait_for_selector("#send:enabled", timeout=LONG)


def growth(page: sync_api.Page, longest: int) -> None:
    """Measure both models up to a length."""
    page.get_by_role("tab", name="Growth").click()
    field = page.locator("#longest input[type=number]")
    field.fill(str(longest))
    field.press("Tab")
    page.click("#measure")
    page.wait_for_selector("#halt:enabled")
    page.wait_for_selector("#measure:enabled", timeout=LONG)


def take(browser: sync_api.Browser, address: str, output: Path, context: int, longest: int) -> None:
    """Take all pictures; those of one size share a page."""
    for scheme in ("light", "dark"):
        page = opened(browser, address, WIDE, scheme)
        compare(page, context)
        save(page, output / f"demo-{scheme}.png")
        if scheme == "light":
            held(page)
            save(page, output / "demo-held.png")
            chat(page)
            save(page, output / "demo-chat.png")
            growth(page, longest)
            save(page, output / "demo-growth.png")
        page.close()
    page = opened(browser, address, PHONE, "light")
    compare(page, context)
    save(page, output / "demo-narrow.png")
    page.close()


def opened(browser: sync_api.Browser, address: str, size: tuple[int, int], scheme: str) -> sync_api.Page:
    """Return the demo in a new window."""
    page = browser.new_page(viewport={"width": size[0], "height": size[1]}, color_scheme=scheme)
    page.goto(address)
    page.wait_for_selector("#theirs section")
    return page


def take_forgotten(browser: sync_api.Browser, address: str, output: Path, context: int) -> None:
    """Take the picture of the share of attention on forgotten tokens."""
    page = opened(browser, address, WIDE, "light")
    compare(page, context)
    held(page)
    page.wait_for_selector("#held .lx-chart")
    save(page, output / "demo-forgotten.png")
    page.close()


@contextmanager
def serving(model: str, against: str) -> Iterator[str]:
    """Serve the page of two models, and return its address."""
    demo = Demo(model, against)
    try:
        yield launch(demo)[1]
    finally:
        demo.close()


def main() -> None:
    """Serve the demo and take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--against", required=True)
    parser.add_argument("--metered")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--context", type=int, default=SUMMARISE.context)
    parser.add_argument("--longest", type=int, default=4096, help="last length of the measured curves")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        with serving(args.artifact, args.against) as address:
            take(browser, address, args.output, args.context, args.longest)
        if args.metered:
            with serving(args.metered, args.against) as address:
                take_forgotten(browser, address, args.output, args.context)
        browser.close()


if __name__ == "__main__":
    main()
