"""The block loop: load, capture, solve, write, propagate, free.

Read `quantize_blocks` from top to bottom: it is the whole run.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.algorithms.gptq import EFFORTS, solve_group
from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.files import write_shard
from gptqkit.checkpoint.source import TensorSource
from gptqkit.checkpoint.writer import shard_name
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.events import Emit, Event
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format
from gptqkit.models.device import give_back_memory
from gptqkit.models.layout import InputGroup, LinearInfo
from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.capture import BlockPass, Reference
from gptqkit.pipeline.coverage import Coverage
from gptqkit.pipeline.journal import Journal
from gptqkit.pipeline.plan import BATCH_TOKENS, Plan, linear_name

OUTSIDE_SHARD_BYTES = 1 << 30
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


@dataclass(frozen=True, slots=True)
class Stream:
    """What the block loop works on."""

    model: StreamedModel
    source: TensorSource
    plan: Plan
    config: QuantConfig
    journal: Journal
    emit: Emit

    @property
    def shard_count(self) -> int:
        return len(self.outside_shards()) + self.plan.blocks

    def shard_name(self, number: int) -> str:
        return shard_name(number, self.shard_count)

    def block_shard(self, index: int) -> str:
        return self.shard_name(len(self.outside_shards()) + index + 1)

    def outside_shards(self) -> list[list[str]]:
        """Tensors that belong to no block, cut into files of about a gigabyte."""
        blocks = {name for index in range(self.plan.blocks) for name in self.block_tensors(index)}
        shards: list[list[str]] = [[]]
        size = 0
        for name in self.source.names:
            if name in blocks:
                continue
            nbytes = self.source.info(name).nbytes
            if shards[-1] and size + nbytes > OUTSIDE_SHARD_BYTES:
                shards.append([])
                size = 0
            shards[-1].append(name)
            size += nbytes
        return [names for names in shards if names]

    def block_tensors(self, index: int) -> list[str]:
        """Checkpoint names of the parameters of one block."""
        prefix = self.model.layout.block_name(index) + "."
        return [disk for name, disk in self.model.disk_name.items() if name.startswith(prefix)]


def quantize_blocks(stream: Stream, sequences: Sequence[Tensor]) -> list[LinearRecord]:
    """Quantizes every block that the journal does not hold yet. `sequences` are the calibration token ids; none for methods without.

    Returns one record per linear, in order. Raises InputError or ResourceError; what is finished stays in the journal.
    """
    done = stream.journal.finished_blocks()
    records = [_linear_record(entry) for record in done for entry in record["linears"]]
    if done:
        stream.emit(Event("note", f"resuming: {len(done)} of {stream.plan.blocks} blocks are done", {"done": len(done)}))
    _write_outside(stream)
    if len(done) == stream.plan.blocks:
        return records
    batches = make_batches(sequences, stream.model.device)
    with torch.inference_mode():
        calls, hidden = _embed(stream, batches)
        original = _second_stream(stream, hidden) if stream.config.preset == "best" and batches else None
        stream.emit(Event("stage", "quantizing blocks", {"name": "blocks"}))
        for index in range(stream.plan.blocks):
            if max(group.in_features for group in stream.model.layout.blocks[index]) >= WIDE:
                give_back_memory()
            started = time.perf_counter()
            with stream.model.loaded_block(index) as block:
                groups, last = stream.model.layout.blocks[index], index == stream.plan.blocks - 1
                reference = None if original is None else Reference(copy.deepcopy(block), original)
                whole = BlockPass(block, groups, [calls.get(b, index) for b in range(len(batches))], hidden, last, reference)
                if index < len(done):
                    _restore(stream, index)
                    whole.propagate()
                    continue
                made = _quantize_block(stream, index, whole, sum(batch.numel() for batch in batches))
            records += made
            seconds = time.perf_counter() - started
            stream.emit(
                Event(
                    "block",
                    f"block {index + 1} of {stream.plan.blocks}",
                    {"index": index, "blocks": stream.plan.blocks, "seconds": seconds},
                )
            )
        for activations in (hidden, original):
            if activations is not None:
                activations.clear()
    return records


def make_batches(sequences: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """[B, T] batches of equal-length neighbours after sorting by length (stable), about BATCH_TOKENS tokens each; no padding."""
    batches: list[Tensor] = []
    limit = BATCH_TOKENS[device.type]
    for _, group in _by_length(sequences):
        step = max(1, limit // group[0].numel())
        batches += [torch.stack(group[start : start + step]) for start in range(0, len(group), step)]
    return batches


def _by_length(sequences: Sequence[Tensor]) -> Iterator[tuple[int, list[Tensor]]]:
    lengths = sorted({sequence.numel() for sequence in sequences}, reverse=True)
    for length in lengths:
        yield length, [sequence for sequence in sequences if sequence.numel() == length]


def _embed(stream: Stream, batches: list[Tensor]) -> tuple[CallStore, Activations]:
    memory = stream.plan.memory
    place = stream.model.device if memory.place == "device" else torch.device("cpu")
    folder = stream.journal.activations if memory.place == "disk" else None
    hidden = Activations(len(batches), device=stream.model.device, place=place, folder=folder)
    calls = CallStore()
    if batches:
        stream.emit(Event("stage", "embedding calibration tokens", {"name": "embed"}))
        with stream.model.loaded_outside():
            for number, ids in enumerate(batches):
                hidden[number] = stream.model.embed(ids, number, calls)
    return calls, hidden


def _second_stream(stream: Stream, hidden: Activations) -> Activations:
    """What the blocks of the original model receive: to begin with, the same as those of the quantized one."""
    second = hidden.sibling("original")
    for batch in range(len(hidden)):
        second[batch] = hidden[batch]
    return second


def _quantize_block(stream: Stream, index: int, whole: BlockPass, tokens: int) -> list[LinearRecord]:
    """One block: every group solved in order of use, its shard written and journalled, `whole.hidden` advanced."""
    worker = _BlockWorker(stream, index, whole.block, Coverage(whole.block, len(whole.calls), tokens))
    if whole.calls:
        with worker.coverage:
            whole.run(paused=stream.plan.memory.paused, on_input=worker.see, on_group=worker.solve)
    else:
        for group in range(len(whole.groups)):
            worker.solve(group)
    shard = stream.block_shard(index)
    quantized = {f"{record.name}.weight" for record in worker.records}
    dense = {name: stream.source.read(name) for name in stream.block_tensors(index) if name not in quantized}
    digest = write_shard(stream.journal.checkpoint / shard, {**worker.tensors, **dense})
    stream.journal.record(index, {"shard": shard, "sha256": digest, "linears": [asdict(record) for record in worker.records]})
    return worker.records


class _BlockWorker:
    """Accumulates the Gram matrix of each group as its inputs arrive, then solves its linears and puts them into the block."""

    def __init__(self, stream: Stream, index: int, block: nn.Module, coverage: Coverage) -> None:
        self.stream = stream
        self.index = index
        self.block = block
        self.coverage = coverage
        self.gram: Gram | None = None
        self.cross: CrossGram | None = None
        self.tensors: dict[str, Tensor] = {}
        self.records: list[LinearRecord] = []
        self.format = get_format(stream.config.format)

    def see(self, group: int, x: Tensor, original: Tensor | None) -> None:
        if self.gram is None:
            self.gram = Gram(self._group(group).in_features, self.stream.model.device)
            self.cross = None if original is None else CrossGram(x.shape[-1], self.stream.model.device)
        self.gram.add(x)
        if self.cross is not None and original is not None:
            self.cross.add(x, original)

    def solve(self, group: int) -> None:
        started = time.perf_counter()
        chosen = [(info, name, spec) for info in self._group(group).linears if (spec := self._spec(name := self._name(info)))]
        if self._group(group).in_features >= WIDE:
            give_back_memory()  # solving is the peak; what the forward left behind must not come on top of it
        gram, self.gram, cross, self.cross = self.gram, None, self.cross, None
        if not chosen:
            return
        seen, notes = (0, ()) if gram is None else (gram.tokens, self.coverage.complete(self._group(group), gram, cross))
        weights_OI = [self._weight(info) for info, _, _ in chosen]
        specs = [spec for _, _, spec in chosen]
        if gram is None:
            results = [_rounded(weight_OI, spec) for weight_OI, spec in zip(weights_OI, specs, strict=True)]
        else:
            config = self.stream.config
            names = ", ".join(name for _, name, _ in chosen)
            solutions = solve_group(
                weights_OI,
                gram.finish(),
                specs,
                order=config.column_order,
                damp=config.damp,
                name=names,
                effort=EFFORTS[config.preset]._replace(signed=config.signed_scales and config.preset != "plain"),
                cross_II=None if cross is None else cross.finish(),
            )
            results = [
                (s.weight, dict(method=s.method, error=s.error, weight_change=s.weight_change, damp=s.damp, events=(*notes, *s.events)))
                for s in solutions
            ]
        seconds = (time.perf_counter() - started) / len(chosen)
        for (info, name, spec), (weight, facts) in zip(chosen, results, strict=True):
            shape = (info.out_features, info.in_features)
            record = LinearRecord(name, shape, spec.bits, spec.group_size, spec.sym, tokens=seen, seconds=seconds, **facts)
            self._keep(info, weight, record)

    def _keep(self, info: LinearInfo, weight: QuantizedWeight, record: LinearRecord) -> None:
        _put(self.stream, self.index, info, weight)
        for local, tensor in self.format.encode(weight.to("cpu")).items():
            self.tensors[f"{record.name}.{local}"] = tensor
        self.records.append(record)
        for event in record.events:
            self.stream.emit(Event("fallback", f"{record.name}: {event}", {"name": record.name}))
        facts = {"name": record.name, "block": self.index, "error": record.error, "weight_change": record.weight_change}
        self.stream.emit(Event("linear", record.name, facts))

    def _group(self, index: int) -> InputGroup:
        return self.stream.model.layout.blocks[self.index][index]

    def _name(self, info: LinearInfo) -> str:
        return linear_name(self.stream.model, self.index, info.name)

    def _spec(self, name: str) -> LinearSpec | None:
        return self.stream.config.spec(name)

    def _weight(self, info: LinearInfo) -> Tensor:
        """[O, I] float32 from the checkpoint, not from the block: the block may hold a narrower dtype."""
        weight = self.stream.source.read(f"{self._name(info)}.weight").to(device=self.stream.model.device, dtype=torch.float32)
        return weight.T.contiguous() if info.transposed else weight


def _rounded(weight_OI: Tensor, spec: LinearSpec) -> tuple[QuantizedWeight, dict[str, Any]]:
    weight = round_to_nearest(weight_OI, spec)
    change = float((weight.dequantize() - weight_OI).norm() / weight_OI.norm().clamp(min=1e-30))
    return weight, dict(method="rtn", error=None, weight_change=change, damp=None, events=())


def _put(stream: Stream, index: int, info: LinearInfo, weight: QuantizedWeight) -> None:
    """The quantized weight into the loaded block, so that what follows reads what a user of the checkpoint will compute."""
    value_OI = weight.dequantize()
    parameter = f"{stream.model.layout.block_name(index)}.{info.name}.weight"
    stream.model.put_parameter(parameter, value_OI.T if info.transposed else value_OI)


def _restore(stream: Stream, index: int) -> None:
    """Puts the quantized weights of a finished block, read back from its shard, into the loaded block."""
    shard = TensorSource.open_file(stream.journal.checkpoint / stream.block_shard(index))
    form = get_format(stream.config.format)
    for group in stream.model.layout.blocks[index]:
        for info in group.linears:
            name = linear_name(stream.model, index, info.name)
            spec = stream.config.spec(name)
            if spec is not None:
                tensors = {local: shard.read(f"{name}.{local}") for local in form.tensor_names if f"{name}.{local}" in shard}
                _put(stream, index, info, form.decode(tensors, spec))


def _write_outside(stream: Stream) -> None:
    stream.emit(Event("stage", "copying what is outside the blocks", {"name": "outside"}))
    for number, names in enumerate(stream.outside_shards(), start=1):
        path: Path = stream.journal.checkpoint / stream.shard_name(number)
        if not path.exists():
            write_shard(path, {name: stream.source.read(name) for name in names})


def _linear_record(entry: dict[str, Any]) -> LinearRecord:
    return LinearRecord(**{**entry, "shape": tuple(entry["shape"]), "events": tuple(entry["events"])})
