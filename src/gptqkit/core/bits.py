"""Packing: small unsigned integers as one dense, little-endian bit stream along the last dimension, kept in int32 words.

    value i lies in bits [i * bits, (i + 1) * bits) of the stream; bit j of the stream is bit j % 32 of word j // 32

so 32 values take exactly `bits` words, whatever the width, and a value of 3, 5, 6 or 7 bits may straddle two words. The GPTQ formats
and compressed-tensors' pack-quantized both use this stream (they differ only in the dimension they run along).

Eight values take exactly `bits` bytes. The code therefore works on the eight residues of the position modulo 8: each of them always falls
on the same byte of its group of bytes, at the same shift, which makes at most sixteen whole-tensor byte operations and no index tables.
Words are the bytes reinterpreted, which also gets the sign bit right without any wide arithmetic. A little-endian host is assumed, as
safetensors itself does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad


def packed_words(count: int, bits: int) -> int:
    """The int32 words that `count` values of `bits` bits take.

    >>> packed_words(32, 3), packed_words(33, 3), packed_words(4096, 4)
    (3, 4, 512)
    """
    return -(-count * bits // 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """[..., n] uint8, each below 2**bits, to [..., ceil(n * bits / 32)] int32; unused high bits of the last word are 0.

    Raises ValueError for another dtype or width, or a value that does not fit.

    >>> pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 15], dtype=torch.uint8), 4).item() & 0xFFFFFFFF == 0xF7654321
    True
    """
    _check_width(bits)
    if values.dtype != torch.uint8:
        raise ValueError(f"pack: values are {values.dtype}; expected uint8")
    if values.numel() and int(values.max()) >= 2**bits:
        raise ValueError(f"pack: value {int(values.max())} does not fit into {bits} bits")
    count = values.shape[-1]
    values = pad(values, (0, -count % 32)) if count % 32 else values
    octets = values.reshape(*values.shape[:-1], -1, 8)
    stream = torch.zeros(*octets.shape[:-1], bits, dtype=torch.uint8, device=values.device)
    for lane, byte, shift in _lanes(bits):
        stream[..., byte] |= octets[..., lane] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= octets[..., lane] >> (8 - shift)
    words = stream.reshape(*values.shape[:-1], -1).view(torch.int32)
    return words[..., : packed_words(count, bits)].contiguous()


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack`: [..., ceil(count * bits / 32)] int32 to [..., count] uint8. Raises ValueError for another dtype or size.

    >>> unpack(pack(torch.tensor([[7, 0, 5]], dtype=torch.uint8), 3), 3, 3)
    tensor([[7, 0, 5]], dtype=torch.uint8)
    """
    _check_width(bits)
    if words.dtype != torch.int32:
        raise ValueError(f"unpack: words are {words.dtype}; expected int32")
    if words.shape[-1] != packed_words(count, bits):
        raise ValueError(f"unpack: {words.shape[-1]} words; {count} values of {bits} bits take {packed_words(count, bits)}")
    missing = packed_words(count + -count % 32, bits) - words.shape[-1]
    words = pad(words, (0, missing)) if missing else words.contiguous()
    stream = words.view(torch.uint8).reshape(*words.shape[:-1], -1, bits)
    octets = torch.empty(*stream.shape[:-1], 8, dtype=torch.uint8, device=words.device)
    for lane, byte, shift in _lanes(bits):
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value |= stream[..., byte + 1] << (8 - shift)
        octets[..., lane] = value.bitwise_and_(2**bits - 1)
    return octets.reshape(*words.shape[:-1], -1)[..., :count].contiguous()


def _lanes(bits: int) -> Iterator[tuple[int, int, int]]:
    """For each of eight consecutive values: its place, the byte its lowest bit falls on, and the shift within that byte."""
    for lane in range(8):
        yield lane, lane * bits // 8, lane * bits % 8


def _check_width(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits}; allowed: 1 to 8")
