"""One option of each unit, such that all sizes fit a budget and the costs add up to the least: the multiple-choice knapsack, exactly.

Partial choices are (size, cost) pairs. Units are merged in one after the other; of the pairs that result only the Pareto front is kept,
those that no other beats in both (Nemhauser & Ullmann, Management Science 15, 1969). Sizes are whole numbers, so nothing is rounded.

The front can grow as large as there are distinct sizes. What keeps it small is a bound: where options may be mixed in fractions, the
cheapest completion takes the steps of each unit's lower convex hull in the order of their gain per bit (Sinha & Zoltners, Operations
Research 27, 1979). A pair whose bound is above the cost of a choice that is known already cannot become the best and is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

_SLACK = 1e-12
"""Of the largest costs: sums of the same costs in another order differ in their last bits, and the bound must not drop the best for it."""


class Option(NamedTuple):
    """What one choice for a unit takes and what it costs."""

    size: int
    cost: float


@dataclass(frozen=True, slots=True)
class _Bound:
    """The least cost, in fractions, of completing a choice: piecewise linear in the room that is left, defined from `room[0]` on."""

    room: NDArray[np.int64]
    cost: NDArray[np.float64]

    def __call__(self, room: NDArray[np.int64]) -> NDArray[np.float64]:
        return np.interp(room, self.room, self.cost)


class _Stage(NamedTuple):
    """Where each pair of a front came from: the pair of the front before, and the option that was added."""

    parent: NDArray[np.int64]
    option: NDArray[np.int64]


def choose(units: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """The index of one option for each unit: sizes add up to at most `budget`, costs to the least possible.

    The same input gives the same answer. Raises ValueError when not even the smallest options fit.

    >>> choose([[Option(2, 5.0), Option(4, 1.0)], [Option(2, 2.0), Option(4, 1.0)]], budget=6)
    [1, 0]
    """
    smallest = sum(min(option.size for option in options) for options in units)
    if smallest > budget:
        raise ValueError(f"the smallest options take {smallest}, which is more than the budget of {budget}")
    bounds = _bounds(units)
    limit = _greedy(units, budget) + _SLACK * sum(max(abs(option.cost) for option in options) for options in units)
    sizes, costs = np.zeros(1, np.int64), np.zeros(1, np.float64)
    stages: list[_Stage] = []
    for options, bound in zip(units, bounds[1:], strict=True):
        added = np.array([option.size for option in options], np.int64), np.array([option.cost for option in options], np.float64)
        all_sizes = (sizes[:, None] + added[0]).ravel()
        all_costs = (costs[:, None] + added[1]).ravel()
        room = budget - all_sizes
        possible = np.flatnonzero((room >= bound.room[0]) & (all_costs + bound(room) <= limit))
        kept = possible[_front(all_sizes[possible], all_costs[possible])]
        stages.append(_Stage(kept // len(options), kept % len(options)))
        sizes, costs = all_sizes[kept], all_costs[kept]
    at = len(costs) - 1  # costs fall along a front
    chosen: list[int] = []
    for stage in reversed(stages):
        chosen.append(int(stage.option[at]))
        at = int(stage.parent[at])
    return chosen[::-1]


def _front(sizes: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Indices of the pairs that no other beats, by rising size and falling cost; of equal ones the first."""
    order = np.lexsort((costs, sizes))
    sorted_costs = costs[order]
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_costs)[:-1]))
    return order[sorted_costs < best_before]


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull, by rising size: gains per bit fall along it."""
    hull: list[Option] = []
    for option in sorted(set(options)):
        if hull and (option.cost >= hull[-1].cost or option.size == hull[-1].size):
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option) -> float:
    return (before.cost - after.cost) / (after.size - before.size)


def _bounds(units: Sequence[Sequence[Option]]) -> list[_Bound]:
    """The bound for what is left after 0, 1, … all units."""
    bounds = [_Bound(np.zeros(1, np.int64), np.zeros(1, np.float64))]
    steps: list[tuple[float, int, float]] = []
    size, cost = 0, 0.0
    for options in reversed(units):
        hull = _hull(options)
        size, cost = size + hull[0].size, cost + hull[0].cost
        steps += [(_gain(a, b), b.size - a.size, b.cost - a.cost) for a, b in pairwise(hull)]
        steps.sort(key=lambda step: -step[0])
        room = size + np.cumsum([0, *(step[1] for step in steps)], dtype=np.int64)
        bounds.append(_Bound(room, cost + np.cumsum([0.0, *(step[2] for step in steps)])))
    return bounds[::-1]


def _greedy(units: Sequence[Sequence[Option]], budget: int) -> float:
    """The cost of a good choice: hull steps by gain per bit, as many as fit."""
    hulls = [_hull(options) for options in units]
    at = [0] * len(hulls)
    size = sum(hull[0].size for hull in hulls)
    steps = [(_gain(hull[i], hull[i + 1]), unit, i) for unit, hull in enumerate(hulls) for i in range(len(hull) - 1)]
    for _, unit, i in sorted(steps, key=lambda step: -step[0]):
        more = hulls[unit][i + 1].size - hulls[unit][i].size
        if at[unit] == i and size + more <= budget:
            at[unit], size = i + 1, size + more
    return sum(hull[i].cost for hull, i in zip(hulls, at, strict=True))
