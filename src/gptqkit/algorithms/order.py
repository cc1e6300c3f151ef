"""In which order GPTQ fixes the columns, and where the grids of the groups come from.

A column fixed late absorbs the rounding errors of all columns before it, so important ones (large mean square input, H_jj) go first.

    natural      as stored; a group's grid is chosen when the sweep reaches it, on the weights as compensated so far
    activation   by H_jj, descending. Groups stay runs of neighbouring columns, whose turns are now scattered, so all grids are fixed
                 beforehand from the original weights ("static groups"); no g_idx is stored
    group-aware  groups by their sum of H_jj, descending, and columns inside a group by H_jj, descending. Groups stay whole, so the grid is
                 chosen at the group's start and no g_idx is stored (the default)
    desc-act     by H_jj, descending, and groups are runs *of that order*: the best fit and the slowest kernels, since the group of each
                 column must be stored (g_idx)

With one group per row (group size -1) there is one grid, fixed at the start, and group-aware is the activation order.
Shapes: I = in features (columns), in natural order; a *position* is a place in the sweep.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from gptqkit.core.weight import group_count

STATIC_BLOCK = 128
"""Columns in a block of the sweep when grids are fixed beforehand; otherwise a block is a group."""


@dataclass(frozen=True, slots=True, eq=False)
class ColumnOrder:
    """columns_I   int64 [I]: the column fixed at each position
    group_I     int64 [I]: the group of each column (natural order)
    bounds      (start, stop) of each block of positions; covers 0 .. I
    fixed_grids grids come from the original weights; else every block is one group and its grid is chosen at `start`
    stores_groups  group_I must be stored with the weight
    """

    columns_I: Tensor
    group_I: Tensor
    bounds: tuple[tuple[int, int], ...]
    fixed_grids: bool
    stores_groups: bool


def column_order(importance_I: Tensor, order: str, group_size: int) -> ColumnOrder:
    """The order for columns of the given importance (H_jj). `order` is one of the four above; ties keep the natural order."""
    in_features = importance_I.shape[0]
    size = in_features if group_size == -1 else group_size
    natural_I = torch.arange(in_features, device=importance_I.device)
    group_I = natural_I // size
    descending_I = torch.argsort(importance_I, descending=True, stable=True)
    if order == "natural":
        columns_I = natural_I
    elif order in ("activation", "desc-act"):
        columns_I = descending_I
    elif order == "group-aware":
        columns_I = _groups_first(importance_I, group_I, descending_I, group_count(in_features, group_size))
    else:
        raise ValueError(f"order={order!r}; allowed: natural, activation, group-aware, desc-act")
    stores_groups = order == "desc-act" and size < in_features
    if stores_groups:
        group_I = torch.empty_like(group_I).scatter_(0, columns_I, group_I)
    fixed_grids = order == "activation" or size >= in_features
    bounds = _even_bounds(in_features, STATIC_BLOCK) if fixed_grids else _group_bounds(group_I[columns_I])
    return ColumnOrder(columns_I, group_I, bounds, fixed_grids, stores_groups)


def _groups_first(importance_I: Tensor, group_I: Tensor, descending_I: Tensor, groups: int) -> Tensor:
    total_G = torch.zeros(groups, dtype=importance_I.dtype, device=importance_I.device).index_add_(0, group_I, importance_I)
    rank_G = torch.empty_like(total_G, dtype=torch.int64)
    rank_G[torch.argsort(total_G, descending=True, stable=True)] = torch.arange(groups, device=importance_I.device)
    return descending_I[torch.argsort(rank_G[group_I[descending_I]], stable=True)]


def _even_bounds(in_features: int, width: int) -> tuple[tuple[int, int], ...]:
    return tuple((start, min(start + width, in_features)) for start in range(0, in_features, width))


def _group_bounds(group_at_position_I: Tensor) -> tuple[tuple[int, int], ...]:
    """Runs of equal group: also right when the last group is narrower than the others and does not come last."""
    starts = [0, *(torch.nonzero(group_at_position_I.diff()).flatten() + 1).tolist(), group_at_position_I.shape[0]]
    return tuple(pairwise(starts))
