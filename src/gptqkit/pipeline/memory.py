"""What a run will need in memory, from shapes alone. Pure: nothing is computed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from gptqkit.core.config import QuantConfig
from gptqkit.models.device import available_memory
from gptqkit.models.layout import InputGroup
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.supply import STEP_TOKENS, streamed_modules
from gptqkit.pipeline.coverage import SAMPLE_TOKENS

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


STEP_STATES = 5
"""Hidden states' worth of tensors that a forward keeps while it waits for its next expert."""
KERNEL_BYTES = 200 << 20
"""Of experts on a CPU: oneDNN keeps the last 1024 kernels it compiled, one for each number of rows (algorithms/precision.py)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Where activations go and what the run is predicted to need, in bytes above the process's start."""

    paused: bool
    """All batches of a block in flight at once (fast), or replayed per input group (small)."""
    flight: int | None
    """Bytes that flights may take of a CUDA device, the batches beyond them being replayed; None for no limit."""
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

    Of a block's experts one has weights at a time (models/supply.py), except while scales are tuned, which needs the whole block. A layer
    of experts keeps a Gram matrix, its mean and a factor in common, and a sample of its tokens; on a CPU, products with so many different
    numbers of rows leave kernels behind. Where a forward is replayed, some batches go in step when the block's outputs are made.
    """
    element = model.dtype.itemsize
    hidden = model.skeleton.config.get_text_config().hidden_size
    batch = min(tokens, BATCH_TOKENS[model.device.type])
    stored = streams * tokens * hidden * element
    blocks = _costs(model, streams)
    in_flight = streams * tokens * max((3 * hidden + b.width) * element for b in blocks)
    host_budget = available_memory(torch.device("cpu")) // 2 if budget is None else budget
    device_budget = host_budget
    if model.device.type == "cuda":
        free = available_memory(model.device) // 2
        device_budget = free if budget is None else min(free, budget)
    paused, room = stored + in_flight <= device_budget, None
    if model.device.type == "cuda" and not paused and tokens:
        room = device_budget - stored
        paused = room > in_flight * batch // tokens
    place = "device" if paused or stored <= device_budget else "ram" if stored <= host_budget else "disk"
    working = batch * max((3 * hidden + 2 * b.width) * element for b in blocks)
    block_bytes = max((streams * b.parameters * element + 2 * b.largest * 4) for b in blocks)
    experts = any(b.experts for b in blocks)
    in_step = min(tokens, STEP_TOKENS) * STEP_STATES * hidden * element if experts else 0
    flight = (in_flight if room is None else room) if paused else in_step
    at_solve = max(b.solver for b in blocks) if tokens else 0
    outside = sum(p.numel() for n, p in model.skeleton.named_parameters() if not model.layout.holds(n)) * element
    resident = LIBRARY_BYTES + (KERNEL_BYTES if experts else 0) if model.device.type == "cpu" else 0
    peak = (
        resident
        + (stored if place == "device" or (model.device.type == "cpu" and place == "ram") else 0)
        + max(block_bytes + max(flight + working, flight + at_solve), outside + working)
    )
    return Memory(
        paused, room if paused else None, place, stored, peak, {"device": device_budget, "ram": host_budget, "disk": stored}[place]
    )


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
    blocks = [_BlockCost.of(groups, 1, {}) for groups in set(model.layout.blocks)]
    widest = max(group.in_features for groups in set(model.layout.blocks) for group in groups)
    fit, probe = min(tokens, max(FIT_TOKENS, 2 * widest)), min(tokens, PROBES * PROBE_TOKENS)
    flight = fit if memory.paused else min(fit, BATCH_TOKENS[model.device.type])
    block = max(5 * b.parameters + 8 * b.largest + 4 * flight * (3 * hidden + b.width) + b.solver for b in blocks)
    waiting = 4 * hidden * (fit + probe) + min(memory.room, 4 * hidden * probe * units)
    resident = LIBRARY_BYTES if model.device.type == "cpu" else 0
    return resident + block + (0 if memory.place == "disk" or (memory.place == "ram" and model.device.type == "cuda") else waiting)


def _costs(model: StreamedModel, streams: int) -> list[_BlockCost]:
    """One for each sort of block. `parameters` are those that are in memory together."""
    first = {groups: index for index, groups in reversed([*enumerate(model.layout.blocks)])}
    expert_of = {index: {leaf: expert for expert, leaf in streamed_modules(model.block(index))} for index in first.values()}
    return [_BlockCost.of(groups, streams, expert_of[index]) for groups, index in first.items()]


@dataclass(frozen=True, slots=True)
class _BlockCost:
    width: int
    parameters: int
    largest: int
    solver: int
    experts: bool

    @classmethod
    def of(cls, groups: tuple[InputGroup, ...], streams: int, expert_of: Mapping[str, str]) -> _BlockCost:
        """`expert_of`: the expert of each linear whose weights come and go."""
        outputs = [sum(linear.out_features for linear in group.linears) for group in groups]
        before = [0, *outputs[:-1]]
        sizes = [linear.out_features * linear.in_features for group in groups for linear in group.linears]
        squares, rows = (3, 6) if streams == 1 else (5, 9)
        solver = max(4 * (squares * g.in_features**2 + rows * out * g.in_features) for g, out in zip(groups, outputs, strict=True))
        width = max(g.in_features + b for g, b in zip(groups, before, strict=True))
        together: Counter[str] = Counter()
        for info in (linear for group in groups for linear in group.linears):
            together[expert_of.get(info.name, "")] += info.out_features * info.in_features
        if not expert_of:
            return cls(width, sum(sizes), max(sizes), solver, False)
        one = max(size for expert, size in together.items() if expert)
        widest = max(group.in_features for group in groups if group.linears[0].name in expert_of)
        shared = 4 * 3 * widest**2 + 4 * SAMPLE_TOKENS * widest
        return cls(width, sum(sizes) if streams > 1 else together[""] + one, max(sizes), solver + shared, True)
