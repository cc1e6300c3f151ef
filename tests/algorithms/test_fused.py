"""The Triton kernels against what they replace, run by Triton's interpreter: no GPU needed. tests/gpu has the same on a card."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gptqkit.algorithms import refine as refine_module
from gptqkit.algorithms import sweep as sweep_module
from gptqkit.algorithms.gptq import EFFORTS, solve_group
from gptqkit.algorithms.precision import exact
from gptqkit.algorithms.sweep import SHORTLIST, shares
from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import Grid, searched_grids

kernels = pytest.importorskip("gptqkit.algorithms.fused", reason="Triton is for Linux")

CASES = [(4, True, True, 32, 40), (3, False, False, 24, 33), (2, True, True, 16, 64), (4, True, False, 8, 5), (8, False, False, 32, 31)]
"""bits, sym, signed, columns, rows: whole tiles and odd ones."""


def gram(columns: int, generator: torch.Generator) -> Tensor:
    x_MI = torch.randn(4 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    return x_MI.T @ x_MI / x_MI.shape[0] + 0.05 * torch.eye(columns)


@pytest.mark.parametrize(("bits", "sym", "signed", "columns", "rows"), CASES)
def test_decides_a_group_as_the_oracle_does(bits: int, sym: bool, signed: bool, columns: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    root_BB = torch.linalg.cholesky(gram(columns, generator).flip(0, 1)).flip(0, 1)
    weight_BO = torch.randn(columns, rows, generator=generator)
    pivot_B = root_BB.diagonal().square()
    _, share_BB = shares(root_BB)
    expected = searched_grids(weight_BO.T, pivot_B, bits=bits, sym=sym, signed=signed, count=SHORTLIST)
    found = kernels.best_grids(weight_BO, pivot_B, LinearSpec(bits, columns, sym), signed=signed, count=SHORTLIST)
    assert torch.equal(found.scale_R, torch.stack([grid.scale_R for grid in expected]))
    assert torch.equal(found.zero_R, torch.stack([grid.zero_R for grid in expected]))

    level_BO, found_BO = torch.empty_like(weight_BO), torch.empty_like(weight_BO)
    cost_KO = kernels.sweep_costs(weight_BO, share_BB, pivot_B, found, bits)
    expected_KO = torch.stack([sweep_module._cost(grid, weight_BO, level_BO, share_BB, pivot_B, bits) for grid in expected])
    torch.testing.assert_close(cost_KO, expected_KO, rtol=1e-4, atol=1e-6)

    by_column = Grid(*(values.expand(columns, rows) + torch.zeros(columns, 1) for values in expected[0]))
    for grid in (Grid(*(values.expand_as(weight_BO) for values in expected[0])), by_column):
        miss_BO = sweep_module.fix_block(weight_BO.clone(), level_BO, share_BB, grid, bits)
        torch.testing.assert_close(kernels.fix_block(weight_BO, found_BO, share_BB, grid, bits), miss_BO, rtol=1e-4, atol=1e-5)
        assert torch.equal(found_BO, level_BO)


@pytest.mark.parametrize("order", ["natural", "activation", "group-aware", "desc-act"])
@pytest.mark.parametrize(("bits", "sym"), [(4, True), (3, False), (2, True)])
def test_solves_as_the_oracle_does(monkeypatch: pytest.MonkeyPatch, bits: int, sym: bool, order: str) -> None:
    generator = torch.Generator().manual_seed(1)
    gram_II, weight_OI = gram(48, generator), torch.randn(24, 48, generator=generator)
    solved = []
    for found in (None, kernels):
        for module in (sweep_module, refine_module):
            monkeypatch.setattr(module, "kernels_for", lambda values, found=found: found)
        with exact():
            solved += solve_group(
                [weight_OI], gram_II, [LinearSpec(bits, 16, sym)], order=order, damp=0.01, effort=EFFORTS["fast"].limited(signed=sym)
            )
    assert torch.equal(solved[0].weight.scale_OG, solved[1].weight.scale_OG)
    assert torch.equal(solved[0].weight.codes_OI, solved[1].weight.codes_OI)
