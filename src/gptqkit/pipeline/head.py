"""Quantizing the output head, after the last block: with the Gram matrix of the final hidden states, or from the weight alone.

The head is far larger than any linear of a block (128k x 4096 where those are 14k x 4096), and a solver holds several copies of its rows in
float32. But each row is solved by itself, given the Gram matrix; so the rows are solved in slices of a fixed size, and only codes and
scales of all of them are ever held. (The factorization is repeated for each slice, about a third of the work.)
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from gptqkit.algorithms.awq import round_scaled
from gptqkit.algorithms.factor import damping
from gptqkit.algorithms.gptq import EFFORTS, output_energy, solve_group
from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.algorithms.hqq import half_quadratic
from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.files import write_shard
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.events import Event
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format
from gptqkit.models.device import give_back_memory
from gptqkit.models.head import Head
from gptqkit.models.standin import StopForward
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.memory import head_rows
from gptqkit.pipeline.worker import LinearRecord

if TYPE_CHECKING:
    from gptqkit.pipeline.stream import Stream


@dataclass(frozen=True, slots=True)
class _Moments:
    """What the head reads: the mean of x x^T, and with a second stream that of x_q x_f^T."""

    gram_II: Tensor
    cross_II: Tensor | None
    tokens: int
    effective_tokens: float


@dataclass(slots=True)
class _Total:
    """Sums over slices of rows: squared output error and energy, squared change and norm of the weight."""

    lost: float = 0.0
    energy: float = 0.0
    change: float = 0.0
    norm: float = 0.0
    damp: float | None = None
    methods: set[str] = field(default_factory=set)
    events: dict[str, None] = field(default_factory=dict)


def quantize_head(
    stream: Stream, head: Head, spec: LinearSpec, batches: Sequence[Tensor], hidden: Activations, original: Activations | None
) -> list[LinearRecord]:
    """Solves the head on what the last block handed on, writes its shard and makes it done in the journal."""
    stream.emit(Event("stage", "quantizing the output head", {"name": "head"}))
    started = time.perf_counter()
    moments = _moments(stream, head, batches, hidden, original) if batches else None
    give_back_memory()
    weight, total = _solve_slices(stream, head, spec, moments)
    record = LinearRecord(
        name=head.name,
        shape=(head.info.out_features, head.info.in_features),
        bits=spec.bits,
        group_size=spec.group_size,
        sym=spec.sym,
        method=total.methods.pop() if len(total.methods) == 1 else stream.config.method,
        error=None if moments is None else total.lost / total.energy if total.energy > 0 else 0.0,
        weight_change=(total.change / total.norm) ** 0.5 if total.norm > 0 else 0.0,
        damp=total.damp,
        tokens=0 if moments is None else moments.tokens,
        seconds=time.perf_counter() - started,
        events=tuple(total.events),
    )
    index = stream.plan.blocks
    shard = stream.block_shard(index)
    tensors = {f"{head.name}.{local}": tensor for local, tensor in get_format(stream.config.format).encode(weight.to("cpu")).items()}
    del weight
    digest = write_shard(stream.journal.checkpoint / shard, tensors)
    stream.journal.record(index, {"shard": shard, "sha256": digest, "linears": [asdict(record)]})
    for event in record.events:
        stream.emit(Event("fallback", f"{record.name}: {event}", {"name": record.name}))
    facts = {"name": record.name, "block": index, "error": record.error, "weight_change": record.weight_change}
    stream.emit(Event("linear", record.name, facts))
    return [record]


def _moments(stream: Stream, head: Head, batches: Sequence[Tensor], hidden: Activations, original: Activations | None) -> _Moments:
    width, device = head.info.in_features, stream.model.device
    gram = Gram(width, device)
    cross = None if original is None else CrossGram(width, device)
    with _inputs(stream.model, head) as input_of:
        for number, ids_BT in enumerate(batches):
            x_MI = input_of(ids_BT, hidden[number])
            gram.add(x_MI)
            if cross is not None and original is not None:
                cross.add(x_MI, input_of(ids_BT, original[number]))
    tokens, effective = gram.tokens, gram.effective_tokens
    return _Moments(gram.finish(), None if cross is None else cross.finish(), tokens, effective)


@contextmanager
def _inputs(model: StreamedModel, head: Head) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """What the head reads [B * T, I], given the tokens and what the blocks return: the model's own forward, ended at the head."""
    seen: list[Tensor] = []

    def catch(module: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(inputs[0] if inputs else next(iter(named.values())))
        raise StopForward

    def input_of(ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        with suppress(StopForward):
            model.head(ids_BT, hidden_BTH)
        return seen.pop().flatten(0, -2)

    with model.loaded_outside():
        # in front of the hook that loads the head's weight, which is not needed
        hook = model.skeleton.get_submodule(head.module).register_forward_pre_hook(catch, with_kwargs=True, prepend=True)
        try:
            yield input_of
        finally:
            hook.remove()


def _solve_slices(stream: Stream, head: Head, spec: LinearSpec, moments: _Moments | None) -> tuple[QuantizedWeight, _Total]:
    """All rows, a slice at a time; codes and scales on the CPU."""
    weight_OI = stream.source.read(head.source)
    rows, total = head_rows(head.info.in_features), _Total()
    codes_OI = torch.empty(weight_OI.shape, dtype=torch.uint8)
    scales, zeros = [], []
    for start in range(0, weight_OI.shape[0], rows):
        slice_RI = weight_OI[start : start + rows].to(device=stream.model.device, dtype=torch.float32)
        part = _solve(slice_RI, spec, stream.config, moments, head.name, total)
        total.change += float(part.dequantize().sub_(slice_RI).square_().sum(dtype=torch.float64))
        total.norm += float(slice_RI.square().sum(dtype=torch.float64))
        codes_OI[start : start + rows] = part.codes_OI
        scales.append(part.scale_OG.cpu())
        zeros += [] if part.zero_OG is None else [part.zero_OG.cpu()]
    whole = QuantizedWeight(
        bits=spec.bits,
        group_size=spec.group_size,
        codes_OI=codes_OI,
        scale_OG=torch.cat(scales),
        zero_OG=torch.cat(zeros) if zeros else None,
        group_I=None if part.group_I is None else part.group_I.cpu(),
    )
    return whole, total


def _solve(weight_RI: Tensor, spec: LinearSpec, config: QuantConfig, moments: _Moments | None, name: str, total: _Total) -> QuantizedWeight:
    """One slice of rows; its share of the error goes into `total`."""
    if moments is None:
        total.methods.add(config.method)
        return half_quadratic(weight_RI, spec, signed=config.signed_scales) if config.method == "hqq" else round_to_nearest(weight_RI, spec)
    energy = float(output_energy(weight_RI.T, moments.gram_II))
    total.energy += energy
    if not config.solves:
        diagonal_I = moments.gram_II.diagonal()
        weight = round_scaled(weight_RI, diagonal_I + damping(diagonal_I, config.damp), spec, signed=config.signed_scales)
        total.lost += float(output_energy(weight.dequantize().sub_(weight_RI).T, moments.gram_II))
        total.damp = config.damp
        total.methods.add(config.method)
        return weight
    (solution,) = solve_group(
        [weight_RI], moments.gram_II, [spec], order=config.column_order, damp=config.damp, name=name,
        effort=EFFORTS[config.preset].limited(signed=config.signed_scales), cross_II=moments.cross_II, tokens=moments.effective_tokens,
    )  # fmt: skip
    total.lost += solution.error * energy
    total.damp = solution.damp
    total.methods.add(config.method if solution.method == "gptq" else solution.method)
    total.events |= dict.fromkeys(solution.events)
    return solution.weight
