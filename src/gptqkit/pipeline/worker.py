"""One block at work: Gram matrices as inputs arrive, solving, and putting the quantized weights where the rest of the block reads them."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.algorithms.gptq import EFFORTS, solve_group
from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.algorithms.hqq import half_quadratic
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.events import Emit, Event
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format
from gptqkit.models.device import give_back_memory
from gptqkit.models.layout import InputGroup, LinearInfo
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.capture import BlockPass, Seen
from gptqkit.pipeline.coverage import Coverage
from gptqkit.pipeline.plan import linear_name
from gptqkit.pipeline.tune import Tuned, tune_block

WIDE = 4096
"""Input features from which a Gram matrix (64 MB) weighs more than the page faults that giving memory back costs."""


@dataclass(frozen=True, slots=True)
class LinearRecord:
    """What became of one linear; a line of layers.jsonl. `error` is the squared output error relative to the output's energy."""

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


class BlockWorker:
    """Quantizes the linears of one loaded block; `tensors` is what goes into its shard for them, `records` what became of each."""

    def __init__(
        self, model: StreamedModel, source: TensorSource, config: QuantConfig, index: int, block: nn.Module, coverage: Coverage, emit: Emit
    ) -> None:
        self.model = model
        self.source = source
        self.config = config
        self.index = index
        self.block = block
        self.coverage = coverage
        self.emit = emit
        self.format = get_format(config.format)
        self.tensors: dict[str, Tensor] = {}
        self.records: list[LinearRecord] = []
        self._weights: dict[str, tuple[LinearInfo, QuantizedWeight]] = {}
        self._grams = _Grams()

    def see(self, group: int, seen: Seen) -> None:
        self._grams.add(seen, self.model.device)

    def solve(self, group: int) -> None:
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
            results = self._solved(weights_OI, specs, inputs, grams, ", ".join(name for _, name, _ in chosen))
        seconds = (time.perf_counter() - started) / len(chosen)
        for (info, name, spec), (weight, facts) in zip(chosen, results, strict=True):
            shape = (info.out_features, info.in_features)
            record = LinearRecord(name, shape, spec.bits, spec.group_size, spec.sym, tokens=grams.tokens, seconds=seconds, **facts)
            self.records.append(record)
            self._keep(info, name, weight)
            self._report(record)

    def _solved(
        self, weights_OI: list[Tensor], specs: list[LinearSpec], inputs: InputGroup, grams: _Grams, names: str
    ) -> list[tuple[QuantizedWeight, dict[str, Any]]]:
        assert grams.own is not None
        config = self.config
        notes = self.coverage.complete(inputs, grams.own, grams.cross)
        solutions = solve_group(
            weights_OI, grams.own.finish(), specs, order=config.column_order, damp=config.damp, name=names,
            effort=EFFORTS[config.preset].limited(signed=config.signed_scales),
            cross_II=None if grams.cross is None else grams.cross.finish(),
            ahead_IO=None if grams.ahead is None else grams.ahead.finish(),
        )  # fmt: skip
        return [
            (s.weight, dict(method=s.method, error=s.error, weight_change=s.weight_change, damp=s.damp, events=(*notes, *s.events)))
            for s in solutions
        ]

    def tune(self, whole: BlockPass) -> None:
        """Scales of all linears together, towards what the reference made of the block (tune.py)."""
        assert whole.reference is not None
        if not self._weights:
            return
        weights = {name: (weight, info.transposed) for name, (info, weight) in self._weights.items()}
        tuned = tune_block(self.block, whole.calls, whole.hidden, whole.reference.hidden, weights)
        if tuned.accepted:
            for local, weight in tuned.weights.items():
                info = self._weights[local][0]
                self._keep(info, self._name(info), weight)
        self._report_tuning(tuned)

    def _report_tuning(self, tuned: Tuned) -> None:
        fall = 1 - tuned.after / tuned.before if tuned.before > 0 else 0.0
        words = (
            f"scales tuned, block error on held-back tokens {fall:.1%} lower" if tuned.accepted else "tuning the scales did not help: left"
        )
        facts = {"block": self.index, "before": tuned.before, "after": tuned.after, "accepted": tuned.accepted}
        self.emit(Event("note", f"block {self.index + 1}: {words}", facts))

    def _keep(self, info: LinearInfo, name: str, weight: QuantizedWeight) -> None:
        put_weight(self.model, self.index, info, weight)
        self._weights[info.name] = (info, weight)
        for local, tensor in self.format.encode(weight.to("cpu")).items():
            self.tensors[f"{name}.{local}"] = tensor

    def _report(self, record: LinearRecord) -> None:
        for event in record.events:
            self.emit(Event("fallback", f"{record.name}: {event}", {"name": record.name}))
        facts = {"name": record.name, "block": self.index, "error": record.error, "weight_change": record.weight_change}
        self.emit(Event("linear", record.name, facts))

    def _name(self, info: LinearInfo) -> str:
        return linear_name(self.model, self.index, info.name)

    def _weight(self, info: LinearInfo) -> Tensor:
        """[O, I] float32 from the checkpoint, not from the block: the block may hold a narrower dtype."""
        weight = self.source.read(f"{self._name(info)}.weight").to(device=self.model.device, dtype=torch.float32)
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

    def add(self, seen: Seen, device: torch.device) -> None:
        width = seen.x.shape[-1]
        if self.own is None:
            self.own = Gram(width, device)
            self.cross = None if seen.original is None else CrossGram(width, device)
            self.ahead = None if seen.ahead is None else CrossGram(width, device, seen.ahead.shape[-1])
        self.own.add(seen.x)
        if self.cross is not None and seen.original is not None:
            self.cross.add(seen.x, seen.original)
        if self.ahead is not None and seen.ahead is not None:
            self.ahead.add(seen.x, seen.ahead.to(seen.x.dtype))


def _uncalibrated(weight_OI: Tensor, spec: LinearSpec, config: QuantConfig) -> tuple[QuantizedWeight, dict[str, Any]]:
    weight = half_quadratic(weight_OI, spec, signed=config.signed_scales) if config.method == "hqq" else round_to_nearest(weight_OI, spec)
    change = float((weight.dequantize() - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30))
    return weight, dict(method=config.method, error=None, weight_change=change, damp=None, events=())


def put_weight(model: StreamedModel, index: int, info: LinearInfo, weight: QuantizedWeight) -> None:
    """The quantized weight into the loaded block, so that what follows reads what a user of the checkpoint will compute."""
    value_OI = weight.dequantize()
    model.put_parameter(f"{model.layout.block_name(index)}.{info.name}.weight", value_OI.T if info.transposed else value_OI)
