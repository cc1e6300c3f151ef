"""A run with a bit budget: measure, choose, and go on with the choice as ordinary rules.

What was measured is kept in the journal pass by pass, so that a resumed run measures only what is missing and chooses the same. The choice
itself follows from the measurements alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from gptqkit.checkpoint.files import read_json, write_json
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.events import Emit, Event
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.journal import Journal
from gptqkit.pipeline.memory import Memory
from gptqkit.pipeline.plan import Prepared, replan
from gptqkit.pipeline.sensitivity import Measuring, Sensitivity, choose_tokens, measure
from gptqkit.pipeline.units import config_for, find_units
from gptqkit.planner.budget import Unit, allocate


@dataclass(frozen=True, slots=True)
class BudgetLine:
    """What one unit got.

    unit   its name; `linears` how many it joins; `weights` how many numbers
    bits, group_size  None: full precision
    kl     estimated KL to the original with only this unit quantized; None for what a rule fixes, which is not measured
    share  of the size of all units
    """

    unit: str
    block: int
    linears: int
    weights: int
    bits: int | None
    group_size: int | None
    kl: float | None
    share: float


@dataclass(frozen=True, slots=True)
class Budget:
    """How a bit budget was spent. `kl` is the sum over the units that were measured, on `tokens` tokens of the calibration set."""

    target_bits: float
    bits_per_weight: float
    kl: float
    tokens: int
    lines: tuple[BudgetLine, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def spend(
    target_bits: float,
    prepared: Prepared,
    config: QuantConfig,
    sequences: Sequence[Tensor],
    journal: Journal,
    emit: Emit,
    *,
    trust_remote_code: bool,
) -> tuple[Prepared, QuantConfig, Budget]:
    """Measures what the journal does not know yet, and chooses. Returns the plan and the configuration to go on with, and the record."""
    units = find_units(prepared.model, config)
    model = prepared.model.with_dtype(torch.float32, trust_remote_code=trust_remote_code)
    tokens = choose_tokens(sequences, max(group.in_features for groups in model.layout.blocks for group in groups), model.device)
    memory = prepared.plan.memory
    task = Measuring(
        model=model, config=config, target_bits=target_bits, units=units, tokens=tokens, paused=memory.paused, room=memory.room,
        place=_place(model, memory, journal), emit=emit,
    )  # fmt: skip
    path = journal.folder / "budget.json"
    measured = {name: Sensitivity(kl, tuple(losses)) for name, (kl, losses) in read_json(path).items()} if path.exists() else {}
    for found in measure(task, measured):
        measured |= found
        write_json(path, measured)
    specs = allocate(units, {name: sensitivity.losses for name, sensitivity in measured.items()}, target_bits)
    chosen = config_for(config, units, specs)
    budget = _record(target_bits, units, specs, measured, sum(batch.numel() for batch in task.tokens.probe))
    emit(
        Event(
            "note",
            f"bit budget: {budget.bits_per_weight:.3f} bits per weight of {target_bits:g}, estimated KL {budget.kl:.3g}",
            {"bits_per_weight": budget.bits_per_weight, "kl": budget.kl},
        )
    )
    return replan(prepared, chosen), chosen, budget


def _place(model: StreamedModel, memory: Memory, journal: Journal) -> Callable[[int, str], Activations]:
    """Hidden states wait where those of the run will."""
    place = model.device if memory.place == "device" else torch.device("cpu")

    def waiting(count: int, name: str) -> Activations:
        folder = journal.activations / name if memory.place == "disk" else None
        return Activations(count, device=model.device, place=place, folder=folder)

    return waiting


def _record(
    target_bits: float, units: Sequence[Unit], specs: Sequence[LinearSpec | None], measured: dict[str, Sensitivity], tokens: int
) -> Budget:
    sizes = [unit.size(spec) for unit, spec in zip(units, specs, strict=True)]
    lines = []
    for unit, spec, size in zip(units, specs, sizes, strict=True):
        kl = None if unit.fixed else measured[unit.name].losses[unit.options.index(spec)]
        bits, group_size = (None, None) if spec is None else (spec.bits, spec.group_size)
        lines.append(BudgetLine(unit.name, unit.block, len(unit.linears), unit.weights, bits, group_size, kl, size / sum(sizes)))
    total = sum(line.kl for line in lines if line.kl is not None)
    return Budget(target_bits, sum(sizes) / sum(unit.weights for unit in units), total, tokens, tuple(lines))
