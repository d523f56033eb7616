"""Draw the pictures of the documents that show no measurement: a token's life, and the rooms of the package.

python benchmarks/drawings.py            writes docs/images/token_life.svg and docs/images/architecture.svg
python benchmarks/drawings.py --check    fails if a picture differs from what would be drawn
"""

from __future__ import annotations

import sys
from html import escape
from pathlib import Path

IMAGES = Path(__file__).parents[1] / "docs" / "images"
TEAL, ORANGE, VIOLET, GREY = "#00796b", "#e65100", "#5e35b1", "#546e7a"
FILL = {TEAL: "#e0f2f1", ORANGE: "#fff3e0", VIOLET: "#ede7f6", GREY: "#eceff1"}


def text(x: float, y: float, words: str, size: int = 14, weight: int = 400, anchor: str = "middle") -> str:
    """Return one line of text."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(words)}</text>"
    )


def box(x: float, y: float, width: float, height: float, colour: str, title: str, *lines: str) -> str:
    """Return a titled box with lines of text in its middle."""
    middle, top = x + width / 2, y + height / 2 - 9 * len(lines) + 5
    return "\n".join([
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="8" fill="{FILL[colour]}" '
        f'stroke="{colour}" stroke-width="1.5"/>',
        text(middle, top, title, 15, 600),
        *(text(middle, top + 19 * (i + 1), line, 13) for i, line in enumerate(lines)),
    ])  # fmt: skip


def arrow(points: list[tuple[float, float]], words: str = "", at: tuple[float, float] | None = None) -> str:
    """Return a line with a head at its end, and words at `at`."""
    path = " ".join(f"{x:g},{y:g}" for x, y in points)
    line = f'<polyline points="{path}" fill="none" stroke="#37474f" stroke-width="1.5" marker-end="url(#head)"/>'
    return line + (text(*at, words, 12) if at else "")


def picture(width: int, height: int, title: str, *parts: str) -> str:
    """Return a whole SVG on a white ground, so that it can be read on light and dark pages."""
    head = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        'orient="auto-start-reverse"><path d="M0 0L10 5L0 10z" fill="#37474f"/></marker></defs>'
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        'font-family="system-ui, sans-serif" fill="#263238">',
        f"<title>{escape(title)}</title>", head,
        f'<rect width="{width}" height="{height}" rx="10" fill="#ffffff"/>', *parts, "</svg>",
    ]) + "\n"  # fmt: skip


def token_life() -> str:
    """Draw what happens to a token after its arrival."""
    return picture(
        820, 400, "A token enters the window; then it is a sink, wins a slot, or is evicted",
        box(20, 40, 130, 76, GREY, "new token", "key, value,", "position"),
        arrow([(150, 78), (196, 78)]),
        box(200, 40, 150, 76, TEAL, "window", "the last 60 tokens,", "kept exactly"),
        arrow([(350, 78), (456, 78)], "60 tokens later", (402, 68)),
        box(460, 40, 190, 76, GREY, "leaves the window", "its score is now fixed"),
        arrow([(555, 116), (555, 176)], "best by score", (602, 150)),
        box(460, 180, 190, 76, TEAL, "pool of slots", "64 exact tokens,", "no matter how old"),
        arrow([(650, 78), (725, 78), (725, 316)], "score too low", (735, 68)),
        arrow([(555, 256), (555, 354), (636, 354)], "loses its slot to a better token", (455, 310)),
        box(640, 320, 165, 66, ORANGE, "evicted", "added to fixed sums,", "or dropped"),
        box(200, 180, 150, 76, TEAL, "sinks", "the first 4 tokens,", "kept for ever"),
        arrow([(275, 116), (275, 176)], "first 4 only", (318, 150)),
        text(20, 300, "Each new token reads all of these:", 13, 600, "start"),
        text(20, 321, "softmax attention over window, sinks and slots;", 13, 400, "start"),
        text(20, 342, "presets with a recurrence also read the sums.", 13, 400, "start"),
        text(20, 372, "The sizes never grow with the text.", 13, 600, "start"),
    )  # fmt: skip


def architecture() -> str:
    """Draw the way from a checkpoint to an artifact, with the room that does each part."""
    return picture(
        860, 470, "From a Transformer checkpoint to an artifact, with the rooms of the package",
        box(20, 30, 150, 70, GREY, "Transformer", "safetensors, GGUF"),
        arrow([(170, 65), (226, 65)]),
        box(230, 30, 180, 70, TEAL, "checkpoint/", "reads, converts,", "compares layers"),
        arrow([(410, 65), (466, 65)]),
        box(470, 30, 170, 70, GREY, "converted", "checkpoint (torch)"),
        arrow([(555, 100), (555, 146)]),
        box(470, 150, 170, 70, TEAL, "exporters/", "writes a graph,", "verifies it"),
        arrow([(555, 220), (555, 266)]),
        box(470, 270, 170, 70, GREY, "artifact", "graph, weights,", "manifest"),
        arrow([(470, 305), (414, 305)]),
        box(230, 270, 180, 70, TEAL, "run/", "sessions,", "text, snapshots"),
        arrow([(230, 305), (174, 305)]),
        box(20, 270, 150, 70, GREY, "text"),
        arrow([(640, 50), (726, 50)]),
        arrow([(730, 84), (644, 84)]),
        box(730, 30, 115, 70, VIOLET, "train/", "recover,", "allocate"),
        box(730, 150, 115, 70, VIOLET, "measure/", "evaluate, bench"),
        box(730, 270, 115, 70, VIOLET, "demo/", "two models", "on a page"),
        arrow([(640, 90), (690, 90), (690, 170), (726, 170)]),
        arrow([(640, 305), (726, 305)]),
        arrow([(640, 285), (690, 285), (690, 200), (726, 200)]),
        box(230, 150, 180, 70, ORANGE, "layers/ and kernels/", "the mixer of a layer", "and its operators"),
        arrow([(320, 150), (320, 104)]),
        arrow([(410, 185), (466, 185)]),
        box(20, 150, 150, 70, ORANGE, "model/", "families, gates,", "scores, state"),
        arrow([(170, 185), (226, 185)]),
        box(20, 380, 825, 66, GREY, "cli/: one file for each command",
            "artifact/, text/, console, errors, staging: shared"),
    )  # fmt: skip


PICTURES = {"token_life": token_life, "architecture": architecture}


def main() -> None:
    """Write or check the pictures."""
    stale = []
    for name, draw in PICTURES.items():
        path = IMAGES / f"{name}.svg"
        if "--check" not in sys.argv:
            path.write_text(draw(), encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != draw():
            stale.append(f"stale: {path.name}")
    sys.exit("\n".join(stale) or None)


if __name__ == "__main__":
    main()
