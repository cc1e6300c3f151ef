"""Seeing what each linear of a block reads, with the linears before it already quantized (true-sequential), in one forward.

A block's forward is paused at the first linear of each input group. When every batch has arrived there, the group's Gram matrix is complete
and its linears are solved and replaced; then every batch goes on to the next group. The forward that captured is the forward that
propagates: a block costs one pass, where repeating the forward per group costs one each. greenlet (a C extension that switches between
Python call stacks) does the pausing; no model code is changed, traced or copied.

    batch 0 ──attention norm──▌q k v          ▌o        ▌gate up     ▌down ── output
    batch 1 ──attention norm──▌               ▌         ▌            ▌     ── output
                              Gram, solve      Gram, …

A paused forward, a flight, keeps its intermediate tensors alive. Where memory is short, `replay` computes the same values by running the
forward once per group and stopping early: slower, same bytes. On a device with memory of its own this is decided batch by batch (Room).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import greenlet
import torch
from torch import Tensor, nn

from gptqkit.core.errors import InputError
from gptqkit.hf.experts import ROUTED
from gptqkit.models.attention import WideAttention
from gptqkit.models.layout import InputGroup
from gptqkit.models.standin import Call, StopForward
from gptqkit.models.supply import run_in_step
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.residual import BLOCK_INPUT


@dataclass(frozen=True, slots=True)
class Seen:
    """What the linears of a group read for one batch. If a reference runs beside: what they read there, the same tokens row by row, and
    how far the reference's residual stream is ahead of ours where the linear's output is added to it, if it is (residual.py)."""

    x: Tensor
    original: Tensor | None = None
    ahead: Tensor | None = None


Result = TypeVar("Result")
OnInput = Callable[[int, Seen], None]
"""(group index, what was seen for one batch)."""
OnGroup = Callable[[int], None]
"""All batches of a group were seen: solve it and put the quantized weights into the block."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What a linear reads; `tokens_M` says which tokens the rows are where a router chose them; `stream` what its output is added to."""

    x: Tensor
    tokens_M: Tensor | None
    stream: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Reference:
    """The same block with its original weights, on the activations of the original model: the second stream."""

    block: nn.Module
    hidden: Activations


@dataclass(frozen=True, slots=True)
class BlockPass:
    """One block over all batches: `run` feeds inputs to `on_input`, calls `on_group`, and replaces `hidden` by the block's outputs (the
    reference's by the reference's)."""

    block: nn.Module
    groups: Sequence[InputGroup]
    calls: Sequence[Call]
    hidden: Activations
    last: bool = False
    reference: Reference | None = None
    anchors: Sequence[str | None] = ()
    """By group, where the residual stream can be seen that its output is added to (residual.py); () for none at all."""

    def run(self, *, paused: bool, on_input: OnInput, on_group: OnGroup, room: Room | None = None) -> None:
        """`paused` holds batches in flight, as many as there is room for; else the forward is replayed per group. Equal results.

        After the `last` block nothing reads the outputs: the forward ends with its last group, and `hidden` is not replaced. With a
        reference, `hidden` stays as well and only the reference moves on: its outputs are what the block can still be tuned towards.
        """
        if paused and not any(group.revisited for group in self.groups):
            self._paused(on_input, on_group, room or Room())
        else:
            self._replayed(on_input, on_group)

    def propagate(self) -> None:
        """Only replaces `hidden` by the outputs; the reference stays where it is."""
        run_in_step(self.block, self.calls, self.hidden, self.hidden)

    def propagate_reference(self) -> None:
        """Only replaces the reference's activations by its outputs."""
        if self.reference is not None:
            run_in_step(self.reference.block, self.calls, self.reference.hidden, self.reference.hidden)

    def _paused(self, on_input: OnInput, on_group: OnGroup, room: Room) -> None:
        streams = [_Flights(block, self.groups, self.calls, hidden, self.anchors, room) for block, hidden in self._streams()]
        room.taken_by(streams)
        try:
            for index in range(len(self.groups)):
                for flights in streams:
                    flights.advance(index)
                for batch in range(len(self.calls)):
                    _offer(on_input, index, [self._arrived(flights, index, batch) for flights in streams])
                for flights in streams:
                    flights.arrivals.clear()
                on_group(index)
            if self.reference is not None:
                streams[1].land()
            elif not self.last:
                streams[0].land()
        finally:
            for flights in streams:
                flights.close()

    def _arrived(self, flights: _Flights, index: int, batch: int) -> Reading:
        """What the group reads for a batch: where its flight has stopped, or in a forward of its own."""
        arrival = flights.arrivals.pop(batch, None)
        if arrival is not None:
            return arrival
        (reading,) = self._inputs(index, False, flights.block, self.calls[batch], flights.hidden[batch])
        return reading

    def _replayed(self, on_input: OnInput, on_group: OnGroup) -> None:
        for index, group in enumerate(self.groups):
            for batch, call in enumerate(self.calls):
                seen = [self._inputs(index, group.revisited, block, call, hidden[batch]) for block, hidden in self._streams()]
                for readings in zip(*seen, strict=True):
                    _offer(on_input, index, readings)
            on_group(index)
        if self.reference is not None:
            self.propagate_reference()
        elif not self.last:
            self.propagate()

    def _inputs(self, index: int, revisited: bool, block: nn.Module, call: Call, hidden_BTH: Tensor) -> list[Reading]:
        """What the group reads in one forward, which ends there unless the group is visited again."""
        seen: list[Reading] = []
        anchor = self.anchors[index] if self.anchors else None
        passed = {BLOCK_INPUT: hidden_BTH}

        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            seen.append(_reading(inputs, named, None if anchor is None else passed[anchor]))
            if not revisited:
                raise StopForward

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            passed[str(anchor)] = _first(inputs, named)

        handles = [_first_to_know(_leader(block, self.groups[index]), hook)]
        if anchor:
            handles.append(block.get_submodule(anchor).register_forward_pre_hook(note, with_kwargs=True))
        try:
            with suppress(StopForward), WideAttention():
                call.run(block, hidden_BTH)
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _streams(self) -> list[tuple[nn.Module, Activations]]:
        reference = [] if self.reference is None else [(self.reference.block, self.reference.hidden)]
        return [(self.block, self.hidden), *reference]


class Room:
    """What the flights of a block may take of a device's memory; batches beyond are replayed.

    nbytes       of a CUDA device; None for no limit
    batches      that fly at most; falls when memory runs out, from then on
    on_shortage  told of that, with the new number of batches
    """

    def __init__(self, nbytes: int | None = None, on_shortage: Callable[[int], None] = lambda batches: None) -> None:
        self.nbytes = nbytes
        self.batches: int | None = None
        self._on_shortage = on_shortage
        self._streams: list[_Flights] = []

    def taken_by(self, streams: list[_Flights]) -> None:
        self._streams = streams
        for number, flights in enumerate(streams, start=1):
            if self.nbytes is not None:
                flights.limit = torch.cuda.memory_allocated() + self.nbytes * number // len(streams)

    def spared_for(self, work: Callable[[], Result]) -> Result:
        """What `work` returns, begun again with half as many flights when memory runs out, until there are none to give up."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if not self.halve():
                    raise

    def halve(self, flying: int | None = None) -> bool:
        """Memory has run out: gives up half of the flights, of `flying` ones if only so many have begun. False when there are none."""
        flying = max((flights.open for flights in self._streams), default=0) if flying is None else flying
        if not any(flights.open for flights in self._streams):
            return False
        self.batches = flying // 2
        for flights in self._streams:
            flights.keep(self.batches)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self._on_shortage(self.batches)
        return True


class _Flights:
    """The forwards of one block over all batches, each paused at the first linear of a group; `open` of them, the first ones. Those that
    are given up for want of room stay given up."""

    def __init__(
        self,
        block: nn.Module,
        groups: Sequence[InputGroup],
        calls: Sequence[Call],
        hidden: Activations,
        anchors: Sequence[str | None],
        room: Room,
    ) -> None:
        self.arrivals: dict[int, Reading] = {}
        self.block = block
        self.hidden = hidden
        self._main = greenlet.getcurrent()
        self._reached = -1
        self._calls = calls
        self._room = room
        self.limit: int | None = None
        """Bytes that may be allocated on the CUDA device once a flight has paused."""
        self._anchors = anchors or [None] * len(groups)
        self._passed: dict[tuple[object, str], Tensor] = {}
        self._hooks = [_first_to_know(_leader(block, group), self._pause(index)) for index, group in enumerate(groups)]
        for anchor in {anchor for anchor in self._anchors if anchor}:
            self._hooks.append(block.get_submodule(anchor).register_forward_pre_hook(self._note(anchor), with_kwargs=True))
        self._flights = [greenlet.greenlet(call.run) for call in calls]
        self.open = len(calls) if room.batches is None else min(len(calls), room.batches)

    def advance(self, index: int) -> None:
        """Every batch to the first linear of group `index`; what it reads is in `arrivals`."""
        self._reached = index - 1
        with WideAttention():  # around the switches, not inside a flight: modes nest by call order, which flights do not keep
            batch = 0
            while batch < self.open:
                arrival = self._arrival(batch)
                if arrival is None:
                    self._room.halve(batch)
                    continue
                if not isinstance(arrival, tuple) or arrival[0] != index:
                    raise InputError(
                        f"{type(self.block).__name__}: its forward takes another path for batch {batch} than the probe saw; "
                        "not supported yet"
                    )
                self.arrivals[batch] = arrival[1]
                del arrival
                batch += 1
                while self.limit is not None and self.open and torch.cuda.memory_allocated() > self.limit:
                    self.keep(self.open - 1)

    def _arrival(self, batch: int) -> Any:
        """What a flight comes back with; None when memory has run out, which ends it."""
        flight = self._flights[batch]
        try:
            return flight.switch() if flight else flight.switch(self.block, self._start(flight, batch))
        except torch.OutOfMemoryError:
            return None

    def keep(self, batches: int) -> None:
        """Gives up all flights but the first ones."""
        while self.open > batches:
            self.open -= 1
            self.arrivals.pop(self.open, None)
            flight = self._flights[self.open]
            self._forget(flight)
            if flight:
                flight.throw(greenlet.GreenletExit)

    def _forget(self, flight: object) -> None:
        for key in [key for key in self._passed if key[0] is flight]:
            del self._passed[key]

    def _start(self, flight: object, batch: int) -> Tensor:
        hidden_BTH = self.hidden[batch]
        if BLOCK_INPUT in self._anchors:
            self._passed[flight, BLOCK_INPUT] = hidden_BTH
        return hidden_BTH

    def land(self) -> None:
        """Every batch to the end; the outputs replace the inputs."""
        self._reached = len(self._hooks)
        self._passed.clear()
        with WideAttention():
            for batch in range(len(self._flights)):
                out = self._arrival(batch) if batch < self.open else None
                if out is None:
                    if batch < self.open:
                        self._room.halve(batch)
                    out = self._calls[batch].run(self.block, self.hidden[batch])
                self.hidden[batch] = out

    def close(self) -> None:
        for hook in self._hooks:
            hook.remove()
        for flight in self._flights:
            if not flight.dead:
                flight.throw(greenlet.GreenletExit)

    def _pause(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if index > self._reached and greenlet.getcurrent() is not self._main:
                anchor = self._anchors[index]
                stream = None if anchor is None else self._passed.pop((greenlet.getcurrent(), anchor))
                self._main.switch((index, _reading(inputs, named, stream)))

        return hook

    def _note(self, anchor: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            if greenlet.getcurrent() is not self._main:
                self._passed[greenlet.getcurrent(), anchor] = _first(inputs, named)

        return hook


def _leader(block: nn.Module, group: InputGroup) -> nn.Module:
    """The first linear of a group to be called."""
    return block.get_submodule(group.linears[0].name)


def _first_to_know(module: nn.Module, hook: Callable[..., None]) -> Any:
    """Before the hook that loads an expert's weights: those of the expert before are needed until all batches have left it."""
    return module.register_forward_pre_hook(hook, with_kwargs=True, prepend=True)


def _first(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    value: Tensor = inputs[0] if inputs else next(iter(named.values()))
    return value


def _reading(inputs: tuple[Any, ...], named: dict[str, Any], stream: Tensor | None) -> Reading:
    return Reading(_first(inputs, named), ROUTED.get(), stream)


def _offer(on_input: OnInput, index: int, readings: Sequence[Reading]) -> None:
    own = readings[0]
    if len(readings) == 1:
        on_input(index, Seen(own.x))
        return
    reference = readings[1]
    ahead = None if own.stream is None or reference.stream is None else reference.stream.float() - own.stream.float()
    on_input(index, Seen(own.x, _aligned(own, reference), ahead))


def _aligned(own: Reading, reference: Reading) -> Tensor:
    """What the reference reads for the tokens of `own`, row by row.

    A router may send a token elsewhere in the two streams (3 % of them at 3 bits, 6 % at 2). Such a token has no counterpart to follow, so
    its own row stands for it. Tokens are in ascending order in both.
    """
    if own.tokens_M is None or reference.tokens_M is None:
        return reference.x
    aligned_MI = own.x.clone()
    if own.tokens_M.numel() and reference.tokens_M.numel():
        at_M = torch.searchsorted(reference.tokens_M, own.tokens_M).clamp(max=reference.tokens_M.numel() - 1)
        both_M = reference.tokens_M[at_M] == own.tokens_M
        aligned_MI[both_M] = reference.x[at_M[both_M]]
    return aligned_MI
