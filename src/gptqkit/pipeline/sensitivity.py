"""How much each unit matters: the KL of the model with only this unit quantized, measured for all units without backward passes.

The original hidden states go through the blocks. At a block, each of its units is quantized alone, at one reference option, and gives the
*variant* of the hidden states that leaves the block; the variants travel on through the blocks that follow, beside the original:

    original  ── block 0 ─────── block 1 ─────── … ── head
                  ├ {q,k,v} ──── block 1 ─────── … ── head      KL(original || variant) on the probe tokens
                  ├ o ────────── block 1 ─────── … ── head
                                  ├ {q,k,v} ──── … ── head

A block's weights are loaded once for all that pass through it. Variants wait between blocks where a run's activations do; when they would
take more room than those, the units are measured in several passes, each of which begins where the one before stopped making variants.

The solver learns from other tokens than those that judge its result: on its own tokens a linear with many inputs looks better than it is.
From the reference, the other options follow by the ratio of estimated layer objectives (algorithms/estimate.py).

The forwards run in float32 whatever the run's dtype. Bfloat16 rounds every intermediate result, differently in two forwards as soon as
they differ at all, and that alone is a KL of 3e-4 on llama-small: as much as its least important unit has at 3 bits, and more than units
of a deep model have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptqkit.algorithms.estimate import rounding_loss
from gptqkit.algorithms.factor import factorize, sample_damp
from gptqkit.algorithms.gptq import EFFORTS, solve_group
from gptqkit.algorithms.gram import Gram
from gptqkit.algorithms.precision import exact, short_products
from gptqkit.core.config import QuantConfig
from gptqkit.core.events import Emit, Event
from gptqkit.core.weight import QuantizedWeight
from gptqkit.models.layout import LinearInfo
from gptqkit.models.standin import Call, CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.supply import run_in_step
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.capture import BlockPass, Seen
from gptqkit.pipeline.coverage import Coverage
from gptqkit.pipeline.memory import FIT_TOKENS, PROBE_TOKENS, PROBES
from gptqkit.pipeline.stream import make_batches
from gptqkit.pipeline.units import linear_name
from gptqkit.pipeline.worker import put_weight
from gptqkit.planner.budget import Unit, reference

_SCORED_VALUES = 4 << 20
"""Logits turned into float32 probabilities at a time."""


class Sensitivity(NamedTuple):
    """kl: with only this unit quantized at its reference; losses: the estimate for each of the unit's options, in nats."""

    kl: float
    losses: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Tokens:
    """Batches that the solver sees, and batches that judge; [B, T] token ids."""

    fit: list[Tensor]
    probe: list[Tensor]


def choose_tokens(sequences: Sequence[Tensor], widest: int, device: torch.device) -> Tokens:
    """A few of the calibration sequences, cut to `PROBE_TOKENS`: different ones to judge and to fit, unless there is only one."""
    cut = [ids_T[:PROBE_TOKENS] for ids_T in sequences]
    judging = max(1, min(PROBES, len(cut) // 4))
    fitting, tokens = [], 0
    for ids_T in cut[judging:] or cut:
        if tokens >= max(FIT_TOKENS, 2 * widest):
            break
        fitting.append(ids_T)
        tokens += ids_T.numel()
    probes = [ids_T for ids_T in cut[:judging] if ids_T.numel() > 1]  # one token predicts nothing that could be compared
    return Tokens(make_batches(fitting, device), make_batches(probes or cut[:1], device))


@dataclass(frozen=True, slots=True, kw_only=True)
class Measuring:
    """What is measured, on what, and where hidden states wait between blocks.

    paused  how the solver's tokens run through a block (capture.py)
    room    bytes that the variants of one pass may take, one block's at least
    place   a list for so many hidden states, by name
    """

    model: StreamedModel
    config: QuantConfig
    target_bits: float
    units: Sequence[Unit]
    tokens: Tokens
    paused: bool
    room: int
    place: Callable[[int, str], Activations]
    emit: Emit


def measure(task: Measuring, known: Mapping[str, Sensitivity]) -> Iterator[dict[str, Sensitivity]]:
    """Measures the units that are neither fixed nor `known`; yields after each pass what it found. How it is divided changes no bit."""
    waiting = [unit for unit in task.units if not unit.fixed and unit.name not in known]
    if not waiting:
        return
    walk = _Walk(task)
    while waiting:
        stop = _end_of_pass(waiting, task.room // walk.probe.nbytes)
        with torch.inference_mode(), short_products():
            walk.advance(waiting[0].block)
            found = _one_pass(walk, [unit for unit in waiting if unit.block < stop], stop)
        yield found
        waiting = [unit for unit in waiting if unit.block >= stop]
    walk.clear()


def _end_of_pass(waiting: Sequence[Unit], count: int) -> int:
    """The block before which a pass stops making variants: at most `count` of them, but those of one block in any case."""
    if len(waiting) <= count:
        return waiting[-1].block + 1
    return max(waiting[0].block + 1, waiting[count].block)


class _Flow:
    """Some batches of tokens on their way: how each block is called for them, and their hidden states."""

    def __init__(self, task: Measuring, batches: Sequence[Tensor], name: str) -> None:
        self.batches = batches
        self.hidden = task.place(len(batches), name)
        self._calls = CallStore()
        with torch.inference_mode(), short_products(), task.model.loaded_outside():
            for number, ids_BT in enumerate(batches):
                self.hidden[number] = task.model.embed(ids_BT, number, self._calls)

    @property
    def nbytes(self) -> int:
        return sum(self.hidden[batch].nbytes for batch in range(len(self.batches)))

    def calls(self, index: int) -> list[Call]:
        return [self._calls.get(batch, index) for batch in range(len(self.batches))]

    def through(self, block: nn.Module, index: int, before: Activations, after: Activations) -> None:
        """`after` becomes what block `index` makes of `before`; the two may be the same."""
        run_in_step(block, self.calls(index), before, after)


class _Walk:
    """The original hidden states of both token sets at the input of block `at`."""

    def __init__(self, task: Measuring) -> None:
        self.task = task
        self.at = 0
        task.emit(Event("stage", "embedding tokens to measure with", {"name": "embed"}))
        self.fit, self.probe = _Flow(task, task.tokens.fit, "fit"), _Flow(task, task.tokens.probe, "probe")

    def advance(self, stop: int) -> None:
        """Both sets to the input of block `stop`."""
        while self.at < stop:
            with self.task.model.loaded_block(self.at) as block:
                for flow in (self.fit, self.probe):
                    flow.through(block, self.at, flow.hidden, flow.hidden)
            self.at += 1

    def clear(self) -> None:
        self.fit.hidden.clear()
        self.probe.hidden.clear()


def _one_pass(walk: _Walk, units: Sequence[Unit], stop: int) -> dict[str, Sensitivity]:
    """Measures `units`, all in blocks from `walk.at` up to `stop`, where the walk stands afterwards."""
    task, probe = walk.task, walk.probe
    variants: dict[str, Activations] = {}
    losses: dict[str, list[float]] = {}
    ahead = probe.hidden
    task.emit(Event("stage", f"measuring {len(units)} of {len(task.units)} units", {"name": "measure"}))
    for index in range(walk.at, task.model.block_count):
        with task.model.loaded_block(index) as block:
            for hidden in variants.values():
                probe.through(block, index, hidden, hidden)
            if index < stop:
                trial = _Trial(walk, block, index, [unit for unit in units if unit.block == index])
                losses |= trial.learn()
                for unit in trial.units:
                    variants[unit.name] = task.place(len(probe.batches), f"variant-{len(variants)}")
                    with trial.in_place(unit):
                        probe.through(block, index, probe.hidden, variants[unit.name])
            probe.through(block, index, ahead, ahead)
        if index + 1 == stop:
            walk.at = stop
            ahead = _copy(ahead, task.place(len(probe.batches), "ahead"))
        facts = {"index": index, "blocks": task.model.block_count, "variants": len(variants)}
        task.emit(Event("block", f"block {index + 1} of {task.model.block_count}", facts))
    distances = _distances(walk, ahead, variants)
    for hidden in (*variants.values(), ahead):
        hidden.clear()
    return {unit.name: _sensitivity(unit, distances[unit.name], losses[unit.name], task.target_bits) for unit in units}


def _sensitivity(unit: Unit, kl: float, losses: Sequence[float], target_bits: float) -> Sensitivity:
    """`losses`: the layer objective's estimate for each option, up to a factor."""
    at_reference = losses[unit.options.index(reference(unit, target_bits))]
    return Sensitivity(kl, tuple(kl * loss / at_reference if at_reference > 0 else 0.0 for loss in losses))


class _Trial:
    """The units of one loaded block, each quantized at its reference, to be put in and taken out again."""

    def __init__(self, walk: _Walk, block: nn.Module, index: int, units: Sequence[Unit]) -> None:
        self.walk, self.block, self.index, self.units = walk, block, index, units
        self._groups = walk.task.model.layout.blocks[index]
        self._unit = {linear: unit for unit in units for linear in unit.linears}
        self._losses = {unit.name: [0.0] * len(unit.options) for unit in units}
        self._quantized: dict[str, list[tuple[LinearInfo, QuantizedWeight]]] = {unit.name: [] for unit in units}
        self._gram: Gram | None = None
        fit = walk.fit.batches
        self._coverage = Coverage(block, len(fit), sum(batch.numel() for batch in fit), everything=walk.task.config.calibrate_all_experts)

    def learn(self) -> dict[str, list[float]]:
        """Solves all units from what the fit tokens show, which are at the block's output afterwards. Returns losses by unit and option."""
        whole = BlockPass(self.block, self._groups, self.walk.fit.calls(self.index), self.walk.fit.hidden)
        with self._coverage:
            whole.run(paused=self.walk.task.paused, on_input=self._see, on_group=self._solve)
        return self._losses

    @contextmanager
    def in_place(self, unit: Unit) -> Iterator[None]:
        """While inside, the block computes with this unit quantized."""
        model = self.walk.task.model
        for info, weight in self._quantized[unit.name]:
            put_weight(model, self.index, info, weight, partial(_same, weight))
        yield
        for info, _ in self._quantized[unit.name]:
            model.put_back(f"{model.layout.block_name(self.index)}.{info.name}.weight")

    def _see(self, group: int, seen: Seen) -> None:
        if self._gram is None:
            self._gram = Gram(self._groups[group].in_features, self.walk.task.model.device)
        if self._coverage.replaces(self._groups[group]):
            self._gram.count(seen.x)
        else:
            self._gram.add(seen.x)

    def _solve(self, group: int) -> None:
        task = self.walk.task
        members = [
            (info, unit)
            for info in self._groups[group].linears
            if (unit := self._unit.get(linear_name(task.model, self.index, info.name))) is not None
        ]
        gram, self._gram = self._gram, None
        if not members or gram is None:
            return
        covered = self._coverage.finish(self._groups[group], gram, None)
        gram_II, tokens = covered.gram_II, covered.tokens
        effort = EFFORTS[task.config.preset]._replace(signed=task.config.signed_scales and task.config.preset != "plain")
        weights_OI = [self._weight(info) for info, _ in members]
        specs = [spec for _, unit in members if (spec := reference(unit, task.target_bits)) is not None]
        name = ", ".join(info.name for info, _ in members)
        solutions = solve_group(
            weights_OI,
            gram_II,
            specs,
            order=task.config.column_order,
            damp=task.config.damp,
            effort=effort,
            name=f"block {self.index}: {name}",
            tokens=tokens,
            factors=covered.factors,
        )
        with exact():
            identity_I = torch.arange(gram_II.shape[0], device=gram_II.device)
            damp = sample_damp(task.config.damp, gram_II.shape[0], tokens)
            pivot_I = factorize(gram_II, identity_I, damp, rule=effort.damping).pivot_I
        for (info, unit), weight_OI, solution in zip(members, weights_OI, solutions, strict=True):
            self._quantized[unit.name].append((info, solution.weight))
            for number, spec in enumerate(unit.options):
                if spec is not None:
                    self._losses[unit.name][number] += rounding_loss(weight_OI, pivot_I, spec, signed=effort.signed)

    def _weight(self, info: LinearInfo) -> Tensor:
        model = self.walk.task.model
        weight = model.read_parameter(f"{model.layout.block_name(self.index)}.{info.name}.weight").to(
            device=model.device, dtype=torch.float32
        )
        return weight.T.contiguous() if info.transposed else weight


def _same(weight: QuantizedWeight) -> QuantizedWeight:
    return weight


def _copy(source: Activations, target: Activations) -> Activations:
    for batch in range(len(source)):
        target[batch] = source[batch]
    return target


def _distances(walk: _Walk, original: Activations, variants: Mapping[str, Activations]) -> dict[str, float]:
    """KL(original || variant) in nats per token, of every variant's hidden states after the last block."""
    total, tokens = dict.fromkeys(variants, 0.0), 0
    model = walk.task.model
    with model.loaded_outside():
        for batch, ids_BT in enumerate(walk.probe.batches):
            for row in range(len(ids_BT)):
                part = slice(row, row + 1)
                expected_PV = model.head(ids_BT[part], original[batch][part])[0]
                tokens += expected_PV.shape[0]
                for name, hidden in variants.items():
                    total[name] += _kl(expected_PV, model.head(ids_BT[part], hidden[batch][part])[0])
    return {name: value / tokens for name, value in total.items()}


def _kl(expected_PV: Tensor, logits_PV: Tensor) -> float:
    """Sum over positions of KL between two sets of logits, float64 sums of float32 terms."""
    total = 0.0
    step = max(1, _SCORED_VALUES // logits_PV.shape[1])
    for expected_SV, logits_SV in zip(expected_PV.split(step), logits_PV.split(step), strict=True):
        p_SV, q_SV = F.log_softmax(expected_SV.float(), dim=-1), F.log_softmax(logits_SV.float(), dim=-1)
        total += (p_SV.exp() * (p_SV - q_SV)).sum(dtype=torch.float64).item()
    return max(total, 0.0)
