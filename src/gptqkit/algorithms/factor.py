"""Damping the Gram matrix and factoring it: the one O(I^3) step, done once for all linears that read the same input.

GPTQ needs the Cholesky factor of the inverse, H^-1 = U^T U with U upper triangular. Factoring the matrix with rows and columns reversed,
J H J = L L^T (J: reversal), gives it without ever forming an inverse: with the upper triangular R = J L J,

    H = R R^T     and therefore     U = R^-1.

The sweep only needs R and the inverses of its diagonal blocks (sweep.py), so the whole cost is one Cholesky: I^3 / 3 multiply-adds instead
of the 4/3 I^3 of factor, invert, factor again, and no ill-conditioned inverse in between.

Damping adds lambda_j to the diagonal, with a floor (`damping`), and more of it the fewer tokens H was made of (`sample_damp`). A column
whose input was never different from zero (H_jj = 0) says nothing and couples to nothing: its row and column of H are zero, so the
damping's floor alone stands on its diagonal, and the sweep rounds it to nearest. It is not zeroed: calibration is a sample, and a channel
silent in the sample may speak in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gptqkit.core.errors import InputError

RAISE = 10.0
"""How much the damping grows when a factorization fails in float64 too."""
_ATTEMPTS = 6  # 0.01 -> 1000: far beyond any matrix that is finite and symmetric


@dataclass(frozen=True, slots=True, eq=False)
class Factor:
    """root_II  upper triangular R in sweep order, H = R R^T
    pivot_I  R_jj^2 in sweep order: what a rounding error of 1 at its turn costs
    damping_I  what was added to the diagonal, in natural order
    damp     the fraction that was needed
    events   what had to be done to get it, in words
    """

    root_II: Tensor
    pivot_I: Tensor
    damping_I: Tensor
    damp: float
    events: tuple[str, ...]


def damping(diagonal_I: Tensor, damp: float) -> Tensor:
    """lambda_j for each column, [I] -> [I]: damp times H_jj, or times the median of the live (non-zero) diagonal where H_jj is below it.

    The median is the floor that near-dead channels need; unlike the mean it does not follow a few massive channels. Of the rules with a
    floor that were compared on a trained model (mean; median; mean of H_jj and median; this one) none was worse by more than noise at 4
    and 3 bits, and this one was best at 2 bits and with synthetic massive channels.
    """
    return damp * torch.maximum(diagonal_I, _live(diagonal_I).median())


def sample_damp(damp: float, features: int, tokens: float) -> float:
    """The fraction to damp by when H is the mean of so many tokens: at least features / tokens.

    The sample covariance of N tokens in I channels is off by sqrt(I / N) in every direction, and a solver finds the directions in which
    it errs: what it saves there is an illusion that the next text pays for. Shrinking the correlations towards none by about I / N is
    what estimators of covariances do (Ledoit & Wolf 2004). Of 0, 0.1, 0.3, 1 and 3 times I / N, 1 was best or within noise of it at 4
    and at 16 sequences of 512 tokens, at 4, 3 and 2 bits; from about 100 tokens a channel on, nothing changes.
    """
    return max(damp, features / max(tokens, 1.0))


def even_damping(diagonal_I: Tensor, damp: float) -> Tensor:
    """The stronger rule of the fallback: as `damping`, but at least damp times the mean of the live diagonal."""
    return torch.maximum(damping(diagonal_I, damp), damp * _live(diagonal_I).mean())


DampingRule = Callable[[Tensor, float], Tensor]


def mean_damping(diagonal_I: Tensor, damp: float) -> Tensor:
    """The textbook's: damp times the mean of the diagonal for every column. A few massive channels drown all others in it."""
    return (damp * _live(diagonal_I).mean()).expand_as(diagonal_I)


def _live(diagonal_I: Tensor) -> Tensor:
    live = diagonal_I[diagonal_I > 0]
    return live if live.numel() else diagonal_I.new_ones(1)


def factorize(gram_II: Tensor, columns_I: Tensor, damp: float, *, rule: DampingRule = damping) -> Factor:
    """R of the damped Gram matrix [I, I] in the order `columns_I`. Float32, again in float64 on failure, then with more damping.

    Raises InputError when nothing helps (a Gram matrix that is not one: not symmetric, or negative on the diagonal).
    """
    diagonal_I = gram_II.diagonal()
    events: list[str] = []
    reversed_I = columns_I.flip(0)
    for _ in range(_ATTEMPTS):
        damping_I = rule(diagonal_I, damp)
        matrix_II = gram_II[reversed_I[:, None], reversed_I]
        matrix_II.diagonal().add_(damping_I[reversed_I])
        for dtype in (gram_II.dtype, torch.float64):
            lower_II, failed = torch.linalg.cholesky_ex(matrix_II.to(dtype))
            if not failed.item() and bool(torch.isfinite(lower_II.diagonal()).all()):  # L_ii takes in every other entry of its row
                del matrix_II  # these are the largest matrices of a run: three at a time, not four
                root_II = lower_II.flip(0, 1).to(gram_II.dtype)
                return Factor(root_II, root_II.diagonal().square(), damping_I, damp, tuple(events))
            events.append(f"Cholesky failed in {str(dtype).removeprefix('torch.')} with damping {damp:g}")
        damp *= RAISE
    raise InputError(f"the Gram matrix cannot be factored even with damping {damp / RAISE:g}: it is not positive semidefinite")
