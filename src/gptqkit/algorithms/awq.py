"""AWQ: before rounding, columns that meet a strong input are scaled up, and the input is scaled down by the same factor.

Lin et al. 2023 (arXiv:2306.00978). For any s > 0, W x = (W S)(S^-1 x) with S = diag(s). A column that is larger relative to the others of
its group is rounded more finely relative to itself; so s_j should be large where an error in column j costs much. The 1 / s is not computed
at run time: whatever makes x is divided by it (models/folds.py), and the file is an ordinary one. All linears that read one input share s.

Tried are s_j = m_j^(ratio / 2), m_j the mean square of input channel j, at ratios from 0 (no scaling) to 1; the one is taken whose rounded
weights give the least output error, tr(E H E^T) over all linears, E = Q(W S) S^-1 - W, H the Gram matrix. Q is the rounding that is really
done: the grid of each group is searched and then fitted, errors in column j counting H_jj / s_j^2. The paper averages |x| where this takes
the root of the mean square, because the Gram matrix has it; it keeps activations where H serves, and clips in a second search.

H and m are damped as for GPTQ (factor.py), so that a near-dead channel is neither ignored nor scaled to nothing.

Shapes: O = out features, I = in features, S = distinct scales (as I, or fewer where several channels must share one).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gptqkit.algorithms.factor import damping
from gptqkit.algorithms.gptq import output_energy
from gptqkit.algorithms.hqq import half_quadratic
from gptqkit.algorithms.precision import exact
from gptqkit.algorithms.threads import one_thread
from gptqkit.core.config import LinearSpec
from gptqkit.core.weight import QuantizedWeight

STEPS = 20
"""Ratios are multiples of 1 / STEPS: every second one is tried, then both neighbours of the best."""
SCALE_LIMIT = 32.0
"""Scales stay within [1 / 32, 32]: they end up in float16 scales, and in norms of 8 bits of mantissa."""
SEARCH_ROWS = 512
"""About how many rows the ratios are compared on, evenly drawn from all linears; the winner must then beat s = 1 on all rows."""


def search_scale(
    weights_OI: Sequence[Tensor],
    gram_II: Tensor,
    specs: Sequence[LinearSpec],
    *,
    share_I: Tensor | None = None,
    damp: float = 0.01,
    signed: bool = True,
) -> Tensor:
    """The scale of each input channel, [I], for the linears [O_k, I] that read an input with the mean Gram matrix [I, I].

    share_I  int64 [I]: channels with equal numbers get one scale, that of their mean square (query heads that share a value head)

    The objective with the result is at most that with s = 1, which is returned when nothing is better. Deterministic.
    """
    with torch.no_grad(), exact(), one_thread(gram_II.is_cpu and gram_II.shape[0] <= 2048):
        damped_II = gram_II.float().clone()
        damped_II.diagonal().add_(damping(gram_II.diagonal().float(), damp))
        mean_I = _shared_mean(damped_II.diagonal(), share_I)
        none_I = torch.ones_like(mean_I)
        sampled = _sample(weights_OI)
        errors: dict[int, float] = {}
        for step in range(0, STEPS + 1, 2):
            errors[step] = scaled_error(sampled, damped_II, specs, _scale(mean_I, step / STEPS), signed=signed)
        coarse = min(errors, key=lambda step: errors[step])
        for step in {max(coarse - 1, 0), min(coarse + 1, STEPS)} - {coarse}:
            errors[step] = scaled_error(sampled, damped_II, specs, _scale(mean_I, step / STEPS), signed=signed)
        best = min(errors, key=lambda step: errors[step])
        if best == 0:
            return none_I
        best_I = _scale(mean_I, best / STEPS)
        if sum(map(len, sampled)) < sum(map(len, weights_OI)):
            whole = [scaled_error(weights_OI, damped_II, specs, scale_I, signed=signed) for scale_I in (best_I, none_I)]
            best_I = best_I if whole[0] < whole[1] else none_I
        return best_I


def scaled_error(weights_OI: Sequence[Tensor], gram_II: Tensor, specs: Sequence[LinearSpec], scale_I: Tensor, *, signed: bool) -> float:
    """The objective: the sum over linears of tr(E H E^T) when W S is rounded."""
    total = 0.0
    for weight_OI, spec in zip(weights_OI, specs, strict=True):
        rounded = round_scaled(weight_OI * scale_I, gram_II.diagonal() / scale_I.square(), spec, signed=signed)
        error_OI = rounded.dequantize().div_(scale_I).sub_(weight_OI)
        total += float(output_energy(error_OI.T, gram_II))
    return total


def round_scaled(weight_OI: Tensor, importance_I: Tensor, spec: LinearSpec, *, signed: bool) -> QuantizedWeight:
    """Rounding on grids that are searched and fitted with an error in column j counting importance_j."""
    return half_quadratic(weight_OI, spec, signed=signed, importance_I=importance_I)


def _scale(mean_I: Tensor, ratio: float) -> Tensor:
    """m^(ratio / 2), centred between its largest and smallest on a logarithmic axis, and limited."""
    scale_I = mean_I.pow(ratio / 2)
    return (scale_I / (scale_I.max() * scale_I.min()).sqrt()).clamp_(1 / SCALE_LIMIT, SCALE_LIMIT)


def _shared_mean(diagonal_I: Tensor, share_I: Tensor | None) -> Tensor:
    """Mean square of each channel, or of those that share its scale (summed on the CPU: on CUDA in no particular order)."""
    if share_I is None:
        return diagonal_I.clone()
    on_cpu_I, size = share_I.cpu(), int(share_I.max()) + 1
    sum_S = torch.zeros(size).index_add_(0, on_cpu_I, diagonal_I.cpu())
    return (sum_S / torch.bincount(on_cpu_I, minlength=size).clamp_min(1))[on_cpu_I].to(diagonal_I.device)


def _sample(weights_OI: Sequence[Tensor]) -> list[Tensor]:
    """Every n-th row of each."""
    step = max(1, sum(map(len, weights_OI)) // SEARCH_ROWS)
    return [weight_OI[::step].float() for weight_OI in weights_OI]
