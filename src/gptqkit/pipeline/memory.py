"""What a run will need in memory, from shapes alone. Pure: nothing is computed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gptqkit.core.config import QuantConfig
from gptqkit.models.device import available_memory
from gptqkit.models.layout import InputGroup
from gptqkit.models.streamed import StreamedModel

LIBRARY_BYTES = 150 << 20
"""What a run's first use of the libraries costs whatever the model: lazily imported modules, the tokenizer, thread pools, kernel caches."""

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of one forward. Fixed per device type, never derived from free memory: batch shape decides the last bits of a result."""

PROBES, PROBE_TOKENS = 8, 512
"""For a bit budget: sequences that judge how much a unit matters, and the most tokens of each (sensitivity.py)."""
FIT_TOKENS = 32768
"""Tokens that units are quantized with to be judged, and at least twice as many as a linear has inputs, if there are so many."""

HEAD_SLICE = 1 << 25
"""Values of the output head that are solved at a time: 128 MB in float32, of which a solver holds six copies."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Where activations go and what the run is predicted to need, in bytes above the process's start."""

    paused: bool
    """All batches of a block in flight at once (fast), or replayed per input group (small)."""
    place: str
    """Where hidden states wait between blocks: "device", "ram" or "disk"."""
    activations: int
    peak: int
    room: int
    """Bytes that may wait there."""


def predict_memory(model: StreamedModel, tokens: int, budget: int | None, *, streams: int = 1) -> Memory:
    """Peak bytes of a run over `tokens` calibration tokens, and where its activations fit.

    One block, its activations and one Gram matrix with the solver's copies of it, or the embedding and head, whichever is more:

        hidden     tokens x H                                    between blocks
        in flight  tokens x (3 H + widest input + outputs before it)   paused; one batch only when replayed
        solver     3 I^2 + 6 rows x I, float32                   Gram, damped copy, factor; weights, targets, codes, errors, pull

    With two streams everything that belongs to activations is there twice, the block as well, and the solver holds what the streams have
    in common (2 I^2) and what follows from it (3 rows x I).
    """
    element = model.dtype.itemsize
    hidden = model.skeleton.config.get_text_config().hidden_size
    batch = min(tokens, BATCH_TOKENS[model.device.type])
    stored = streams * tokens * hidden * element
    blocks = [_BlockCost.of(groups, streams) for groups in set(model.layout.blocks)]
    in_flight = streams * tokens * max((3 * hidden + b.width) * element for b in blocks)
    host_budget = available_memory(torch.device("cpu")) // 2 if budget is None else budget
    device_budget = host_budget
    if model.device.type == "cuda":
        free = available_memory(model.device) // 2
        device_budget = free if budget is None else min(free, budget)
    paused = stored + in_flight <= device_budget
    place = "device" if paused or stored <= device_budget else "ram" if stored <= host_budget else "disk"
    working = batch * max((3 * hidden + 2 * b.width) * element for b in blocks)
    block_bytes = max((streams * b.parameters * element + 2 * b.largest * 4) for b in blocks)
    flight = in_flight if paused else 0
    at_solve = max(b.solver for b in blocks) if tokens else 0
    outside = sum(p.numel() for n, p in model.skeleton.named_parameters() if not model.layout.holds(n)) * element
    resident = LIBRARY_BYTES if model.device.type == "cpu" else 0
    peak = (
        resident
        + (stored if place == "device" or (model.device.type == "cpu" and place == "ram") else 0)
        + max(block_bytes + max(flight + working, flight + at_solve), outside + working)
    )
    return Memory(paused, place, stored, peak, {"device": device_budget, "ram": host_budget, "disk": stored}[place])


def head_rows(in_features: int) -> int:
    """Rows of the output head in one slice."""
    return max(1, HEAD_SLICE // in_features)


def predict_head(memory: Memory, shape: tuple[int, int], stored: int, config: QuantConfig, model: StreamedModel) -> int:
    """Peak bytes of quantizing an output head [O, I] that takes `stored` bytes, and of reading it back.

    solving        weight as stored, codes, Gram matrices, 6 copies of a slice of rows (9 with two streams)
    encoding       codes, and the packed words twice
    reading back   codes and words again, float32, and the run's dtype
    """
    out_features, in_features = shape
    values = out_features * in_features
    squares, rows = (5, 9) if config.second_stream else (3, 6)
    solver = 4 * (squares * in_features**2 + rows * min(out_features, head_rows(in_features)) * in_features)
    on_cpu = model.device.type == "cpu"
    waiting = memory.activations if memory.place == "device" or (memory.place == "ram" and on_cpu) else 0
    reading_back = values * (6 + 2 * model.dtype.itemsize)
    return (LIBRARY_BYTES if on_cpu else 0) + max(waiting + stored + values + solver, waiting + 3 * values, reading_back)


def predict_measuring(model: StreamedModel, memory: Memory, tokens: int, units: int) -> int:
    """Peak bytes of measuring `units` for a bit budget: a block in float32 and its codes, tokens in flight, the solver, all that waits."""
    hidden = model.skeleton.config.get_text_config().hidden_size
    blocks = [_BlockCost.of(groups, 1) for groups in set(model.layout.blocks)]
    widest = max(group.in_features for groups in set(model.layout.blocks) for group in groups)
    fit, probe = min(tokens, max(FIT_TOKENS, 2 * widest)), min(tokens, PROBES * PROBE_TOKENS)
    flight = fit if memory.paused else min(fit, BATCH_TOKENS[model.device.type])
    block = max(5 * b.parameters + 8 * b.largest + 4 * flight * (3 * hidden + b.width) + b.solver for b in blocks)
    waiting = 4 * hidden * (fit + probe) + min(memory.room, 4 * hidden * probe * units)
    resident = LIBRARY_BYTES if model.device.type == "cpu" else 0
    return resident + block + (0 if memory.place == "disk" or (memory.place == "ram" and model.device.type == "cuda") else waiting)


@dataclass(frozen=True, slots=True)
class _BlockCost:
    width: int
    parameters: int
    largest: int
    solver: int

    @classmethod
    def of(cls, groups: tuple[InputGroup, ...], streams: int) -> _BlockCost:
        outputs = [sum(linear.out_features for linear in group.linears) for group in groups]
        before = [0, *outputs[:-1]]
        sizes = [linear.out_features * linear.in_features for group in groups for linear in group.linears]
        squares, rows = (3, 6) if streams == 1 else (5, 9)
        solver = max(4 * (squares * g.in_features**2 + rows * out * g.in_features) for g, out in zip(groups, outputs, strict=True))
        return cls(max(g.in_features + b for g, b in zip(groups, before, strict=True)), sum(sizes), max(sizes), solver)
