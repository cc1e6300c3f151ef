"""refine.py on a CUDA device: the same steps group by group, with the kernels of fused.py, and what a group needs of H computed once for
all groups together.

There P is brought up to date after every group: [I, B] times [B, O], which reads and writes all of P for few operations. Here a group
collects what the groups before it in the round owe it when its turn comes, as in the sweep, and between rounds one product with all of H
brings P up to date: half as many operations more, a third of the time.

Shapes as in refine.py; N = groups.
"""

from __future__ import annotations

from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from gptqkit.algorithms.precision import short_updates
from gptqkit.algorithms.refine import Fitted, Refiner
from gptqkit.algorithms.sweep import shares


class _Within(NamedTuple):
    """Of each group's own block of H, damping included: the block, its inverse, H_jk / H_jj and 1 / H_jj; then, in the order of sweeping
    again: that order, what a miss makes later columns owe, and the pivots."""

    gram_NBB: Tensor
    inverse_NBB: Tensor
    share_NBB: Tensor
    inverse_NB: Tensor
    order_NB: Tensor
    again_NBB: Tensor
    pivot_NB: Tensor

    @classmethod
    def of(cls, gram_NBB: Tensor) -> _Within:
        diagonal_NB = gram_NBB.diagonal(dim1=1, dim2=2)
        inverse_NB = 1 / diagonal_NB
        order_NB = torch.argsort(diagonal_NB, dim=1, descending=True, stable=True)
        reversed_NB = order_NB.flip(1)
        permuted_NBB = gram_NBB.gather(1, reversed_NB[:, :, None].expand_as(gram_NBB)).gather(2, reversed_NB[:, None].expand_as(gram_NBB))
        lower_NBB = torch.linalg.cholesky(permuted_NBB)
        root_NBB = lower_NBB.flip(1, 2)
        again_NBB = shares(root_NBB)[1]
        share_NBB = gram_NBB * inverse_NB[:, :, None]
        natural_NB = torch.argsort(reversed_NB, dim=1)
        solved_NBB = torch.cholesky_inverse(lower_NBB)
        inverse_NBB = solved_NBB.gather(1, natural_NB[:, :, None].expand_as(gram_NBB)).gather(2, natural_NB[:, None].expand_as(gram_NBB))
        pivot_NB = root_NBB.diagonal(dim1=1, dim2=2).square().contiguous()
        return cls(gram_NBB, inverse_NBB, share_NBB, inverse_NB, order_NB, again_NBB, pivot_NB)


class FusedRefiner(Refiner):
    """Refiner for groups of equal size whose columns `kernels` (fused.py) can decide."""

    def __init__(
        self, target_IO: Tensor, gram_II: Tensor, damping_I: Tensor, bounds: list[tuple[int, int]], fitted: Fitted, kernels: ModuleType
    ) -> None:
        super().__init__(target_IO, gram_II, damping_I, bounds, fitted)
        within_NBB = torch.stack([gram_II[start:stop, start:stop] for start, stop in bounds])
        within_NBB.diagonal(dim1=1, dim2=2).add_(damping_I.view(len(bounds), -1))
        self._within = _Within.of(within_NBB)
        self._kernels = kernels
        self._moved_IO: Tensor | None = None
        """By how much the errors changed in the round before, which P does not know of yet."""

    def round(self, *, codes: bool = True) -> None:
        """One pass over all groups, as Refiner's."""
        fitted, kernels = self.fitted, self._kernels
        moved_IO = self._settled()
        for group, (start, stop) in enumerate(self.bounds):
            own = _Within(*(values[group] for values in self._within))
            pull_BO, level_BO = self.pull_IO[start:stop].clone(), fitted.level_IO[start:stop]
            if start:
                with short_updates():
                    pull_BO.addmm_(self.gram_II[start:stop, :start], moved_IO[:start])
            scale_O, zero_O = fitted.scale_GO[group], fitted.zero_GO[group]
            before_BO = kernels.fit_scale(own.gram_NBB @ level_BO, pull_BO, level_BO, scale_O)
            if not fitted.sym:
                self._fit_zero(group, level_BO, pull_BO, own.gram_NBB)
            if codes:
                away_BO = own.inverse_NBB @ pull_BO
                now_O = (away_BO * pull_BO).sum(0)
                wanted_BO = away_BO.addcmul_(level_BO, scale_O)
                step_BO = kernels.sweep_again(
                    wanted_BO, level_BO, scale_O, zero_O, own.again_NBB, own.pivot_NB, own.order_NB, now_O, fitted.bits
                )
                pull_BO.addmm_(own.gram_NBB, step_BO, alpha=-1)
                kernels.descend(pull_BO, level_BO, scale_O, zero_O, own.share_NBB, own.inverse_NB, fitted.bits)
            torch.addcmul(before_BO, level_BO, scale_O, value=-1, out=moved_IO[start:stop])

    def _settled(self) -> Tensor:
        """Brings P up to date with the round before; returns where this one notes how errors change."""
        moved_IO = self._moved_IO
        if moved_IO is None:
            self._moved_IO = torch.empty_like(self.pull_IO)
            return self._moved_IO
        with short_updates():
            self.pull_IO.addmm_(self.gram_II, moved_IO)
        self.pull_IO.addcmul_(moved_IO, self.damping_I[:, None])
        return moved_IO
