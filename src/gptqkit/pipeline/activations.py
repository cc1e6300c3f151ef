"""Hidden states of all batches between two blocks: on the device, in RAM, or in files when they are larger than the memory budget.

RAM beside a CUDA device is pinned: both ways at 50 GB/s, and nothing waits, where pageable memory moves 2 GB/s.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gptqkit.checkpoint.files import writing


class Activations:
    """A list of tensors by batch. `folder` None keeps them where `place` says; else each one is a raw file in `folder`.

    The values that come back are the bytes that were put in, wherever they were kept.
    """

    def __init__(self, count: int, *, device: torch.device, place: torch.device, folder: Path | None = None) -> None:
        self._device = device
        self._place = place
        self._folder = folder
        self._kept: list[Tensor | None] = [None] * count
        self._filed: list[tuple[torch.dtype, torch.Size] | None] = [None] * count
        if folder is not None:
            with writing(folder):
                folder.mkdir(parents=True, exist_ok=True)

    def sibling(self, name: str) -> Activations:
        """An empty list of the same length, kept in the same place."""
        folder = None if self._folder is None else self._folder / name
        return Activations(len(self), device=self._device, place=self._place, folder=folder)

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, batch: int) -> Tensor:
        filed = self._filed[batch]
        if filed is None:
            kept = self._kept[batch]
            assert kept is not None, f"batch {batch} was never set"
            return kept.to(self._device, non_blocking=True)
        dtype, shape = filed
        raw = torch.from_numpy(np.fromfile(self._path(batch), dtype=np.uint8))
        return raw.view(dtype).reshape(shape).to(self._device)

    def __setitem__(self, batch: int, value: Tensor) -> None:
        if self._folder is None:
            self._kept[batch] = value.to(self._place) if self._place == self._device else self._fetched(batch, value)
            return
        with writing(self._folder):
            value.cpu().contiguous().view(torch.uint8).numpy().tofile(self._path(batch))
        self._filed[batch] = (value.dtype, value.shape)

    def _fetched(self, batch: int, value: Tensor) -> Tensor:
        """A copy in RAM, where the value before it was if it fits; only the device may read it, in the order of its work."""
        kept = self._kept[batch]
        if kept is None or kept.shape != value.shape or kept.dtype != value.dtype:
            kept = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
        return kept.copy_(value, non_blocking=True)

    def clear(self) -> None:
        """Frees the memory or deletes the files."""
        for batch, filed in enumerate(self._filed):
            if filed is not None:
                self._path(batch).unlink(missing_ok=True)
        self._kept = [None] * len(self._kept)
        self._filed = [None] * len(self._filed)

    def _path(self, batch: int) -> Path:
        assert self._folder is not None
        return self._folder / f"batch-{batch:05d}.bin"
