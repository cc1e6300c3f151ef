"""HQQ: never worse than rounding on its own measure, every turn an improvement, and what the options promise."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.cases import weight
from torch import Tensor

from gptqkit.algorithms.hqq import COLUMN_LIMIT, ROUNDS, _error, _scale_step, column_importance, fit_grid, half_quadratic
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import encode, minmax_grid
from gptqkit.core.weight import QuantizedWeight


def uneven(rows: int, features: int, seed: int) -> Tensor:
    """[O, I] with columns of different size and a lopsided distribution."""
    generator = torch.Generator().manual_seed(seed)
    return (weight(rows, features, seed) + 0.02).mul(torch.randn(features, generator=generator).mul(0.5).exp()).float()


def measure(weight_OI: Tensor, quantized: QuantizedWeight) -> Tensor:
    """[O]"""
    return (quantized.dequantize() - weight_OI).square() @ column_importance(weight_OI)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_never_worse_than_rounding(bits: int, group_size: int, sym: bool, signed: bool) -> None:
    weight_OI, spec = uneven(12, 160, bits), LinearSpec(bits, group_size, sym)
    fitted, rounded = half_quadratic(weight_OI, spec, signed=signed), round_to_nearest(weight_OI, spec)
    assert (measure(weight_OI, fitted) <= measure(weight_OI, rounded) * (1 + 1e-5)).all()
    assert measure(weight_OI, fitted).sum() < measure(weight_OI, rounded).sum()
    assert (fitted.sym, fitted.bits, fitted.group_size) == (sym, bits, group_size)
    assert bool((fitted.scale_OG < 0).any()) is (sym and signed)


@pytest.mark.parametrize("sym", [True, False])
def test_turns_only_improve(sym: bool) -> None:
    weight_RC = uneven(64, 64, 3)
    importance_C = column_importance(weight_RC)
    grid = minmax_grid(weight_RC, bits=3, sym=sym)
    before_R = _error(weight_RC, importance_C, encode(weight_RC, grid, 3), grid)
    fitted = fit_grid(weight_RC, importance_C, grid, bits=3, sym=sym)
    after_R = _error(weight_RC, importance_C, encode(weight_RC, fitted, 3), fitted)
    assert ROUNDS > 0
    assert (after_R <= before_R).all()
    assert after_R.sum() < 0.9 * before_R.sum()
    assert torch.equal(fitted.scale_R, fitted.scale_R.half().float())


def test_the_scale_step_is_the_least_squares_scale() -> None:
    weight_RC = uneven(8, 32, 5).double()
    importance_C = column_importance(weight_RC)
    grid = minmax_grid(weight_RC, bits=4, sym=True)
    codes_RC = encode(weight_RC, grid, 4)
    root_C = importance_C.sqrt()
    for row, scale in enumerate(_scale_step(weight_RC, importance_C, codes_RC, grid, 4).scale_R.tolist()):
        level_C = (codes_RC[row] - 8) * root_C
        best = torch.linalg.lstsq(level_C[:, None], (weight_RC[row] * root_C)[:, None]).solution.item()
        assert scale == pytest.approx(best, rel=1e-3)


def test_columns_count_by_their_size_up_to_a_limit() -> None:
    weight_OI = torch.ones(4, 256)
    weight_OI[:, 0] = 100.0
    weight_OI[:, 1] = 0.0
    importance_I = column_importance(weight_OI)
    assert importance_I.argmax() == 0
    assert importance_I[0] == COLUMN_LIMIT
    assert importance_I[1] == 0
    assert importance_I[2] > 0


@pytest.mark.parametrize("sym", [True, False])
def test_zeros_and_constants(sym: bool) -> None:
    weight_OI = torch.zeros(4, 64)
    weight_OI[1] = 0.25
    weight_OI[2, :32] = -0.5
    quantized = half_quadratic(weight_OI, LinearSpec(4, 32, sym))
    torch.testing.assert_close(quantized.dequantize(), weight_OI, rtol=2e-3, atol=1e-6)


def test_takes_half_precision_and_leaves_it_alone() -> None:
    weight_OI = weight(4, 64, 1, torch.bfloat16)
    copy = weight_OI.clone()
    half, full = (half_quadratic(w_OI, LinearSpec(4, 32, True)) for w_OI in (weight_OI, copy.float()))
    assert torch.equal(half.codes_OI, full.codes_OI)
    assert torch.equal(weight_OI, copy)
