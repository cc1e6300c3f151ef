"""One block at work: Gram matrices as inputs arrive, solving, and putting the quantized weights where the rest of the block reads them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.algorithms.awq import round_scaled, search_scale
from gptqkit.algorithms.factor import damping
from gptqkit.algorithms.gptq import EFFORTS, output_energy, solve_group
from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.algorithms.hqq import half_quadratic
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.source import TensorSource
from gptqkit.checkpoint.spool import Spool
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event
from gptqkit.core.grid import SCALE_MAX, SCALE_MIN, round_scale
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format
from gptqkit.models.device import give_back_memory
from gptqkit.models.folds import Fold, Folds, fold_norm
from gptqkit.models.layout import LinearInfo
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.capture import BlockPass, Room, Seen
from gptqkit.pipeline.clock import Clock
from gptqkit.pipeline.coverage import Coverage
from gptqkit.pipeline.plan import linear_name
from gptqkit.pipeline.tune import Tuned, tune_block

WIDE = 4096
"""Input features from which a Gram matrix (64 MB) weighs more than the page faults that giving memory back costs."""


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """What became of one linear; a line of layers.jsonl.

    error     the squared output error relative to the output's energy
    absorber  the module that its input's scale was folded into, if it was scaled: the stored weight is the original's times that scale
    """

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    sym: bool
    method: str
    error: float | None
    weight_change: float
    damp: float | None
    tokens: int
    seconds: float
    events: tuple[str, ...]
    absorber: str | None = None


class BlockWorker:
    """Quantizes the linears of one loaded block.

    spool    receives what goes into its shard for them, and what replaces norms and biases there (by their names in the checkpoint)
    records  what became of each

    While groups are solved, the block computes with the original norms and with weights that have the scales divided out again; `settle`
    puts in what is written.
    """

    def __init__(
        self,
        model: StreamedModel,
        source: TensorSource,
        config: QuantConfig,
        index: int,
        block: nn.Module,
        coverage: Coverage,
        emit: Emit,
        spool: Spool,
        clock: Clock,
        room: Room,
        folds: Folds | None = None,
    ) -> None:
        self.model = model
        self.source = source
        self.config = config
        self.index = index
        self.block = block
        self.coverage = coverage
        self.emit = emit
        self.format = get_format(config.format)
        self.spool = spool
        self.clock = clock
        self.room = room
        self.records: list[LinearRecord] = []
        self._done: dict[str, LinearInfo] = {}
        self._folds = folds or Folds()
        self._scales: dict[int, Tensor] = {}
        self._grams = _Grams()

    def see(self, group: int, seen: Seen) -> None:
        inputs = self.model.layout.blocks[self.index][group]
        with self.clock.phase("gram"):
            self._grams.add(seen, self.model.device, counted=self.coverage.replaces(inputs))

    def solve(self, group: int) -> None:
        with self.clock.phase("solve"):
            self._solve(group)

    def _solve(self, group: int) -> None:
        started = time.perf_counter()
        grams, self._grams = self._grams, _Grams()
        inputs = self.model.layout.blocks[self.index][group]
        chosen = [(info, name, spec) for info in inputs.linears if (spec := self.config.spec(name := self._name(info)))]
        if inputs.in_features >= WIDE:
            give_back_memory()  # solving is the peak; what the forward left behind must not come on top of it
        if not chosen:
            return
        weights_OI = [self._weight(info) for info, _, _ in chosen]
        specs = [spec for _, _, spec in chosen]
        if grams.own is None:
            results = [_uncalibrated(weight_OI, spec, self.config) for weight_OI, spec in zip(weights_OI, specs, strict=True)]
        else:
            results = self._solved(weights_OI, specs, group, grams, ", ".join(name for _, name, _ in chosen))
        seconds = (time.perf_counter() - started) / len(chosen)
        scale_I = self._scales.get(group)
        absorber = None if scale_I is None else self._name_of(self._folds.found[group].absorber)
        for (info, name, spec), (weight, facts) in zip(chosen, results, strict=True):
            shape = (info.out_features, info.in_features)
            facts |= {"tokens": grams.tokens, "seconds": seconds, "absorber": absorber}
            record = LinearRecord(name, shape, spec.bits, spec.group_size, spec.sym, **facts)
            self.records.append(record)
            self._keep(info, name, weight, scale_I)
            self._report(record)

    def _solved(
        self, weights_OI: list[Tensor], specs: list[LinearSpec], group: int, grams: _Grams, names: str
    ) -> list[tuple[QuantizedWeight, dict[str, Any]]]:
        """Results of a calibrated method. `weights_OI` are multiplied by the scales of their inputs, if any."""
        assert grams.own is not None
        config = self.config
        covered = self.coverage.finish(self.model.layout.blocks[self.index][group], grams.own, grams.cross)
        gram_II, notes = covered.gram_II, covered.notes
        if config.scales_inputs and not bool(torch.isfinite(gram_II.diagonal()).all()):
            raise InputError(
                f"{names}: the calibration inputs are not finite; the model overflows or holds NaN: try --dtype float32 "
                "(or bfloat16 instead of float16), or check the checkpoint with `gptqkit verify`"
            )
        cross_II = None if grams.cross is None else grams.cross.finish()
        ahead_IO = None if grams.ahead is None else grams.ahead.finish()
        scale_I = self._scale(group, weights_OI, gram_II, specs)
        if scale_I is not None:
            self._scales[group] = scale_I
            gram_II, covered = (gram_II, covered) if covered.factors is None else (gram_II.clone(), replace(covered, factors=None))
            for weight_OI in weights_OI:
                weight_OI *= scale_I
            for moment_II in (gram_II, cross_II):
                if moment_II is not None:
                    moment_II.div_(scale_I).div_(scale_I[:, None])
            if ahead_IO is not None:
                ahead_IO /= scale_I[:, None]
        if config.method == "awq":
            return [_rounded(weight_OI, gram_II, spec, config, scale_I, notes) for weight_OI, spec in zip(weights_OI, specs, strict=True)]
        solve = partial(
            solve_group, weights_OI, gram_II, specs, order=config.column_order, damp=config.damp, name=names,
            effort=EFFORTS[config.preset].limited(signed=config.signed_scales), cross_II=cross_II, ahead_IO=ahead_IO,
            tokens=covered.tokens, factors=covered.factors,
        )  # fmt: skip
        solutions = self.room.spared_for(solve)
        return [
            (
                s.weight,
                dict(
                    method=config.method if s.method == "gptq" else s.method, error=s.error,
                    weight_change=s.weight_change if scale_I is None else _change(s.weight, weight_OI, scale_I),
                    damp=s.damp, events=(*notes, *s.events),
                ),
            )
            for s, weight_OI in zip(solutions, weights_OI, strict=True)
        ]  # fmt: skip

    def _scale(self, group: int, weights_OI: list[Tensor], gram_II: Tensor, specs: list[LinearSpec]) -> Tensor | None:
        """The scale of a group's input channels that can be folded away and helps, or None."""
        fold = self._folds.found.get(group)
        if fold is None:
            return None
        config = self.config
        scale_I = search_scale(weights_OI, gram_II, specs, share_I=fold.share_I, damp=config.damp, signed=config.signed_scales)
        if fold.offset is not None:
            weight_I = self._stored(fold, "weight")
            assert weight_I is not None
            scale_I = fold_norm(fold.offset, weight_I, None, scale_I)[2]
        elif fold.absorber in self._done:
            least_R, most_R = _divisors(self._made(fold.absorber))
            scale_I = scale_I.clamp(least_R[fold.channel_I], most_R[fold.channel_I])
        return scale_I if bool((scale_I != 1).any()) else None

    def settle(self) -> None:
        """Divides what makes the inputs by their scales, and puts all of the block into the form in which it is written."""
        for group, scale_I in self._scales.items():
            fold = self._folds.found[group]
            bias_I = self._stored(fold, "bias")
            if fold.offset is not None:
                weight_I = self._stored(fold, "weight")
                assert weight_I is not None
                weight_I, bias_I, _ = fold_norm(fold.offset, weight_I, bias_I, scale_I)
                self._replace(f"{fold.absorber}.weight", weight_I)
            else:
                info, weight = self._done[fold.absorber], self._made(fold.absorber)
                divisor_R = fold.divisor(scale_I, weight.out_features)
                divided_OG = round_scale(weight.scale_OG.float() / divisor_R[:, None]).to(torch.float16)
                self._keep(info, self._name(info), replace(weight, scale_OG=divided_OG))
                bias_I = None if bias_I is None else (bias_I.float() / divisor_R).to(bias_I.dtype)
            if bias_I is not None:
                self._replace(f"{fold.absorber}.bias", bias_I)
        for name, info in self._done.items() if self._scales else ():
            put_weight(self.model, self.index, info, self._made(name), partial(self._made, name))

    def _stored(self, fold: Fold, leaf: str) -> Tensor | None:
        """A parameter of an absorber as the checkpoint has it, on the device; None when there is none."""
        disk = self.model.disk_name.get(f"{self.model.layout.block_name(self.index)}.{fold.absorber}.{leaf}")
        return None if disk is None else self.source.read(disk).to(self.model.device)

    def _replace(self, local: str, value: Tensor) -> None:
        name = f"{self.model.layout.block_name(self.index)}.{local}"
        self.model.put_parameter(name, value, lambda: value)
        self.spool.put(self.model.disk_name[name], value)

    def tune(self, whole: BlockPass) -> None:
        """Scales of all linears together, towards what the reference made of the block (tune.py)."""
        assert whole.reference is not None
        if not self._done:
            return
        weights = {name: (self._made(name), info.transposed) for name, info in self._done.items()}
        self.model.drop_experts()  # what inference mode has made takes no part in gradients
        tuned = tune_block(self.block, whole.calls, whole.hidden, whole.reference.hidden, weights)
        if tuned.accepted:
            for local, weight in tuned.weights.items():
                info = self._done[local]
                self._keep(info, self._name(info), weight)
        self._report_tuning(tuned)

    def _report_tuning(self, tuned: Tuned) -> None:
        fall = 1 - tuned.after / tuned.before if tuned.before > 0 else 0.0
        words = (
            f"scales tuned, block error on held-back tokens {fall:.1%} lower" if tuned.accepted else "tuning the scales did not help: left"
        )
        facts = {"block": self.index, "before": tuned.before, "after": tuned.after, "accepted": tuned.accepted}
        self.emit(Event("note", f"block {self.index + 1}: {words}", facts))

    def _keep(self, info: LinearInfo, name: str, weight: QuantizedWeight, scale_I: Tensor | None = None) -> None:
        with self.clock.phase("write"):
            for local, tensor in self.format.encode(weight).items():
                self.spool.put(f"{name}.{local}", tensor)
        self._done[info.name] = info
        put_weight(self.model, self.index, info, weight, partial(self._made, info.name), scale_I)

    def _made(self, local: str) -> QuantizedWeight:
        """What became of a linear, read back: nothing that grows with the number of experts is kept in memory."""
        name = self._name_of(local)
        spec = self.config.spec(name)
        assert spec is not None
        names = {leaf: f"{name}.{leaf}" for leaf in self.format.tensor_names}
        tensors = {leaf: self.spool.read(full).to(self.model.device) for leaf, full in names.items() if full in self.spool}
        return self.format.decode(tensors, spec)

    def _report(self, record: LinearRecord) -> None:
        for event in record.events:
            self.emit(Event("fallback", f"{record.name}: {event}", {"name": record.name}))
        facts = {"name": record.name, "block": self.index, "error": record.error, "weight_change": record.weight_change}
        self.emit(Event("linear", record.name, facts))

    def _name(self, info: LinearInfo) -> str:
        return self._name_of(info.name)

    def _name_of(self, module: str) -> str:
        return linear_name(self.model, self.index, module)

    def _weight(self, info: LinearInfo) -> Tensor:
        """[O, I] float32 from the checkpoint, not from the block: the block may hold a narrower dtype."""
        with self.clock.phase("load"):
            weight = self.source.read(f"{self._name(info)}.weight").to(self.model.device).float()
        return weight.T.contiguous() if info.transposed else weight

    def to_journal(self) -> list[dict[str, Any]]:
        return [asdict(record) for record in self.records]


@dataclass(slots=True)
class _Grams:
    """What is accumulated for one input group: H, and with a second stream C and what the output is behind by."""

    own: Gram | None = None
    cross: CrossGram | None = None
    ahead: CrossGram | None = None

    @property
    def tokens(self) -> int:
        return 0 if self.own is None else self.own.tokens

    def add(self, seen: Seen, device: torch.device, *, counted: bool = False) -> None:
        """`counted`: without a second stream only the number of tokens is wanted."""
        width = seen.x.shape[-1]
        if self.own is None:
            self.own = Gram(width, device)
            self.cross = None if seen.original is None else CrossGram(width, device)
            self.ahead = None if seen.ahead is None else CrossGram(width, device, seen.ahead.shape[-1])
        if counted and seen.original is None:
            self.own.count(seen.x)
        else:
            self.own.add(seen.x)
        if self.cross is not None and seen.original is not None:
            self.cross.add(seen.x, seen.original)
        if self.ahead is not None and seen.ahead is not None:
            self.ahead.add(seen.x, seen.ahead.to(seen.x.dtype))


def _uncalibrated(weight_OI: Tensor, spec: LinearSpec, config: QuantConfig) -> tuple[QuantizedWeight, dict[str, Any]]:
    weight = half_quadratic(weight_OI, spec, signed=config.signed_scales) if config.method == "hqq" else round_to_nearest(weight_OI, spec)
    change = float((weight.dequantize() - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30))
    return weight, dict(method=config.method, error=None, weight_change=change, damp=None, events=())


def _rounded(
    weight_OI: Tensor, gram_II: Tensor, spec: LinearSpec, config: QuantConfig, scale_I: Tensor | None, notes: tuple[str, ...]
) -> tuple[QuantizedWeight, dict[str, Any]]:
    """AWQ's second half: scaled weights, rounded."""
    diagonal_I = gram_II.diagonal()
    weight = round_scaled(weight_OI, diagonal_I + damping(diagonal_I, config.damp), spec, signed=config.signed_scales)
    energy, lost = (float(output_energy(value_OI.T, gram_II)) for value_OI in (weight_OI, weight.dequantize().sub_(weight_OI)))
    change = _change(weight, weight_OI, torch.ones_like(diagonal_I) if scale_I is None else scale_I)
    return weight, dict(method="awq", error=lost / energy if energy > 0 else 0.0, weight_change=change, damp=config.damp, events=notes)


def _change(weight: QuantizedWeight, scaled_OI: Tensor, scale_I: Tensor) -> float:
    """||Q S^-1 - W|| / ||W|| of what was multiplied by S before."""
    change_OI = weight.dequantize().sub_(scaled_OI).div_(scale_I)
    return float(change_OI.norm() / (scaled_OI / scale_I).norm().clamp(min=1e-30))


def _divisors(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """What the rows of a weight can be divided by, least and most, and its scales be float16 normals still: [O], [O]."""
    magnitude_OG = weight.scale_OG.float().abs()
    return magnitude_OG.amax(1) / SCALE_MAX, magnitude_OG.amin(1) / SCALE_MIN


def put_weight(
    model: StreamedModel,
    index: int,
    info: LinearInfo,
    weight: QuantizedWeight,
    again: Callable[[], QuantizedWeight],
    scale_I: Tensor | None = None,
) -> None:
    """The quantized weight into the loaded block, so that what follows reads what a user of the checkpoint will compute. `again` makes it
    anew (StreamedModel.put_parameter).

    With `scale_I` the weight is one for an input divided by that, and the block's input is not divided yet.
    """

    def value_of(weight: QuantizedWeight) -> Tensor:
        value_OI = weight.dequantize()
        if scale_I is not None:
            value_OI /= scale_I
        return value_OI.T if info.transposed else value_OI

    model.put_parameter(f"{model.layout.block_name(index)}.{info.name}.weight", value_of(weight), lambda: value_of(again()))
