"""Grids: scales that float16 can hold, zero points that every format can hold, and a search that never loses."""

from __future__ import annotations

import pytest
import torch

from gptqkit.core.grid import SCALE_MIN, Grid, candidate_grids, decode, encode, minmax_grid, round_scale, searched_grids, shrinks


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("signed", [True, False])
def test_search_never_loses_to_the_widest_grid(bits: int, sym: bool, signed: bool) -> None:
    weight_RC, importance_C = rows(), torch.rand(32, generator=torch.Generator().manual_seed(1))

    def loss(grid: Grid) -> torch.Tensor:
        return (decode(encode(weight_RC, grid, bits), grid) - weight_RC).square() @ importance_C

    searched, widest = (
        searched_grids(weight_RC, importance_C, bits=bits, sym=sym, signed=signed)[0],
        minmax_grid(weight_RC, bits=bits, sym=sym),
    )
    assert bool((loss(searched) <= loss(widest)).all())
    if bits < 8:
        assert float(loss(searched).sum()) < float(loss(widest).sum())


def test_what_nobody_reads_keeps_its_range() -> None:
    searched = searched_grids(rows(), torch.zeros(32), bits=4, sym=True)[0]
    assert torch.equal(searched.scale_R, minmax_grid(rows(), bits=4, sym=True).scale_R)


@pytest.mark.parametrize("sym", [True, False])
def test_scales_and_zeros_fit_the_formats(sym: bool) -> None:
    weight_RC = torch.stack([torch.zeros(32), torch.full((32,), 1e-9), torch.full((32,), 3.0), torch.full((32,), -3.0), rows()[0]])
    for bits in (2, 3, 4, 8):
        grid = minmax_grid(weight_RC, bits=bits, sym=sym)
        assert torch.equal(grid.scale_R.half().float(), grid.scale_R)
        assert bool((grid.scale_R >= SCALE_MIN).all())
        assert bool(((grid.zero_R >= 1) & (grid.zero_R < 2**bits)).all())
        assert bool((decode(encode(weight_RC, grid, bits), grid)[0] == 0).all())


def test_scale_rounding_keeps_sign_and_range() -> None:
    scales = torch.tensor([0.0, 1e-9, -1e-9, 0.1, -0.1, 1e9])
    expected = [SCALE_MIN, SCALE_MIN, -SCALE_MIN, float(torch.tensor(0.1).half()), -float(torch.tensor(0.1).half()), 65504.0]
    assert round_scale(scales).tolist() == expected


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_shortlist_is_ranked_and_holds_every_grid_once(bits: int) -> None:
    weight_RC, importance_C = rows(3), torch.rand(32, generator=torch.Generator().manual_seed(2))
    every = list(candidate_grids(weight_RC, bits=bits, sym=True, signed=True))
    ranked = searched_grids(weight_RC, importance_C, bits=bits, sym=True, signed=True, count=len(every))
    error_KR = torch.stack([(decode(encode(weight_RC, grid, bits), grid) - weight_RC).square() @ importance_C for grid in ranked])
    assert bool((error_KR.diff(dim=0) >= 0).all())
    assert len(every) == len(ranked) == 2 * len(shrinks(bits))
    scales_KR, every_KR = (torch.stack([grid.scale_R for grid in grids]).sort(0).values for grids in (ranked, every))
    assert torch.equal(scales_KR, every_KR)
