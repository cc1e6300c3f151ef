"""How large the layer objective will be at other bits and group sizes, without solving again.

GPTQ's objective is a sum over columns of what rounding costs when a column's turn comes, pivot times squared rounding error (sweep.py):

    ||W - Q||_H^2 = sum over j of R_jj^2 (w_j - q_j)^2

with w_j as compensation has left it. The rounding error of the *original* weights on a searched grid is much like it, so

    J(bits, group) ~ sum over j of R_jj^2 (W_j - Q_j)^2,    Q: rounded to nearest, each group's grid searched with weights R_jj^2

needs one factorization for all options and no sweep. Only the ratio between two options is used: from 3 bits, groups of 128, the ratio of
true KLs of one quantized unit is met within 3 to 6 % (standard deviation) at 3, 4 and 8 bits, and -12 +- 12 % at 2 bits, where KL itself
stops being proportional to J: with the solver's own J it is -8 +- 11 % (llama-small, 32 units, 12 options; LOG.md). With min-max instead
of searched grids it is off by 15 to 40 %.

Shapes: O = rows, I = in features, G = groups, C = columns of a group.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import candidate_grids, decode, encode

ROWS = 256
"""Rows looked at, evenly spaced: the ratio between options is a mean over rows."""


def rounding_loss(weight_OI: Tensor, pivot_I: Tensor, spec: LinearSpec, *, signed: bool) -> float:
    """The estimate of the layer objective, up to a factor that is the same for all specs of one linear.

    pivot_I  R_jj^2 in natural order, as `factorize` gives it for the identity permutation

    >>> weight_OI = torch.tensor([[-1.0, 0.3, 0.5, 1.0], [0.2, 0.4, -1.0, 0.7]])
    >>> at_3, at_4 = (rounding_loss(weight_OI, torch.ones(4), LinearSpec(bits, 4, sym=True), signed=True) for bits in (3, 4))
    >>> at_4 < at_3
    True
    """
    out_features, in_features = weight_OI.shape
    width = in_features if spec.group_size == -1 else spec.group_size
    sample_OI = weight_OI[:: -(-out_features // ROWS)].float()
    rows = sample_OI.shape[0]
    weight_RC = sample_OI.reshape(-1, width)
    pivot_RC = pivot_I.float().reshape(-1, width).repeat(rows, 1)
    least_R: Tensor | None = None
    for grid in candidate_grids(weight_RC, bits=spec.bits, sym=spec.sym, signed=signed):
        error_RC = decode(encode(weight_RC, grid, spec.bits), grid).sub_(weight_RC).square_()
        error_R = error_RC.mul_(pivot_RC).sum(1)
        least_R = error_R if least_R is None else torch.minimum(least_R, error_R)
    assert least_R is not None
    return float(least_R.sum(dtype=torch.float64)) * out_features / rows
