"""Pausing a block at each input group sees and computes exactly what replaying it does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import FAMILIES, save_tiny, token_ids

from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.capture import BlockPass

CPU = torch.device("cpu")


def run(folder: Path, *, paused: bool) -> tuple[list[tuple[int, torch.Tensor]], list[torch.Tensor]]:
    """What every group saw and what came out, with each linear perturbed once its group was seen (as quantizing does)."""
    model = StreamedModel.open(folder, device=CPU, dtype=torch.float32)
    batches = [torch.tensor(token_ids(2, 16, seed=seed)) for seed in range(3)]
    calls, hidden = CallStore(), Activations(3, device=CPU, place=CPU)
    seen: list[tuple[int, torch.Tensor]] = []
    with torch.inference_mode():
        with model.loaded_outside():
            for number, ids in enumerate(batches):
                hidden[number] = model.embed(ids, number, calls)
        for index, groups in enumerate(model.layout.blocks):
            with model.loaded_block(index) as block:

                def solve(group: int, block: torch.nn.Module = block, groups: tuple = groups) -> None:
                    for linear in groups[group].linears:
                        block.get_submodule(linear.name).weight.data.mul_(1.1)

                whole = BlockPass(block, groups, [calls.get(b, index) for b in range(3)], hidden)
                whole.run(paused=paused, on_input=lambda group, x, original: seen.append((group, x.clone())), on_group=solve)
    return seen, [hidden[b] for b in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_paused_equals_replayed(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    seen_paused, out_paused = run(folder, paused=True)
    seen_replayed, out_replayed = run(folder, paused=False)
    assert len(seen_paused) == len(seen_replayed) > 0
    for (group, x), (other_group, other_x) in zip(seen_paused, seen_replayed, strict=True):
        assert group == other_group
        assert torch.equal(x, other_x)
    assert all(torch.equal(a, b) for a, b in zip(out_paused, out_replayed, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_from_disk_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = Activations(2, device=CPU, place=CPU, folder=tmp_path / "activations")
    values = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    for i, value in enumerate(values):
        stored[i] = value
    assert all(torch.equal(stored[i], value) and stored[i].dtype == dtype for i, value in enumerate(values))
    stored.clear()
    assert not list((tmp_path / "activations").iterdir())
