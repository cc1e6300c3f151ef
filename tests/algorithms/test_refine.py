"""Refinement: the objective never rises, each step is the best of its kind, and the bookkeeping says what is true."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tests.algorithms.cases import gram, inputs, weight
from torch import Tensor

from gptqkit.algorithms.factor import damping, factorize
from gptqkit.algorithms.gptq import EFFORTS
from gptqkit.algorithms.order import column_order
from gptqkit.algorithms.refine import Fitted, Refiner, refine
from gptqkit.algorithms.sweep import sweep
from gptqkit.core.config import LinearSpec

ROWS, FEATURES, SIZE = 24, 160, 64  # the last group is narrower
BOUNDS = [(0, 64), (64, 128), (128, 160)]
GROUP_I = torch.arange(FEATURES) // SIZE


def case(bits: int, sym: bool, seed: int = 0, order: str = "natural") -> tuple[Tensor, Tensor, Tensor, Tensor, Fitted]:
    """Target [I, O], Gram, damping, group of each column, and what the sweep made of it. Float64."""
    gram_II, target_IO = gram(inputs(500, FEATURES, seed)), weight(ROWS, FEATURES, seed).T.contiguous()
    plan = column_order(gram_II.diagonal(), order, SIZE)
    swept = sweep(target_IO, factorize(gram_II, plan.columns_I, 0.01), plan, LinearSpec(bits, SIZE, sym), EFFORTS["fast"])
    fitted = Fitted(swept.level_IO, swept.scale_GO, swept.zero_GO, bits, sym)
    return target_IO, gram_II, damping(gram_II.diagonal(), 0.01), plan.group_I, fitted


def objective(target_IO: Tensor, gram_II: Tensor, damping_I: Tensor, group_I: Tensor, fitted: Fitted) -> Tensor:
    """[O]: ||W - Q||_H^2, computed from nothing but its definition."""
    error_IO = target_IO - fitted.level_IO * fitted.scale_GO[group_I]
    return ((gram_II + torch.diag(damping_I)) @ error_IO * error_IO).sum(0)


def storable(fitted: Fitted, group_I: Tensor) -> bool:
    codes_IO = fitted.level_IO + fitted.zero_GO[group_I]
    whole = torch.equal(codes_IO, codes_IO.round()) and torch.equal(fitted.scale_GO, fitted.scale_GO.half().double())
    return whole and float(codes_IO.min()) >= 0 and float(codes_IO.max()) < 2**fitted.bits and float(fitted.zero_GO.min()) >= 1


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_no_step_raises_the_objective_of_any_row(bits: int, sym: bool) -> None:
    target_IO, gram_II, damping_I, group_I, fitted = case(bits, sym)
    refiner = Refiner(target_IO, gram_II, damping_I, BOUNDS, fitted)
    steps: list[Callable[..., None]] = [refiner._fit_scale, refiner._sweep_again, refiner._fit_codes]
    steps += [] if sym else [refiner._fit_zero]
    last_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
    first_O = last_O
    for _ in range(2):
        for group, (start, stop) in enumerate(BOUNDS):
            within_BB = (gram_II + torch.diag(damping_I))[start:stop, start:stop]
            for step in steps:
                error_IO = target_IO - fitted.level_IO * fitted.scale_GO[group_I]
                pull_BO = ((gram_II + torch.diag(damping_I)) @ error_IO)[start:stop]
                step(group, fitted.level_IO[start:stop], pull_BO, within_BB.clone())
                now_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
                assert bool((now_O <= last_O * (1 + 1e-12)).all()), step.__name__
                assert storable(fitted, group_I)
                last_O = now_O
    assert float(last_O.sum()) < (0.99 if bits < 8 else 1.0) * float(first_O.sum())


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("order", ["natural", "activation", "group-aware", "desc-act"])
def test_more_rounds_come_nearer_in_every_order(order: str, sym: bool) -> None:
    """Row by row against the sweep; in all against fewer rounds, whose last step is another."""
    target_IO, gram_II, damping_I, group_I, fitted = case(3, sym, order=order)
    swept_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
    totals = [float(swept_O.sum())]
    for rounds in (0, 1, 3, 8):
        fitted = case(3, sym, order=order)[-1]
        refine(target_IO, gram_II, damping_I, group_I, fitted, rounds)
        now_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
        assert bool((now_O <= swept_O * (1 + 1e-12)).all())
        assert storable(fitted, group_I)
        totals.append(float(now_O.sum()))
    assert totals == sorted(totals, reverse=True)


def test_pull_is_the_gradient_after_every_round() -> None:
    target_IO, gram_II, damping_I, group_I, fitted = case(3, False)
    refiner = Refiner(target_IO, gram_II, damping_I, BOUNDS, fitted)
    for _ in range(3):
        refiner.round()
        error_IO = target_IO - fitted.level_IO * fitted.scale_GO[group_I]
        torch.testing.assert_close(refiner.pull_IO, (gram_II + torch.diag(damping_I)) @ error_IO, rtol=1e-9, atol=1e-12)


def test_the_scale_is_the_least_squares_scale() -> None:
    """After a pass over scales alone no float16 value nearby is better for the group visited last."""
    target_IO, gram_II, damping_I, group_I, fitted = case(4, True)
    Refiner(target_IO, gram_II, damping_I, BOUNDS, fitted).round(codes=False)
    best_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
    chosen_O = fitted.scale_GO[-1].clone()
    for towards in (torch.inf, -torch.inf):
        fitted.scale_GO[-1] = torch.nextafter(chosen_O.half(), torch.tensor(towards).half()).double()
        assert bool((objective(target_IO, gram_II, damping_I, group_I, fitted) >= best_O).all())


def test_no_single_code_could_be_better_in_the_end() -> None:
    """Run to the end, neither of a code's neighbours lowers the objective: what coordinate descent promises."""
    target_IO, gram_II, damping_I, group_I, fitted = case(3, True)
    refine(target_IO, gram_II, damping_I, group_I, fitted, rounds=60)
    Refiner(target_IO, gram_II, damping_I, BOUNDS, fitted).round()
    best_O = objective(target_IO, gram_II, damping_I, group_I, fitted)
    for column in (0, 5, 63, 64, 130, 159):
        for step in (-1.0, 1.0):
            kept_O = fitted.level_IO[column].clone()
            fitted.level_IO[column] = (kept_O + step).clamp(-4, 3)
            assert bool((objective(target_IO, gram_II, damping_I, group_I, fitted) >= best_O * (1 - 1e-12)).all())
            fitted.level_IO[column] = kept_O


def test_columns_of_scattered_groups_are_put_back() -> None:
    """A permutation of the columns that keeps the groups together in the sorted view: the same codes, permuted."""
    target_IO, gram_II, damping_I, group_I, fitted = case(3, True)
    shuffle_I = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(0))
    keep_I = shuffle_I[torch.argsort(group_I[shuffle_I], stable=True)]  # the order in which refine will see the shuffled columns
    plain = Fitted(fitted.level_IO[keep_I], fitted.scale_GO.clone(), fitted.zero_GO.clone(), 3, True)
    refine(target_IO[keep_I], gram_II[keep_I][:, keep_I], damping_I[keep_I], group_I[keep_I], plain, 2)
    moved = Fitted(fitted.level_IO[shuffle_I], fitted.scale_GO.clone(), fitted.zero_GO.clone(), 3, True)
    refine(target_IO[shuffle_I], gram_II[shuffle_I][:, shuffle_I], damping_I[shuffle_I], group_I[shuffle_I], moved, 2)
    back_I, shuffled_back_I = torch.argsort(keep_I), torch.argsort(shuffle_I)
    assert torch.equal(moved.level_IO[shuffled_back_I], plain.level_IO[back_I])
    assert torch.equal(moved.scale_GO, plain.scale_GO)
