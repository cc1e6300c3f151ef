"""The obvious GPTQ: invert, factor the inverse, one column after the other, no blocks. What the solver must agree with, code by code."""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.core.grid import SHRINKS, Grid, decode, encode, minmax_grid


def obvious_grid(weight_OC: Tensor, importance_C: Tensor, *, bits: int, sym: bool) -> Grid:
    """Row by row, the shrunken range whose rounding errors weigh least."""
    rows = []
    for weight_1C in weight_OC.split(1):
        grids = [minmax_grid(weight_1C * shrink, bits=bits, sym=sym) for shrink in SHRINKS]
        losses = [float(((decode(encode(weight_1C, grid, bits), grid) - weight_1C) ** 2 * importance_C).sum()) for grid in grids]
        rows.append(grids[losses.index(min(losses))])
    return Grid(torch.cat([grid.scale_R for grid in rows]), torch.cat([grid.zero_R for grid in rows]))


def obvious_gptq(
    weight_OI: Tensor, damped_II: Tensor, columns_I: Tensor, group_I: Tensor, *, bits: int, sym: bool, fixed_grids: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes and values [O, I] (natural order) and the objective [O]. Columns are fixed in the order `columns_I`; `group_I` is natural."""
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped_II[columns_I][:, columns_I]), upper=True)
    running_OI, group_at_I = weight_OI[:, columns_I].clone(), group_I[columns_I]
    codes_OI, values_OI = torch.empty_like(weight_OI), torch.empty_like(weight_OI)
    objective_O = torch.zeros_like(weight_OI[:, 0])
    grids: dict[int, Grid] = {}
    pivot_I = 1 / upper_II.diagonal() ** 2
    for j, column in enumerate(columns_I.tolist()):
        group = int(group_at_I[j])
        if group not in grids:
            members_OC = (weight_OI[:, columns_I] if fixed_grids else running_OI)[:, group_at_I == group]
            grids[group] = obvious_grid(members_OC, pivot_I[group_at_I == group], bits=bits, sym=sym)
        codes_OI[:, [column]] = encode(running_OI[:, [j]], grids[group], bits)
        values_OI[:, [column]] = decode(codes_OI[:, [column]], grids[group])
        error_O = (running_OI[:, j] - values_OI[:, column]) / upper_II[j, j]
        running_OI[:, j + 1 :] -= error_O[:, None] * upper_II[j, j + 1 :]
        objective_O += error_O**2
    return codes_OI, values_OI, objective_O
