"""The experts of a loaded block, one at a time.

A layer of 128 experts is most of a model's memory, and of all its weights one expert's are in use at any moment. So a loaded block has its
experts' weights on meta; they are read when a linear is called, and dropped when a linear of another expert is. What was put in their place
(a quantized weight) is not kept either: whoever puts it says how to make it again.

Read once per pass or once per batch: that is decided by the order in which batches come. `run_in_step` lets them go from expert to expert
together. A forward that comes to an expert whose weights are not there waits (greenlets, as in pipeline/capture.py) until all others have
come as far; only then are weights exchanged. A pass reads each expert once then, and no result changes by a bit. Forwards that wait keep
their intermediate tensors, so at most `STEP_TOKENS` tokens go in step, or one batch.

    batch 0 ── attention ──▌expert 0 ──▌expert 1 ──▌ …
    batch 1 ── attention ──▌expert 0 ──▌expert 1 ──▌ …
                           read        drop, read
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import greenlet
import torch
from torch import Tensor, nn

from gptqkit.hf.experts import Expert
from gptqkit.models.attention import WideAttention
from gptqkit.models.standin import Call

HELD = 1
"""Experts of a block that have weights at the same time. More would only help forwards that are not in step, and all would be needed."""
STEP_TOKENS = 32768
"""Tokens that go through a block in step: eight batches of a CPU. Their intermediates are about 5 times their hidden states."""


class Batches(Protocol):
    """Hidden states by batch."""

    def __len__(self) -> int: ...

    def __getitem__(self, batch: int, /) -> Tensor: ...

    def __setitem__(self, batch: int, value: Tensor, /) -> None: ...


class _Flight(greenlet.greenlet):
    """The forward of one batch among several in step."""


class ExpertSupply:
    """Gives the experts of one block their weights, until `close`.

    read  the value of a parameter, by its name in the block
    """

    def __init__(self, block: nn.Module, read: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype) -> None:
        self.names: set[str] = set()
        self._block, self._read, self._device, self._dtype = block, read, device, dtype
        self._again: dict[str, Callable[[], Tensor]] = {}
        self._held: dict[str, dict[str, nn.Parameter]] = {}
        """Expert -> what was on meta where it has weights now."""
        self._hooks = []
        for expert, leaf in streamed_modules(block):
            own = [f"{leaf}.{name}" for name, _ in block.get_submodule(leaf).named_parameters(recurse=False)]
            self.names.update(own)
            self._hooks.append(block.get_submodule(leaf).register_forward_pre_hook(self._arrival(expert, own)))

    def put(self, name: str, value: Tensor, again: Callable[[], Tensor]) -> None:
        """Replaces a parameter, now and for all later calls; `again` makes the same value anew."""
        self._again[name] = again
        self._fill(name, value)

    def put_back(self, name: str) -> None:
        """Undoes `put`."""
        del self._again[name]
        self._drop(_expert_of(name))

    def drop(self) -> None:
        """No expert has weights until it is called."""
        for expert in list(self._held):
            self._drop(expert)

    def close(self) -> None:
        """Leaves the block without experts' weights, and unattended."""
        self.drop()
        for hook in self._hooks:
            hook.remove()

    def _arrival(self, expert: str, names: Sequence[str]) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            missing = self._missing(names)
            flight = greenlet.getcurrent()
            if missing and expert not in self._held and len(self._held) >= HELD and isinstance(flight, _Flight):
                flight.parent.switch(expert)
                missing = self._missing(names)  # others may have come before
            if missing:
                self._make_room(expert)
            for name in missing:
                self._fill(name, self._again[name]() if name in self._again else self._read(name))

        return hook

    def _missing(self, names: Sequence[str]) -> list[str]:
        places = {name: _place(self._block, name) for name in names}  # not get_parameter: while scales are tuned they are plain tensors
        return [name for name, (owner, leaf) in places.items() if (value := owner._parameters[leaf]) is not None and value.is_meta]

    def _fill(self, name: str, value: Tensor) -> None:
        expert = _expert_of(name)
        self._make_room(expert)
        before = self._held.setdefault(expert, {})
        owner, leaf = _place(self._block, name)
        current = owner._parameters[leaf]
        assert current is not None
        before.setdefault(name, current)
        owner._parameters[leaf] = nn.Parameter(value.to(device=self._device, dtype=self._dtype), requires_grad=False)

    def _make_room(self, expert: str) -> None:
        while expert not in self._held and len(self._held) >= HELD:
            self._drop(next(iter(self._held)))

    def _drop(self, expert: str) -> None:
        for name, parameter in self._held.pop(expert, {}).items():
            owner, leaf = _place(self._block, name)
            owner._parameters[leaf] = parameter


def streamed_modules(block: nn.Module) -> list[tuple[str, str]]:
    """(expert, module of it that has parameters), by their names in the block: what is not loaded with the block."""
    experts = [name for name, module in block.named_modules() if isinstance(module, Expert)]
    return [
        (expert, f"{expert}.{local}")
        for expert in experts
        for local, module in block.get_submodule(expert).named_modules()
        if local and module._parameters
    ]


def run_in_step(block: nn.Module, calls: Sequence[Call], inputs: Batches, outputs: Batches) -> None:
    """`outputs[batch]` becomes what `block` makes of `inputs[batch]`; the two may be the same. Equal to one batch after the other."""
    started = 0
    while started < len(calls):
        waiting: dict[int, tuple[_Flight, str]] = {}
        tokens = 0
        try:
            with WideAttention():  # around the switches, not inside a flight: modes nest by call order, which flights do not keep
                while started < len(calls) and tokens < STEP_TOKENS:
                    x_BTH = inputs[started]
                    flight = _Flight(calls[started].run)
                    _follow(started, flight, flight.switch(block, x_BTH), waiting, outputs)
                    tokens += x_BTH.shape[0] * x_BTH.shape[1] if started in waiting else 0
                    started += 1
                while waiting:
                    wanted = next(iter(waiting.values()))[1]
                    for batch, (flight, expert) in list(waiting.items()):
                        if expert == wanted:
                            del waiting[batch]
                            _follow(batch, flight, flight.switch(), waiting, outputs)
        finally:
            for flight, _ in waiting.values():
                flight.throw(greenlet.GreenletExit)


def _follow(batch: int, flight: _Flight, arrival: Any, waiting: dict[int, tuple[_Flight, str]], outputs: Batches) -> None:
    if flight.dead:
        outputs[batch] = arrival
    else:
        waiting[batch] = (flight, arrival)


def _expert_of(name: str) -> str:
    """The expert that a parameter belongs to: the name of a container, a number, a linear, a leaf."""
    return name.rsplit(".", 2)[0]


def _place(block: nn.Module, name: str) -> tuple[nn.Module, str]:
    prefix, _, leaf = name.rpartition(".")
    return block.get_submodule(prefix), leaf
