"""Formats pinned by bytes: worked out by hand for GPTQ, written by the foreign package for compressed-tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.strategies import assert_same

from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import detect, get_format

GOLDEN = Path(__file__).parents[1] / "golden"


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def words(*values: int) -> torch.Tensor:
    """int32 words, given as unsigned."""
    return torch.tensor([value - 2**32 if value >= 2**31 else value for value in values], dtype=torch.int64).to(torch.int32)


def progression(bits: int, out_features: int, in_features: int, group_size: int, *, sym: bool) -> QuantizedWeight:
    out_O, in_I = torch.arange(out_features)[:, None], torch.arange(in_features)[None]
    group_G = torch.arange(in_features // group_size)[None]
    return QuantizedWeight(
        bits=bits,
        group_size=group_size,
        codes_OI=((out_O * 7 + in_I * 5) % 2**bits).to(torch.uint8),
        scale_OG=(2.0 ** -(out_O % 4 + group_G)).to(torch.float16),
        zero_OG=None if sym else ((out_O * 3 + group_G) % 2**bits).to(torch.uint8),
    )


def test_gptq_four_bits() -> None:
    """Output o holds codes (o + i) % 16 for i = 0..7: one word an output, its first code in the lowest nibble, so 0x76543210 for o = 0."""
    out_O, in_I = torch.arange(8)[:, None], torch.arange(8)[None]
    weight = QuantizedWeight(
        bits=4,
        group_size=4,
        codes_OI=((out_O + in_I) % 16).to(torch.uint8),
        scale_OG=torch.tensor([[1.0, -0.5]]).repeat(8, 1).to(torch.float16),
        zero_OG=torch.stack([torch.arange(1, 9), torch.arange(8, 16)], dim=1).to(torch.uint8),
    )
    qweight = b"".join(
        bytes.fromhex(word)
        for word in ("10325476", "21436587", "32547698", "436587a9", "547698ba", "6587a9cb", "7698badc", "87a9cbed")
    )  # fmt: skip
    scales = bytes.fromhex("003c" * 8 + "00b8" * 8)
    g_idx = bytes.fromhex("00000000" * 4 + "01000000" * 4)
    # zero points 1..8 of group 0 and 8..15 of group 1, eight outputs to a word; version 1 stores one less
    for name, qzeros in (("gptq", "10325476" + "87a9cbed"), ("gptq_v2", "21436587" + "98badcfe")):
        tensors = get_format(name).encode(weight)
        assert tensors["qweight"].shape == (1, 8)
        assert tensors["qzeros"].shape == (2, 1)
        assert tensors["scales"].shape == (2, 8)
        assert bytes_of(tensors["qweight"]) == qweight
        assert bytes_of(tensors["qzeros"]) == bytes.fromhex(qzeros)
        assert bytes_of(tensors["scales"]) == scales
        assert bytes_of(tensors["g_idx"]) == g_idx
        assert_same(get_format(name).decode(tensors, LinearSpec(4, 4, False)), weight)


def test_gptq_three_bits_straddles_words() -> None:
    """All codes 0b100: the stream ...100100100 cut into words; symmetric zero points are 4, stored as 3 by version 1."""
    weight = QuantizedWeight(
        bits=3, group_size=-1, codes_OI=torch.full((32, 32), 4, dtype=torch.uint8), scale_OG=torch.ones(32, 1, dtype=torch.float16)
    )
    stream = sum(4 << (3 * i) for i in range(32)).to_bytes(12, "little")
    assert stream.hex() == "244992244992244992244992"
    three = sum(3 << (3 * i) for i in range(32)).to_bytes(12, "little")
    for name, qzeros in (("gptq", three), ("gptq_v2", stream)):
        tensors = get_format(name).encode(weight)
        assert bytes_of(tensors["qweight"].T) == stream * 32
        assert bytes_of(tensors["qzeros"]) == qzeros
        assert_same(get_format(name).decode(tensors, LinearSpec(3, -1, True)), weight)


@pytest.mark.parametrize(("bits", "sym"), [(3, False), (4, True), (8, False)])
def test_compressed_tensors_file_of_the_package(bits: int, sym: bool) -> None:
    golden = {k.partition(".")[2]: v for k, v in load_file(GOLDEN / "compressed-tensors.safetensors").items() if k.startswith(f"w{bits}.")}
    weight = progression(bits, 10, 48, 16, sym=sym)
    encoded = get_format("compressed-tensors").encode(weight)
    assert set(encoded) == set(golden)
    for name, tensor in golden.items():
        assert encoded[name].dtype == tensor.dtype, name
        assert encoded[name].shape == tensor.shape, name
        assert bytes_of(encoded[name]) == bytes_of(tensor), name
    assert_same(get_format("compressed-tensors").decode(golden, LinearSpec(bits, 16, sym)), weight)


def tensors_of(weight: QuantizedWeight, qzeros: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**get_format("gptq_v2").encode(weight), "qzeros": qzeros}


def test_zero_points_of_zero_in_version_one_are_read_as_their_writer_meant_them() -> None:
    """Zero points [0, 3, 7, 15, 0, 8, 1, 0]: masked writers keep the neighbours, gptqmodel's subtraction borrows from them."""
    weight = QuantizedWeight(
        bits=4, group_size=-1, codes_OI=torch.zeros(8, 8, dtype=torch.uint8), scale_OG=torch.ones(8, 1, dtype=torch.float16),
        zero_OG=torch.tensor([[0, 3, 7, 15, 0, 8, 1, 0]], dtype=torch.uint8).T.contiguous(),
    )  # fmt: skip
    masked = words(0xF07FE62F)[None]
    borrowed = words((0x0180F730 - 0x11111111) % 2**32)[None]
    assert not torch.equal(masked, borrowed)
    plain, gptqmodel = detect({"quant_method": "gptq"}), detect({"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.7.0"]}})
    spec = LinearSpec(4, -1, False)
    assert_same(plain.decode(tensors_of(weight, masked), spec), weight)
    assert_same(gptqmodel.decode(tensors_of(weight, borrowed), spec), weight)
    assert plain.decode(tensors_of(weight, borrowed), spec).zero_OG is not None
    assert not torch.equal(plain.decode(tensors_of(weight, borrowed), spec).zero_OG, weight.zero_OG)  # type: ignore[arg-type]


def test_three_bit_files_of_old_and_new_gptqmodel() -> None:
    """Symmetric at 3 bits: new releases subtract per field, old ones subtracted constants that are not aligned with the fields."""
    weight = QuantizedWeight(
        bits=3, group_size=-1, codes_OI=torch.zeros(32, 32, dtype=torch.uint8), scale_OG=torch.ones(32, 1, dtype=torch.float16)
    )
    gptqmodel = detect({"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:4.0.0"]}})
    four = (0x24924924, 0x49249249, 0x92492492)
    old = words(*((word - constant) % 2**32 for word, constant in zip(four, (0x24924924, 0x92492492, 0x49249249), strict=True)))[None]
    new = get_format("gptq").encode(weight)["qzeros"]
    for qzeros in (old, new):
        assert_same(gptqmodel.decode(tensors_of(weight, qzeros), LinearSpec(3, -1, True)), weight)
    with pytest.raises(InputError, match="sym=true, so all zero points must be 4, but qzeros holds"):
        get_format("gptq").decode(tensors_of(weight, old), LinearSpec(3, -1, True))


def test_old_checkpoints_without_g_idx_or_with_a_trivial_or_negative_one() -> None:
    weight = progression(4, 8, 16, 8, sym=True)
    gptq, spec = get_format("gptq"), LinearSpec(4, 8, True)
    tensors = gptq.encode(weight)
    assert_same(gptq.decode({k: v for k, v in tensors.items() if k != "g_idx"}, spec), weight)
    assert_same(gptq.decode({**tensors, "g_idx": tensors["g_idx"] - 2}, spec), weight)
    reversed_groups = gptq.decode({**tensors, "g_idx": tensors["g_idx"].flip(0)}, spec)
    assert reversed_groups.group_I is not None
    assert reversed_groups.group_I.tolist() == [1] * 8 + [0] * 8
    with pytest.raises(InputError, match="g_idx holds 2 or 0; allowed: 0 to 1"):
        gptq.decode({**tensors, "g_idx": tensors["g_idx"] * 2}, spec)
    with pytest.raises(InputError, match="g_idx holds 1 or -7"):
        gptq.decode({**tensors, "g_idx": tensors["g_idx"] * 8 - 7}, spec)


def test_compressed_tensors_quirks() -> None:
    fmt, weight = get_format("compressed-tensors"), progression(4, 10, 48, 16, sym=False)
    spec, tensors = LinearSpec(4, 16, False), get_format("compressed-tensors").encode(progression(4, 10, 48, 16, sym=False))
    assert weight.zero_OG is not None
    unpacked = (weight.zero_OG.to(torch.int16) - 8).to(torch.int8)
    assert_same(fmt.decode({**tensors, "weight_zero_point": unpacked}, spec), weight)
    assert_same(fmt.decode({**tensors, "weight_scale": tensors["weight_scale"].to(torch.bfloat16)}, spec), weight)
    natural = torch.arange(48, dtype=torch.int32) // 16
    assert fmt.decode({**tensors, "weight_g_idx": natural}, spec).group_I is None
    assert fmt.decode({**tensors, "weight_g_idx": torch.full_like(natural, -1)}, spec).group_I is None
    assert torch.equal(fmt.decode({**tensors, "weight_g_idx": natural.flip(0)}, spec).group_I, natural.flip(0))  # type: ignore[arg-type]
    for name, value, message in (
        ("weight_shape", torch.tensor([10, 480]), r"weight_packed has shape \[10, 6\]; expected \[10, 60\]"),
        ("weight_shape", torch.tensor([10, -1]), r"weight_shape holds \[10, -1\]"),
        ("weight_scale", tensors["weight_scale"].float() * (1 + 2**-20), "is not a float16 number"),
        ("weight_scale", tensors["weight_scale"] * float("nan"), "30 values that are not finite"),
        ("weight_zero_point", unpacked * 3, "outside the 4-bit signed range"),
        ("weight_packed", tensors["weight_packed"].long(), "weight_packed has dtype int64; expected int32"),
    ):
        with pytest.raises(InputError, match=message):
            fmt.decode({**tensors, name: value}, spec)
    with pytest.raises(InputError, match="weight_zero_point is missing; found weight_packed, weight_scale, weight_shape"):
        fmt.decode({k: v for k, v in tensors.items() if k != "weight_zero_point"}, spec)
