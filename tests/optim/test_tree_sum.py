"""A sum in a tree has the same bits whoever adds which part of it."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from savant_ray.optim.tree_sum import Node, TreeSum, largest_nodes, max_sums


def leaf_values(n: int) -> torch.Tensor:
    """Return n leaves of three numbers whose sum depends on the order of the additions."""
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, 3, generator=generator) * torch.exp(4 * torch.randn(n, 1, generator=generator))


def by_definition(leaves: torch.Tensor, first: int, size: int) -> torch.Tensor:
    """Return the sum of a node as the module's docstring defines it."""
    half = size // 2
    if size == 1:
        return leaves[first]
    if first + half >= len(leaves):
        return by_definition(leaves, first, half)
    return by_definition(leaves, first, half) + by_definition(leaves, first + half, half)


@st.composite
def divisions(draw: st.DrawFn) -> tuple[int, list[range]]:
    """Return a number of leaves and their division among ranks, some of which may have none."""
    n = draw(st.integers(1, 70))
    cuts = sorted(draw(st.lists(st.integers(0, n), max_size=9)))
    return n, [range(*pair) for pair in zip([0, *cuts], [*cuts, n], strict=True)]


@given(divisions())
def test_any_division_among_ranks_gives_the_bits_of_the_tree(division: tuple[int, list[range]]) -> None:
    n, ranks = division
    leaves = leaf_values(n)
    combined = TreeSum()
    for own in ranks:
        tree = TreeSum()
        for index in own:
            tree.add(Node(index, 1), leaves[index])
        for node, total in zip(largest_nodes(own), tree.totals, strict=True):
            combined.add(node, total)
    assert torch.equal(combined.total(), by_definition(leaves, 0, 128))
    assert torch.equal(leaves, leaf_values(n)), "the leaves themselves are not changed"


@given(divisions())
def test_a_rank_keeps_few_sums_and_uses_their_memory_again(division: tuple[int, list[range]]) -> None:
    n, ranks = division
    tree, storages, most = TreeSum(), set(), 0
    for own in ranks:
        tree.clear()
        for index in own:
            tree.add(Node(index, 1), torch.ones(1))
            most = max(most, len(tree.totals))
            storages |= {total.data_ptr() for total in tree.totals}
    assert most <= 2 * n.bit_length() and len(storages) <= most


def test_the_memory_of_one_rank_is_predicted_exactly() -> None:
    tree, most = TreeSum(), 0
    for index in range(300):
        tree.add(Node(index, 1), torch.ones(1))
        most = max(most, len(tree.totals))
        assert most == max_sums(index + 1)
    assert float(tree.total()) == 300


@given(st.integers(0, 300), st.integers(0, 300))
def test_the_nodes_of_consecutive_leaves_are_as_large_as_possible(first: int, n: int) -> None:
    found = largest_nodes(range(first, first + n))
    assert [leaf for node in found for leaf in range(node.first, node.first + node.size)] == list(
        range(first, first + n)
    )
    assert all(node.first % node.size == 0 for node in found)
    assert not any(left.is_left_of(right) for left, right in pairwise(found))
