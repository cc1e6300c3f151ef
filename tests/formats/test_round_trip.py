"""Every format gives back the very weight it was given, or refuses with a reason; and the reasons."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.strategies import assert_same, make_weight, weights

from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import FORMATS, get_format
from gptqkit.formats.protocol import Format


def spec_of(weight: QuantizedWeight) -> LinearSpec:
    return LinearSpec(weight.bits, weight.group_size, weight.sym)


@given(weights(bits=(2, 3, 4, 8), step=32, desc_act=True))
@settings(max_examples=60, deadline=None)
def test_gptq_round_trip(weight: QuantizedWeight) -> None:
    assert_same(get_format("gptq").decode(get_format("gptq").encode(weight), spec_of(weight)), weight)


@given(weights(bits=(2, 3, 4, 8), step=32, desc_act=True, zero_min=0))
@settings(max_examples=60, deadline=None)
def test_gptq_v2_round_trip_with_zero_points_of_zero(weight: QuantizedWeight) -> None:
    assert_same(get_format("gptq_v2").decode(get_format("gptq_v2").encode(weight), spec_of(weight)), weight)


@given(weights(bits=range(2, 9), step=1, whole_groups=True, zero_min=0))
@settings(max_examples=100, deadline=None)
def test_compressed_tensors_round_trip_at_odd_shapes(weight: QuantizedWeight) -> None:
    fmt = get_format("compressed-tensors")
    assert_same(fmt.decode(fmt.encode(weight), spec_of(weight)), weight)


@given(
    fmt=st.sampled_from(FORMATS), bits=st.integers(2, 8), out_features=st.integers(1, 70), in_features=st.integers(1, 70),
    group_size=st.sampled_from([-1, 16, 32]), sym=st.booleans(),
)  # fmt: skip
@settings(max_examples=100, deadline=None)
def test_what_the_spec_does_not_refuse_is_stored(
    fmt: Format, bits: int, out_features: int, in_features: int, group_size: int, sym: bool
) -> None:
    weight = make_weight(bits=bits, group_size=group_size, out_features=out_features, in_features=in_features, sym=sym)
    reason = fmt.refuses_spec(spec_of(weight), out_features, in_features, desc_act=False)
    assert fmt.refuses(weight) == reason
    if reason is None:
        assert_same(fmt.decode(fmt.encode(weight), spec_of(weight)), weight)
    else:
        with pytest.raises(InputError):
            fmt.encode(weight)


@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_encode_is_contiguous_and_leaves_the_input_alone(fmt: Format) -> None:
    weight = make_weight(bits=4, group_size=32, out_features=32, in_features=64, sym=False)
    before = [t.clone() for t in (weight.codes_OI, weight.scale_OG, weight.zero_OG) if t is not None]
    tensors = fmt.encode(weight)
    assert fmt.packed_name in tensors
    assert set(tensors) <= fmt.tensor_names
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert all(torch.equal(a, b) for a, b in zip(before, (weight.codes_OI, weight.scale_OG, weight.zero_OG), strict=True) if b is not None)


def test_refusals_name_the_cause_and_the_remedy() -> None:
    gptq, compressed = get_format("gptq"), get_format("compressed-tensors")
    assert gptq.refuses_spec(LinearSpec(5, 32, True), 32, 32, False) == (
        "gptq holds 2, 3, 4 or 8 bits, not 5; use --format compressed-tensors"
    )
    assert gptq.refuses_spec(LinearSpec(3, 32, True), 48, 64, False) == (
        "gptq needs out_features to be a multiple of 32 at 3 bits, and it is 48; use --format compressed-tensors, which pads"
    )
    assert "in_features to be a multiple of 8 at 4 bits, and it is 60" in str(gptq.refuses_spec(LinearSpec(4, 32, True), 64, 60, False))
    assert "removed in 2026; use --format gptq" in str(compressed.refuses_spec(LinearSpec(4, 32, True), 64, 64, True))
    assert "64 is no multiple of 48" in str(compressed.refuses_spec(LinearSpec(4, 48, True), 64, 64, False))
    zero = QuantizedWeight(
        bits=4, group_size=32, codes_OI=torch.zeros(32, 32, dtype=torch.uint8), scale_OG=torch.ones(32, 1, dtype=torch.float16),
        zero_OG=torch.zeros(32, 1, dtype=torch.uint8),
    )  # fmt: skip
    assert gptq.refuses(zero) == (
        "32 of its zero points are 0, which gptq stores as -1 and readers disagree about; "
        "use --format gptq_v2 or --format compressed-tensors"
    )
    with pytest.raises(InputError, match="use --format gptq_v2"):
        gptq.encode(zero)
    assert get_format("gptq_v2").refuses(zero) is None
    with pytest.raises(InputError, match="format='awq'; allowed: gptq, gptq_v2, compressed-tensors"):
        get_format("awq")
