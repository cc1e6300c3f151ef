"""The estimated layer objective against the solver's own."""

from __future__ import annotations

import pytest
import torch

from gptqkit.algorithms.estimate import ROWS, rounding_loss
from gptqkit.algorithms.factor import factorize
from gptqkit.algorithms.gptq import output_energy, solve_group
from gptqkit.core.config import LinearSpec


def problem(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight with a few large columns, and the Gram matrix of correlated inputs of different size."""
    generator = torch.Generator().manual_seed(0)
    mix_II = torch.randn(columns, columns, generator=generator) / columns**0.5
    x_MI = torch.randn(8 * columns, columns, generator=generator) @ (mix_II + torch.eye(columns))
    x_MI *= torch.exp(0.3 * torch.randn(columns, generator=generator))
    weight_OI = torch.randn(rows, columns, generator=generator) * torch.exp(0.3 * torch.randn(columns, generator=generator))
    return weight_OI, x_MI.T @ x_MI / x_MI.shape[0]


@pytest.mark.parametrize("sym", [True, False])
def test_ratios_between_options_are_those_of_the_solver(sym: bool) -> None:
    weight_OI, gram_II = problem(96, 256)
    pivot_I = factorize(gram_II, torch.arange(256), 0.01).pivot_I
    estimated, solved = {}, {}
    for bits, size in [(2, 64), (3, 32), (3, 64), (3, 128), (4, 128), (8, 64)]:
        spec = LinearSpec(bits, size, sym)
        estimated[spec] = rounding_loss(weight_OI, pivot_I, spec, signed=True)
        solution = solve_group([weight_OI], gram_II, [spec], order="group-aware", damp=0.01)[0]
        solved[spec] = float(output_energy((solution.weight.dequantize() - weight_OI).T, gram_II))
    at = LinearSpec(3, 64, sym)
    for spec, loss in estimated.items():
        assert loss / estimated[at] == pytest.approx(solved[spec] / solved[at], rel=0.3), spec


def test_many_rows_are_sampled_without_a_change_of_scale() -> None:
    weight_OI, gram_II = problem(ROWS, 64)
    pivot_I = factorize(gram_II, torch.arange(64), 0.01).pivot_I
    spec = LinearSpec(3, 32, True)
    once = rounding_loss(weight_OI, pivot_I, spec, signed=True)
    assert rounding_loss(weight_OI.repeat_interleave(3, dim=0), pivot_I, spec, signed=True) == pytest.approx(3 * once)


def test_what_no_input_sees_costs_nothing() -> None:
    assert rounding_loss(torch.randn(8, 64), torch.zeros(64), LinearSpec(2, 32, True), signed=True) == 0.0
