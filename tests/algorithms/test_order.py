"""Column orders: each is a permutation with the promised shape."""

from __future__ import annotations

import pytest
import torch

from gptqkit.algorithms.order import column_order

IMPORTANCE = torch.tensor([1.0, 9.0, 4.0, 4.0, 7.0, 0.0, 8.0, 8.0, 3.0, 2.0])


@pytest.mark.parametrize(
    ("order", "columns", "groups"),
    [
        ("natural", [0, 1, 2, 3, 4, 5, 6, 7, 8, 9], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ("activation", [1, 6, 7, 4, 2, 3, 8, 9, 0, 5], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ("group-aware", [6, 7, 4, 5, 1, 2, 3, 0, 8, 9], [0, 0, 0, 0, 1, 1, 1, 1, 2, 2]),
        ("desc-act", [1, 6, 7, 4, 2, 3, 8, 9, 0, 5], [2, 0, 1, 1, 0, 2, 0, 0, 1, 1]),
    ],
)
def test_ten_columns_in_groups_of_four(order: str, columns: list[int], groups: list[int]) -> None:
    plan = column_order(IMPORTANCE, order, 4)
    assert plan.columns_I.tolist() == columns
    assert plan.group_I.tolist() == groups
    assert plan.fixed_grids is (order == "activation")
    assert plan.stores_groups is (order == "desc-act")
    if not plan.fixed_grids:
        assert [set(plan.group_I[plan.columns_I[start:stop]].tolist()) for start, stop in plan.bounds] == [
            {g} for g in dict.fromkeys(plan.group_I[plan.columns_I].tolist())
        ]


@pytest.mark.parametrize("order", ["natural", "activation", "group-aware", "desc-act"])
@pytest.mark.parametrize(("features", "group_size"), [(300, -1), (300, 32), (300, 256), (128, 128), (100, 256), (1, -1)])
def test_blocks_cover_every_position_once(order: str, features: int, group_size: int) -> None:
    plan = column_order(torch.rand(features, generator=torch.Generator().manual_seed(features)), order, group_size)
    assert [position for start, stop in plan.bounds for position in range(start, stop)] == list(range(features))
    assert sorted(plan.columns_I.tolist()) == list(range(features))


def test_a_narrow_group_may_come_first() -> None:
    plan = column_order(torch.tensor([1.0, 1.0, 1.0, 9.0]), "group-aware", 3)
    assert plan.columns_I.tolist() == [3, 0, 1, 2]
    assert plan.bounds == ((0, 1), (1, 4))


def test_unknown_order() -> None:
    with pytest.raises(ValueError, match="order='random'; allowed: natural, activation, group-aware, desc-act"):
        column_order(IMPORTANCE, "random", 4)
