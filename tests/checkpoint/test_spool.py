"""A file made tensor by tensor has the bytes of one that was saved at once."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from gptqkit.checkpoint.spool import _NAMES, Spool
from gptqkit.core.errors import ResourceError


def some_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"{letter}.{dtype}": (torch.rand(3, 5, generator=generator) * 9).to(dtype) for dtype in _NAMES for letter in "zaä"}
    return {**made, "scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "large": torch.rand(700, 600, generator=generator)}


def test_the_bytes_are_those_of_the_library(tmp_path: Path) -> None:
    tensors = some_tensors()
    save_file(tensors, tmp_path / "whole.safetensors", metadata={"format": "pt"})
    with Spool(tmp_path / "scratch") as spool:
        for name, tensor in tensors.items():
            spool.put(name, torch.zeros(2, 2) if name == "large" else tensor)
        spool.put("large", tensors["large"])
        assert all(torch.equal(spool.read(name), tensor) and spool.read(name).dtype == tensor.dtype for name, tensor in tensors.items())
        digest = spool.publish(tmp_path / "pieces.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    assert (tmp_path / "pieces.safetensors").read_bytes() == whole
    assert digest == hashlib.sha256(whole).hexdigest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pieces.safetensors", "whole.safetensors"]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    (tmp_path / "scratch").symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="no space left while writing"), Spool(tmp_path / "scratch") as spool:
        spool.put("a", torch.ones(4))
    assert not list(tmp_path.iterdir())
