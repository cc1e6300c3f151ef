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

import functools
import importlib.util
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gptqkit.algorithms.factor import DampingRule, Factor
from gptqkit.algorithms.order import ColumnOrder
from gptqkit.algorithms.precision import short_updates
from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import Grid, minmax_grid, searched_grids
from gptqkit.core.weight import group_count

WIDEST_FUSED = 256
"""Columns of a group up to which what fused.py's programs keep of it fits their registers."""
STRIP = 32
"""Columns of a block between which errors go by matrix-vector product; between strips, by matrix product."""


SHORTLIST = 4
"""Grids whose cost is measured exactly. All 14 to 28 candidates instead: 0.1 % less objective after refinement, twice to four times the
time of the sweep."""


class Effort(NamedTuple):
    """How much is done for a linear: which grid search ("minmax", "pivot" or "exact"), whether symmetric scales may be negative, rounds of
    refinement (refine.py), and the rule of damping (factor.py)."""

    grid: str
    signed: bool
    rounds: int
    damping: DampingRule

    def limited(self, *, signed: bool) -> Effort:
        """The same without negative scales, unless `signed` allows them."""
        return self._replace(signed=self.signed and signed)


class Swept(NamedTuple):
    """level_IO: code - zero, natural column order, and scale_GO, zero_GO, all in the compute dtype; objective_O: ||W - Q||_H^2 of each
    row, damped H."""

    level_IO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor
    objective_O: Tensor


def sweep(weight_IO: Tensor, factor: Factor, order: ColumnOrder, spec: LinearSpec, effort: Effort) -> Swept:
    """Quantizes [I, O] (columns in natural order, float32 or float64) given the factor of H in sweep order."""
    shape = weight_IO.shape
    target_IO = weight_IO[order.columns_I]
    root_II, pivot_I = factor.root_II, factor.pivot_I
    group_at_I = order.group_I[order.columns_I]
    groups = group_count(shape[0], spec.group_size)
    scale_GO = target_IO.new_empty(groups, shape[1])
    zero_GO = torch.empty_like(scale_GO)
    if order.fixed_grids:
        for group in range(groups):
            at_group = group_at_I == group
            scale_GO[group], zero_GO[group] = _grids_of(target_IO[at_group], pivot_I[at_group], spec, effort)[0]
    error_IO, level_IO = torch.empty_like(target_IO), torch.empty_like(target_IO)
    objective_O = target_IO.new_zeros(shape[1])
    diagonal = diagonal_shares(root_II, order.bounds)
    first_G = group_at_I[[start for start, _ in order.bounds]].tolist()
    for (start, stop), (inverse_BB, share_BB), group in zip(order.bounds, diagonal, first_G, strict=True):
        running_BO = target_IO[start:stop].clone()
        if start:
            with short_updates():
                owed_BO = root_II[:start, start:stop].T @ error_IO[:start]
            running_BO.addmm_(inverse_BB.T, owed_BO)
        if order.fixed_grids:
            group_B = group_at_I[start:stop]
            grid_B = Grid(scale_GO[group_B], zero_GO[group_B])
        else:
            grid = _grid_at_start(running_BO, share_BB, pivot_I[start:stop], spec, effort)
            scale_GO[group], zero_GO[group] = grid
            grid_B = Grid(grid.scale_R.expand_as(running_BO), grid.zero_R.expand_as(running_BO))
        miss_BO = fix_block(running_BO, level_IO[start:stop], share_BB, grid_B, spec.bits)
        torch.addcmul(target_IO[start:stop], level_IO[start:stop], grid_B.scale_R, value=-1, out=error_IO[start:stop])
        objective_O += miss_BO.square_().mul_(pivot_I[start:stop, None]).sum(0)
    natural_IO = torch.empty_like(level_IO)
    natural_IO[order.columns_I] = level_IO
    return Swept(natural_IO, scale_GO, zero_GO, objective_O)


def _grids_of(weight_BO: Tensor, pivot_B: Tensor, spec: LinearSpec, effort: Effort, count: int = 1) -> list[Grid]:
    """The grids that look best for a group when a rounding error in column j costs its pivot."""
    if effort.grid == "minmax":
        return [minmax_grid(weight_BO.T, bits=spec.bits, sym=spec.sym)]
    return searched_grids(weight_BO.T, pivot_B, bits=spec.bits, sym=spec.sym, signed=effort.signed, count=count)


def _grid_at_start(running_BO: Tensor, share_BB: Tensor, pivot_B: Tensor, spec: LinearSpec, effort: Effort) -> Grid:
    """The grid of a group, from its weights as they stand when it begins.

    With the search "exact" it is the one with which sweeping the group costs least, sum of e_j^2, for each row; of the SHORTLIST by the
    cheap measure. By the identity above that is what the group adds to the layer's objective, given the groups before it.
    """
    if effort.grid != "exact":
        return _grids_of(running_BO, pivot_B, spec, effort)[0]
    if kernels := kernels_for(running_BO):
        found = kernels.best_grids(running_BO, pivot_B, spec, signed=effort.signed, count=SHORTLIST)
        best_O = kernels.sweep_costs(running_BO, share_BB, pivot_B, found, spec.bits).argmin(0, keepdim=True)
        return Grid(found.scale_R.gather(0, best_O)[0], found.zero_R.gather(0, best_O)[0])
    grids = _grids_of(running_BO, pivot_B, spec, effort, SHORTLIST)
    best, level_BO = grids[0], torch.empty_like(running_BO)
    least_O = _cost(best, running_BO, level_BO, share_BB, pivot_B, spec.bits)
    for grid in grids[1:]:
        cost_O = _cost(grid, running_BO, level_BO, share_BB, pivot_B, spec.bits)
        better_O = cost_O < least_O
        best = Grid(torch.where(better_O, grid.scale_R, best.scale_R), torch.where(better_O, grid.zero_R, best.zero_R))
        least_O = torch.where(better_O, cost_O, least_O)
    return best


def _cost(grid: Grid, running_BO: Tensor, level_BO: Tensor, share_BB: Tensor, pivot_B: Tensor, bits: int) -> Tensor:
    """[O]: what sweeping a group on one grid costs. Overwrites `level_BO`."""
    grid_B = Grid(grid.scale_R.expand_as(running_BO), grid.zero_R.expand_as(running_BO))
    return pivot_B @ fix_block(running_BO.clone(), level_BO, share_BB, grid_B, bits).square_()


def fix_block(running_BO: Tensor, level_BO: Tensor, share_BB: Tensor, grid_B: Grid, bits: int) -> Tensor:
    """Rounds the columns of a block in turn. Writes code - zero into `level_BO`; returns w_j - q_j [B, O] as it was at each turn.

    The loop is the hot spot of a run: one matrix-vector product and five in-place passes a column, no allocation, no synchronisation.
    """
    if kernels := kernels_for(running_BO):
        return kernels.fix_block(running_BO, level_BO, share_BB, grid_B, bits)
    lowest = (-grid_B.zero_R).unbind(0)
    highest = (2**bits - 1 - grid_B.zero_R).unbind(0)
    scales, running, levels = grid_B.scale_R.unbind(0), running_BO.unbind(0), level_BO.unbind(0)
    miss_BO = torch.empty_like(running_BO)
    misses = miss_BO.unbind(0)
    for start in range(0, running_BO.shape[0], STRIP):
        stop = min(start + STRIP, running_BO.shape[0])
        if start:
            running_BO[start:stop].addmm_(share_BB[start:stop, :start], miss_BO[:start], alpha=-1)
        for j in range(start, stop):
            column, level, miss = running[j], levels[j], misses[j]
            if j > start:
                column.addmv_(miss_BO[start:j].T, share_BB[j, start:j], alpha=-1)
            torch.div(column, scales[j], out=level)
            level.round_().clamp_(lowest[j], highest[j])
            torch.addcmul(column, level, scales[j], value=-1, out=miss)
    return miss_BO


def kernels_for(running_BO: Tensor) -> ModuleType | None:
    """fused.py where its kernels can run on a group of columns like this one: it decides them in one launch."""
    if not running_BO.is_cuda or running_BO.dtype != torch.float32 or running_BO.shape[0] > WIDEST_FUSED or not _has_triton():
        return None
    return importlib.import_module("gptqkit.algorithms.fused")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def diagonal_shares(root_II: Tensor, bounds: Sequence[tuple[int, int]]) -> Iterator[tuple[Tensor, Tensor]]:
    """`shares` of every diagonal block; on a CUDA device of all blocks of the same size at once."""
    sizes = {stop - start for start, stop in bounds}
    if not root_II.is_cuda or len(sizes) > 1:
        yield from (shares(root_II[start:stop, start:stop]) for start, stop in bounds)
        return
    inverse_NBB, share_NBB = shares(torch.stack([root_II[start:stop, start:stop] for start, stop in bounds]))
    yield from zip(inverse_NBB, share_NBB, strict=True)


def shares(root_BB: Tensor) -> tuple[Tensor, Tensor]:
    """U = R^-1 of diagonal blocks of R [..., B, B], and U_jk / U_jj as [later k, earlier j]: what column k owes for a miss of 1 in
    column j."""
    identity_BB = torch.eye(root_BB.shape[-1], dtype=root_BB.dtype, device=root_BB.device)
    inverse_BB = torch.linalg.solve_triangular(root_BB, identity_BB.expand_as(root_BB), upper=True)
    return inverse_BB, (inverse_BB / inverse_BB.diagonal(dim1=-2, dim2=-1)[..., None]).mT.contiguous()
