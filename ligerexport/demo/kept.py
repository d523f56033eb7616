"""The tab that shows what a model still holds of a text, and how much of its attention went to what it forgot."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

from ligerexport.artifact.artifact import Manifest
from ligerexport.demo.chart import Line, chart
from ligerexport.demo.compare import Stream
from ligerexport.model.config import LigerConfig
from ligerexport.text.tokenizer import Detokenizer, TextModel

SHADES = 5
"""Number of shades; each stands for an equal range of shares of the chosen heads."""
NOTHING = (
    '<p class="lx-note">Ask a question in the tab “Compare” first. Then this tab shows the text that the model read '
    "and wrote, with marks at the tokens that it still holds.</p>"
)
UNKNOWN = (
    '<p class="lx-note">It is not known which tokens this model holds. Models that <code>ligerexport build</code> '
    "wrote can tell.</p>"
)
WITHOUT_METER = "the model was built without <code>--meter</code>."
KEEPS_NOTHING = (
    "this model keeps nothing of a token that it forgets. It is known for a model that was converted with "
    "<code>--preset evicted</code> and built with <code>--meter</code>."
)


@dataclass(frozen=True, eq=False)  # Gradio compares states by their hash
class Kept:
    """What a model held at the end of an answer.

    Attributes:
        pieces: Text of each token that it has seen, in order.
        held: Positions of the tokens that it holds, by layer and KV head.
        forgotten: See `Stream.forgotten`.
        unmeasured: Why there is no `forgotten`.
    """

    pieces: Sequence[str]
    held: Sequence[Sequence[Sequence[int]]]
    forgotten: Sequence[Sequence[float]] = ()
    unmeasured: str = KEEPS_NOTHING

    @property
    def heads(self) -> int:
        """Number of KV heads of a layer."""
        return max(map(len, self.held))


def kept_of(stream: Stream, text: TextModel, manifest: Manifest | None) -> Kept | None:
    """Return what the model of a finished answer holds; None if that is unknown."""
    if not stream.held or manifest is None:
        return None
    detokenizer = Detokenizer(text)
    pieces = [detokenizer.push(token) for token in [*stream.prompt, *stream.ids][: stream.seen]]
    evicts = LigerConfig.from_dict(manifest.liger).evicts
    return Kept(pieces, stream.held, stream.forgotten, WITHOUT_METER if evicts else KEEPS_NOTHING)


def marked(kept: Kept | None, layer: int, head: int) -> str:
    """Return the text with marks, and the share of attention that went to forgotten tokens.

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
    return (
        f'<div class="lx-note" role="status">{_summary(counts, len(chosen), sum(map(len, kept.held)))}</div>'
        f'<div class="lx-kept"><div class="lx-held" tabindex="0" role="region" '
        f'aria-label="The text, with marks at what is held">{body}</div>{_forgotten(kept, layer)}</div>'
    )


def _summary(counts: Sequence[int], chosen: int, heads: int) -> str:
    """Return a sentence about the chosen heads, and what the marks mean."""
    held, total = f"{sum(counts) / max(1, chosen):,.0f}", f"{len(counts):,}"
    if chosen == 1:
        return (f"This head, one of {heads}, still holds {held} of {total} tokens. "
                f'They are <mark class="lx-held{SHADES}">marked</mark>.')  # fmt: skip
    dropped = sum(count == 0 for count in counts)
    scale = " ".join(_run(shade, f"up to {100 * shade // SHADES}%") for shade in range(1, SHADES + 1))
    return (f"Each of these {chosen} heads still holds {held} of {total} tokens on average, and {dropped:,} tokens are "
            f"held by none. Marks show how many of the heads hold a token: {scale}")  # fmt: skip


def _forgotten(kept: Kept, layer: int) -> str:
    """Return a chart of the shares of one layer, or of their mean over all, and a sentence; or why there is none."""
    if not kept.forgotten:
        said = f"It is unknown how much of the attention went to forgotten tokens: {kept.unmeasured}"
        return f'<aside class="lx-forgot" aria-label="Forgotten tokens"><p class="lx-line">{said}</p></aside>'
    where = f"layer {layer}" if layer else "all layers"
    shares = [row[layer - 1] if layer else statistics.fmean(row) for row in kept.forgotten]
    points = [(i + 1, share) for i, share in enumerate(shares)]
    drawn = chart(f"Attention to forgotten tokens, {where}", "token of the answer", [Line(where, "ours", points)],
                  lambda share: f"{100 * share:g}%", (1, max(2, len(points))))  # fmt: skip
    return (
        f'<aside class="lx-forgot" aria-label="Forgotten tokens">{drawn}<p class="lx-line">At least '
        f"{statistics.fmean(shares):.1%} of the attention in {where} went to tokens that the heads no longer hold, of "
        "which they have only a summary. A high share does not mean that the answer is wrong.</p></aside>"
    )


def _run(shade: int, text: str) -> str:
    return f'<mark class="lx-held{shade}">{escape(text)}</mark>' if shade else escape(text)
