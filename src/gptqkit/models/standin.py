"""Running a model's own forward with something else in place of its decoder blocks.

Everything around the blocks (embeddings, rotary tables, masks, which mask each block gets, final norm, head, logit soft-capping) differs
from model to model and is never reimplemented here: the model's own forward runs, and stand-ins in the block list record what each block
is called with, or inject what it would have returned. A stand-in answers attribute reads (`layer.attention_type`) from the real block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.core.errors import InputError


@dataclass(frozen=True, slots=True)
class Call:
    """What a block is called with besides the hidden states; `slot` says where those go: "args" (first) or the keyword's name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: str = "args"

    @classmethod
    def split(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Call]:
        """(hidden states, the rest) of a block call. Raises InputError when no hidden states can be found."""
        if args and isinstance(args[0], Tensor):
            return args[0], cls(args[1:], kwargs)
        if isinstance(kwargs.get("hidden_states"), Tensor):
            rest = {key: value for key, value in kwargs.items() if key != "hidden_states"}
            return kwargs["hidden_states"], cls(args, rest, "hidden_states")
        raise InputError("the decoder blocks of this model are called without hidden states as first argument; not supported yet")

    def run(self, block: nn.Module, hidden_BTH: Tensor) -> Tensor:
        """The hidden states that `block` makes of `hidden_BTH`."""
        return hidden_of(self.output(block, hidden_BTH))

    def output(self, block: nn.Module, hidden_BTH: Tensor) -> Any:
        """All that `block` returns."""
        if self.slot == "args":
            return block(hidden_BTH, *self.args, **self.kwargs)
        return block(*self.args, **{self.slot: hidden_BTH}, **self.kwargs)

    def tensors(self) -> list[Tensor]:
        """Those among its arguments."""
        return [value for value in (*self.args, *self.kwargs.values()) if isinstance(value, Tensor)]


def reading(model: Any, ids_BT: Tensor) -> dict[str, Any]:
    """The arguments with which a model reads text. What has an encoder gets it there and in its decoder: both read all of it."""
    twice = {"decoder_input_ids": ids_BT} if getattr(model.config, "is_encoder_decoder", False) else {}
    return {"input_ids": ids_BT, "use_cache": False, **twice}


def hidden_of(output: Any) -> Tensor:
    """The hidden states in what a block returns: the tensor itself, or the first of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


class StopForward(Exception):
    """Raised inside a forward once there is nothing left to learn from it."""


Handler = Callable[[int, tuple[Any, ...], dict[str, Any]], Any]


class StandIn(nn.Module):
    """Sits where block `index` belongs and passes its calls to `handler`."""

    def __init__(self, block: nn.Module, index: int, handler: Handler) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        self._index = index
        self._handler = handler

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._handler(self._index, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "_block"), name)


@contextmanager
def stand_ins(model: nn.Module, path: str, handler: Handler, numbers: Sequence[int] | None = None) -> Iterator[None]:
    """Replaces every block of the ModuleList at `path` by a StandIn while inside.

    `numbers` are the blocks that will be called, by their place in the list; the handler is told which of those is.
    """
    parent = model.get_submodule(path.rpartition(".")[0])
    name = path.rpartition(".")[2]
    blocks = getattr(parent, name)
    counted = {number: index for index, number in enumerate(range(len(blocks)) if numbers is None else numbers)}
    setattr(parent, name, nn.ModuleList([StandIn(block, counted.get(i, -1), handler) for i, block in enumerate(blocks)]))
    try:
        yield
    finally:
        setattr(parent, name, blocks)


@dataclass(slots=True)
class CallStore:
    """Calls of every (batch, block), with equal ones kept once.

    Masks and rotary tables are the same for most blocks and batches. Tensors are compared by content, so what is stored is as small as it
    can be however the model made them.
    """

    _tensors: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    _calls: dict[tuple[int, int], Call] = field(default_factory=dict)

    def put(self, batch: int, block: int, call: Call) -> None:
        self._calls[batch, block] = Call(self._shared(call.args), self._shared(call.kwargs), call.slot)

    def get(self, batch: int, block: int) -> Call:
        return self._calls[batch, block]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for group in self._tensors.values() for t in group)

    def _shared(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            known = self._tensors.setdefault((value.dtype, tuple(value.shape), value.device), [])
            for tensor in known:
                if tensor is value or torch.equal(tensor, value):
                    return tensor
            known.append(value.clone())
            return known[-1]
        if isinstance(value, tuple):
            return tuple(self._shared(item) for item in value)
        if isinstance(value, list):
            return [self._shared(item) for item in value]
        if isinstance(value, dict):
            return {key: self._shared(item) for key, item in value.items()}
        return value
