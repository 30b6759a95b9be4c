"""Draft trees: which combinations of several heads' guesses one pass verifies.

A node at depth d holds one of the guesses of head d; its rank says which (0 is the likeliest).
Siblings are different ranks of one head, so no parent has the same child token twice.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """A tree below the root (the newest token), nodes in topological order.

    Attributes:
        parents: parent of each node, -1 for the root's children.
        ranks: which guess of its head each node holds.
    """

    parents: tuple[int, ...]
    ranks: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.parents) == len(self.ranks)
        assert all(parent < node for node, parent in enumerate(self.parents))

    @property
    def num_nodes(self) -> int:
        """Nodes without the root."""
        return len(self.parents)

    @property
    def depths(self) -> tuple[int, ...]:
        """Distance of each node from the root (its children have 1)."""
        depths: list[int] = []
        for parent in self.parents:
            depths.append(1 if parent < 0 else depths[parent] + 1)
        return tuple(depths)

    @property
    def depth(self) -> int:
        """Nodes on the longest path."""
        return max(self.depths, default=0)

    def paths(self) -> list[tuple[int, ...]]:
        """Ranks from the root's child down to each node."""
        paths: list[tuple[int, ...]] = []
        for parent, rank in zip(self.parents, self.ranks, strict=True):
            paths.append((*(paths[parent] if parent >= 0 else ()), rank))
        return paths

    def expected_tokens(self, accuracy: Tensor) -> float:
        """Tokens per pass that this tree should give: 1 and every node's chance to be accepted.

        Args:
            accuracy: (heads, ranks), as in `tuned_tree`.
        """
        table = accuracy.tolist()
        chances: list[float] = []
        for parent, rank, depth in zip(self.parents, self.ranks, self.depths, strict=True):
            chances.append((chances[parent] if parent >= 0 else 1.0) * table[depth - 1][rank])
        return 1.0 + sum(chances)


def tuned_tree(accuracy: Tensor, num_nodes: int) -> Tree:
    """The tree of that many nodes that should be accepted furthest (Medusa, section 2.3.3).

    A node is accepted with the product of the accuracies on its path, the heads taken as
    independent; the node with the highest product comes next. A product never exceeds its
    parent's, so the greedy order is the best one and is topological.

    Args:
        accuracy: (heads, ranks) chance that the guess of that rank is right.
        num_nodes: nodes wanted; the tree has fewer only where there are no more combinations.
    """
    table = accuracy.tolist()
    # (-chance, order of arrival, parent, depth, rank): ties go to the node that came first.
    frontier = [(-chance, rank, -1, 0, rank) for rank, chance in enumerate(table[0])]
    heapq.heapify(frontier)
    arrivals = len(frontier)
    parents: list[int] = []
    ranks: list[int] = []
    while frontier and len(parents) < num_nodes:
        negative, _, parent, depth, rank = heapq.heappop(frontier)
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        for below, chance in enumerate(table[depth + 1] if depth + 1 < len(table) else ()):
            heapq.heappush(frontier, (negative * chance, arrivals, node, depth + 1, below))
            arrivals += 1
    return _path_by_path(parents, ranks)


def _path_by_path(parents: list[int], ranks: list[int]) -> Tree:
    """The same tree with each node's first child right behind it.

    The first children are the likeliest ones. A path that consists of them is then a run of nodes
    from the start, whose keys and values need not be moved when it is accepted.
    """
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents):
        children.setdefault(parent, []).append(node)
    order: list[int] = []
    waiting = children.get(-1, [])[::-1]
    while waiting:
        node = waiting.pop()
        order.append(node)
        waiting += children.get(node, [])[::-1]
    place = {node: index for index, node in enumerate(order)} | {-1: -1}
    return Tree(tuple(place[parents[node]] for node in order), tuple(ranks[node] for node in order))


def chain_tree(num_heads: int, num_nodes: int) -> Tree:
    """The likeliest guess of each head, one after the other."""
    length = min(num_heads, num_nodes)
    return Tree(tuple(range(-1, length - 1)), (0,) * length)


def random_tree(num_heads: int, num_ranks: int, num_nodes: int, *, seed: int = 0) -> Tree:
    """A tree of random nodes, each hung below a random node that is there already."""
    generator = random.Random(seed)
    frontier = [(-1, 0, rank) for rank in range(num_ranks)]
    parents: list[int] = []
    ranks: list[int] = []
    while frontier and len(parents) < num_nodes:
        parent, depth, rank = frontier.pop(generator.randrange(len(frontier)))
        node = len(parents)
        parents.append(parent)
        ranks.append(rank)
        if depth + 1 < num_heads:
            frontier += [(node, depth + 1, below) for below in range(num_ranks)]
    return Tree(tuple(parents), tuple(ranks))
