"""Take the pictures of the demo for the documents, with an installed browser.

python benchmarks/screenshots.py build/smollm2-onnx --against smollm2-135m -o docs/images
"""

from __future__ import annotations

import argparse
import io
import shutil
from pathlib import Path

from PIL import Image
from playwright import sync_api

from ligerexport.demo.app import launch
from ligerexport.demo.host import Demo
from ligerexport.demo.prompts import SUMMARISE

PICTURES = {"light": (1120, 1330, "light"), "dark": (1120, 1330, "dark"), "narrow": (390, 2200, "light")}
"""Width, height and colours of each."""
COLOURS = 96
"""Number of colours in the palette, which keeps the files small."""


def take(browser: sync_api.Browser, address: str, output: Path, context: int) -> None:
    """Ask one question in each size and take a picture of the result."""
    for name, (width, height, scheme) in PICTURES.items():
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        page.goto(address)
        page.wait_for_selector("#theirs section")
        page.get_by_label(SUMMARISE.name).check()
        field = page.locator("#context input[type=number]")
        sync_api.expect(field).to_have_value(str(SUMMARISE.context))
        field.fill(str(context))
        field.press("Tab")
        page.click("#run")
        page.wait_for_selector("#stop:enabled")
        page.wait_for_selector("#run:enabled", timeout=1_200_000)
        page.mouse.move(0, 0)
        page.wait_for_timeout(500)
        image = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        image.quantize(COLOURS, dither=Image.Dither.NONE).save(output / f"demo-{name}.png", optimize=True)
        page.close()


def main() -> None:
    """Serve the demo and take all pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--against", required=True)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--context", type=int, default=1024)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    demo = Demo(args.artifact, args.against)
    try:
        _, address = launch(demo)
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            take(browser, address, args.output, args.context)
            browser.close()
    finally:
        demo.close()


if __name__ == "__main__":
    main()
