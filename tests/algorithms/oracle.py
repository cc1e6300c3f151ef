"""The obvious GPTQ: invert, factor the inverse, one column after the other, no blocks. What the solver must agree with, code by code."""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.algorithms.sweep import SHORTLIST, Effort
from gptqkit.core.grid import Grid, decode, encode, minmax_grid, shrinks


def obvious_candidates(weight_1C: Tensor, *, bits: int, sym: bool, signed: bool) -> list[Grid]:
    """The shrunken ranges of one row, each followed by its mirror image."""
    grids = []
    for shrink in shrinks(bits):
        grid = minmax_grid(weight_1C * shrink, bits=bits, sym=sym)
        grids += [grid, Grid(-grid.scale_R, grid.zero_R)] if sym and signed else [grid]
    return grids


def obvious_grid(weight_OC: Tensor, upper_CC: Tensor, *, bits: int, sym: bool, effort: Effort, alone: bool) -> Grid:
    """Row by row. `alone`: grids are chosen before the sweep begins, so that only the pivots of the columns are known."""
    rows = []
    for weight_1C in weight_OC.split(1):
        grids = [minmax_grid(weight_1C, bits=bits, sym=sym)]
        if effort.grid != "minmax":
            grids = obvious_candidates(weight_1C, bits=bits, sym=sym, signed=effort.signed)
            pivot_C = upper_CC.diagonal() ** -2
            losses = [float(((decode(encode(weight_1C, grid, bits), grid) - weight_1C) ** 2 * pivot_C).sum()) for grid in grids]
            grids = [grids[k] for k in sorted(range(len(grids)), key=losses.__getitem__)][:SHORTLIST]
        if effort.grid == "exact" and not alone:
            costs = [obvious_cost(weight_1C, upper_CC, grid, bits) for grid in grids]
            grids = [grids[costs.index(min(costs))]]
        rows.append(grids[0])
    return Grid(torch.cat([grid.scale_R for grid in rows]), torch.cat([grid.zero_R for grid in rows]))


def obvious_cost(weight_1C: Tensor, upper_CC: Tensor, grid: Grid, bits: int) -> float:
    """What the textbook's update makes of one row of a group."""
    running_1C, cost = weight_1C.clone(), 0.0
    for j in range(running_1C.shape[1]):
        value_1 = decode(encode(running_1C[:, [j]], grid, bits), grid)
        error = float(running_1C[0, j] - value_1) / float(upper_CC[j, j])
        running_1C[:, j + 1 :] -= error * upper_CC[j, j + 1 :]
        cost += error**2
    return cost


def obvious_gptq(
    weight_OI: Tensor, damped_II: Tensor, columns_I: Tensor, group_I: Tensor, *, bits: int, sym: bool, fixed_grids: bool, effort: Effort
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and values [O, I] (natural order) and the objective [O]. Columns are fixed in the order `columns_I`; `group_I` is natural."""
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II[columns_I][:, columns_I]), upper=True)
    running_OI, group_at_I = weight_OI[:, columns_I].clone(), group_I[columns_I]
    codes_OI, values_OI = torch.empty_like(weight_OI), torch.empty_like(weight_OI)
    objective_O = torch.zeros_like(weight_OI[:, 0])
    grids: dict[int, Grid] = {}
    for j, column in enumerate(columns_I.tolist()):
        group = int(group_at_I[j])
        if group not in grids:
            at_group = group_at_I == group
            members_OC = (weight_OI[:, columns_I] if fixed_grids else running_OI)[:, at_group]
            grids[group] = obvious_grid(members_OC, upper_II[at_group][:, at_group], bits=bits, sym=sym, effort=effort, alone=fixed_grids)
        codes_OI[:, [column]] = encode(running_OI[:, [j]], grids[group], bits)
        values_OI[:, [column]] = decode(codes_OI[:, [column]], grids[group])
        error_O = (running_OI[:, j] - values_OI[:, column]) / upper_II[j, j]
        running_OI[:, j + 1 :] -= error_O[:, None] * upper_II[j, j + 1 :]
        objective_O += error_O**2
    return codes_OI, values_OI, objective_O
