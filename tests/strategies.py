"""Hypothesis generators of the values that cross seams."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from hypothesis import strategies as st

from gptqkit.core.weight import QuantizedWeight, group_count


def make_weight(
    *, bits: int, group_size: int, out_features: int, in_features: int, sym: bool, seed: int = 0, desc_act: bool = False, zero_min: int = 1
) -> QuantizedWeight:
    """A random weight: scales of both signs over the whole range of float16 normals, zero points from `zero_min` up."""
    generator = torch.Generator().manual_seed(seed)
    groups = group_count(in_features, group_size)
    shape = (out_features, groups)
    exponents = torch.rand(shape, generator=generator) * 29.9 - 14
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    natural = torch.arange(in_features) // (in_features if group_size == -1 else group_size)
    group_I = natural[torch.randperm(in_features, generator=generator)].to(torch.int32)
    return QuantizedWeight(
        bits=bits,
        group_size=group_size,
        codes_OI=torch.randint(0, 2**bits, (out_features, in_features), dtype=torch.uint8, generator=generator),
        scale_OG=(signs * 2.0**exponents).to(torch.float16),
        zero_OG=None if sym else torch.randint(zero_min, 2**bits, shape, dtype=torch.uint8, generator=generator),
        group_I=group_I if desc_act and not torch.equal(group_I, natural.to(torch.int32)) else None,
    )


@st.composite
def weights(
    draw: st.DrawFn, *, bits: Sequence[int], step: int, whole_groups: bool = False, desc_act: bool = False, zero_min: int = 1
) -> QuantizedWeight:
    """Weights whose sizes are multiples of `step`; with `whole_groups` the group size divides in_features."""
    in_features = step * draw(st.integers(1, 9 if step > 1 else 100))
    sizes = [size for size in (1, 3, 8, 16, 32, 64) if in_features % size == 0 or not whole_groups]
    return make_weight(
        bits=draw(st.sampled_from(bits)),
        group_size=draw(st.sampled_from([-1, *sizes])),
        out_features=step * draw(st.integers(1, 3 if step > 1 else 40)),
        in_features=in_features,
        sym=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
        desc_act=desc_act and draw(st.booleans()),
        zero_min=zero_min,
    )


def assert_same(found: QuantizedWeight, expected: QuantizedWeight) -> None:
    """Equal in every field, bit for bit."""
    assert (found.bits, found.group_size) == (expected.bits, expected.group_size)
    for name in ("codes_OI", "scale_OG", "zero_OG", "group_I"):
        a, b = getattr(found, name), getattr(expected, name)
        assert (a is None) == (b is None), name
        assert a is None or (a.dtype == b.dtype and torch.equal(a, b)), name
