"""Round to nearest: every code is the nearest, and groups follow `group_I`."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.cases import weight

from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.core.config import LinearSpec


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, 64, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_no_other_code_is_nearer(bits: int, group_size: int, sym: bool) -> None:
    weight_OI = weight(6, 80, bits, torch.float32)
    quantized = round_to_nearest(weight_OI, LinearSpec(bits, group_size, sym))
    scale_OI = quantized.scale_OG.float()[:, quantized.column_groups()]
    zero_OI = quantized.natural_zero if sym else quantized.zero_OG.float()[:, quantized.column_groups()]
    candidates_KOI = (torch.arange(2**bits).float()[:, None, None] - zero_OI) * scale_OI
    distance_OI = (candidates_KOI - weight_OI).abs().amin(0)
    torch.testing.assert_close((quantized.dequantize() - weight_OI).abs(), distance_OI, rtol=1e-4, atol=1e-7)
    assert quantized.sym is sym


def test_stored_groups() -> None:
    """With groups of interleaved columns the result is that of the columns sorted by group, put back."""
    weight_OI = weight(5, 96, 0, torch.float32)
    group_I = (torch.arange(96) % 3).to(torch.int32)
    sorted_I = torch.argsort(group_I, stable=True)
    spec = LinearSpec(4, 32, False)
    stored, plain = round_to_nearest(weight_OI, spec, group_I), round_to_nearest(weight_OI[:, sorted_I], spec)
    assert torch.equal(stored.codes_OI[:, sorted_I], plain.codes_OI)
    assert torch.equal(stored.scale_OG, plain.scale_OG)
    assert torch.equal(stored.group_I, group_I)
    assert torch.equal(stored.dequantize()[:, sorted_I], plain.dequantize())


def test_takes_half_precision_and_leaves_it_alone() -> None:
    weight_OI = weight(4, 64, 1, torch.bfloat16)
    copy = weight_OI.clone()
    half, full = (round_to_nearest(w_OI, LinearSpec(4, 32, True)) for w_OI in (weight_OI, copy.float()))
    assert torch.equal(half.codes_OI, full.codes_OI)
    assert torch.equal(weight_OI, copy)
