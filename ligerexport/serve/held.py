"""A state at its place in the tree of prefixes, and how soon it goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ligerexport.artifact.snapshot import Snapshot
from ligerexport.serve.delta import Delta
from ligerexport.serve.tree import Node

INSIDE = 0.1
"""Worth of a state inside a chat, as a share of that of the last one."""
SHORT = 256
"""Number of tokens that are rather read again than written to the disk as a state."""


@dataclass(eq=False)
class Held:
    """A state at a node of a tree.

    Attributes:
        space: Key of the tree in which it is.
        id: `digest` of its tokens.
        node: Its place.
        nbytes: Its size.
        answers: Whether it has the logits after its last token, so that an answer can begin there.
        snapshot: The state itself; None if it is on the disk only.
        base: The state from which it is a difference; None if it is whole.
        uses: Number of states that are differences from this one.
        tried: Whether a difference was tried already.
        written: Whether it is on the disk.
        writing: Whether it is on its way there.
        dropped: Whether the memory gives it up once it is written; it counts as written already.
        pinned, name: See `StateInfo`.
        stamp: Value of the cache's clock at its last use.
        used: Number of that use.
    """

    space: str
    id: str
    node: Node
    nbytes: int
    answers: bool
    snapshot: Snapshot | Delta | None = None
    base: Held | None = None
    uses: int = 0
    tried: bool = False
    written: bool = False
    writing: bool = False
    dropped: bool = False
    pinned: bool = False
    name: str = ""
    stamp: float = 0.0
    used: int = 0

    @property
    def ids(self) -> np.ndarray:
        """The tokens that the state has seen, `[T]` int64."""
        edges, node = [self.node.edge], self.node.parent
        while node is not None:
            edges.append(node.edge)
            node = node.parent
        return np.concatenate(edges[::-1])

    @property
    def taken(self) -> int:
        """Bytes of memory that it takes."""
        if self.snapshot is None or self.dropped:
            return 0
        return self.snapshot.nbytes if isinstance(self.snapshot, Delta) else self.nbytes

    @property
    def own(self) -> int:
        """Number of tokens that would be read again without it."""
        return self.node.length - next((node.length for node in self.node.above()), 0)

    @property
    def minor(self) -> bool:
        """Whether only another answer would need it, nobody chose it, and it takes little time to make it again."""
        return len(self.node.children) == 1 and self.own < SHORT and not (self.pinned or self.name)

    @property
    def priority(self) -> tuple[float, int]:
        """When it goes: the smallest first, and of equal ones the one that was used longest ago."""
        branches = len(self.node.children)
        share = 1.0 if branches == 0 else max(INSIDE, branches - 1.0)
        return self.stamp + share * self.own, self.used
