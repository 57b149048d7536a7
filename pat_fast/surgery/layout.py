"""How the tensors of a plan lie in memory, and how they will lie after a prune.

Nearly every tensor is dense and is one tile, rows by columns by kernel. How these lie in memory is found once per plan
and follows the model as it shrinks; a prune then computes their tables as arrays.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from ..ops.tiles import NONE
from ..plan.flat import IndexArray
from ..plan.types import Plan, is_grouped

SHARE = 0.9  # of all elements, which the largest tensors hold: the others are copied beside these


def largest_first(elements: IndexArray) -> tuple[IndexArray, int]:
    """Places of tensors of so many ``elements [T]``, the largest first, and how many of them hold ``SHARE`` of all."""
    order = np.argsort(-elements, kind="stable")
    return order, int(np.searchsorted(np.cumsum(elements[order]), SHARE * elements.sum())) + 1


def dense_strides(shape: Sequence[int], like: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense tensor of ``shape`` whose dimensions lie in the order of the strides ``like``."""
    if len(shape) == 1:
        return (1,)
    strides = [1] * len(shape)
    step = 1
    for dim in _ascending(like):
        strides[dim] = step
        step *= max(shape[dim], 1)
    return tuple(strides)


def _ascending(strides: Sequence[int]) -> list[int]:
    """Dimensions from the smallest stride to the largest."""
    return sorted(range(len(strides)), key=lambda d: (strides[d], -d))


@lru_cache(maxsize=4096)
def _places(shape: tuple[int, ...], strides: tuple[int, ...], dims: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
    """The dimensions that rows, columns and kernel of a dense tensor's one tile end with, -1 for none; whether one is
    enough.

    Then the sizes of columns (0 if they are an axis) and kernel, then all dimensions by descending stride.
    """
    order = _ascending(strides)[::-1]
    axes = [d for d in order if d in dims]
    runs: list[list[int]] = []  # of neighbouring dimensions that are not pruned
    inside = False
    for dim in order:
        if dim in dims:
            inside = False
        elif shape[dim] != 1:
            runs = [*runs[:-1], [*runs[-1], dim]] if inside else [*runs, [dim]]
            inside = True
    room = 3 - len(axes)
    is_one = dense_strides(shape, strides) == strides and len(runs) <= room
    ends, sizes = [r[-1] for r in runs], [math.prod(shape[d] for d in r) for r in runs]
    kernel, of_kernel = (ends[-1], sizes[-1]) if runs else (-1, 1)
    column, of_column = (ends[0], sizes[0]) if len(runs) == 2 else (-1, 1)
    if len(axes) == 2:
        column, of_column = axes[1], 0
    return (axes[0], column, kernel, of_column, of_kernel, *order), is_one


@dataclass
class Layout:
    """How the tensors of a plan lie in memory, a row for each ``[T]``.

    Attributes:
        sizes: of the tensors, as the plan has them ``[T, D]``.
        strides: of the tensors.
        plain: whether a tensor is one dense tile.
        places: dimensions that its rows, columns and kernel end with, and sizes of columns and kernel ``[T, 5]``;
            see :func:`_places`.
        order: dimensions by descending stride ``[T, D]``.
        rows, columns: the channel vectors of both, the number of vectors for none.
    """

    sizes: IndexArray
    strides: list[tuple[int, ...]]
    plain: NDArray[np.bool_]
    places: IndexArray
    order: IndexArray
    rows: IndexArray
    columns: IndexArray

    @classmethod
    def of(cls, plan: Plan, strides: list[tuple[int, ...]]) -> Layout:
        """The layout of tensors with these strides."""
        n, width = plan.shapes.sizes.shape
        made = cls(
            plan.shapes.sizes,
            strides,
            np.zeros(n, dtype=np.bool_),
            np.zeros((n, 5), dtype=np.int64),
            np.tile(np.arange(width), (n, 1)),
            np.zeros(n, dtype=np.int64),
            np.zeros(n, dtype=np.int64),
        )
        made._fill(plan, range(n))
        return made

    def _fill(self, plan: Plan, numbers: Sequence[int] | range) -> None:
        """Work out the rows of these tensors."""
        place, none = plan.vectors.number, len(plan.vectors.arrays)
        width = self.order.shape[1]
        plain, places, order, rows, columns = [], [], [], [], []
        for i in numbers:
            tensor, strides = plan.tensors[i], self.strides[i]
            dims = tuple(a.dim for a in tensor.axes)
            found, is_one = _places(tensor.shape, strides, dims)
            vector = {a.dim: place[id(a.channels)] for a in tensor.axes}
            plain.append(is_one and not any(is_grouped(tensor, a) for a in tensor.axes))
            places.append(found[:5])
            order.append((*found[5:], *range(len(strides), width)))
            rows.append(vector[found[0]])
            columns.append(vector.get(found[1], none))
        if plain:
            index = np.asarray(numbers)
            self.plain[index], self.places[index], self.order[index] = plain, places, order
            self.rows[index], self.columns[index] = rows, columns

    def dense(self, sizes: IndexArray) -> IndexArray:
        """Strides of dense tensors of ``sizes [T, D]`` in the same order of dimensions ``[T, D]``."""
        ordered = np.maximum(sizes.reshape(-1)[self._ordered], 1)
        steps = np.ones_like(ordered)
        steps[:, :-1] = np.cumprod(ordered[:, :0:-1], axis=1)[:, ::-1]
        strides = np.empty_like(steps)
        strides.reshape(-1)[self._ordered] = steps
        return strides

    @cached_property
    def _ordered(self) -> IndexArray:
        """Where the dimensions by descending stride stand in all sizes ``[T, D]``, laid end to end."""
        number, width = self.order.shape
        return self.order + width * np.arange(number)[:, None]

    def tiles(self, sizes: IndexArray, strides: IndexArray) -> IndexArray:
        """Sizes and strides ``[T, 6]`` of the tiles of tensors of these sizes and strides ``[T, D]``."""
        picked, fixed = self._picked
        return np.concatenate([sizes.reshape(-1), strides.reshape(-1), fixed])[picked]

    @cached_property
    def _picked(self) -> tuple[IndexArray, IndexArray]:
        """Where the entries of :meth:`tiles` stand in all sizes, all strides and what is given second."""
        number, width = self.order.shape
        rows, columns, kernel, of_columns, _ = self.places.T
        first = width * np.arange(number)
        strides, fixed = number * width + first, 2 * number * width + np.arange(number)
        one = np.full(number, 2 * number * (width + 1))
        picked = [
            first + rows,
            np.where(of_columns == 0, first + columns, fixed),
            fixed + number,
            strides + rows,
            np.where(columns < 0, one, strides + columns),
            np.where(kernel < 0, one, strides + kernel),
        ]
        return np.stack(picked, axis=1), np.append(self.places[:, 3:].T.reshape(-1), 1)

    @cached_property
    def sides(self) -> IndexArray:
        """The channel vectors of rows and columns ``[T, 2]``."""
        return np.stack([self.rows, self.columns], axis=1)

    @cached_property
    def large(self) -> NDArray[np.bool_]:
        """Which tensors are the largest, that hold ``SHARE`` of all elements together ``[T]``."""
        order, count = largest_first(self.sizes.prod(1))
        found = np.zeros(len(order), dtype=np.bool_)
        found[order[:count]] = True
        return found

    @cached_property
    def whole(self) -> IndexArray:
        """Sizes and strides of the tiles of the tensors as they are, and that they have no lists ``[T, 8]``."""
        none = np.full((len(self.sizes), 2), NONE)
        return np.concatenate([self.tiles(self.sizes, self.dense(self.sizes)), none], axis=1)

    def smaller(self, before: Plan, after: Plan, strides: list[tuple[int, ...]]) -> Layout:
        """The layout after a prune, of tensors with these ``strides``, given for all of the plan ``before`` it."""
        kept = after.shapes.rows
        made = Layout(
            after.shapes.sizes,
            [strides[i] for i in kept.tolist()],
            self.plain[kept],
            self.places[kept],
            self.order[kept],
            self.rows[kept],
            self.columns[kept],
        )
        axes, left = (np.bincount(s.tensor, minlength=len(s.ndim)) for s in (before.shapes, after.shapes))
        lost = np.flatnonzero((axes[kept] != left) | ~made.plain)
        made._fill(after, lost.tolist())
        return made
