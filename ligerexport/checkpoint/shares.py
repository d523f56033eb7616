"""Share out the bytes of a memory over KV heads: which sizes a head may have, what they cost, and who gets which."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from ligerexport.errors import UsageError

WINDOWS = (16, 64, 128, 256, 512, 1024)
SLOTS = (0, 64, 128, 256, 512, 1024, 2048)
OPTIONS = tuple((window, slots) for window in WINDOWS for slots in SLOTS)
"""The memories that a head may have: window and scored slots."""

USUAL = 654
"""Tokens for each KV head in the default total of bytes; those of SmolLM2-135M take 8 MB."""


def head_bytes(sinks: int, window: int, slots: int, width: int) -> int:
    """Return the bytes of the state of a KV head with keys and values in 8 bits.

    A token has a key and a value, a scale of two bytes for each, and a position of 4 bytes. If the head has scored
    slots, every token also has a score of 4 bytes.

    Args:
        sinks: Number of first tokens.
        window: Number of most recent tokens.
        slots: Number of scored tokens.
        width: Width of key and value together.
    """
    return (sinks + window + slots) * (width + 8 + (4 if slots else 0))


def usual_bytes(heads: int, width: int) -> int:
    """Return the default total for a number of KV heads, rounded to two digits."""
    total = heads * USUAL * (width + 8)
    unit = 10 ** max(0, len(str(total)) - 2)
    return round(total / unit) * unit


def share_out(cost: Sequence[Sequence[float]], nbytes: Sequence[int], total: int) -> list[int]:
    """Choose an option for each head so that the costs add up to little and the bytes to at most `total`.

    Every head starts with the option of fewest bytes. Again and again, the step to a larger option that lowers the
    cost most per byte is taken, among those that still fit. The steps of a head follow the convex hull of its costs,
    so they become worse from one to the next. Therefore a larger total never costs more: it takes the same steps
    until one fits that did not fit before, and that step is worth more than all that filled its place.

    Args:
        cost: Cost of each option for each head.
        nbytes: Bytes of each option.
        total: Bytes that all heads may take together.

    Returns:
        The number of the option of each head.

    Raises:
        UsageError: The smallest options already take more than `total`.
    """
    least = min(range(len(nbytes)), key=nbytes.__getitem__)
    chosen, left = [least] * len(cost), total - len(cost) * nbytes[least]
    if left < 0:
        needed = total - left
        raise UsageError(
            f"{total:,} bytes of state, but the smallest memory of {len(cost)} KV heads takes {needed:,}",
            hint=f"--state-bytes {needed}",
        )

    def offer(head: int) -> tuple[float, int, int] | None:
        """Return the best step that fits: its change of the cost per byte, which is negative, head and option."""
        now = chosen[head]
        larger = [new for new in range(len(nbytes)) if 0 < nbytes[new] - nbytes[now] <= left]
        steps = [((cost[head][new] - cost[head][now]) / (nbytes[new] - nbytes[now]), head, new) for new in larger]
        best = min(steps, default=None)
        return best if best and best[0] < 0 else None

    waiting = [step for head in range(len(cost)) if (step := offer(head))]
    heapq.heapify(waiting)
    while waiting:
        _, head, new = heapq.heappop(waiting)
        needed = nbytes[new] - nbytes[chosen[head]]
        if needed <= left:
            chosen[head], left = new, left - needed
        if step := offer(head):
            heapq.heappush(waiting, step)
    return chosen


def words(sizes: Sequence[tuple[int, int]]) -> str:
    """Return the sizes of a layer's heads as `LigerConfig.heads` has them, such as `16 256+64`."""
    return " ".join(f"{window}+{slots}" if slots else str(window) for window, slots in sizes)
