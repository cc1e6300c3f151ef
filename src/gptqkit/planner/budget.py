"""A bit budget: which spec each unit gets, so that a model keeps a mean number of bits per weight at the least estimated loss.

A unit is a set of linears that get one spec, because engines fuse them. Its loss at an option is an estimate of KL(original || model with
only this unit quantized); the losses of units are taken to add up, which they do while they are small. Sizes are exact: codes, float16
scales and zero points, in bits; a linear that stays in full precision counts 16 bits a weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import group_count
from gptqkit.planner.knapsack import Option, choose

BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)
FULL_PRECISION_BITS = 16
REFERENCE_BITS = {"low": 2.25, "usual": 3.25}
LOW_TARGET = 2.75
"""Targets below it are met with 2 and 3 bits, others with 3 and 4: a unit is measured at the width that decides (see `reference`)."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Linears that get one spec.

    name     for people
    block    index of the decoder block
    linears  names in the checkpoint
    shapes   (out features, in features) of each
    options  what may be chosen; None is full precision. A single one: a rule fixes it
    """

    name: str
    block: int
    linears: tuple[str, ...]
    shapes: tuple[tuple[int, int], ...]
    options: tuple[LinearSpec | None, ...]

    @property
    def weights(self) -> int:
        return sum(out_features * in_features for out_features, in_features in self.shapes)

    @property
    def fixed(self) -> bool:
        return len(self.options) == 1

    def size(self, spec: LinearSpec | None) -> int:
        """Stored bits of all its linears."""
        return sum(stored_bits(out_features, in_features, spec) for out_features, in_features in self.shapes)


def stored_bits(out_features: int, in_features: int, spec: LinearSpec | None) -> int:
    """Bits of one linear: codes, scales, and zero points of an asymmetric one.

    >>> stored_bits(64, 256, LinearSpec(bits=3, group_size=128, sym=True)) / (64 * 256)
    3.125
    """
    if spec is None:
        return FULL_PRECISION_BITS * out_features * in_features
    per_group = 16 if spec.sym else 16 + spec.bits
    return out_features * (in_features * spec.bits + group_count(in_features, spec.group_size) * per_group)


def specs_for(in_features: Sequence[int], *, sym: bool) -> tuple[LinearSpec, ...]:
    """What linears with these in features can have in common: every width with every group size that divides, or one group per row."""
    sizes = [size for size in GROUP_SIZES if all(count % size == 0 for count in in_features)] or [-1]
    return tuple(LinearSpec(bits, size, sym) for bits in BITS for size in sizes)


def reference(unit: Unit, target_bits: float) -> LinearSpec | None:
    """The option at which a unit is measured; None for a unit that can only stay as it is."""
    wanted = REFERENCE_BITS["low" if target_bits < LOW_TARGET else "usual"]
    specs = [spec for spec in unit.options if spec is not None]
    return min(specs, key=lambda spec: abs(spec.bits_per_weight - wanted), default=None)


def allocate(units: Sequence[Unit], losses: Mapping[str, Sequence[float]], target_bits: float) -> list[LinearSpec | None]:
    """The spec of each unit: least sum of losses among all choices of at most `target_bits` stored bits per weight.

    losses  by unit name, one for each of its options; units that are fixed need none

    Raises InputError when even the smallest options take more.
    """
    weights = sum(unit.weights for unit in units)
    options = [
        [Option(unit.size(spec), loss) for spec, loss in zip(unit.options, losses.get(unit.name, (0.0,)), strict=True)] for unit in units
    ]
    check_reachable(units, target_bits)
    chosen = choose(options, math.floor(target_bits * weights))
    return [unit.options[index] for unit, index in zip(units, chosen, strict=True)]


def check_reachable(units: Sequence[Unit], target_bits: float) -> None:
    """Raises InputError when no choice has so few bits."""
    weights = sum(unit.weights for unit in units)
    least = sum(min(unit.size(spec) for spec in unit.options) for unit in units)
    if least > target_bits * weights:
        fixed = sum(len(unit.linears) for unit in units if unit.fixed)
        rules = f"; rules fix {fixed} linears" if fixed else ""
        lowest = math.ceil(1000 * least / weights) / 1000
        raise InputError(f"target_bits={target_bits:g} cannot be reached: the least is {lowest:.3f} bits per weight{rules}")
