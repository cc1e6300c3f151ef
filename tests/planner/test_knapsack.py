"""The exact solver against trying everything."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqkit.planner.knapsack import Option, choose

OPTIONS = st.builds(Option, st.integers(0, 30), st.floats(0, 10) | st.integers(0, 5).map(float))
UNITS = st.lists(st.lists(OPTIONS, min_size=1, max_size=5), min_size=1, max_size=5)


def best_cost(units: list[list[Option]], budget: int) -> float:
    """The oracle: every combination."""
    costs = [sum(o.cost for o in chosen) for chosen in itertools.product(*units) if sum(o.size for o in chosen) <= budget]
    return min(costs, default=float("inf"))


def total(units: list[list[Option]], chosen: list[int]) -> Option:
    picked = [options[index] for options, index in zip(units, chosen, strict=True)]
    return Option(sum(o.size for o in picked), sum(o.cost for o in picked))


@settings(max_examples=400, deadline=None)
@given(UNITS, st.integers(0, 150))
def test_the_choice_fits_and_none_is_cheaper(units: list[list[Option]], budget: int) -> None:
    expected = best_cost(units, budget)
    if expected == float("inf"):
        with pytest.raises(ValueError, match="more than the budget"):
            choose(units, budget)
        return
    found = total(units, choose(units, budget))
    assert found.size <= budget
    assert found.cost == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_like_a_large_model_it_is_exact_where_fractions_are_not_allowed() -> None:
    """320 units of 13 options: within the bound that fractions give, and no swap of two units improves it."""
    rng = random.Random(0)
    units = []
    for _ in range(80):
        for weights in (83886080, 67108864, 469762048, 234881024):
            importance = rng.lognormvariate(0, 1.5) * weights
            options = [
                Option(weights * bits + weights * 16 // size, importance * 4.0**-bits * (1 + size / 256) * rng.lognormvariate(0, 0.05))
                for bits in (2, 3, 4, 8)
                for size in (32, 64, 128)
            ]
            units.append([*options, Option(16 * weights, 0.0)])
    budget = round(3.25 * sum(unit[-1].size for unit in units) / 16)
    chosen = choose(units, budget)
    found = total(units, chosen)
    assert found.size <= budget
    assert choose(units, budget) == chosen
    for first, second in itertools.islice(itertools.combinations(rng.sample(range(len(units)), 40), 2), 200):
        rest = found.size - units[first][chosen[first]].size - units[second][chosen[second]].size
        now = units[first][chosen[first]].cost + units[second][chosen[second]].cost
        assert best_cost([units[first], units[second]], budget - rest) >= now * (1 - 1e-9)


def test_nothing_to_choose_and_nothing_that_fits() -> None:
    assert choose([], 0) == []
    assert choose([[Option(5, 1.0)]], 5) == [0]
    with pytest.raises(ValueError, match="the smallest options take 5, which is more than the budget of 4"):
        choose([[Option(5, 1.0), Option(6, 0.0)]], 4)


def test_equal_options_take_the_first() -> None:
    assert choose([[Option(2, 1.0), Option(2, 1.0)], [Option(1, 0.0), Option(1, 0.0)]], 3) == [0, 0]
