"""The tab that shows which tokens of a text a model still holds: the text, with marks where heads hold it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from ligerexport.demo.compare import Stream
from ligerexport.text.tokenizer import Detokenizer, TextModel

SHADES = 5
"""Number of shades; the darkest means that all chosen heads hold a token."""
NOTHING = (
    '<p class="lx-note">Run a question first. This tab then shows its text, with marks at the tokens that the model '
    "still holds.</p>"
)


@dataclass(frozen=True, eq=False)  # Gradio compares states by their hash
class Kept:
    """What a model held at the end of an answer.

    Attributes:
        pieces: Text of each token that it has seen, in order.
        held: Positions of the tokens that it holds, by layer and KV head.
    """

    pieces: Sequence[str]
    held: Sequence[Sequence[Sequence[int]]]

    @property
    def heads(self) -> int:
        """Number of KV heads of a layer."""
        return max(map(len, self.held))


def kept_of(stream: Stream, text: TextModel) -> Kept | None:
    """Return what the model of a finished answer holds; None if that is unknown."""
    if not stream.held:
        return None
    detokenizer = Detokenizer(text)
    return Kept([detokenizer.push(token) for token in [*stream.prompt, *stream.ids][: stream.seen]], stream.held)


def marked(kept: Kept | None, layer: int, head: int) -> str:
    """Return the text with marks.

    Args:
        kept: What is held.
        layer: A layer from 1; 0 takes all.
        head: A KV head from 1; 0 takes all.
    """
    if kept is None:
        return NOTHING
    chosen = [
        positions
        for heads in (kept.held if layer == 0 else kept.held[layer - 1 : layer])
        for positions in (heads if head == 0 else heads[head - 1 : head])
    ]
    counts = [0] * len(kept.pieces)
    for positions in chosen:
        for position in positions:
            counts[position] += 1
    shades = [-(-SHADES * count // max(1, len(chosen))) for count in counts]
    runs = groupby(zip(shades, kept.pieces, strict=True), key=lambda pair: pair[0])
    body = "".join(_run(shade, "".join(piece for _, piece in run)) for shade, run in runs)
    average, total = sum(counts) / max(1, len(chosen)), len(counts)
    dropped = sum(count == 0 for count in counts)
    which = f"{len(chosen)} heads" if len(chosen) > 1 else "This head"
    said = (
        f"{which} of {sum(map(len, kept.held))}, after {total:,} tokens: {average:,.0f} tokens"
        f"{' on average' if len(chosen) > 1 else ''} are held, and {dropped:,} by none of them."
    )
    scale = "".join(f'<mark class="lx-held{shade}">{_share(shade)}</mark> ' for shade in range(1, SHADES + 1))
    return (
        f'<p class="lx-note" role="status">{said} Share of the chosen heads that hold a token: {scale}</p>'
        '<div class="lx-held" tabindex="0" role="region" aria-label="The text, with marks at what is held">'
        f"{body}</div>"
    )


def _run(shade: int, text: str) -> str:
    return f'<mark class="lx-held{shade}">{escape(text)}</mark>' if shade else escape(text)


def _share(shade: int) -> str:
    return "all" if shade == SHADES else f"to {100 * shade // SHADES}%"
