"""QuantizedWeight: the one data type that crosses the seams between algorithms, formats and kernels.

Shapes: O = out features, I = in features, G = number of groups = ceil(I / group_size).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

EXPANDED_AT_ONCE = 1 << 22
"""Values dequantized at a time: three copies of them exist, which for a large weight would be far more than the result."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedWeight:
    """One linear weight after quantization, in canonical order: what algorithms return, formats store and kernels multiply with.

    The value of entry (o, i) is `scale_OG[o, g] * (codes_OI[o, i] - zero_OG[o, g])` with g the group of column i.

    codes_OI    uint8, values 0 .. 2**bits - 1
    scale_OG    float16, finite, |scale| >= 2**-14 (a float16 normal: engines flush subnormals), may be negative
    zero_OG     uint8, values 0 .. 2**bits - 1; None means symmetric: zero is 2**(bits - 1)
    group_I     int32, the group of each column (activation order); None means the natural one: i // group_size
    group_size  columns in a group, or -1 for one group over all columns

    >>> w = QuantizedWeight(bits=4, group_size=2, codes_OI=torch.tensor([[0, 8, 15, 9]], dtype=torch.uint8),
    ...                     scale_OG=torch.tensor([[0.5, 1.0]], dtype=torch.float16))
    >>> w.dequantize()
    tensor([[-4.,  0.,  7.,  1.]])
    """

    bits: int
    group_size: int
    codes_OI: Tensor
    scale_OG: Tensor
    zero_OG: Tensor | None = None
    group_I: Tensor | None = field(default=None)

    def __post_init__(self) -> None:
        out_features, in_features = self.codes_OI.shape
        groups = group_count(in_features, self.group_size)
        _require(2 <= self.bits <= 8, f"bits={self.bits}; allowed: 2 to 8")
        _require(self.codes_OI.dtype == torch.uint8, f"codes_OI is {self.codes_OI.dtype}; expected uint8")
        _require(self.scale_OG.dtype == torch.float16, f"scale_OG is {self.scale_OG.dtype}; expected float16")
        shape = (out_features, groups)
        _require(tuple(self.scale_OG.shape) == shape, f"scale_OG has shape {tuple(self.scale_OG.shape)}; expected {shape}")
        if self.zero_OG is not None:
            _require(self.zero_OG.dtype == torch.uint8, f"zero_OG is {self.zero_OG.dtype}; expected uint8")
            _require(tuple(self.zero_OG.shape) == shape, f"zero_OG has shape {tuple(self.zero_OG.shape)}; expected {shape}")
        if self.group_I is not None:
            _require(self.group_I.dtype == torch.int32, f"group_I is {self.group_I.dtype}; expected int32")
            _require(
                tuple(self.group_I.shape) == (in_features,), f"group_I has shape {tuple(self.group_I.shape)}; expected ({in_features},)"
            )

    @property
    def out_features(self) -> int:
        return self.codes_OI.shape[0]

    @property
    def in_features(self) -> int:
        return self.codes_OI.shape[1]

    @property
    def groups(self) -> int:
        return self.scale_OG.shape[1]

    @property
    def sym(self) -> bool:
        return self.zero_OG is None

    @property
    def natural_zero(self) -> int:
        """The zero point of a symmetric weight: the middle code."""
        return 2 ** (self.bits - 1)

    def column_groups(self) -> Tensor:
        """[I] int64: the group of each column, whether or not `group_I` is stored."""
        if self.group_I is not None:
            return self.group_I.long()
        size = self.in_features if self.group_size == -1 else self.group_size
        return torch.arange(self.in_features, device=self.codes_OI.device) // size

    def to(self, device: torch.device | str) -> QuantizedWeight:
        """The same weight with its tensors on `device`."""
        zero_OG = None if self.zero_OG is None else self.zero_OG.to(device)
        group_I = None if self.group_I is None else self.group_I.to(device)
        return QuantizedWeight(
            bits=self.bits, group_size=self.group_size, codes_OI=self.codes_OI.to(device), scale_OG=self.scale_OG.to(device),
            zero_OG=zero_OG, group_I=group_I,
        )  # fmt: skip

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[O, I]: scale * (code - zero), computed in float32 and cast once. The same bits wherever a weight is expanded."""
        group_I = self.column_groups()
        rows = max(1, EXPANDED_AT_ONCE // self.in_features)
        if self.out_features <= rows:
            return self._expand(slice(None), group_I).to(dtype)
        value_OI = torch.empty(self.codes_OI.shape, dtype=dtype, device=self.codes_OI.device)
        for start in range(0, self.out_features, rows):
            part = slice(start, start + rows)
            value_OI[part] = self._expand(part, group_I)
        return value_OI

    def _expand(self, rows: slice, group_I: Tensor) -> Tensor:
        zero: Tensor | int = self.natural_zero if self.zero_OG is None else self.zero_OG[rows].float()[:, group_I]
        return (self.codes_OI[rows].float() - zero) * self.scale_OG[rows].float()[:, group_I]


def group_count(in_features: int, group_size: int) -> int:
    """G for I columns; group_size -1 means one group.

    >>> group_count(4096, 128), group_count(4096, -1)
    (32, 1)
    """
    return 1 if group_size == -1 else -(-in_features // group_size)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(f"QuantizedWeight: {message}")
