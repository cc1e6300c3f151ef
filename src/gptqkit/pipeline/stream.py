"""The block loop: load, capture, solve, write, propagate, free.

Read `quantize_blocks` from top to bottom: it is the whole run.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.checkpoint.background import Background
from gptqkit.checkpoint.files import write_shard
from gptqkit.checkpoint.source import TensorSource
from gptqkit.checkpoint.spool import Spool
from gptqkit.checkpoint.writer import shard_name
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.events import Emit, Event
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format
from gptqkit.models.device import give_back_memory
from gptqkit.models.folds import Folds, find_folds
from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.capture import BlockPass, Reference, Room
from gptqkit.pipeline.clock import Clock
from gptqkit.pipeline.coverage import Coverage
from gptqkit.pipeline.head import quantize_head
from gptqkit.pipeline.journal import Journal
from gptqkit.pipeline.memory import BATCH_TOKENS
from gptqkit.pipeline.plan import Plan, linear_name
from gptqkit.pipeline.residual import find_anchors
from gptqkit.pipeline.worker import WIDE, BlockWorker, LinearRecord, put_weight

OUTSIDE_SHARD_BYTES = 1 << 30


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
        return len(self.outside_shards()) + self.parts

    @property
    def parts(self) -> int:
        """What is made one after the other, each a shard and a record in the journal: the blocks, and the head if it is quantized."""
        return self.plan.blocks + (self.plan.head is not None)

    def shard_name(self, number: int) -> str:
        return shard_name(number, self.shard_count)

    def block_shard(self, index: int) -> str:
        return self.shard_name(len(self.outside_shards()) + index + 1)

    def outside_shards(self) -> list[list[str]]:
        """Tensors that belong to no block, cut into files of about a gigabyte; without the head's weight if it is quantized."""
        blocks = {name for index in range(self.plan.blocks) for name in self.block_tensors(index)}
        if self.plan.head is not None:
            blocks.add(f"{self.plan.head.name}.weight")
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
    """Quantizes every block, and the output head if it is planned, that the journal does not hold yet.

    `sequences` are the calibration token ids; none for methods without. Returns one record per linear, in order.
    Raises InputError or ResourceError; what is finished stays in the journal.
    """
    done = stream.journal.finished_blocks()
    records = [_linear_record(entry) for record in done for entry in record["linears"]]
    if done:
        finished = min(len(done), stream.plan.blocks)
        stream.emit(Event("note", f"resuming: {finished} of {stream.plan.blocks} blocks are done", {"done": finished}))
    with _background(stream) as outside:
        outside.do(lambda: _write_outside(stream))
        if len(done) < stream.parts:
            records += _quantize_rest(stream, make_batches(sequences, stream.model.device), len(done))
    return records


def _quantize_rest(stream: Stream, batches: list[Tensor], done: int) -> list[LinearRecord]:
    """What follows the first `done` blocks, which are only run."""
    records: list[LinearRecord] = []
    clock, room = Clock(stream.model.device), Room(stream.plan.memory.flight, partial(_report_shortage, stream))
    with torch.inference_mode(), _background(stream) as background:
        calls, hidden = _embed(stream, batches)
        original = _second_stream(stream, hidden) if stream.config.second_stream and batches else None
        stream.emit(Event("stage", "quantizing blocks", {"name": "blocks"}))
        for index in range(stream.plan.blocks):
            if index in stream.model.layout.starts[1:]:
                calls, hidden = _embed(stream, batches, encoded=hidden)
                original = None if original is None else _second_stream(stream, hidden)
            if max(group.in_features for group in stream.model.layout.blocks[index]) >= WIDE:
                give_back_memory()
            started = time.perf_counter()
            copies = 1 if original is None else 2
            with ExitStack() as stack:
                with clock.phase("load"):
                    block, *beside = stack.enter_context(stream.model.loaded_copies(index, copies))
                groups, last = stream.model.layout.blocks[index], index == stream.parts - 1
                called = [calls.get(b, index) for b in range(len(batches))]
                reference = None if original is None else Reference(beside[0], original)
                anchors = find_anchors(block, groups, called[0], hidden[0]) if reference is not None else ()
                # What the block hands on is what its written form makes of the inputs, so with scaling they have to wait for that form.
                whole = BlockPass(block, groups, called, hidden, last or stream.config.scales_inputs, reference, anchors)
                if index < done:
                    _restore(stream, index)
                    whole.propagate()
                    whole.propagate_reference()
                    continue
                records += _quantize_block(stream, index, whole, sum(batch.numel() for batch in batches), background, clock, room)
            seconds = time.perf_counter() - started
            stream.emit(
                Event(
                    "block",
                    f"block {index + 1} of {stream.plan.blocks}",
                    {"index": index, "blocks": stream.plan.blocks, "seconds": seconds, "phases": clock.take()},
                )
            )
    with torch.inference_mode():
        if stream.plan.head is not None and (spec := stream.config.head_spec(stream.plan.head.name)):
            records += quantize_head(stream, stream.plan.head, spec, batches, hidden, original)
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


def _embed(stream: Stream, batches: list[Tensor], encoded: Activations | None = None) -> tuple[CallStore, Activations]:
    """What the first block receives; or the first of the decoder, which then takes the place of what the encoder has made."""
    memory = stream.plan.memory
    place = stream.model.device if memory.place == "device" else torch.device("cpu")
    folder = stream.journal.activations if memory.place == "disk" else None
    hidden = encoded or Activations(len(batches), device=stream.model.device, place=place, folder=folder)
    calls = CallStore()
    if batches:
        stream.emit(Event("stage", "embedding calibration tokens", {"name": "embed"}))
        with stream.model.loaded_outside():
            for number, ids in enumerate(batches):
                hidden[number] = stream.model.embed(ids, number, calls, None if encoded is None else encoded[number])
    return calls, hidden


def _second_stream(stream: Stream, hidden: Activations) -> Activations:
    """What the blocks of the original model receive: to begin with, the same as those of the quantized one."""
    second = hidden.sibling("original")
    for batch in range(len(hidden)):
        second[batch] = hidden[batch]
    return second


def _background(stream: Stream) -> Background:
    """Beside a GPU, files are written by a thread of their own; on a CPU that would only take cores from the solver."""
    return Background(threaded=stream.model.device.type == "cuda")


def _report_shortage(stream: Stream, batches: int) -> None:
    words = (
        f"the device ran out of memory; from here on at most {batches} batches are in flight, the others are computed again for each group"
    )
    stream.emit(Event("note", words, {"batches": batches}))


def _quantize_block(
    stream: Stream, index: int, whole: BlockPass, tokens: int, background: Background, clock: Clock, room: Room
) -> list[LinearRecord]:
    """One block: every group solved in order of use, its shard written and journalled, `whole.hidden` advanced."""
    coverage = Coverage(whole.block, len(whole.calls), tokens, everything=stream.config.calibrate_all_experts)
    folds = _find_folds(stream, index, whole) if stream.config.scales_inputs else None
    with ExitStack() as stack:
        spool = stack.enter_context(Spool(stream.journal.folder / f"block-{index:05d}.spool", background.executor))
        worker = BlockWorker(
            stream.model, stream.source, stream.config, index, whole.block, coverage, stream.emit, spool, clock, room, folds
        )
        if whole.calls:
            with coverage, clock.phase("forward"):
                whole.run(paused=stream.plan.memory.paused, room=room, on_input=worker.see, on_group=worker.solve)
            worker.settle()
            if whole.reference is not None:
                with clock.phase("tune"):
                    worker.tune(whole)
        else:
            for group in range(len(whole.groups)):
                worker.solve(group)
        if index < stream.parts - 1 and (whole.reference is not None or stream.config.scales_inputs):
            with clock.phase("forward"):
                whole.propagate()
        spread = coverage.summary(index)
        if spread is not None and spread.under:
            stream.emit(Event("note", f"block {index + 1}: {spread}", {"coverage": asdict(spread)}))
        facts = {"linears": worker.to_journal(), "coverage": None if spread is None else asdict(spread)}
        replaced = {f"{record.name}.weight" for record in worker.records} | set(spool.names)
        with clock.phase("write"):
            background.do(partial(_finish_block, stream, index, spool, replaced, facts, stack.pop_all()))
    return worker.records


def _finish_block(stream: Stream, index: int, spool: Spool, replaced: set[str], facts: dict[str, Any], closing: ExitStack) -> None:
    """Adds what is kept as it was, writes the shard, and makes the block done."""
    spool.writer = None
    with closing:
        shard = stream.block_shard(index)
        for name in stream.source.together([name for name in stream.block_tensors(index) if name not in replaced]):
            spool.put(name, stream.source.read(name))
        digest = spool.publish(stream.journal.checkpoint / shard)
        stream.journal.record(index, {"shard": shard, "sha256": digest, **facts})


def _find_folds(stream: Stream, index: int, whole: BlockPass) -> Folds:
    """What can absorb the scales of this block's inputs. Says which linears go without, and why."""
    names = {info.name: linear_name(stream.model, index, info.name) for group in whole.groups for info in group.linears}
    quantized = {local for local, name in names.items() if stream.config.spec(name)}
    folds = find_folds(whole.block, whole.groups, quantized, whole.calls[0], whole.hidden[0])
    unscaled: dict[str, list[str]] = {}
    for group, reason in folds.refused.items():
        unscaled.setdefault(reason, []).extend(info.name for info in whole.groups[group].linears if info.name in quantized)
    for reason, locals_ in unscaled.items():
        if locals_:
            listed = ", ".join(locals_[:4]) + (f" and {len(locals_) - 4} more" if len(locals_) > 4 else "")
            words = f"block {index + 1}: inputs of {listed} are not scaled: {reason}"
            stream.emit(Event("note", words, {"block": index, "linears": [names[local] for local in locals_]}))
    return folds


def _restore(stream: Stream, index: int) -> None:
    """Puts the quantized weights of a finished block into the loaded block, read from its shard, and norms and biases that changed."""
    shard = TensorSource.open_file(stream.journal.checkpoint / stream.block_shard(index))
    if stream.config.scales_inputs:
        prefix = stream.model.layout.block_name(index) + "."
        for parameter, disk in stream.model.disk_name.items():
            if parameter.startswith(prefix) and disk in shard and len(shard.info(disk).shape) == 1:
                stream.model.put_parameter(parameter, shard.read(disk), partial(shard.read, disk))
    form = get_format(stream.config.format)

    def stored(name: str, spec: LinearSpec) -> QuantizedWeight:
        tensors = {local: shard.read(f"{name}.{local}") for local in form.tensor_names if f"{name}.{local}" in shard}
        return form.decode(tensors, spec).to(stream.model.device)

    for group in stream.model.layout.blocks[index]:
        for info in group.linears:
            name = linear_name(stream.model, index, info.name)
            spec = stream.config.spec(name)
            if spec is not None:
                put_weight(stream.model, index, info, stored(name, spec), partial(stored, name, spec))


def _write_outside(stream: Stream) -> None:
    stream.emit(Event("stage", "copying what is outside the blocks", {"name": "outside"}))
    for number, names in enumerate(stream.outside_shards(), start=1):
        path: Path = stream.journal.checkpoint / stream.shard_name(number)
        if not path.exists():
            write_shard(path, {name: stream.source.read(name) for name in names})


def _linear_record(entry: dict[str, Any]) -> LinearRecord:
    return LinearRecord(**{**entry, "shape": tuple(entry["shape"]), "events": tuple(entry["events"])})
