"""The inner loops of the solver as Triton kernels: a group of columns at a time, all rows at once, on a CUDA device.

What they compute is what sweep.py and refine.py compute with torch operations (which remain the oracle: tests/algorithms/test_fused.py):
column after column of a group is decided, and each collects what the earlier ones owe it when its turn comes. There the price of a column
is the launch of six operations; here one launch does the group. A program has ROWS rows to itself and keeps what it decided for the
group's columns in registers, so its steps need nothing from memory but a row of coefficients.

Everything is float32 and [I, O] as in the sweep. Shapes: B = columns of the group, O = rows, K = candidate grids.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import SCALE_MAX, SCALE_MIN, Grid, shrinks

_ROWS = 32
_WARPS = 4


def best_grids(running_BO: Tensor, importance_B: Tensor, spec: LinearSpec, *, signed: bool, count: int) -> Grid:
    """core.grid.searched_grids: scale and zero [count, O] of the `count` best candidates by weighted rounding error, best first."""
    columns, rows = running_BO.shape
    scale_KO = running_BO.new_empty(count, rows)
    zero_KO = torch.empty_like(scale_KO)
    factors = torch.tensor(shrinks(spec.bits), dtype=torch.float32).to(running_BO.device, non_blocking=True)
    _search_kernel[(triton.cdiv(rows, _ROWS),)](
        running_BO, importance_B, factors, scale_KO, zero_KO, rows, running_BO.stride(0),
        2**spec.bits - 1, 2.0 / (2**spec.bits - 1), SCALE_MIN, SCALE_MAX,
        FACTORS=factors.numel(), SYM=spec.sym, SIGNED=spec.sym and signed, COUNT=count, COLUMNS=columns, WIDTH=_width(columns), ROWS=_ROWS,
        num_warps=_WARPS,
    )  # fmt: skip
    return Grid(scale_KO, zero_KO)


def sweep_costs(running_BO: Tensor, share_BB: Tensor, pivot_B: Tensor, grids: Grid, bits: int) -> Tensor:
    """[K, O]: what sweeping the group on each grid costs, sum of pivot times squared miss."""
    cost_KO = torch.empty_like(grids.scale_R)
    _round(running_BO, share_BB, grids, bits, pivot_B=pivot_B, cost_KO=cost_KO)
    return cost_KO


def fix_block(running_BO: Tensor, level_BO: Tensor, share_BB: Tensor, grid: Grid, bits: int) -> Tensor:
    """sweep.fix_block: writes code - zero into `level_BO`, returns the misses [B, O]. `grid` is [B, O], or [O] for all columns."""
    miss_BO = torch.empty_like(running_BO)
    _round(running_BO, share_BB, grid, bits, level_BO=level_BO, miss_BO=miss_BO)
    return miss_BO


def _round(
    running_BO: Tensor,
    share_BB: Tensor,
    grid: Grid,
    bits: int,
    *,
    level_BO: Tensor | None = None,
    miss_BO: Tensor | None = None,
    pivot_B: Tensor | None = None,
    cost_KO: Tensor | None = None,
) -> None:
    columns, rows = running_BO.shape
    scale, zero = grid
    candidates = 1 if cost_KO is None else cost_KO.shape[0]
    between = scale.stride(0) if scale.ndim == 2 else 0
    by_column, by_candidate = (between, 0) if cost_KO is None else (0, between)
    assert scale.stride() == zero.stride(), (scale.stride(), zero.stride())
    share_BB = share_BB.contiguous()
    _round_kernel[(triton.cdiv(rows, _ROWS), candidates)](
        running_BO, share_BB, scale, zero, level_BO, miss_BO, pivot_B, cost_KO,
        rows, running_BO.stride(0), 0 if level_BO is None else level_BO.stride(0), by_column, by_candidate, 2**bits - 1,
        KEEP=level_BO is not None, COLUMNS=columns, WIDTH=_width(columns), ROWS=_ROWS, num_warps=_WARPS,
    )  # fmt: skip


def sweep_again(
    wanted_BO: Tensor, level_BO: Tensor, scale_O: Tensor, zero_O: Tensor, share_BB: Tensor, pivot_B: Tensor, order_B: Tensor,
    now_O: Tensor, bits: int,
) -> Tensor:  # fmt: skip
    """Refiner._sweep_again: rounds `wanted_BO` column by column in the order `order_B`, which is that of `share_BB` and `pivot_B`, and
    takes the result in the rows where it costs less than `now_O`. Updates `level_BO`; returns how far values moved, [B, O]."""
    columns, rows = wanted_BO.shape
    moved_BO = torch.empty_like(wanted_BO)
    assert level_BO.stride() == wanted_BO.stride(), (level_BO.stride(), wanted_BO.stride())
    _again_kernel[(triton.cdiv(rows, _ROWS),)](
        wanted_BO, level_BO, scale_O, zero_O, share_BB, pivot_B, order_B, now_O, moved_BO, rows, 2**bits - 1,
        COLUMNS=columns, WIDTH=_width(columns), ROWS=_ROWS, num_warps=_WARPS,
    )  # fmt: skip
    return moved_BO


def descend(pull_BO: Tensor, level_BO: Tensor, scale_O: Tensor, zero_O: Tensor, share_BB: Tensor, inverse_B: Tensor, bits: int) -> None:
    """Refiner._fit_codes: coordinate descent over the columns. Updates `level_BO`; `share_BB` is H_jk / H_jj, `inverse_B` 1 / H_jj."""
    columns, rows = pull_BO.shape
    assert level_BO.stride() == pull_BO.stride(), (level_BO.stride(), pull_BO.stride())
    _descend_kernel[(triton.cdiv(rows, _ROWS),)](
        pull_BO, level_BO, scale_O, zero_O, share_BB, inverse_B, rows, 2**bits - 1,
        COLUMNS=columns, WIDTH=_width(columns), ROWS=_ROWS, num_warps=_WARPS,
    )  # fmt: skip


def fit_scale(seen_BO: Tensor, pull_BO: Tensor, level_BO: Tensor, scale_O: Tensor) -> Tensor:
    """Refiner._fit_scale, given H_gg times the levels: updates `scale_O` and `pull_BO`; returns the values before, [B, O]."""
    columns, rows = pull_BO.shape
    before_BO = torch.empty_like(pull_BO)
    assert level_BO.stride() == pull_BO.stride() == seen_BO.stride()
    _scale_kernel[(triton.cdiv(rows, _ROWS),)](
        seen_BO, pull_BO, level_BO, scale_O, before_BO, rows, SCALE_MIN, SCALE_MAX, torch.finfo(torch.float32).tiny,
        COLUMNS=columns, WIDTH=_width(columns), ROWS=_ROWS, num_warps=_WARPS,
    )  # fmt: skip
    return before_BO


def _width(columns: int) -> int:
    return max(16, triton.next_power_of_2(columns))


@triton.jit
def _nearest(value, lowest, highest):
    """Rounded half to even and clamped. Clamped first: a value may be too large for the trick, which is exact below 2**22."""
    clamped = tl.minimum(tl.maximum(value, lowest - 1.0), highest + 1.0)
    return tl.minimum(tl.maximum((clamped + 12582912.0) - 12582912.0, lowest), highest)


@triton.jit
def _storable(scale, least, most):
    """core.grid.round_scale."""
    magnitude = tl.minimum(tl.maximum(tl.abs(scale), least), most).to(tl.float16).to(tl.float32)
    return tl.where(scale < 0, -magnitude, magnitude)


@triton.jit
def _search_kernel(
    running, importance, factors, scales, zeros, rows, stride, levels, per_level, least, most,
    FACTORS: tl.constexpr, SYM: tl.constexpr, SIGNED: tl.constexpr, COUNT: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (column[:, None] < COLUMNS) & (row[None, :] < rows)
    weight = tl.load(running + column[:, None] * stride + row[None, :], mask=inside, other=0.0)
    weight_of = tl.load(importance + column, mask=column < COLUMNS, other=0.0)[:, None]
    largest = tl.max(tl.abs(weight), axis=0)
    low = tl.minimum(tl.min(weight, axis=0), 0.0)
    high = tl.maximum(tl.max(weight, axis=0), 0.0)
    rank = tl.arange(0, COUNT)[:, None]
    error_k = tl.full((COUNT, ROWS), float("inf"), tl.float32)
    scale_k = tl.full((COUNT, ROWS), 1.0, tl.float32)
    zero_k = tl.full((COUNT, ROWS), 0.0, tl.float32)
    signs: tl.constexpr = 2 if SIGNED else 1
    for candidate in range(FACTORS * signs):
        factor = tl.load(factors + candidate // signs)
        if SYM:
            scale = _storable(largest * factor * per_level, least, most)
            zero = tl.zeros_like(scale) + (levels + 1) // 2
            scale = tl.where(candidate % signs == 1, -scale, scale)
        else:
            scale = _storable((high * factor - low * factor) / levels, least, most)
            zero = _nearest(-(low * factor) / scale, tl.full((ROWS,), 1.0, tl.float32), tl.zeros_like(scale) + levels)
        level = _nearest(tl.div_rn(weight, tl.broadcast_to(scale[None, :], (WIDTH, ROWS))), -zero[None, :], levels - zero[None, :])
        miss = level * scale[None, :] - weight
        error = tl.sum(miss * miss * weight_of, axis=0)
        # Insertion into the sorted list: behind those that are no worse, the rest moves down by one.
        place = tl.sum((error_k <= error[None, :]).to(tl.int32), axis=0)[None, :]
        error_k = _inserted(error_k, error, place, rank, COUNT, ROWS)
        scale_k = _inserted(scale_k, scale, place, rank, COUNT, ROWS)
        zero_k = _inserted(zero_k, zero, place, rank, COUNT, ROWS)
    at = rank * rows + row[None, :]
    tl.store(scales + at, scale_k, mask=row[None, :] < rows)
    tl.store(zeros + at, zero_k, mask=row[None, :] < rows)


@triton.jit
def _inserted(list_k, value, place, rank, COUNT: tl.constexpr, ROWS: tl.constexpr):
    """A short sorted list [COUNT, ROWS] with `value` at `place`, what stood there and below one further down."""
    above = tl.sum(tl.where((rank[:, None, :] == rank[None, :, :] + 1), list_k[None, :, :], 0.0), axis=1)
    return tl.where(rank < place, list_k, tl.where(rank == place, value[None, :], above))


@triton.jit
def _round_kernel(
    running, share, scales, zeros, levels_out, misses_out, pivots, costs, rows, stride, level_stride, by_column, by_candidate,
    levels, KEEP: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    column = tl.arange(0, WIDTH)
    scales += tl.program_id(1) * by_candidate
    zeros += tl.program_id(1) * by_candidate
    misses = tl.zeros((WIDTH, ROWS), tl.float32)
    cost = tl.zeros((ROWS,), tl.float32)
    for j in range(COLUMNS):
        owed = tl.load(share + j * COLUMNS + column, mask=column < j, other=0.0)
        value = tl.load(running + j * stride + row, mask=known, other=0.0) - tl.sum(misses * owed[:, None], axis=0)
        scale = tl.load(scales + j * by_column + row, mask=known, other=1.0)
        zero = tl.load(zeros + j * by_column + row, mask=known, other=0.0)
        level = _nearest(tl.div_rn(value, scale), -zero, levels - zero)
        miss = value - level * scale
        misses = tl.where(column[:, None] == j, miss[None, :], misses)
        if KEEP:
            tl.store(levels_out + j * level_stride + row, level, mask=known)
        else:
            cost += tl.load(pivots + j) * miss * miss
    if KEEP:
        inside = (column[:, None] < COLUMNS) & known[None, :]
        tl.store(misses_out + column[:, None] * rows + row[None, :], misses, mask=inside)
    else:
        tl.store(costs + tl.program_id(1) * rows + row, cost, mask=known)


@triton.jit
def _again_kernel(
    wanted, level_io, scales, zeros, share, pivots, order, now, moved_out, rows, levels,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    column = tl.arange(0, WIDTH)
    scale = tl.load(scales + row, mask=known, other=1.0)
    zero = tl.load(zeros + row, mask=known, other=0.0)
    misses = tl.zeros((WIDTH, ROWS), tl.float32)
    found = tl.zeros((WIDTH, ROWS), tl.float32)
    cost = tl.zeros((ROWS,), tl.float32)
    for turn in range(COLUMNS):
        j = tl.load(order + turn)
        owed = tl.load(share + turn * COLUMNS + column, mask=column < turn, other=0.0)
        value = tl.load(wanted + j * rows + row, mask=known, other=0.0) - tl.sum(misses * owed[:, None], axis=0)
        level = _nearest(tl.div_rn(value, scale), -zero, levels - zero)
        miss = value - level * scale
        misses = tl.where(column[:, None] == turn, miss[None, :], misses)
        found = tl.where(column[:, None] == j, level[None, :], found)
        cost += tl.load(pivots + turn) * miss * miss
    inside = (column[:, None] < COLUMNS) & known[None, :]
    at = column[:, None] * rows + row[None, :]
    before = tl.load(level_io + at, mask=inside, other=0.0)
    better = (cost < tl.load(now + row, mask=known, other=0.0))[None, :]
    after = tl.where(better, found, before)
    tl.store(level_io + at, after, mask=inside)
    tl.store(moved_out + at, (after - before) * scale[None, :], mask=inside)


@triton.jit
def _descend_kernel(
    pull, level_io, scales, zeros, share, inverses, rows, levels, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    column = tl.arange(0, WIDTH)
    scale = tl.load(scales + row, mask=known, other=1.0)
    zero = tl.load(zeros + row, mask=known, other=0.0)
    moves = tl.zeros((WIDTH, ROWS), tl.float32)
    for j in range(COLUMNS):
        owed = tl.load(share + j * COLUMNS + column, mask=column < j, other=0.0)
        wish = tl.load(pull + j * rows + row, mask=known, other=0.0) * tl.load(inverses + j)
        wish = tl.div_rn(wish, scale) - tl.sum(moves * owed[:, None], axis=0)
        level = tl.load(level_io + j * rows + row, mask=known, other=0.0)
        move = _nearest(level + wish, -zero, levels - zero) - level
        moves = tl.where(column[:, None] == j, move[None, :], moves)
    inside = (column[:, None] < COLUMNS) & known[None, :]
    at = column[:, None] * rows + row[None, :]
    tl.store(level_io + at, tl.load(level_io + at, mask=inside, other=0.0) + moves, mask=inside)


@triton.jit
def _scale_kernel(
    seen, pull, level, scales, before_out, rows, least, most, tiny, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    known = row < rows
    column = tl.arange(0, WIDTH)
    inside = (column[:, None] < COLUMNS) & known[None, :]
    at = column[:, None] * rows + row[None, :]
    levels = tl.load(level + at, mask=inside, other=0.0)
    sights = tl.load(seen + at, mask=inside, other=0.0)
    pulls = tl.load(pull + at, mask=inside, other=0.0)
    scale = tl.load(scales + row, mask=known, other=1.0)
    gain = tl.sum(levels * pulls, axis=0)
    cost = tl.sum(levels * sights, axis=0)
    step = _storable(scale + gain / tl.maximum(cost, tiny), least, most) - scale
    step = tl.where(step * (2 * gain - step * cost) > 0, step, 0.0)
    tl.store(before_out + at, levels * scale[None, :], mask=inside)
    tl.store(scales + row, scale + step, mask=known)
    tl.store(pull + at, pulls - sights * step[None, :], mask=inside)
