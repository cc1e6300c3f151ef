"""After the sweep: the best scale for the codes, the best code for the scale, in turn, group by group.

The sweep decides each column once, and each grid before it has seen the codes. What is left on the table is picked up by minimising the
very same objective J = ||W - Q||_H^2 over one group of variables at a time, everything else held fixed. With E = W - Q and P = H E:

    scale of group g   q = s v with v = code - zero:  s += b / a,    b = v . P_g,  a = v H_gg v      (J falls by b^2 / a)
    zero of group g    z += 1 moves the group by -s:  b = 1 . P_g,   a = 1 H_gg 1                    (asymmetric only)
    codes of group g   were all other groups what they are, the best group were q + H_gg^-1 P_g: sweep it again from there
    code of column j   q_j = nearest grid value to q_j + P_j / H_jj                                  (QuantEase, arXiv:2309.01885)

Scale, zero and single code are exact minimisers of their coordinate on the grid of values that can be stored (scales are rounded to
float16 before they are judged); a group swept again is taken row by row where it is better. So J never rises. P is brought up to date
once per group with one matrix product; a round over all groups costs O I^2 multiply-adds, as much as the sweep itself.

Everything is [I, O], as in the sweep. Shapes: I = in features sorted by group, O = rows, B = columns of one group, G = groups.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from gptqkit.algorithms.precision import short_updates
from gptqkit.algorithms.sweep import fix_block, kernels_for, shares
from gptqkit.core.grid import Grid, round_scale


@dataclass(slots=True)
class Fitted:
    """A quantized weight as the solver holds it, columns sorted by group: value = scale * level, level = code - zero.

    level_IO  the compute dtype, whole numbers
    scale_GO, zero_GO  float16 values and whole numbers in the compute dtype
    """

    level_IO: Tensor
    scale_GO: Tensor
    zero_GO: Tensor
    bits: int
    sym: bool


class Refiner:
    """Minimises ||W - Q||_H^2 from where the sweep ended. `gram_II` without damping, `damping_I` to be added to its diagonal."""

    def __init__(self, target_IO: Tensor, gram_II: Tensor, damping_I: Tensor, bounds: list[tuple[int, int]], fitted: Fitted) -> None:
        self.fitted = fitted
        self.gram_II = gram_II
        self.damping_I = damping_I
        self.bounds = bounds
        self._roots: dict[int, tuple[Tensor, Tensor]] = {}
        group_I = torch.repeat_interleave(
            torch.arange(len(bounds), device=target_IO.device),
            torch.tensor([stop - start for start, stop in bounds], device=target_IO.device),
        )
        error_IO = torch.addcmul(target_IO, fitted.level_IO, fitted.scale_GO[group_I], value=-1)
        with short_updates():
            self.pull_IO = torch.addcmul(gram_II @ error_IO, error_IO, damping_I[:, None])
        """P = H E: half the downhill gradient of J."""

    def round(self, *, codes: bool = True) -> None:
        """One pass over all groups: scale (and zero), then, with `codes`, every code of the group."""
        for group, (start, stop) in enumerate(self.bounds):
            within_BB = self.gram_II[start:stop, start:stop].clone()
            within_BB.diagonal().add_(self.damping_I[start:stop])
            pull_BO, level_BO = self.pull_IO[start:stop].clone(), self.fitted.level_IO[start:stop]
            before_BO = level_BO * self.fitted.scale_GO[group]
            self._fit_scale(group, level_BO, pull_BO, within_BB)
            if not self.fitted.sym:
                self._fit_zero(group, level_BO, pull_BO, within_BB)
            if codes:
                self._sweep_again(group, level_BO, pull_BO, within_BB)
                self._fit_codes(group, level_BO, pull_BO, within_BB)
            moved_BO = torch.addcmul(before_BO, level_BO, self.fitted.scale_GO[group], value=-1)
            self.pull_IO.addmm_(self.gram_II[:, start:stop], moved_BO)
            self.pull_IO[start:stop].addcmul_(moved_BO, self.damping_I[start:stop, None])

    def _fit_scale(self, group: int, level_BO: Tensor, pull_BO: Tensor, within_BB: Tensor) -> None:
        seen_BO = within_BB @ level_BO
        gain_O, cost_O = (level_BO * pull_BO).sum(0), (level_BO * seen_BO).sum(0)
        scale_O = self.fitted.scale_GO[group]
        step_O = round_scale(scale_O + gain_O / cost_O.clamp_min(torch.finfo(cost_O.dtype).tiny)) - scale_O
        step_O = torch.where(step_O * (2 * gain_O - step_O * cost_O) > 0, step_O, 0.0)
        self.fitted.scale_GO[group] = scale_O + step_O
        pull_BO.addcmul_(seen_BO, step_O, value=-1)

    def _fit_zero(self, group: int, level_BO: Tensor, pull_BO: Tensor, within_BB: Tensor) -> None:
        seen_B = within_BB.sum(1)
        zero_O, scale_O = self.fitted.zero_GO[group], self.fitted.scale_GO[group]
        step_O = torch.where(pull_BO.sum(0) * scale_O > 0, 1.0, -1.0)  # of the levels; the zero moves the other way
        step_O = torch.where((zero_O - step_O >= 1) & (zero_O - step_O <= 2**self.fitted.bits - 1), step_O, 0.0)
        moved_O = step_O * scale_O
        step_O = torch.where(moved_O * (2 * pull_BO.sum(0) - moved_O * seen_B.sum()) > 0, step_O, 0.0)
        self.fitted.zero_GO[group] = zero_O - step_O
        level_BO += step_O
        pull_BO.addcmul_(seen_B[:, None], step_O * scale_O, value=-1)

    def _sweep_again(self, group: int, level_BO: Tensor, pull_BO: Tensor, within_BB: Tensor) -> None:
        """The codes of a group all at once: a sweep inside the group towards its optimum, kept in the rows where it comes nearer."""
        root_BB, order_B = self._root(group, within_BB)
        scale_BO, zero_BO = self.fitted.scale_GO[group].expand_as(level_BO), self.fitted.zero_GO[group].expand_as(level_BO)
        away_BO = torch.linalg.solve_triangular(root_BB, pull_BO[order_B], upper=True)
        now_O = away_BO.square().sum(0)  # P_g H_gg^-1 P_g: what J would fall by if values could be anything
        away_BO = torch.linalg.solve_triangular(root_BB.T, away_BO, upper=False)
        level_ordered_BO = level_BO[order_B]
        wanted_BO = away_BO.addcmul_(level_ordered_BO, scale_BO)
        found_BO = torch.empty_like(level_BO)
        _, share_BB = shares(root_BB)
        miss_BO = fix_block(wanted_BO, found_BO, share_BB, Grid(scale_BO, zero_BO), self.fitted.bits)
        better_O = root_BB.diagonal().square() @ miss_BO.square_() < now_O
        moved_BO = torch.where(better_O, found_BO - level_ordered_BO, 0.0)
        step_BO = torch.empty_like(moved_BO)
        step_BO[order_B] = moved_BO
        level_BO += step_BO
        pull_BO.addmm_(within_BB, step_BO * scale_BO, alpha=-1)

    def _root(self, group: int, within_BB: Tensor) -> tuple[Tensor, Tensor]:
        """R of the group's own block of H, and the order of its columns: by H_jj, descending. Computed once."""
        if group not in self._roots:
            order_B = torch.argsort(within_BB.diagonal(), descending=True, stable=True)
            reversed_B = order_B.flip(0)
            lower_BB = torch.linalg.cholesky(within_BB[reversed_B[:, None], reversed_B])
            self._roots[group] = (lower_BB.flip(0, 1), order_B)
        return self._roots[group]

    def _fit_codes(self, group: int, level_BO: Tensor, pull_BO: Tensor, within_BB: Tensor) -> None:
        """Coordinate descent over the columns; a column collects what those before it owe when its turn comes (as in the sweep)."""
        scale_O, zero_O = self.fitted.scale_GO[group], self.fitted.zero_GO[group]
        lowest_O, highest_O = -zero_O, 2**self.fitted.bits - 1 - zero_O
        inverse_B = 1 / within_BB.diagonal()
        share_BB = within_BB * inverse_B[:, None]
        pull_BO.mul_(inverse_B[:, None]).div_(scale_O)  # in steps of the grid from here on
        moved_BO = torch.empty_like(pull_BO)
        pulls, levels, moves = pull_BO.unbind(0), level_BO.unbind(0), moved_BO.unbind(0)
        for j in range(pull_BO.shape[0]):
            if j:
                pulls[j].addmv_(moved_BO[:j].T, share_BB[j, :j], alpha=-1)
            torch.add(levels[j], pulls[j], out=moves[j])
            moves[j].round_().clamp_(lowest_O, highest_O).sub_(levels[j])
            levels[j].add_(moves[j])


def refine(target_IO: Tensor, gram_II: Tensor, damping_I: Tensor, group_I: Tensor, fitted: Fitted, rounds: int) -> None:
    """`rounds` of scales and codes, then scales once more; `fitted` is updated in place."""
    sizes = torch.bincount(group_I).tolist()
    stops = list(itertools.accumulate(sizes))
    bounds = [(stop - size, stop) for size, stop in zip(sizes, stops, strict=True)]
    columns_I = torch.argsort(group_I, stable=True)
    scattered = bool((group_I.diff() < 0).any())
    if scattered:
        level_IO, fitted.level_IO = fitted.level_IO, fitted.level_IO[columns_I]
        target_IO, gram_II, damping_I = target_IO[columns_I], gram_II[columns_I[:, None], columns_I], damping_I[columns_I]
    kernels = kernels_for(target_IO[: max(sizes)]) if len(set(sizes)) == 1 else None
    if kernels is None:
        refiner = Refiner(target_IO, gram_II, damping_I, bounds, fitted)
    else:
        from gptqkit.algorithms.refine_fused import FusedRefiner  # which builds on this module

        refiner = FusedRefiner(target_IO, gram_II, damping_I, bounds, fitted, kernels)
    for _ in range(rounds):
        refiner.round()
    refiner.round(codes=False)
    if scattered:
        level_IO[columns_I] = fitted.level_IO
        fitted.level_IO = level_IO
