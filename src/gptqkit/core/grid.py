"""Grids: the affine map between floats and codes, and the rounding onto it. All quantizer arithmetic is here.

    value = scale * (code - zero),    code = clamp(round(value / scale) + zero, 0, 2**bits - 1)

Symmetric: zero = 2**(bits - 1) and scale = 2 * max|w| / (2**bits - 1) (Frantar et al. 2022, arXiv:2210.17323, and what every GPTQ
checkpoint in the field uses). Asymmetric: the range always contains 0, scale = (max - min) / (2**bits - 1), zero = round(-min / scale),
clamped to 1 .. 2**bits - 1 because the GPTQ v1 format stores zero - 1 and has no agreed encoding of -1.

Scales are rounded to float16 *before* any code is computed, so that the codes are right for the scale that is stored, and kept at or
above 2**-14 in magnitude, the smallest float16 normal. Tensors: R = rows, C = columns of one group.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

SCALE_MIN = 2.0**-14
SCALE_MAX = 65504.0


class Grid(NamedTuple):
    """Scale and zero of one group in each of R rows; `scale_R` holds float16 values in the compute dtype, `zero_R` integers."""

    scale_R: Tensor
    zero_R: Tensor


def round_scale(scale: Tensor) -> Tensor:
    """The float16 value nearest to `scale`, in the dtype of `scale`; magnitude kept within [2**-14, 65504], sign kept."""
    sign = torch.where(scale < 0, -1.0, 1.0).to(scale.dtype)
    return (scale.abs().clamp(SCALE_MIN, SCALE_MAX).to(torch.float16)).to(scale.dtype) * sign


def minmax_grid(weight_RC: Tensor, *, bits: int, sym: bool) -> Grid:
    """The grid that covers the range of each row: [R, C] -> scale [R], zero [R]."""
    levels = 2**bits - 1
    if sym:
        scale_R = round_scale(weight_RC.abs().amax(dim=1) * (2.0 / levels))
        return Grid(scale_R, torch.full_like(scale_R, 2 ** (bits - 1)))
    low_R = weight_RC.amin(dim=1).clamp(max=0)
    high_R = weight_RC.amax(dim=1).clamp(min=0)
    scale_R = round_scale((high_R - low_R) / levels)
    return Grid(scale_R, torch.round(-low_R / scale_R).clamp(1, levels))


NARROWEST = {2: 0.35, 3: 0.55, 4: 0.7}
"""The smallest fraction of a row's range that a search tries, by bits: the more levels, the less there is to gain from clipping."""


def shrinks(bits: int) -> tuple[float, ...]:
    """Fractions of a row's range, widest first: 1.0, 0.95 … NARROWEST (0.8 above 4 bits)."""
    steps = round((1 - NARROWEST.get(bits, 0.8)) / 0.05)
    return tuple(1 - 0.05 * step for step in range(steps + 1))


def candidate_grids(weight_RC: Tensor, *, bits: int, sym: bool, signed: bool) -> Iterator[Grid]:
    """The min-max grid of each row and shrunken ones, widest first. `signed` adds the mirror image of each symmetric grid.

    A symmetric grid reaches one step further down than up, (-2**(bits-1) .. 2**(bits-1) - 1) scale: with a negative scale, up. At 2 bits
    that is two steps against one, so which side faces the longer tail matters a good deal.
    """
    for shrink in shrinks(bits):
        grid = minmax_grid(weight_RC * shrink, bits=bits, sym=sym)
        yield grid
        if sym and signed:
            yield Grid(-grid.scale_R, grid.zero_R)


def searched_grids(weight_RC: Tensor, importance_C: Tensor, *, bits: int, sym: bool, signed: bool = False, count: int = 1) -> list[Grid]:
    """Of `candidate_grids` the `count` with the least weighted rounding error of each row: sum over c of importance_c (w - q)^2.

    Clipping a few far weights makes the step finer for all others; how far to go depends on which columns matter, so a plain squared error
    (all importances equal) is the wrong measure, and often worse than not clipping at all. Ties go to the first, the widest.
    """
    grids = list(candidate_grids(weight_RC, bits=bits, sym=sym, signed=signed))
    error_KR = torch.stack([_weighted_error(weight_RC, importance_C, grid, bits) for grid in grids])
    ranked_KR = torch.argsort(error_KR, dim=0, stable=True)[:count]
    scale_KR = torch.stack([grid.scale_R for grid in grids]).gather(0, ranked_KR)
    zero_KR = torch.stack([grid.zero_R for grid in grids]).gather(0, ranked_KR)
    return [Grid(scale_R, zero_R) for scale_R, zero_R in zip(scale_KR, zero_KR, strict=True)]


def _weighted_error(weight_RC: Tensor, importance_C: Tensor, grid: Grid, bits: int) -> Tensor:
    return decode(encode(weight_RC, grid, bits), grid).sub_(weight_RC).square_() @ importance_C


def encode(weight_RC: Tensor, grid: Grid, bits: int) -> Tensor:
    """Nearest codes, as floats: [R, C] -> [R, C]."""
    return torch.round(weight_RC / grid.scale_R[:, None]).add_(grid.zero_R[:, None]).clamp_(0, 2**bits - 1)


def decode(codes_RC: Tensor, grid: Grid) -> Tensor:
    """Values of codes: [R, C] -> [R, C]."""
    return (codes_RC - grid.zero_R[:, None]) * grid.scale_R[:, None]
