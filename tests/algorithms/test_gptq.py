"""The solver against the obvious GPTQ, and the laws it must keep."""

from __future__ import annotations

import pytest
import torch
from tests.algorithms.cases import gram, h_norm, inputs, weight
from tests.algorithms.oracle import obvious_gptq
from torch import Tensor

from gptqkit.algorithms import gptq as gptq_module
from gptqkit.algorithms.factor import damping, factorize
from gptqkit.algorithms.gptq import EFFORTS, output_energy, solve_group
from gptqkit.algorithms.order import column_order
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.algorithms.sweep import Effort, sweep
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError

ORDERS = ("natural", "activation", "group-aware", "desc-act")
GRIDS = {
    "minmax": Effort("minmax", signed=False, rounds=0, damping=damping),
    "pivot": Effort("pivot", signed=False, rounds=0, damping=damping),
    "exact": Effort("exact", signed=False, rounds=0, damping=damping),
    "exact-signed": Effort("exact", signed=True, rounds=0, damping=damping),
}


def damped(gram_II: Tensor, damp: float) -> Tensor:
    return gram_II + torch.diag(damping(gram_II.diagonal(), damp))


def oracle_for(weight_OI: Tensor, gram_II: Tensor, spec: LinearSpec, order_name: str, effort: Effort) -> tuple[Tensor, Tensor, Tensor]:
    order = column_order(gram_II.diagonal(), order_name, spec.group_size)
    return obvious_gptq(
        weight_OI,
        damped(gram_II, 0.01),
        order.columns_I,
        order.group_I,
        bits=spec.bits,
        sym=spec.sym,
        fixed_grids=order.fixed_grids,
        effort=effort,
    )


@pytest.fixture
def accept_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fallback: the bare solver."""
    monkeypatch.setattr(gptq_module, "_refusal", lambda judged, rounded: None)


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_equal_codes_with_the_obvious_gptq(grid: str, order: str, group_size: int, sym: bool) -> None:
    """200 columns: every group size but -1 leaves a narrower last group."""
    for seed, bits in enumerate((2, 3, 4, 8)):
        x_MI, weight_OI = inputs(600, 200, seed), weight(4, 200, seed)
        spec = LinearSpec(bits, group_size, sym)
        (solution,) = solve_group([weight_OI], gram(x_MI), [spec], order=order, damp=0.01, effort=GRIDS[grid])
        codes_OI, values_OI, _ = oracle_for(weight_OI, gram(x_MI), spec, order, GRIDS[grid])
        assert torch.equal(solution.weight.codes_OI.double(), codes_OI), f"{bits} bits"
        assert torch.equal(solution.weight.dequantize(torch.float64), values_OI)
        assert solution.weight.group_size == group_size
        assert solution.weight.sym is sym


@pytest.mark.usefixtures("accept_all")
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("order", ORDERS)
def test_equal_codes_in_float32(grid: str, order: str) -> None:
    """Float32 rounds differently in the two. A weight halfway between two codes, or a scale halfway between two float16 values, may
    fall on either side and drag its row along: one row in 24 may differ, and its objective must not."""
    for seed in range(3):
        x_MI, weight_OI = inputs(1024, 128, seed, torch.float32), weight(24, 128, seed, torch.float32)
        spec = LinearSpec(4, 32, True)
        (solution,) = solve_group([weight_OI], gram(x_MI), [spec], order=order, damp=0.01, effort=GRIDS[grid])
        codes_OI, values_OI, _ = oracle_for(weight_OI, gram(x_MI), spec, order, GRIDS[grid])
        assert int((solution.weight.codes_OI.float() != codes_OI).any(1).sum()) <= 1
        change_OI = solution.weight.dequantize() - weight_OI
        assert h_norm(change_OI, gram(x_MI)) == pytest.approx(h_norm(values_OI - weight_OI, gram(x_MI)), rel=5e-3)


@pytest.mark.parametrize("effort", EFFORTS.values(), ids=EFFORTS.keys())
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 4])
def test_objective_is_the_sum_of_squared_steps(order: str, bits: int, effort: Effort) -> None:
    x_MI, weight_OI = inputs(500, 192, 7), weight(16, 192, 7)
    gram_II = gram(x_MI)
    for sym in (True, False):
        plan = column_order(gram_II.diagonal(), order, 64)
        swept = sweep(weight_OI.T.contiguous(), factorize(gram_II, plan.columns_I, 0.01), plan, LinearSpec(bits, 64, sym), effort)
        change_OI = (swept.level_IO * swept.scale_GO[plan.group_I]).T - weight_OI
        expected_O = ((change_OI @ damped(gram_II, 0.01)) * change_OI).sum(1)
        torch.testing.assert_close(swept.objective_O, expected_O, rtol=1e-9, atol=0)


def test_what_is_tried_harder_comes_nearer() -> None:
    """Objectives of the whole range of grids, summed over seeds: each step of the search and the refinement pays."""
    efforts = [GRIDS["minmax"], GRIDS["pivot"], GRIDS["exact"], GRIDS["exact-signed"], EFFORTS["fast"]]
    for bits in (2, 3, 4):
        totals = [0.0] * len(efforts)
        for seed in range(4):
            gram_II, weight_OI = gram(inputs(600, 192, seed)), weight(24, 192, seed)
            for k, effort in enumerate(efforts):
                (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(bits, 64, True)], order="group-aware", damp=0.01, effort=effort)
                totals[k] += solution.error / solution.error_rounded
        assert totals == sorted(totals, reverse=True), f"{bits} bits: {totals}"


def test_positive_scales_when_engines_want_them() -> None:
    gram_II, weight_OI = gram(inputs(400, 128, 0)), weight(16, 128, 0)
    for preset, effort in EFFORTS.items():
        for signed in (True, False):
            limited = effort.limited(signed=signed)
            (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(3, 32, True)], order="natural", damp=0.01, effort=limited)
            assert bool((solution.weight.scale_OG < 0).any()) is (signed and preset != "plain")


@pytest.mark.parametrize("follow", [0.5, 1.0])
def test_a_second_stream_moves_the_target(follow: float) -> None:
    """W + alpha (W (C - H)^T + A^T) H^-1 as an ordinary target: the same codes; and with alpha = 1 the least-squares optimum itself."""
    generator = torch.Generator().manual_seed(4)
    x_MI, weight_OI = inputs(800, 96, 4), weight(12, 96, 4)
    original_MI = x_MI + 0.2 * inputs(800, 96, 5)
    behind_MO = 0.01 * torch.randn(800, 12, generator=generator, dtype=torch.float64)
    gram_II = damped(gram(x_MI), 0.01)
    cross_II, ahead_IO = x_MI.T @ original_MI / 800, x_MI.T @ behind_MO / 800
    drift_IO = (cross_II - gram(x_MI)) @ weight_OI.T + ahead_IO
    target_OI = weight_OI + follow * torch.linalg.solve(gram_II, drift_IO).T
    spec, same = LinearSpec(3, 32, True), dict(order="group-aware", damp=0.01)
    (solution,) = solve_group([weight_OI], gram(x_MI), [spec], cross_II=cross_II, ahead_IO=ahead_IO, follow=follow, **same)
    (direct,) = solve_group([target_OI], gram(x_MI), [spec], **same)
    assert (solution.method, direct.method) == ("gptq", "gptq")
    assert torch.equal(solution.weight.codes_OI, direct.weight.codes_OI)
    assert torch.equal(solution.weight.scale_OG, direct.weight.scale_OG)
    if follow == 1.0:
        wanted_MO = original_MI @ weight_OI.T + behind_MO
        ridge_OI = torch.linalg.solve(gram_II, x_MI.T @ (wanted_MO - x_MI @ weight_OI.T) / 800).T
        torch.testing.assert_close(target_OI, weight_OI + ridge_OI, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", ORDERS)
def test_factor_is_the_inverse_of_the_textbook_one(order: str) -> None:
    gram_II = gram(inputs(400, 96, 3))
    columns_I = column_order(gram_II.diagonal(), order, 32).columns_I
    factor = factorize(gram_II, columns_I, 0.01)
    upper_II = torch.linalg.cholesky(torch.linalg.inv(damped(gram_II, 0.01)[columns_I][:, columns_I]), upper=True)
    torch.testing.assert_close(factor.root_II @ upper_II, torch.eye(96, dtype=torch.float64), rtol=0, atol=1e-10)
    assert torch.equal(factor.root_II, factor.root_II.triu())
    assert factor.damp == 0.01
    assert factor.events == ()


@pytest.mark.usefixtures("accept_all")
def test_one_factorization_serves_all_specs_of_equal_permutation(monkeypatch: pytest.MonkeyPatch) -> None:
    gram_II = gram(inputs(500, 128, 1))
    weights_OI = [weight(rows, 128, seed) for seed, rows in enumerate((24, 8, 16, 8))]
    specs = [LinearSpec(4, 32, True), LinearSpec(3, 32, True), LinearSpec(4, 32, True), LinearSpec(2, 32, False)]
    calls = []
    monkeypatch.setattr(gptq_module, "factorize", lambda *args, **kwargs: calls.append(1) or factorize(*args, **kwargs))
    for order in ORDERS:
        calls.clear()
        together = solve_group(weights_OI, gram_II, specs, order=order, damp=0.01)
        assert len(calls) == 1
        for weight_OI, spec, solution in zip(weights_OI, specs, together, strict=True):
            (alone,) = solve_group([weight_OI], gram_II, [spec], order=order, damp=0.01)
            assert torch.equal(alone.weight.codes_OI, solution.weight.codes_OI)
            assert torch.equal(alone.weight.scale_OG, solution.weight.scale_OG)
            assert alone.error == pytest.approx(solution.error)
    # Group-aware: the permutation depends on the group size, so two sizes need two factorizations.
    calls.clear()
    solve_group(weights_OI[:2], gram_II, [LinearSpec(4, 32, True), LinearSpec(4, 64, True)], order="group-aware", damp=0.01)
    assert len(calls) == 2


@pytest.mark.parametrize("order", ["activation", "desc-act", "group-aware"])
def test_permuting_columns_commutes(order: str) -> None:
    """Renaming channels renames the codes; with one group per row the grids do not depend on neighbours either. (Refinement visits columns
    as they are stored.)"""
    x_MI, weight_OI = inputs(400, 96, 5), weight(12, 96, 5)
    shuffle_I = torch.randperm(96, generator=torch.Generator().manual_seed(5))
    spec = LinearSpec(4, -1, False)
    (plain,) = solve_group([weight_OI], gram(x_MI), [spec], order=order, damp=0.01, effort=GRIDS["exact-signed"])
    (moved,) = solve_group(
        [weight_OI[:, shuffle_I]], gram(x_MI)[shuffle_I][:, shuffle_I], [spec], order=order, damp=0.01, effort=GRIDS["exact-signed"]
    )
    assert torch.equal(moved.weight.codes_OI, plain.weight.codes_OI[:, shuffle_I])


def test_permuting_whole_groups_commutes_with_group_aware_order() -> None:
    x_MI, weight_OI = inputs(400, 96, 6), weight(12, 96, 6)
    shuffle_I = torch.cat([torch.arange(64, 96), torch.arange(32), torch.arange(32, 64)])
    spec = LinearSpec(3, 32, True)
    (plain,) = solve_group([weight_OI], gram(x_MI), [spec], order="group-aware", damp=0.01, effort=GRIDS["exact-signed"])
    (moved,) = solve_group(
        [weight_OI[:, shuffle_I]], gram(x_MI)[shuffle_I][:, shuffle_I], [spec], order="group-aware", damp=0.01, effort=GRIDS["exact-signed"]
    )
    assert torch.equal(moved.weight.codes_OI, plain.weight.codes_OI[:, shuffle_I])


def test_same_input_same_bytes_and_arguments_untouched() -> None:
    gram_II, weight_OI = gram(inputs(300, 128, 2, torch.float32)), weight(16, 128, 2, torch.bfloat16)
    copies = gram_II.clone(), weight_OI.clone()
    first, second = (solve_group([weight_OI], gram_II, [LinearSpec(4, 32, True)], order="group-aware", damp=0.01)[0] for _ in range(2))
    assert torch.equal(first.weight.codes_OI, second.weight.codes_OI)
    assert torch.equal(first.weight.scale_OG, second.weight.scale_OG)
    assert (first.error, first.weight_change) == (second.error, second.weight_change)
    assert torch.equal(gram_II, copies[0])
    assert torch.equal(weight_OI, copies[1])


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_beats_rounding_on_average_and_never_loses(order: str, bits: int) -> None:
    ratios = []
    for seed in range(6):
        gram_II, weight_OI = gram(inputs(512, 128, seed)), weight(16, 128, seed)
        (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(bits, 32, True)], order=order, damp=0.01)
        assert solution.error <= solution.error_rounded
        ratios.append(solution.error / solution.error_rounded)
    assert sum(ratios) / len(ratios) < (0.8 if bits == 2 else 0.7)


def test_reported_numbers_are_what_they_say() -> None:
    gram_II, weight_OI = gram(inputs(512, 96, 4)), weight(16, 96, 4)
    (solution,) = solve_group([weight_OI], gram_II, [LinearSpec(3, 32, True)], order="group-aware", damp=0.02)
    change_OI = solution.weight.dequantize(torch.float64) - weight_OI
    rounded_OI = round_to_nearest(weight_OI, LinearSpec(3, 32, True)).dequantize(torch.float64) - weight_OI
    assert solution.error == pytest.approx(h_norm(change_OI, gram_II) / h_norm(weight_OI, gram_II))
    assert solution.error_rounded == pytest.approx(h_norm(rounded_OI, gram_II) / h_norm(weight_OI, gram_II))
    assert solution.weight_change == pytest.approx(float(change_OI.norm() / weight_OI.norm()))
    assert (solution.method, solution.damp, solution.dead, solution.near_dead, solution.events) == ("gptq", 0.02, 0, 0, ())


@pytest.mark.parametrize("features", [3, 256, 300, 513])
def test_output_energy_by_blocks(features: int) -> None:
    gram_II, weight_OI = gram(inputs(64, features, 0)), weight(5, features, 0)
    assert float(output_energy(weight_OI.T, gram_II)) == pytest.approx(h_norm(weight_OI, gram_II), rel=1e-10)


def test_zero_weight_and_no_tokens() -> None:
    """Nothing to quantize, and nothing known about the inputs (a Gram of zeros): the nearest weight, no division by zero."""
    spec = LinearSpec(4, 32, False)
    (zeros,) = solve_group([torch.zeros(4, 64)], gram(inputs(100, 64, 0, torch.float32)), [spec], order="group-aware", damp=0.01)
    assert not zeros.weight.dequantize().any()
    assert (zeros.error, zeros.weight_change) == (0.0, 0.0)
    weight_OI = weight(4, 64, 0, torch.float32)
    (blind,) = solve_group([weight_OI], torch.zeros(64, 64), [spec], order="group-aware", damp=0.01)
    assert blind.weight_change <= float((round_to_nearest(weight_OI, spec).dequantize() - weight_OI).norm() / weight_OI.norm())
    assert blind.dead == 64


def test_nonfinite_gram_names_the_linear() -> None:
    gram_II = torch.eye(8)
    gram_II[3, 3] = float("nan")
    with pytest.raises(InputError, match=r"model\.layers\.3\.mlp\.down_proj: the calibration inputs are not finite in 1 of 8 channels"):
        solve_group([torch.ones(2, 8)], gram_II, [LinearSpec(4, -1, True)], order="natural", damp=0.01, name="model.layers.3.mlp.down_proj")
