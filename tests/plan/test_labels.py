"""Union-find over slots, and what the four relations add up to."""

from __future__ import annotations

import networkx
import numpy as np
import pytest

from pat_fast.plan.labels import Slots, components, flat
from pat_fast.plan.rules.moving import reshape


@pytest.mark.parametrize("seed", range(20))
def test_components_are_those_of_networkx(seed: int) -> None:
    rng = np.random.default_rng(seed)
    n = int(rng.integers(1, 200))
    pairs = rng.integers(0, n, size=(2, int(rng.integers(0, 2 * n))))
    graph = networkx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(pairs.T.tolist())
    expected = np.empty(n, dtype=np.int64)
    for component in networkx.connected_components(graph):
        expected[list(component)] = min(component)
    np.testing.assert_array_equal(components(n, pairs), expected)


def test_a_long_chain_ends() -> None:
    n = 50_000
    chain = np.random.default_rng(0).permutation(n)
    assert (components(n, np.stack([chain[:-1], chain[1:]])) == 0).all()


def test_a_factor_that_is_a_whole_vector_is_known_by_it() -> None:
    slots = np.arange(6)
    for same in (slots.reshape(1, 6, 1), slots.reshape(2, 3), slots[:], slots.reshape(2, 3).T.T):
        assert flat(same) is slots
    spread = np.broadcast_to(slots[:1], (1, 6))
    others = (slots, slots[::-1], slots.reshape(2, 3).T, slots[:5], np.arange(7)[1:], spread)
    for other in others:
        np.testing.assert_array_equal(flat(other), other.reshape(-1))


def test_channels_units_and_frozen_reasons() -> None:
    slots = Slots()
    a, b, c = slots.new(4), slots.new(4), slots.new(2)
    slots.unify(a, b)
    slots.couple_blocks(a, 2)
    slots.freeze(b[1:2], "first reason")
    slots.freeze(a[1:2], "second reason")
    slots.note(b[2:3], "a statistic")
    solved = slots.solve()
    assert (solved.channel[a] == solved.channel[b]).all()
    assert solved.unit[a].tolist() == [0, 1, 0, 1]
    assert solved.frozen == {1: "first reason"}
    assert solved.noted == {2: "a statistic"}
    assert solved.unit[c].tolist() == c.tolist()


@pytest.mark.parametrize(
    ("source", "target", "dim", "expected"),
    [
        ((2, 3, 2, 2), (2, 12), 1, [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]),  # flatten repeats
        ((2, 3, 1, 1), (2, 3), 1, [0, 1, 2]),
        ((2, 5, 3), (10, 3), 2, [0, 1, 2]),
        ((2, 3, 4), (6, 4), 1, [0, 1, 2, 0, 1, 2]),  # batch and channels merged
        ((4, 6), (4, 2, 3), 1, [0, 1, 2, 3, 4, 5]),  # a split spreads them
    ],
)
def test_reshape_moves_labels(source: tuple, target: tuple, dim: int, expected: list[int]) -> None:
    shape = [1] * len(source)
    shape[dim] = source[dim]
    moved = reshape(np.arange(source[dim]).reshape(shape), source, target)
    assert moved.reshape(-1).tolist() == expected


def test_reshape_undoes_a_merge() -> None:
    merged = reshape(np.arange(3).reshape(1, 3, 1), (2, 3, 5), (1, 6, 5))
    back = reshape(merged, (1, 6, 5), (2, 3, 5))
    assert back.shape == (1, 3, 1)
    assert back.reshape(-1).tolist() == [0, 1, 2]
