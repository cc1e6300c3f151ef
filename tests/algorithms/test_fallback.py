"""Channels that tempt the solver: dead, nearly dead, massive, dependent. Whatever the data, no weight may run away."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.cases import gram, h_norm, inputs, weight
from torch import Tensor

from gptqkit.algorithms.factor import damping, even_damping, factorize, mean_damping, sample_damp
from gptqkit.algorithms.gptq import CHANGE_LIMIT, EFFORTS, solve_group
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError

ORDERS = ("natural", "activation", "group-aware", "desc-act")
SPEC = LinearSpec(4, 32, True)


def whispering(scale: float, seed: int = 0) -> Tensor:
    """The last third of 96 channels repeats the first third, `scale` times as loud: nearly dead, and a tempting place for compensation."""
    x_MI = inputs(512, 96, seed)
    x_MI[:, 64:] = scale * (x_MI[:, :32] + 0.05 * x_MI[:, 64:])
    return x_MI


@pytest.mark.parametrize("order", ORDERS)
def test_dead_columns_are_rounded_and_do_not_disturb_the_others(order: str) -> None:
    x_MI, weight_OI = inputs(400, 96, 1), weight(8, 96, 1)
    x_MI[:, 32:64] = 0  # a whole group, so that the grids of the others are the same without it
    live_I = torch.cat([torch.arange(32), torch.arange(64, 96)])
    (solution,) = solve_group([weight_OI], gram(x_MI), [SPEC], order=order, damp=0.01)
    (without,) = solve_group([weight_OI[:, live_I]], gram(x_MI[:, live_I]), [SPEC], order=order, damp=0.01)
    assert solution.dead == 32
    assert solution.method == "gptq"
    assert torch.equal(solution.weight.codes_OI[:, live_I], without.weight.codes_OI)
    dead_OI = solution.weight.dequantize(torch.float64)[:, 32:64]
    rounded_OI = round_to_nearest(weight_OI[:, 32:64], SPEC).dequantize(torch.float64)
    assert bool(((dead_OI - weight_OI[:, 32:64]).square().sum(1) <= (rounded_OI - weight_OI[:, 32:64]).square().sum(1)).all())
    step_OI = solution.weight.scale_OG.double().abs()[:, solution.weight.column_groups()[32:64]]
    held_OI = (dead_OI / step_OI).abs() < 7  # inside the range of both signs
    assert bool(((dead_OI - weight_OI[:, 32:64]).abs() <= 0.5 * step_OI)[held_OI].all())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_near_dead_channels_stay_where_they_are(order: str, dtype: torch.dtype) -> None:
    """With the damping of the default rule the compensation does not pour into channels 1e-4 and 1e-8 times as loud."""
    for scale in (1e-4, 1e-8):
        gram_II, weight_OI = gram(whispering(scale)).to(dtype), weight(16, 96, 0).to(dtype)
        (solution,) = solve_group([weight_OI], gram_II, [SPEC], order=order, damp=0.01)
        rounded = round_to_nearest(weight_OI, SPEC).dequantize(dtype) - weight_OI
        assert solution.near_dead == 32
        assert solution.method == "gptq"
        assert solution.error < 0.7 * solution.error_rounded
        assert solution.weight_change < 5 * float(rounded.norm() / weight_OI.norm())


def test_proportional_damping_would_blow_up_and_is_caught() -> None:
    """The rule that failed on a real model (lambda_j proportional to H_jj, no floor): refused, then saved by the even damping."""
    gram_II, weight_OI = gram(whispering(1e-6)), weight(16, 96, 0)
    effort = EFFORTS["fast"]._replace(damping=lambda diagonal_I, damp: damp * diagonal_I)
    (solution,) = solve_group([weight_OI], gram_II, [SPEC], order="group-aware", damp=0.01, effort=effort)
    assert solution.method == "gptq"
    assert solution.damp == 0.01
    assert len(solution.events) == 1
    assert "times as far as rounding to nearest would move it (allowed: 8): solved again" in solution.events[0]
    assert solution.events[0].endswith("with the damping's floor at the mean")
    assert solution.weight_change < 1


@pytest.mark.parametrize("order", ORDERS)
def test_falls_back_to_rounding_when_damping_does_not_help(order: str) -> None:
    gram_II, weight_OI = gram(whispering(1e-4)), weight(16, 96, 0)
    (solution,) = solve_group([weight_OI], gram_II, [SPEC], order=order, damp=1e-9)
    assert solution.method == "rtn"
    assert solution.error == solution.error_rounded
    assert solution.damp == pytest.approx(1e-8)
    assert [event.rpartition(": ")[2] for event in solution.events] == [
        "solved again with the damping's floor at the mean",
        "solved again with 10 times the damping",
        "rounded to nearest",
    ]
    expected = round_to_nearest(weight_OI, SPEC, solution.weight.group_I)
    assert torch.equal(solution.weight.codes_OI, expected.codes_OI)
    assert torch.equal(solution.weight.scale_OG, expected.scale_OG)
    assert (solution.weight.group_I is not None) is (order == "desc-act")


def test_only_the_refused_linear_of_a_group_is_solved_again() -> None:
    """A weight of zeros in the quiet channels and one that is not, side by side: each is judged alone."""
    gram_II = gram(whispering(1e-5))
    tempted_OI, plain_OI = weight(16, 96, 0), torch.zeros(4, 96, dtype=torch.float64)
    tempted, plain = solve_group([tempted_OI, plain_OI], gram_II, [SPEC, SPEC], order="natural", damp=1e-9)
    assert tempted.method == "rtn"
    assert (plain.method, plain.damp, plain.events) == ("gptq", 1e-9, ())


def massive(loudness: float, seed: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """A layer with three outlier channels: Gram to solve with, Gram held out, weight."""
    x_MI = inputs(4000, 192, seed)
    x_MI[:, [5, 77, 150]] *= loudness
    return gram(x_MI[:2000]), gram(x_MI[2000:]), weight(24, 192, seed)


def test_massive_channels_do_not_drown_the_rest() -> None:
    """The floor follows the median: a mean dominated by three channels thirty times as loud damps all the others to death."""
    errors = []
    for rule in (damping, mean_damping):
        error = 0.0
        for seed in range(4):
            gram_II, held_out_II, weight_OI = massive(30.0, seed)
            (solution,) = solve_group(
                [weight_OI],
                gram_II,
                [LinearSpec(4, 64, True)],
                order="activation",
                damp=0.01,
                effort=EFFORTS["fast"]._replace(damping=rule),
            )
            error += h_norm(solution.weight.dequantize(torch.float64) - weight_OI, held_out_II) / h_norm(weight_OI, held_out_II)
        errors.append(error)
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("order", ORDERS)
def test_extreme_channels_never_make_it_worse_than_rounding(bits: int, order: str) -> None:
    """A thousand times as loud: the other weights would have to move further than any grid can follow."""
    gram_II, _, weight_OI = massive(1000.0)
    (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(bits, 64, True)], order=order, damp=0.01)
    assert solution.error <= solution.error_rounded
    assert solution.method == "gptq" or len(solution.events) == 3


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [1, 10, 60])
def test_fewer_tokens_than_columns(order: str, tokens: int) -> None:
    """A singular Gram matrix: damping makes it solvable, in float32 too."""
    gram_II, weight_OI = gram(inputs(tokens, 128, 3)).float(), weight(8, 128, 3).float()
    (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(4, 32, False)], order=order, damp=0.01)
    assert solution.error <= solution.error_rounded
    assert bool(torch.isfinite(solution.weight.dequantize()).all())


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_few_tokens_are_not_believed(bits: int) -> None:
    """Inner activations of an MLP: heavy tails and hardly correlated, so that most of what few tokens show is chance."""
    generator, weight_OI, spec = torch.Generator().manual_seed(8), weight(32, 128, 8), LinearSpec(bits, 64, True)
    x_MI = 0.3 * inputs(20000, 128, 8) + torch.randn(20000, 128, generator=generator, dtype=torch.float64) ** 3
    sample_MI, whole_II = x_MI[:256], gram(x_MI)
    rounded_OI = round_to_nearest(weight_OI, spec).dequantize(torch.float64)
    errors = []
    for tokens in (float("inf"), 256):
        (solution,) = solve_group([weight_OI], gram(sample_MI), [spec], order="group-aware", damp=0.01, tokens=tokens)
        errors.append(h_norm(solution.weight.dequantize(torch.float64) - weight_OI, whole_II))
    assert errors[1] < 0.8 * errors[0]
    assert errors[1] < h_norm(rounded_OI - weight_OI, whole_II)


def test_damping_follows_the_size_of_the_sample() -> None:
    assert sample_damp(0.01, 512, 65536) == 0.01
    assert sample_damp(0.01, 1408, 2048) == pytest.approx(0.6875)
    assert sample_damp(0.05, 512, float("inf")) == 0.05
    assert sample_damp(0.01, 512, 0) == 512


def test_float64_retry_then_more_damping() -> None:
    """A slightly indefinite matrix, as rounding makes it: both steps are recorded, and the damping that was needed is told."""
    gram_II = torch.ones(16, 16) + 1e-9 * torch.eye(16)
    gram_II[0, 1] = gram_II[1, 0] = 1.0 + 1e-3
    factor = factorize(gram_II, torch.arange(16), 1e-6)
    assert factor.damp > 1e-6
    assert factor.events[:2] == ("Cholesky failed in float32 with damping 1e-06", "Cholesky failed in float64 with damping 1e-06")
    assert bool(torch.isfinite(factor.root_II).all())


def test_float64_alone_may_do() -> None:
    """Singular in float32's eyes only: the retry in float64 with the same damping is enough, and is recorded."""
    x_MI = inputs(4, 64, 0)
    factor = factorize(gram(x_MI).float(), torch.arange(64), 3e-9)
    assert factor.events
    assert factor.events[0].startswith("Cholesky failed in float32")


def test_what_is_no_gram_matrix_is_refused() -> None:
    gram_II = -torch.ones(4, 4) + torch.diag(torch.full((4,), 2.0))
    gram_II[0, 1] = gram_II[1, 0] = -1e6
    with pytest.raises(InputError, match="the Gram matrix cannot be factored even with damping 1000"):
        factorize(gram_II, torch.arange(4), 0.01)


def test_damping_has_a_floor_and_ignores_dead_columns() -> None:
    diagonal_I = torch.tensor([0.0, 1e-8, 1.0, 3.0, 0.0, 5.0, 1000.0])
    lambda_I = damping(diagonal_I, 0.01)
    assert float(lambda_I.min()) >= 0.01 * 3.0 * 0.999
    even_I = even_damping(diagonal_I, 0.01)
    assert float(even_I.min()) == pytest.approx(0.01 * 1009 / 5)
    assert bool((even_I >= lambda_I).all())
    assert CHANGE_LIMIT > 4
    assert bool(torch.isfinite(damping(torch.zeros(4), 0.01)).all())
