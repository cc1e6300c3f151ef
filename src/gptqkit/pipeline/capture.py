"""Seeing what each linear of a block reads, with the linears before it already quantized (true-sequential), in one forward.

A block's forward is paused at the first linear of each input group. When every batch has arrived there, the group's Gram matrix is complete
and its linears are solved and replaced; then every batch goes on to the next group. The forward that captured is the forward that
propagates: a block costs one pass, where repeating the forward per group costs one each. greenlet (a C extension that switches between
Python call stacks) does the pausing; no model code is changed, traced or copied.

    batch 0 ──attention norm──▌q k v          ▌o        ▌gate up     ▌down ── output
    batch 1 ──attention norm──▌               ▌         ▌            ▌     ── output
                              Gram, solve      Gram, …

A paused forward keeps its intermediate tensors alive. Where memory is short, `replay` computes the same values by running the forward once
per group and stopping early: slower, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import greenlet
from torch import Tensor, nn

from gptqkit.core.errors import InputError
from gptqkit.models.attention import WideAttention
from gptqkit.models.layout import InputGroup
from gptqkit.models.standin import Call, StopForward
from gptqkit.pipeline.activations import Activations

OnInput = Callable[[int, Tensor], None]
"""(group index, what its linears read for one batch)."""
OnGroup = Callable[[int], None]
"""All batches of a group were seen: solve it and put the quantized weights into the block."""


@dataclass(frozen=True, slots=True)
class BlockPass:
    """One block over all batches: `run` feeds inputs to `on_input`, calls `on_group`, and replaces `hidden` by the block's outputs."""

    block: nn.Module
    groups: Sequence[InputGroup]
    calls: Sequence[Call]
    hidden: Activations
    last: bool = False

    def run(self, *, paused: bool, on_input: OnInput, on_group: OnGroup) -> None:
        """`paused` holds all batches in flight; else the forward is replayed per group. Equal results.

        After the `last` block nothing reads the outputs: the forward ends with its last group, and `hidden` is not replaced.
        """
        if paused and not any(group.revisited for group in self.groups):
            self._paused(on_input, on_group)
        else:
            self._replayed(on_input, on_group)

    def propagate(self) -> None:
        """Only replaces `hidden` by the outputs."""
        with WideAttention():
            for batch, call in enumerate(self.calls):
                self.hidden[batch] = call.run(self.block, self.hidden[batch])

    def _paused(self, on_input: OnInput, on_group: OnGroup) -> None:
        main = greenlet.getcurrent()
        solved = [False] * len(self.groups)

        def pause(index: int) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
                if not solved[index]:
                    main.switch((index, _input_of(inputs, named)))

            return hook

        hooks = [self._leader(i).register_forward_pre_hook(pause(i), with_kwargs=True) for i in range(len(self.groups))]
        flights = [greenlet.greenlet(call.run) for call in self.calls]
        try:
            with WideAttention():  # around the switches, not inside a flight: modes nest by call order, which flights do not keep
                arrivals = [flight.switch(self.block, self.hidden[batch]) for batch, flight in enumerate(flights)]
            for index in range(len(self.groups)):
                for batch, arrival in enumerate(arrivals):
                    if not isinstance(arrival, tuple) or arrival[0] != index:
                        raise InputError(
                            f"{type(self.block).__name__}: its forward takes another path for batch {batch} than the probe saw; "
                            "not supported yet"
                        )
                    on_input(index, arrival[1])
                arrivals.clear()
                on_group(index)
                solved[index] = True
                if self.last and index == len(self.groups) - 1:
                    return
                with WideAttention():
                    for batch, flight in enumerate(flights):
                        arrival = flight.switch()
                        if flight.dead:
                            self.hidden[batch] = arrival
                        else:
                            arrivals.append(arrival)
        finally:
            for hook in hooks:
                hook.remove()
            for flight in flights:
                if not flight.dead:
                    flight.throw(greenlet.GreenletExit)

    def _replayed(self, on_input: OnInput, on_group: OnGroup) -> None:
        for index, group in enumerate(self.groups):

            def hook(
                module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], index: int = index, whole: bool = group.revisited
            ) -> None:
                on_input(index, _input_of(inputs, named))
                if not whole:
                    raise StopForward

            handle = self._leader(index).register_forward_pre_hook(hook, with_kwargs=True)
            try:
                for batch, call in enumerate(self.calls):
                    with suppress(StopForward), WideAttention():
                        call.run(self.block, self.hidden[batch])
            finally:
                handle.remove()
            on_group(index)
        if not self.last:
            self.propagate()

    def _leader(self, index: int) -> nn.Module:
        """The first linear of a group to be called."""
        return self.block.get_submodule(self.groups[index].linears[0].name)


def _input_of(inputs: tuple[Any, ...], named: dict[str, Any]) -> Tensor:
    return inputs[0] if inputs else next(iter(named.values()))
