"""The search for scales: never worse than none, better where channels differ, and what its arguments promise."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.cases import gram, h_norm, inputs, weight
from torch import Tensor

from gptqkit.algorithms import awq
from gptqkit.algorithms.awq import SCALE_LIMIT, round_scaled, scaled_error, search_scale
from gptqkit.algorithms.factor import damping
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.core.config import LinearSpec


def case(features: int = 96, rows: int = 40, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    gram_II = gram(inputs(512, features, seed, torch.float32))
    return [weight(rows, features, seed + k, torch.float32) for k in range(2)], gram_II


def error(weights_OI: list[Tensor], gram_II: Tensor, specs: list[LinearSpec], scale_I: Tensor) -> float:
    """The undamped output error, from the definition."""
    total = 0.0
    for weight_OI, spec in zip(weights_OI, specs, strict=True):
        diagonal_I = gram_II.diagonal() / scale_I.square()
        rounded = round_scaled(weight_OI * scale_I, diagonal_I + damping(diagonal_I, 0.01), spec, signed=True)
        total += h_norm(rounded.dequantize() / scale_I - weight_OI, gram_II)
    return total


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_never_worse_than_no_scaling(bits: int, group_size: int, sym: bool) -> None:
    weights_OI, gram_II = case(seed=bits)
    specs = [LinearSpec(bits, group_size, sym), LinearSpec(4, 32, sym)]
    scale_I = search_scale(weights_OI, gram_II, specs)
    damped_II = gram_II + torch.diag(damping(gram_II.diagonal(), 0.01))
    with_scale, without = (scaled_error(weights_OI, damped_II, specs, s, signed=True) for s in (scale_I, torch.ones(96)))
    assert with_scale <= without
    rounded = sum(h_norm(round_to_nearest(w, spec).dequantize() - w, gram_II) for w, spec in zip(weights_OI, specs, strict=True))
    assert error(weights_OI, gram_II, specs, scale_I) < rounded


def test_strong_channels_gain_much() -> None:
    """Four channels a hundred times as strong as the others, as real models have them."""
    weights_OI, gram_II = case(seed=7)
    strong_I = torch.ones(96)
    strong_I[[5, 40, 41, 90]] = 100.0
    gram_II = gram_II * strong_I * strong_I[:, None]
    spec = LinearSpec(4, -1, True)
    scale_I = search_scale(weights_OI, gram_II, [spec, spec])
    assert scale_I[5] > 2 * scale_I.median()
    assert error(weights_OI, gram_II, [spec, spec], scale_I) < 0.7 * error(weights_OI, gram_II, [spec, spec], torch.ones(96))


def test_the_winner_on_some_rows_must_win_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(awq, "SEARCH_ROWS", 2)
    for seed in range(6):
        weights_OI, gram_II = case(seed=seed)
        spec = LinearSpec(3, 32, True)
        damped_II = gram_II + torch.diag(damping(gram_II.diagonal(), 0.01))
        scale_I = search_scale(weights_OI, gram_II, [spec, spec])
        errors = [scaled_error(weights_OI, damped_II, [spec, spec], s, signed=True) for s in (scale_I, torch.ones(96))]
        assert errors[0] <= errors[1]


def test_shared_scales_are_equal() -> None:
    weights_OI, gram_II = case(seed=3)
    share_I = torch.arange(96) % 48
    scale_I = search_scale(weights_OI, gram_II, [LinearSpec(3, 32, True)] * 2, share_I=share_I)
    assert torch.equal(scale_I[:48], scale_I[48:])
    assert scale_I.unique().numel() > 1


@pytest.mark.parametrize("dead", ["some", "all"])
def test_channels_that_carry_nothing(dead: str) -> None:
    weights_OI, gram_II = case(seed=1)
    off_I = torch.zeros(96, dtype=torch.bool)
    off_I[[0, 31] if dead == "some" else slice(None)] = True
    gram_II = gram_II.masked_fill(off_I, 0).masked_fill(off_I[:, None], 0)
    scale_I = search_scale(weights_OI, gram_II, [LinearSpec(2, 32, True)] * 2)
    assert bool(torch.isfinite(scale_I).all())
    assert float(scale_I.min()) >= 1 / SCALE_LIMIT
    assert float(scale_I.max()) <= SCALE_LIMIT
    assert dead == "some" or torch.equal(scale_I, torch.ones(96))


def test_arguments_are_left_alone_and_the_same_comes_out_again() -> None:
    weights_OI, gram_II = case(seed=2)
    before = [value.clone() for value in (*weights_OI, gram_II)]
    scales = [search_scale(weights_OI, gram_II, [LinearSpec(3, 32, True)] * 2) for _ in range(2)]
    assert torch.equal(*scales)
    assert all(torch.equal(a, b) for a, b in zip(before, (*weights_OI, gram_II), strict=True))
