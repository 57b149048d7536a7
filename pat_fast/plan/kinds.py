"""Which units may change places."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .flat import ChannelArray, IndexArray, Vectors


def kinds_of_units(
    vectors: Vectors,
    axes: IndexArray,
    unit: ChannelArray,
    group_of: ChannelArray,
    order: IndexArray,
    starts: IndexArray,
) -> IndexArray:
    """A number for each unit that is the same for those of one group that axes hold alike ``[U]``.

    Args:
        vectors: the channel vectors of a plan.
        axes: for each axis its vector.
        unit, group_of: of each channel ``[N]``.
        order, starts: channels unit by unit ``[N]``, and where units begin among them ``[U]``.
    """
    held = np.flatnonzero(vectors.channels >= 0)
    channels, own = vectors.channels[held], np.repeat(np.arange(len(vectors.arrays)), vectors.lengths)[held]
    if len(starts) == len(unit) and _by_whole_groups(channels, own, group_of):
        return group_of.astype(np.int64)
    # Random weights tell sets of (axis, count) apart, as a hash does: no Python loop over channels.
    weights = stirred(np.arange(1, len(axes) + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    signature = np.zeros(len(unit), dtype=np.uint64)
    again = np.zeros(len(vectors.arrays), dtype=np.bool_)  # vectors in which a channel may come twice
    again[own[1:][(channels[1:] <= channels[:-1]) & (own[1:] == own[:-1])]] = True
    once = np.zeros(len(vectors.arrays), dtype=np.uint64)
    np.add.at(once, axes, stirred(weights + np.uint64(1)))
    once[again] = 0
    np.add.at(signature, channels, once[own])
    for vector in np.flatnonzero(again):
        distinct, count = np.unique(channels[own == vector], return_counts=True)
        counts, which = np.unique(count, return_inverse=True)
        hashed = stirred(counts.astype(np.uint64)[:, None] + weights[axes == vector]).sum(1)
        signature[distinct] += hashed[which]
    place = np.arange(len(order)) - starts[unit[order]]
    of_unit = np.add.reduceat(stirred(signature[order] + stirred(place.astype(np.uint64))), starts)
    of_unit = stirred(of_unit + group_of[order[starts]].astype(np.uint64))
    return np.unique(of_unit, return_inverse=True)[1].astype(np.int64)


def _by_whole_groups(channels: ChannelArray, own: IndexArray, group_of: ChannelArray) -> bool:
    """Whether vectors (``own`` hold ``channels``) hold all channels of a group side by side and in order, or none."""
    next_of_its_group = np.append(group_of[1:] == group_of[:-1], False)[channels]  # whether there is one
    follows = np.append((channels[1:] == channels[:-1] + 1) & (own[1:] == own[:-1]), False)
    first = np.append(True, group_of[1:] != group_of[:-1])[channels]
    return bool((follows | ~next_of_its_group).all() and (np.append(False, follows[:-1]) | first).all())


def stirred(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Bits of ``x`` stirred (the finaliser of splitmix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
