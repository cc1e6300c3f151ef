"""Tensors that a checkpoint stores stacked, by the names of their pieces.

Some models store the experts of a layer as one tensor. A `Piece` says which part of it is one linear's weight or bias; a source that was
given pieces (`TensorSource.with_pieces`) lists and reads those instead of the stack, so that nothing above it knows the difference, and
never more than one expert's slice is in memory.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of one slice of a stored tensor.

    stored       its name in the checkpoint
    container    what the stack belongs to; its pieces are written one by one, or all together as they were
    index, count which of how many slices along the first dimension, [count, ...] or [count * ..., ...]
    part, parts  which of how many equal shares of the slice's rows
    interleaved  the shares' rows alternate
    transposed   the slice is [in, out]; the piece is [out, in] still
    """

    stored: str
    container: str
    index: int
    count: int
    part: int = 0
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be cut so."""
        if not shape or not self.count or shape[0] % self.count:
            return False
        rows = self.slice_shape(shape)[-1 if self.transposed else 0]
        return rows % self.parts == 0

    def slice_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one slice of a stored tensor of `shape`."""
        return tuple(shape[1:]) if shape[0] == self.count else (shape[0] // self.count, *shape[1:])

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the piece."""
        found = self.slice_shape(shape)
        if self.transposed:
            found = found[::-1]
        return (found[0] // self.parts, *found[1:])

    @property
    def contiguous(self) -> bool:
        """Whether the piece lies in the file in one run of bytes."""
        return not self.transposed and not (self.interleaved and self.parts > 1)

    def offset(self, shape: tuple[int, ...], itemsize: int) -> int:
        """Bytes from the start of the stored tensor to its slice, or, where contiguous, to the piece."""
        slice_bytes = math.prod(self.slice_shape(shape)) * itemsize
        return self.index * slice_bytes + (self.part * slice_bytes // self.parts if self.contiguous else 0)

    def cut(self, stored: Tensor) -> Tensor:
        """The piece of its slice, as a view."""
        rows = stored.T if self.transposed else stored
        return rows[self.part :: self.parts] if self.interleaved else rows.chunk(self.parts)[self.part]


def join(parts: list[Tensor], interleaved: bool, transposed: bool) -> Tensor:
    """The slice that is cut into these parts."""
    rows = torch.stack(parts, dim=1).flatten(0, 1) if interleaved else torch.cat(parts)
    return rows.T if transposed else rows
