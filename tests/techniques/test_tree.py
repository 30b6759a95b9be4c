"""Draft trees: order, choice, and what they are expected to bring."""

from __future__ import annotations

from itertools import combinations, product
from math import prod

import pytest
import torch
from torch import Tensor

from hasten.causal.drafter.tree import Tree, chain_tree, random_tree, tuned_tree
from hasten.causal.slots import Draft

ACCURACY = torch.tensor([[0.5, 0.2, 0.1], [0.4, 0.3, 0.05], [0.35, 0.1, 0.02]])


def random_accuracy(seed: int, heads: int = 3, ranks: int = 4) -> Tensor:
    """Some chances that sum to less than one per head, in no order."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(heads, ranks, generator=generator) / ranks


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("num_nodes", [1, 2, 7, 16, 40])
def test_trees_are_topological_and_have_no_twins(seed: int, num_nodes: int) -> None:
    for tree in (
        tuned_tree(random_accuracy(seed), num_nodes),
        random_tree(3, 4, num_nodes, seed=seed),
    ):
        assert tree.num_nodes == num_nodes
        assert all(parent < node for node, parent in enumerate(tree.parents))
        children = list(zip(tree.parents, tree.ranks, strict=True))
        assert len(set(children)) == len(children), "one parent has the same guess twice"
        assert max(tree.depths) <= 3 and max(tree.ranks) < 4
        assert list(tree.depths) == Draft(torch.zeros(1, num_nodes), tree.parents).depths()


def test_a_tree_is_no_larger_than_its_combinations() -> None:
    assert tuned_tree(ACCURACY, 1000).num_nodes == 3 + 9 + 27
    assert random_tree(2, 3, 1000).num_nodes == 3 + 9


def test_the_tuned_tree_is_the_best_one() -> None:
    paths = [path for depth in (1, 2) for path in product(range(3), repeat=depth)]
    chance = {path: prod(float(ACCURACY[d, r]) for d, r in enumerate(path)) for path in paths}
    for num_nodes in (1, 2, 3, 4, 5):
        closed = [
            sum(chance[path] for path in chosen)
            for chosen in combinations(paths, num_nodes)
            if all(path[:-1] in chosen or len(path) == 1 for path in chosen)
        ]
        tree = tuned_tree(ACCURACY[:2], num_nodes)
        assert tree.expected_tokens(ACCURACY[:2]) == pytest.approx(1 + max(closed))


def test_more_nodes_bring_more_and_random_ones_less() -> None:
    accuracy = random_accuracy(3)
    expected = [tuned_tree(accuracy, n).expected_tokens(accuracy) for n in range(1, 30)]
    assert expected == sorted(expected) and expected[-1] < 4
    for seed in range(10):
        rival = random_tree(3, 4, 12, seed=seed)
        assert rival.expected_tokens(accuracy) <= tuned_tree(accuracy, 12).expected_tokens(accuracy)


def test_the_likeliest_path_stands_first() -> None:
    tree = tuned_tree(ACCURACY, 12)
    assert tree.paths()[:3] == [(0,), (0, 0), (0, 0, 0)]
    assert tree.parents[:3] == (-1, 0, 1)
    # Guesses need not be ordered: where the second one is right more often, it comes first.
    swapped = tuned_tree(ACCURACY[:, [1, 0, 2]], 12)
    assert swapped.paths()[:3] == [(1,), (1, 1), (1, 1, 1)]


def test_chain() -> None:
    assert chain_tree(3, 8) == Tree((-1, 0, 1), (0, 0, 0))
    assert chain_tree(3, 2) == Tree((-1, 0), (0, 0))
    assert chain_tree(3, 8).expected_tokens(ACCURACY) == pytest.approx(
        1 + 0.5 + 0.5 * 0.4 + 0.5 * 0.4 * 0.35
    )


def test_random_trees_differ_by_seed_only() -> None:
    assert random_tree(3, 10, 8, seed=1) == random_tree(3, 10, 8, seed=1)
    assert random_tree(3, 10, 8, seed=1) != random_tree(3, 10, 8, seed=2)
