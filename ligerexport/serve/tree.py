"""A radix tree over token prefixes. A node may hold a state; a node without one is where prefixes branch."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ligerexport.run.prompt_cache import common_length


class Node:
    """The end of a prefix.

    Attributes:
        edge: Tokens from the parent to here, `[n]` int64; empty for the root only.
        parent: The node before; None for the root.
        children: Nodes after this one, by the first token of their edges.
        length: Number of tokens from the root to here.
        held: What the tree keeps here; None for a node where prefixes branch.
    """

    __slots__ = ("children", "edge", "held", "length", "parent")

    def __init__(self, edge: np.ndarray, parent: Node | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[int, Node] = {}
        self.length: int = len(edge) + (parent.length if parent else 0)
        self.held: object | None = None

    def above(self) -> Iterator[Node]:
        """Yield the nodes above this one that hold something, the nearest first."""
        node = self.parent
        while node is not None:
            if node.held is not None:
                yield node
            node = node.parent


class Tree:
    """The prefixes of one owner."""

    def __init__(self) -> None:
        self.root = Node(np.empty(0, np.int64), None)

    def find(self, ids: np.ndarray, limit: int) -> tuple[list[Node], int]:
        """Return the nodes that hold something for a prefix of ids, the deepest first, and how many tokens are known.

        Args:
            ids: Tokens `[T]` int64.
            limit: Largest number of tokens of a prefix.
        """
        found: list[Node] = []
        node, known = self.root, 0
        while known < limit and (child := node.children.get(int(ids[known]))) is not None:
            same = common_length(child.edge, ids[known:limit])
            known += same
            if same < len(child.edge):
                break
            node = child
            if node.held is not None:
                found.append(node)
        return found[::-1], known

    def insert(self, ids: np.ndarray) -> Node:
        """Return the node of a prefix `[T]`, which is made if there is none."""
        node, at = self.root, 0
        while at < len(ids):
            child = node.children.get(int(ids[at]))
            if child is None:
                child = node.children[int(ids[at])] = Node(ids[at:].copy(), node)
            elif (same := common_length(child.edge, ids[at:])) < len(child.edge):
                child = _split(child, same)
            node, at = child, child.length
        return node

    def remove(self, node: Node) -> None:
        """Let a node hold nothing, and remove the nodes that are no longer needed."""
        node.held = None
        while node.held is None and (parent := node.parent) is not None and not node.children:
            del parent.children[int(node.edge[0])]
            node = parent
        if node.held is None and node.parent is not None and len(node.children) == 1:
            (child,) = node.children.values()
            child.edge, child.parent = np.concatenate([node.edge, child.edge]), node.parent
            node.parent.children[int(child.edge[0])] = child


def _split(node: Node, at: int) -> Node:
    """Put a node into an edge after `at` of its tokens, and return it."""
    assert node.parent is not None
    upper = Node(node.edge[:at].copy(), node.parent)
    node.parent.children[int(upper.edge[0])] = upper
    node.edge, node.parent = node.edge[at:].copy(), upper
    upper.children[int(node.edge[0])] = node
    return upper
