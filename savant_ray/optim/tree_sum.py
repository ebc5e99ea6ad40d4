"""Sums in a fixed binary tree, so that their bits do not depend on which rank adds which part.

The addition of floating-point numbers is commutative but not associative: a sum has the same bits wherever it is computed
if its parentheses are the same. Here they are those of a binary tree over the leaves 0 to n - 1. A node of size s, a power
of two, covers s leaves, the first of which is a multiple of s. It is the sum of its two halves, or its left half alone if
the right half has no leaves. The tree depends on n only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Node:
    """A node over the leaves `first` to `first + size - 1`; `size` is a power of two that divides `first`."""

    first: int
    size: int

    def is_left_of(self, other: Node) -> bool:
        """Return whether the two are the halves of a node, this one the left half."""
        return self.size == other.size and self.first + self.size == other.first and self.first % (2 * self.size) == 0


def largest_nodes(leaves: range) -> list[Node]:
    """Return the largest nodes that cover consecutive leaves, in their order.

    There are at most log2(n) + 1 for n leaves that begin at 0, and at most 2 log2(n) for n > 1 leaves anywhere.
    """
    found, first = [], leaves.start
    while first < leaves.stop:
        size = 1 << (leaves.stop - first).bit_length() - 1
        if first:
            size = min(size, first & -first)  # the largest power of two that divides `first`
        found.append(Node(first, size))
        first += size
    return found


def max_sums(n: int) -> int:
    """Return the largest number of tensors that a `TreeSum` keeps while the leaves 0 to n - 1 are added, n > 0."""
    return (n + 1).bit_length() - 1  # the largest number of ones in the binary form of a number up to n


class TreeSum:
    """Adds tensors of one shape, which arrive in the order of their leaves, and keeps the largest complete nodes.

    As many tensors are kept as `largest_nodes` returns for the leaves so far. Their memory is used again after `clear`.
    """

    def __init__(self) -> None:
        self._nodes: list[tuple[Node, Tensor]] = []
        self._unused: list[Tensor] = []

    def add(self, node: Node, values: Tensor) -> None:
        """Add the sum of a node's leaves; `values` is copied, or added to a sum that is kept."""
        total = values
        while self._nodes and self._nodes[-1][0].is_left_of(node):
            left, left_total = self._nodes.pop()
            left_total.add_(total)
            if total is not values:
                self._unused.append(total)
            node, total = Node(left.first, 2 * left.size), left_total
        self._nodes.append((node, self._copy(values) if total is values else total))

    @property
    def totals(self) -> Sequence[Tensor]:
        """Return the sums of `largest_nodes(range(first leaf, last leaf + 1))`; later additions change them."""
        return [total for _, total in self._nodes]

    def total(self) -> Tensor:
        """Return the sum of the whole tree, whose leaves must all have been added; valid until `clear` or `add`."""
        while len(self._nodes) > 1:
            _, right = self._nodes.pop()
            self._nodes[-1][1].add_(right)
            self._unused.append(right)
        return self._nodes[0][1]

    def clear(self) -> None:
        """Remove all leaves."""
        self._unused += self.totals
        self._nodes.clear()

    def _copy(self, values: Tensor) -> Tensor:
        buffer = self._unused.pop() if self._unused else values.new_empty(values.shape)
        return buffer.copy_(values)
