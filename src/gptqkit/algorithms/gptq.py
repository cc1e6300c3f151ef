"""GPTQ for one input group: all linears that read the same tensor, solved with one Gram matrix and one factorization.

What is done, in this order: damp and factor the Gram matrix (factor.py), sweep the columns (sweep.py), then *look at the result*. The
sweep minimises ||W - Q||_H^2 and will gladly move a weight far away where H says that nobody is looking: a nearly dead channel, whose
column of H is nearly empty. Such a matrix has a fine objective on the calibration data and breaks on anything else. Rounding to nearest
on the grid of the same bit width sets the scale of a plausible change, and a result is accepted only if

    * it moves no group of columns more than CHANGE_LIMIT times as far as rounding to nearest does (Frobenius norm), and
    * its output error on the calibration data is not larger than that of rounding to nearest.

Otherwise the linear is solved again with the damping's floor raised to the mean of the diagonal, then with ten times that, and if that is
refused too it is rounded to nearest. Every step is recorded in `Solution.events`.

Shapes: I = in features, O = out features, G = groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from gptqkit.algorithms.factor import RAISE, DampingRule, Factor, damping, even_damping, factorize, mean_damping, sample_damp
from gptqkit.algorithms.order import ColumnOrder, column_order
from gptqkit.algorithms.precision import exact, short_products
from gptqkit.algorithms.refine import Fitted, refine
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.algorithms.sweep import Effort, sweep
from gptqkit.algorithms.threads import one_thread
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight

EFFORTS = {
    "plain": Effort("minmax", signed=False, rounds=0, damping=mean_damping),
    "fast": Effort("exact", signed=True, rounds=3, damping=damping),
    "best": Effort("exact", signed=True, rounds=3, damping=damping),
}
"""What each preset does for a linear."""

CHANGE_LIMIT = 8.0
"""Measured on a trained 27.8 M-parameter Llama (2, 3, 4 bits, groups of 32 and 128, all four orders): healthy groups move 1.1 to 2 times
as far as rounding does, 3.9 at the very most; a layer with near-dead channels and no damping floor, 376 to 1270 times."""
FOLLOW_TOKENS = 4
"""Tokens per input channel at which alpha is half of what it is with many: with 0, some linears end further from the original than
rounding would leave them at 4 and 16 sequences of 512 tokens; with 4 or 16, none do."""
ONE_THREAD_FEATURES = 2048
"""Up to this many in features a CPU solves on one thread (threads.py)."""
NEAR_DEAD = 1e-3
"""A live column counts as near-dead (reported only; the damping's floor takes care of it) below this fraction of the median H_jj."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """One linear, solved, with what is worth knowing about it.

    weight         the codes and scales
    method         "gptq", or "rtn" when it fell back to rounding
    error          relative output error on the calibration data, tr(E H E^T) / tr(W H W^T) with the undamped H
    error_rounded  the same for rounding to nearest: what GPTQ had to beat
    weight_change  ||Q - W|| / ||W||, Frobenius
    damp           the damping fraction that was used in the end
    dead           columns whose input was always 0: rounded to nearest, they take no part in the compensation
    near_dead      live columns with H_jj below a thousandth of the median
    events         what went differently than planned, one sentence each; empty in an ordinary run
    """

    weight: QuantizedWeight
    method: str
    error: float
    error_rounded: float
    weight_change: float
    damp: float
    dead: int
    near_dead: int
    events: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Judged:
    """A quantized linear beside its measures.

    error  relative output error against W on the same inputs; loss: the same against W on the original model's inputs, up to a constant
    worst  the largest change of a group, in units of what rounding changes
    """

    weight: QuantizedWeight
    error: float
    loss: float
    weight_change: float
    worst: float


@dataclass(slots=True)
class _Linear:
    """A linear to be solved: W, the energy of its output, D W^T where a second stream is known, and what rounding to nearest gives."""

    weight_OI: Tensor
    energy: float
    drift_IO: Tensor | None
    usual_G: Tensor
    rounded: _Judged

    @classmethod
    def of(cls, weight_OI: Tensor, order: ColumnOrder, spec: LinearSpec, group: _Group) -> _Linear:
        energy = float(output_energy(weight_OI.T, group.gram_II))
        drift_IO = None if group.cross_II is None else (group.cross_II - group.gram_II) @ weight_OI.T
        if drift_IO is not None and group.ahead_IO is not None:
            drift_IO += group.ahead_IO
        quantized = _rounded(weight_OI, order, spec)
        usual_G = _squares_by_group(quantized.dequantize(weight_OI.dtype).sub_(weight_OI), quantized)
        linear = cls(weight_OI, energy, drift_IO, usual_G, rounded=_Judged(quantized, 0.0, 0.0, 0.0, 0.0))
        linear.rounded = _judge(quantized, linear, group.gram_II)
        return linear


class _Strength(NamedTuple):
    """How strongly to damp: what multiplies the fraction asked for, and by which rule."""

    times: float
    rule: DampingRule
    words: str


_STRENGTHS = (
    _Strength(1.0, damping, "as asked"),
    _Strength(1.0, even_damping, "with the damping's floor at the mean"),
    _Strength(RAISE, even_damping, f"with {RAISE:g} times the damping"),
)


Factors = list[tuple[Tensor, _Strength, Factor]]
"""Factorizations made of one Gram matrix: the permutation, how strongly it was damped, the factor."""


@dataclass(slots=True)
class _Group:
    """The input group being solved: H, the second stream's C, and the factorizations made of H so far."""

    gram_II: Tensor
    order: str
    damp: float
    effort: Effort
    cross_II: Tensor | None = None
    ahead_IO: Tensor | None = None
    follow: float = 0.0
    factors: Factors = field(default_factory=list)

    @property
    def strengths(self) -> tuple[_Strength, ...]:
        return (_STRENGTHS[0]._replace(rule=self.effort.damping), *_STRENGTHS[1:])

    def columns(self, spec: LinearSpec) -> ColumnOrder:
        return column_order(self.gram_II.diagonal(), self.order, spec.group_size)

    def factor(self, order: ColumnOrder, strength: _Strength) -> Factor:
        """R for this order; computed once per distinct permutation, whatever the bits and grids of the linears that use it."""
        for columns_I, known, factor in self.factors:
            if known == strength and torch.equal(columns_I, order.columns_I):
                return factor
        factor = factorize(self.gram_II, order.columns_I, self.damp * strength.times, rule=strength.rule)
        self.factors.append((order.columns_I, strength, factor))
        return factor


def solve_group(
    weights_OI: Sequence[Tensor],
    gram_II: Tensor,
    specs: Sequence[LinearSpec],
    *,
    order: str,
    damp: float,
    effort: Effort = EFFORTS["fast"],
    name: str = "this linear",
    cross_II: Tensor | None = None,
    ahead_IO: Tensor | None = None,
    follow: float = 0.5,
    tokens: float = float("inf"),
    factors: Factors | None = None,
) -> list[Solution]:
    """Quantizes the linears [O_k, I] that read one input, given the mean Gram matrix [I, I] of that input.

    order   natural, activation, group-aware or desc-act (order.py)
    damp    fraction for the damping rule (factor.py)
    name    what an error message calls the input group
    cross_II   second stream: mean of x_q x_f^T [I, I], rows what the quantized model feeds the linears, columns what the original does
    ahead_IO   mean of x_q (h_f - h_q)^T [I, O]: what the residual stream they add to is behind by (one linear only)
    follow  alpha: how far the target moves towards the one that makes up for both
    tokens  what the Gram matrices are the mean of; the fewer, the stronger the damping (factor.sample_damp), and the smaller alpha

    factors what earlier calls with the same matrix, damp and tokens have made of it; those that are made now are added

    With a second stream the target is W* = W + alpha (W D^T + A^T) H^-1, D = C - H, A what is behind: for alpha = 1 the least-squares
    optimum of ||W x_f + h_f - h_q - Y x_q||^2 (Arai & Ichikawa 2025, QEP, arXiv:2504.09629, without the residual stream; Lin et al. 2025,
    LoaQ, arXiv:2509.06297, with it). Half of it fits other data better than all of it.

    Linears of equal spec are stacked and swept together; those of different spec still share the factorization when their permutation
    is the same. Computes in float32 (in float64 when `gram_II` is float64); the same input gives the same bytes. The arguments are not
    modified. Raises InputError when the Gram matrix is not finite.
    """
    gram_II = gram_II if gram_II.dtype == torch.float64 else gram_II.float()
    if not bool(torch.isfinite(gram_II.diagonal()).all()):
        bad = int((~torch.isfinite(gram_II.diagonal())).sum())
        raise InputError(
            f"{name}: the calibration inputs are not finite in {bad} of {gram_II.shape[0]} channels; the model overflows or holds NaN: "
            "try --dtype float32 (or bfloat16 instead of float16), or check the checkpoint with `gptqkit verify`"
        )
    damp = sample_damp(damp, gram_II.shape[0], tokens)
    follow /= 1 + FOLLOW_TOKENS * gram_II.shape[0] / max(tokens, 1.0)
    group = _Group(gram_II, order, damp, effort, cross_II, ahead_IO, follow, [] if factors is None else factors)
    solutions: list[Solution | None] = [None] * len(specs)
    with torch.no_grad(), exact(), one_thread(gram_II.is_cpu and gram_II.shape[0] <= ONE_THREAD_FEATURES):
        for spec in dict.fromkeys(specs):
            members = [k for k, other in enumerate(specs) if other == spec]
            stacked = _solve_stacked([weights_OI[k].detach().to(gram_II.dtype) for k in members], group, spec)
            for k, solution in zip(members, stacked, strict=True):
                solutions[k] = solution
    return [solution for solution in solutions if solution is not None]


def _solve_stacked(weights_OI: list[Tensor], group: _Group, spec: LinearSpec) -> list[Solution]:
    """Linears of one spec: solve together, then judge each, and solve those that are refused again."""
    order = group.columns(spec)
    linears = [_Linear.of(weight_OI, order, spec, group) for weight_OI in weights_OI]
    solutions: list[Solution | None] = [None] * len(linears)
    events: list[tuple[str, ...]] = [()] * len(linears)
    open_ = list(range(len(linears)))
    for attempt, strength in enumerate(group.strengths):
        if not open_:
            break
        factor = group.factor(order, strength)
        fitted = _fit_stacked([linears[k] for k in open_], group, factor, order, spec)
        refused = []
        for k, quantized in zip(open_, fitted, strict=True):
            judged = _judge(quantized, linears[k], group.gram_II)
            events[k] += factor.events
            reason = _refusal(judged, linears[k].rounded)
            if reason is None:
                solutions[k] = _solution("gptq", judged, linears[k].rounded, group, factor.damp, events[k])
            else:
                last = attempt == len(group.strengths) - 1
                events[k] += (f"{reason}: {'rounded to nearest' if last else f'solved again {group.strengths[attempt + 1].words}'}",)
                refused.append(k)
        open_ = refused
    damp = group.damp * group.strengths[-1].times
    return [
        solution or _solution("rtn", linear.rounded, linear.rounded, group, damp, notes)
        for solution, linear, notes in zip(solutions, linears, events, strict=True)
    ]


def _fit_stacked(linears: list[_Linear], group: _Group, factor: Factor, order: ColumnOrder, spec: LinearSpec) -> list[QuantizedWeight]:
    """Sweep and refinement over the rows of all weights at once, cut into one QuantizedWeight each."""
    weights_OI = [linear.weight_OI for linear in linears]
    target_IO = torch.cat(weights_OI).T.contiguous()
    if linears[0].drift_IO is not None:
        drift_IO = torch.cat([linear.drift_IO for linear in linears if linear.drift_IO is not None], dim=1)
        target_IO += group.follow * _solve(factor, order, drift_IO)
    swept = sweep(target_IO, factor, order, spec, group.effort)
    fitted = Fitted(swept.level_IO, swept.scale_GO, swept.zero_GO, spec.bits, spec.sym)
    if group.effort.rounds:
        refine(target_IO, group.gram_II, factor.damping_I, order.group_I, fitted, group.effort.rounds)
    rows = [weight_OI.shape[0] for weight_OI in weights_OI]
    group_I = order.group_I.to(torch.int32) if order.stores_groups else None
    codes_IO = (fitted.level_IO + fitted.zero_GO[order.group_I]).to(torch.uint8)
    return [
        QuantizedWeight(
            bits=spec.bits,
            group_size=spec.group_size,
            codes_OI=codes_IO.T.contiguous(),
            scale_OG=scale_GO.T.to(torch.float16).contiguous(),
            zero_OG=None if spec.sym else zero_GO.T.to(torch.uint8).contiguous(),
            group_I=group_I,
        )
        for codes_IO, scale_GO, zero_GO in zip(
            codes_IO.split(rows, 1), fitted.scale_GO.split(rows, 1), fitted.zero_GO.split(rows, 1), strict=True
        )
    ]


def _solve(factor: Factor, order: ColumnOrder, right_IO: Tensor) -> Tensor:
    """H^-1 times [I, O], from the factor of H."""
    step_IO = torch.linalg.solve_triangular(factor.root_II, right_IO[order.columns_I], upper=True)
    step_IO = torch.linalg.solve_triangular(factor.root_II.T, step_IO, upper=False)
    solved_IO = torch.empty_like(step_IO)
    solved_IO[order.columns_I] = step_IO
    return solved_IO


def _rounded(weight_OI: Tensor, order: ColumnOrder, spec: LinearSpec) -> QuantizedWeight:
    """Rounding to nearest in the groups that the sweep uses, so that a linear that falls back still fits beside its neighbours."""
    return round_to_nearest(weight_OI, spec, order.group_I.to(torch.int32) if order.stores_groups else None)


def output_energy(weight_IO: Tensor, gram_II: Tensor, width: int = 256) -> Tensor:
    """tr(W^T H W) for [I, O] and symmetric [I, I]: scalar, the mean squared norm of the output over tokens.

    The blocks above the diagonal count twice, those below not at all, which halves the work. Operands may be shortened (bfloat16 on a
    CPU, TF32 on CUDA), which moves the sum of so many terms by less than a part in a thousand: it is a measure, nothing is computed
    from it.
    """
    total = weight_IO.new_zeros((), dtype=torch.float64)
    with short_products():
        for start in range(0, weight_IO.shape[0], width):
            block_BO = weight_IO[start : start + width]
            stop = start + block_BO.shape[0]
            seen_BO = gram_II[start:stop, start:stop] @ block_BO
            if stop < weight_IO.shape[0]:
                seen_BO.addmm_(gram_II[start:stop, stop:], weight_IO[stop:], alpha=2)
            total += (seen_BO.mul_(block_BO)).sum(dtype=torch.float64)
    return total


def _judge(quantized: QuantizedWeight, linear: _Linear, gram_II: Tensor) -> _Judged:
    weight_OI = linear.weight_OI
    change_OI = quantized.dequantize(weight_OI.dtype).sub_(weight_OI)
    error = float(output_energy(change_OI.T, gram_II))
    owed = 0.0 if linear.drift_IO is None else 2 * float((change_OI * linear.drift_IO.T).sum(dtype=torch.float64))
    moved_G = _squares_by_group(change_OI, quantized)
    usual_G = linear.usual_G
    # A group that rounding happens to hit (all zeros, say) is measured by its linear's mean instead.
    ratio_G = moved_G / torch.maximum(usual_G, usual_G.mean()).clamp_min(torch.finfo(torch.float32).tiny)
    return _Judged(
        weight=quantized,
        error=_ratio(error, linear.energy),
        loss=_ratio(error - owed, linear.energy),
        weight_change=_ratio(float(moved_G.sum()), float(weight_OI.square().sum(dtype=torch.float64))) ** 0.5,
        worst=float(ratio_G.max()) ** 0.5,
    )


def _squares_by_group(change_OI: Tensor, quantized: QuantizedWeight) -> Tensor:
    """[G] float64: squared Frobenius norm of the columns of each group."""
    square_I = change_OI.square().sum(0, dtype=torch.float64)
    return torch.zeros(quantized.groups, dtype=torch.float64, device=square_I.device).index_add_(0, quantized.column_groups(), square_I)


def _refusal(judged: _Judged, rounded: _Judged) -> str | None:
    """Why a result is not accepted, or None. Written so that NaN is refused."""
    if not judged.worst <= CHANGE_LIMIT:
        return f"a group moved {judged.worst:.3g} times as far as rounding to nearest would move it (allowed: {CHANGE_LIMIT:g})"
    if not judged.loss <= rounded.loss:
        return f"output error {judged.error:.3g} is above that of rounding to nearest, {rounded.error:.3g}"
    return None


def _solution(method: str, judged: _Judged, rounded: _Judged, group: _Group, damp: float, events: tuple[str, ...]) -> Solution:
    diagonal_I = group.gram_II.diagonal()
    live = diagonal_I[diagonal_I > 0]
    return Solution(
        weight=judged.weight,
        method=method,
        error=judged.error,
        error_rounded=rounded.error,
        weight_change=judged.weight_change,
        damp=damp,
        dead=diagonal_I.shape[0] - live.numel(),
        near_dead=int((live < NEAR_DEAD * live.median()).sum()) if live.numel() else 0,
        events=events,
    )


def _ratio(part: float, whole: float) -> float:
    """part / whole; 0 when the whole is nothing (no tokens, or a weight of zeros)."""
    return part / whole if whole > 0 else 0.0
