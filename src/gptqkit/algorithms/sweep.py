"""The GPTQ sweep: fix the columns one by one, push each rounding error onto the columns still free.

Frantar et al. 2022 (arXiv:2210.17323). With H^-1 = U^T U, column j of the running weights w is rounded to q_j and

    e_j = (w_j - q_j) / U_jj,     w_k -= e_j U_jk  for k > j,     and   ||W - Q||_H^2 = sum of e_j^2   exactly.

Columns are worked off in blocks. Inside a block [start, stop) the update above is applied as written, except that a column collects what
it is owed when its turn comes (a product that reads the block's errors, instead of a rank-one update that rewrites all later columns).
Between blocks, the textbook keeps all later columns up to date with U. Here a block is brought up to date when it is reached, from the
errors E = W - Q of all columns before it and the factor R = U^-1 itself,

    w[start:stop] = W[start:stop] + E[:start] R[:start, start:stop] U_b,       U_b = inverse(R[start:stop, start:stop]),

which is the same number: given the fixed columns S, the optimum of the free ones F is W_F + E_S H_SF inverse(H_FF), and H = R R^T makes
H_SF inverse(H_FF) = R_SF inverse(R_FF). It needs no inverse beyond the diagonal blocks, and writes every weight once.

The grid of a group is searched (core/grid.py) on the weights as they stand when the group begins, and a rounding error in column j counts
with its pivot R_jj^2 = 1 / U_jj^2: by the identity above that is what it will cost, but for the errors that earlier columns of the same
group push onto it.

Everything is kept transposed, [I, O]: the column of a weight is then a contiguous row. Shapes: I = in features (by position in the sweep),
O = rows of all linears solved together, B = columns of a block, G = groups.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gptqkit.algorithms.factor import Factor
from gptqkit.algorithms.order import ColumnOrder
from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import Grid, searched_grid
from gptqkit.core.weight import group_count


class Swept(NamedTuple):
    """codes_IO uint8, natural column order; scale_GO, zero_GO in the compute dtype; objective_O: ||W - Q||_H^2 of each row, damped H."""

    codes_IO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor
    objective_O: Tensor


def sweep(weight_IO: Tensor, factor: Factor, order: ColumnOrder, spec: LinearSpec) -> Swept:
    """Quantizes [I, O] (columns in natural order, float32 or float64) given the factor of H in sweep order."""
    shape = weight_IO.shape
    target_IO = weight_IO[order.columns_I]
    del weight_IO  # the caller gave it away: in sweep order is enough, and it is as large as everything below
    root_II, pivot_I = factor.root_II, factor.pivot_I
    group_at_I = order.group_I[order.columns_I]
    groups = group_count(shape[0], spec.group_size)
    scale_GO = target_IO.new_empty(groups, shape[1])
    zero_GO = torch.empty_like(scale_GO)
    if order.fixed_grids:
        for group in range(groups):
            at_group = group_at_I == group
            grid = searched_grid(target_IO[at_group].T, pivot_I[at_group], bits=spec.bits, sym=spec.sym)
            scale_GO[group], zero_GO[group] = grid
    error_IO, level_IO = torch.empty_like(target_IO), torch.empty_like(target_IO)
    objective_O = target_IO.new_zeros(shape[1])
    for start, stop in order.bounds:
        running_BO = target_IO[start:stop].clone()
        inverse_BB = _inverse_upper(root_II[start:stop, start:stop])
        if start:
            running_BO.addmm_(inverse_BB.T, root_II[:start, start:stop].T @ error_IO[:start])
        group_B = group_at_I[start:stop]
        if not order.fixed_grids:
            grid = searched_grid(running_BO.T, pivot_I[start:stop], bits=spec.bits, sym=spec.sym)
            scale_GO[group_B[0]], zero_GO[group_B[0]] = grid
        grid_B = Grid(scale_GO[group_B], zero_GO[group_B])
        miss_BO = _fix_block(running_BO, level_IO[start:stop], inverse_BB, grid_B, spec.bits)
        torch.addcmul(target_IO[start:stop], level_IO[start:stop], grid_B.scale_R, value=-1, out=error_IO[start:stop])
        objective_O += miss_BO.div_(inverse_BB.diagonal()[:, None]).square_().sum(0)
    level_IO += zero_GO[group_at_I]
    codes_IO = torch.empty(shape, dtype=torch.uint8, device=target_IO.device)
    codes_IO[order.columns_I] = level_IO.to(torch.uint8)
    return Swept(codes_IO, scale_GO, zero_GO, objective_O)


def _fix_block(running_BO: Tensor, level_BO: Tensor, inverse_BB: Tensor, grid_B: Grid, bits: int) -> Tensor:
    """Rounds the columns of a block in turn. Writes code - zero into `level_BO`; returns w_j - q_j [B, O] as it was at each turn.

    The loop is the hot spot of a run: one matrix-vector product and five in-place passes a column, no allocation, no synchronisation.
    """
    lowest = (-grid_B.zero_R).unbind(0)
    highest = (2**bits - 1 - grid_B.zero_R).unbind(0)
    scales, running, levels = grid_B.scale_R.unbind(0), running_BO.unbind(0), level_BO.unbind(0)
    share_BB = (inverse_BB / inverse_BB.diagonal()[:, None]).T.contiguous()  # [later, earlier]: U_jk / U_jj
    miss_BO = torch.empty_like(running_BO)
    misses = miss_BO.unbind(0)
    for j in range(running_BO.shape[0]):
        column, level, miss = running[j], levels[j], misses[j]
        if j:
            column.addmv_(miss_BO[:j].T, share_BB[j, :j], alpha=-1)
        torch.div(column, scales[j], out=level)
        level.round_().clamp_(lowest[j], highest[j])
        torch.addcmul(column, level, scales[j], value=-1, out=miss)
    return miss_BO


def _inverse_upper(block_BB: Tensor) -> Tensor:
    identity_BB = torch.eye(block_BB.shape[0], dtype=block_BB.dtype, device=block_BB.device)
    return torch.linalg.solve_triangular(block_BB, identity_BB, upper=True)
