"""Grids: scales that float16 can hold, zero points that every format can hold, and a search that never loses."""

from __future__ import annotations

import pytest
import torch

from gptqkit.core.grid import SCALE_MIN, decode, encode, minmax_grid, round_scale, searched_grid


def rows(seed: int = 0) -> torch.Tensor:
    return torch.randn(64, 32, generator=torch.Generator().manual_seed(seed)) ** 3


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_search_never_loses_to_the_widest_grid(bits: int, sym: bool) -> None:
    weight_RC, importance_C = rows(), torch.rand(32, generator=torch.Generator().manual_seed(1))

    def loss(grid: object) -> torch.Tensor:
        return (decode(encode(weight_RC, grid, bits), grid) - weight_RC).square() @ importance_C  # type: ignore[arg-type]

    searched, widest = searched_grid(weight_RC, importance_C, bits=bits, sym=sym), minmax_grid(weight_RC, bits=bits, sym=sym)
    assert bool((loss(searched) <= loss(widest)).all())
    if bits < 8:
        assert float(loss(searched).sum()) < float(loss(widest).sum())


def test_what_nobody_reads_keeps_its_range() -> None:
    searched = searched_grid(rows(), torch.zeros(32), bits=4, sym=True)
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
