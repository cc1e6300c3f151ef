"""The bit stream against the definition itself: one big integer per row."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptqkit.core.bits import pack, packed_words, unpack


def obvious_pack(row: list[int], bits: int) -> list[int]:
    """The stream as one integer, cut into signed 32-bit words."""
    stream = sum(value << (i * bits) for i, value in enumerate(row))
    words = [(stream >> (32 * j)) & 0xFFFFFFFF for j in range(-(-len(row) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@given(bits=st.integers(1, 8), rows=st.integers(1, 4), count=st.integers(1, 100), seed=st.integers(0, 1000))
def test_pack_is_the_dense_little_endian_stream_and_unpack_its_inverse(bits: int, rows: int, count: int, seed: int) -> None:
    values = torch.randint(0, 2**bits, (rows, count), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    words = pack(values, bits)
    assert words.dtype == torch.int32
    assert words.tolist() == [obvious_pack(row, bits) for row in values.tolist()]
    assert torch.equal(unpack(words, bits, count), values)


@pytest.mark.parametrize("bits", range(1, 9))
def test_all_ones_reach_the_sign_bit(bits: int) -> None:
    values = torch.full((2, 32), 2**bits - 1, dtype=torch.uint8)
    assert pack(values, bits).tolist() == [[-1] * bits] * 2
    assert torch.equal(unpack(torch.full((2, bits), -1, dtype=torch.int32), bits, 32), values)


def test_three_dimensions_and_a_transposed_input() -> None:
    values = torch.randint(0, 8, (40, 3, 5), dtype=torch.uint8).permute(2, 1, 0)
    words = pack(values, 3)
    assert words.shape == (5, 3, packed_words(40, 3))
    assert torch.equal(unpack(words, 3, 40), values)


def test_refusals_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="bits=9; allowed: 1 to 8"):
        pack(torch.zeros(4, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"values are torch\.int32; expected uint8"):
        pack(torch.zeros(4, dtype=torch.int32), 4)
    with pytest.raises(ValueError, match="value 16 does not fit into 4 bits"):
        pack(torch.tensor([16], dtype=torch.uint8), 4)
    with pytest.raises(ValueError, match="3 words; 32 values of 4 bits take 4"):
        unpack(torch.zeros(3, dtype=torch.int32), 4, 32)
    with pytest.raises(ValueError, match=r"words are torch\.int64; expected int32"):
        unpack(torch.zeros(4, dtype=torch.int64), 4, 32)
