"""Sizes, options and the allocation of a bit budget, without a model."""

from __future__ import annotations

import pytest

from gptqkit import InputError
from gptqkit.core.config import LinearSpec
from gptqkit.planner.budget import Unit, allocate, reference, specs_for, stored_bits

SYM_3, SYM_4 = LinearSpec(3, 128, True), LinearSpec(4, 128, True)


def unit(name: str, *options: LinearSpec | None, shape: tuple[int, int] = (256, 256)) -> Unit:
    return Unit(name, 0, (f"{name}.weight",), (shape,), options)


@pytest.mark.parametrize("spec", [LinearSpec(bits, size, sym) for bits in (2, 3, 4, 8) for size in (32, 64, 128) for sym in (True, False)])
def test_stored_bits_are_what_a_spec_says_of_a_weight(spec: LinearSpec) -> None:
    assert stored_bits(96, 384, spec) == spec.bits_per_weight * 96 * 384


def test_a_row_as_one_group_counts_its_scale_and_full_precision_sixteen_bits() -> None:
    assert stored_bits(10, 50, LinearSpec(4, -1, True)) == 10 * (50 * 4 + 16)
    assert stored_bits(10, 50, None) == 16 * 500


def test_group_sizes_divide_all_linears_of_a_unit() -> None:
    assert {spec.group_size for spec in specs_for([1408, 512], sym=True)} == {32, 64, 128}
    assert {spec.group_size for spec in specs_for([512, 96], sym=True)} == {32}
    assert {spec.group_size for spec in specs_for([80], sym=False)} == {-1}
    assert {(spec.bits, spec.sym) for spec in specs_for([80], sym=False)} == {(bits, False) for bits in (2, 3, 4, 8)}


def test_a_unit_is_measured_at_the_width_that_decides() -> None:
    options = (*specs_for([256], sym=True), None)
    assert reference(unit("a", *options), 3.5) == LinearSpec(3, 64, True)
    assert reference(unit("a", *options), 2.5) == LinearSpec(2, 64, True)
    assert reference(unit("a", LinearSpec(8, 32, True), SYM_4, None), 2.5) == SYM_4
    assert reference(unit("a", None), 2.5) is None


def test_the_budget_goes_where_it_saves_most() -> None:
    units = [unit("a", SYM_3, SYM_4), unit("b", SYM_3, SYM_4)]
    assert allocate(units, {"a": [1.0, 0.5], "b": [2.0, 0.4]}, 3.625) == [SYM_3, SYM_4]
    assert allocate(units, {"a": [1.0, 0.5], "b": [2.0, 0.4]}, 3.624) == [SYM_3, SYM_3]
    assert allocate(units, {"a": [1.0, 0.5], "b": [2.0, 0.4]}, 16) == [SYM_4, SYM_4]


def test_a_fixed_unit_takes_its_part_of_the_budget() -> None:
    units = [unit("a", None, shape=(256, 64)), unit("b", SYM_3, SYM_4)]
    assert units[0].fixed
    assert allocate(units, {"b": [1.0, 0.1]}, 6.5) == [None, SYM_4]
    assert allocate(units, {"b": [1.0, 0.1]}, 6.4) == [None, SYM_3]


def test_a_budget_below_the_smallest_options_says_what_is_possible() -> None:
    with pytest.raises(InputError, match=r"target_bits=3 cannot be reached: the least is 3\.125 bits per weight$"):
        allocate([unit("a", SYM_3, SYM_4)], {"a": [1.0, 0.5]}, 3)
    with pytest.raises(InputError, match=r"the least is 9\.563 bits per weight; rules fix 1 linears$"):
        allocate([unit("a", SYM_3, SYM_4), unit("b", None)], {"a": [1.0, 0.5]}, 4)
