"""Where a streamed model's weights come from: a plain checkpoint, or a quantized one expanded linear by linear."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from gptqkit.checkpoint.pieces import Piece
from gptqkit.checkpoint.quantized import QuantizedCheckpoint, is_quantized
from gptqkit.checkpoint.source import TensorSource


class Weights(Protocol):
    """Tensors by checkpoint name. Quantized linears appear as `NAME.weight`, always [out, in]."""

    @property
    def names(self) -> tuple[str, ...]: ...

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """The tensor on a device: a fresh one, or one read ahead, which is not to be written to."""

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begins to read what `read` of these will need, in the background, to be kept until `forget`."""

    def forget(self, names: Iterable[str]) -> None:
        """Gives back what was read ahead."""

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of what `read(name)` returns, from the headers."""

    def is_expanded(self, name: str) -> bool:
        """True when `read(name)` is a dequantized linear: [out, in] whatever the module's own orientation."""

    def with_pieces(self, pieces: Mapping[str, Piece]) -> Weights:
        """The same, stacked tensors listed and read by their pieces. Raises InputError where one does not fit."""


class DenseWeights:
    """The tensors of a plain checkpoint as they are."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source

    @property
    def names(self) -> tuple[str, ...]:
        return self.source.names

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        return self.source.read(name).to(device, non_blocking=True)

    def read_ahead(self, names: Iterable[str]) -> None:
        self.source.read_ahead(names)

    def forget(self, names: Iterable[str]) -> None:
        self.source.forget(names)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.source.info(name).shape

    def is_expanded(self, name: str) -> bool:
        return False

    def with_pieces(self, pieces: Mapping[str, Piece]) -> DenseWeights:
        return DenseWeights(self.source.with_pieces(pieces))


class QuantizedWeights:
    """A quantized checkpoint as if it were plain: linears are dequantized in float32 when they are read."""

    def __init__(self, checkpoint: QuantizedCheckpoint) -> None:
        self.checkpoint = checkpoint

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.checkpoint.dense_names, *(f"{name}.weight" for name in self.checkpoint.linears))

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        if self.is_expanded(name):
            return self.checkpoint.read_linear(name.removesuffix(".weight"), device).dequantize()
        return self.checkpoint.source.read(name).to(device, non_blocking=True)

    def read_ahead(self, names: Iterable[str]) -> None:
        self.checkpoint.source.read_ahead(self._stored(names))

    def forget(self, names: Iterable[str]) -> None:
        self.checkpoint.source.forget(self._stored(names))

    def _stored(self, names: Iterable[str]) -> Iterator[str]:
        """The tensors of the checkpoint that these are made from."""
        for name in names:
            linear = name.removesuffix(".weight")
            yield from [f"{linear}.{local}" for local in self.checkpoint.local_names(linear)] if self.is_expanded(name) else [name]

    def shape(self, name: str) -> tuple[int, ...]:
        if self.is_expanded(name):
            return self.checkpoint.shape(name.removesuffix(".weight"))
        return self.checkpoint.source.info(name).shape

    def is_expanded(self, name: str) -> bool:
        return name.removesuffix(".weight") in self.checkpoint.linears

    def with_pieces(self, pieces: Mapping[str, Piece]) -> QuantizedWeights:
        stacked = {piece.stored for piece in pieces.values()}
        dense = (*(name for name in self.checkpoint.dense_names if name not in stacked), *pieces)
        return QuantizedWeights(replace(self.checkpoint, source=self.checkpoint.source.with_pieces(pieces), dense_names=dense))


def open_weights(folder: Path) -> Weights:
    """The weights of a model folder, quantized or not. Raises InputError for what cannot be read."""
    if is_quantized(folder):
        return QuantizedWeights(QuantizedCheckpoint.open(folder))
    return DenseWeights(TensorSource.open(folder))
