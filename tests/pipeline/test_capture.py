"""Pausing a block at each input group sees and computes exactly what replaying it does."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import greenlet
import pytest
import torch
from tests.tiny import FAMILIES, save_tiny, token_ids

from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.capture import BlockPass, Reading, Reference, Room, Seen, _aligned, _Flights

CPU = torch.device("cpu")


Row = tuple[int, torch.Tensor, torch.Tensor | None]


def run(
    folder: Path, *, paused: bool, reference: bool = False, factor: float = 1.1, room: Room | None = None
) -> tuple[list[Row], list[torch.Tensor]]:
    """What every group saw and what came out, with each linear perturbed once its group was seen (as quantizing does)."""
    model = StreamedModel.open(folder, device=CPU, dtype=torch.float32)
    batches = [torch.tensor(token_ids(2, 16, seed=seed)) for seed in range(3)]
    calls, hidden = CallStore(), Activations(3, device=CPU, place=CPU)
    original = hidden.sibling("original") if reference else None
    seen: list[Row] = []

    def see(group: int, batch: Seen) -> None:
        seen.append((group, batch.x.clone(), None if batch.original is None else batch.original.clone()))

    def changed(name: str) -> torch.Tensor:
        return model.read_parameter(name) * factor

    with torch.inference_mode():
        with model.loaded_outside():
            for number, ids in enumerate(batches):
                hidden[number] = model.embed(ids, number, calls)
                if original is not None:
                    original[number] = hidden[number]
        for index, groups in enumerate(model.layout.blocks):
            with model.loaded_copies(index, 2) as (block, twin):

                def solve(group: int, index: int = index, groups: tuple = groups) -> None:
                    for linear in groups[group].linears:
                        name = f"{model.layout.block_name(index)}.{linear.name}.weight"
                        model.put_parameter(name, changed(name), partial(changed, name))

                beside = None if original is None else Reference(twin, original)
                BlockPass(block, groups, [calls.get(b, index) for b in range(3)], hidden, reference=beside).run(
                    paused=paused, on_input=see, on_group=solve, room=room
                )
    return seen, [hidden[b] for b in range(3)]


@pytest.mark.parametrize("family", FAMILIES)
def test_paused_equals_replayed(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family)
    seen_paused, out_paused = run(folder, paused=True)
    seen_replayed, out_replayed = run(folder, paused=False)
    assert len(seen_paused) == len(seen_replayed) > 0
    assert_same(seen_paused, seen_replayed)
    assert all(torch.equal(a, b) for a, b in zip(out_paused, out_replayed, strict=True))


def assert_same(one: list[Row], other: list[Row]) -> None:
    for (group, x, original), (other_group, other_x, other_original) in zip(one, other, strict=True):
        assert group == other_group
        assert torch.equal(x, other_x)
        assert (original is None) == (other_original is None)
        assert original is None or torch.equal(original, other_original)


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "qwen2_moe"])
def test_a_reference_beside_reads_the_same_tokens(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, num_hidden_layers=1)
    unchanged, _ = run(folder, paused=True, reference=True, factor=1.0)
    assert all(torch.equal(x, original) for _, x, original in unchanged)
    paused, _ = run(folder, paused=True, reference=True)
    replayed, _ = run(folder, paused=False, reference=True)
    assert_same(paused, replayed)
    alone, _ = run(folder, paused=True)
    assert all(torch.equal(x, other) for (_, x, _), (_, other, _) in zip(paused, alone, strict=True))
    assert all(x.shape == original.shape for _, x, original in paused)


def test_tokens_that_a_router_sends_elsewhere_stand_for_themselves() -> None:
    own = Reading(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2, 5, 9]))
    reference = Reading(torch.tensor([[10.0], [20.0], [30.0]]), torch.tensor([1, 5, 9]))
    assert _aligned(own, reference).tolist() == [[1.0], [20.0], [30.0]]
    nobody = Reading(torch.zeros(0, 1), torch.tensor([], dtype=torch.long))
    assert _aligned(own, nobody).tolist() == own.x.tolist()
    assert _aligned(nobody, own).shape == (0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_come_back_from_disk_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    stored = Activations(2, device=CPU, place=CPU, folder=tmp_path / "activations")
    values = [torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    for i, value in enumerate(values):
        stored[i] = value
    assert all(torch.equal(stored[i], value) and stored[i].dtype == dtype for i, value in enumerate(values))
    stored.clear()
    assert not list((tmp_path / "activations").iterdir())


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize("at", [0, 2, 4, 7, 9, 11])
def test_memory_that_runs_out_costs_flights_not_the_run(at: int, reference: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    expected_seen, expected = run(folder, paused=True, reference=reference)
    count, told = 0, []

    def switched(self: _Flights, batch: int) -> object:
        nonlocal count
        count += 1
        if count == at + 1:
            self._flights[batch].throw(greenlet.GreenletExit)  # what was allocated goes with the forward that wanted more
            return None
        return arrival(self, batch)

    arrival = _Flights._arrival
    monkeypatch.setattr(_Flights, "_arrival", switched)
    seen, hidden = run(folder, paused=True, reference=reference, room=Room(on_shortage=told.append))
    assert told, "the shortage is told of"
    assert len(seen) == len(expected_seen)
    for (group, x, original), (expected_group, expected_x, expected_original) in zip(seen, expected_seen, strict=True):
        assert group == expected_group
        assert torch.equal(x, expected_x)
        assert (original is None) == (expected_original is None) or torch.equal(original, expected_original)
    assert all(torch.equal(a, b) for a, b in zip(hidden, expected, strict=True))


def test_work_is_begun_again_with_half_the_flights() -> None:
    class Three:
        open = 3

        def keep(self, batches: int) -> None:
            self.open = min(self.open, batches)

    told: list[int] = []
    room = Room(on_shortage=told.append)
    room.taken_by([Three()])
    tries = iter([torch.OutOfMemoryError(), torch.OutOfMemoryError(), None])

    def work() -> str:
        if (error := next(tries)) is not None:
            raise error
        return "done"

    assert room.spared_for(work) == "done"
    assert told == [1, 0]
    tries = iter([torch.OutOfMemoryError()])
    with pytest.raises(torch.OutOfMemoryError):
        room.spared_for(work)
