"""Mixture-of-experts layers as modules of ordinary linears.

Nothing that works on linears can see into stacked experts (containers.py): not discovery, not capture, not packing, not a quantized module.
`replace_experts` puts an `Experts` module in the container's place, with the linears `E.gate_proj`, `E.up_proj`, `E.down_proj`; from there
on an expert is three linears like any others. The names are those under which checkpoints store experts, up to the renaming rules that
transformers has per family (names.py). Where the checkpoint itself stores experts stacked, `Experts.pieces` says what is where.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.algorithms.precision import filled_rows
from gptqkit.checkpoint.pieces import Piece, join
from gptqkit.hf.containers import Kind, Stack, containers, kind_of, owner_of, refusal, shapes_of

ROUTED: ContextVar[Tensor | None] = ContextVar("ROUTED", default=None)
"""While an expert of a module with `visit_all` runs: which tokens its rows are, ascending."""


class EvenLinear(nn.Linear):
    """A linear that multiplies few different numbers of rows, whatever it is called with (precision.py says why)."""

    def forward(self, x_MI: Tensor) -> Tensor:
        return super().forward(filled_rows(x_MI, x_MI.dtype))[: x_MI.shape[0]]


class Expert(nn.Module):
    """One expert: down(combine(gate(x), up(x))), or what its kind has for that."""

    def __init__(self, container: Any, kind: Kind, linear: type[nn.Linear]) -> None:
        super().__init__()
        for name, stack in kind.stacks.items():
            outputs, inputs = kind.sizes(container, name)
            dtype = container.get_parameter(name).dtype
            for part in stack.parts:
                biased = stack.bias is not None
                self.add_module(part, linear(inputs, outputs // len(stack.parts), bias=biased, device="meta", dtype=dtype))

    @property
    def last(self) -> Any:
        return self.down_proj

    def between(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """What `down_proj` reads, [M, F]."""
        return combine(torch.cat([linear(x_MH) for name, linear in self.named_children() if name != "down_proj"], dim=-1))

    def forward(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        y_MH: Tensor = self.last(self.between(x_MH, combine))
        return y_MH


class Experts(nn.Module):
    """Takes the place of a container of stacked experts: same call, same result.

    Tokens are grouped by expert, so each expert multiplies once per forward. With `visit_all` that holds for experts without tokens too,
    which then see [0, H]: whoever watches the linears meets the same calls in the same order in every forward.
    """

    def __init__(self, container: Any, *, visit_all: bool) -> None:
        super().__init__()
        kind = kind_of(container)
        assert kind is not None, refusal(container)
        self.kind = kind
        self.num_experts = kind.experts(container)
        self.visit_all = visit_all
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(container, kind, EvenLinear if visit_all else nn.Linear))
        self.__dict__["shapes"] = shapes_of(container)
        for name in self.shapes:
            owner, leaf = owner_of(container, name)
            del owner._parameters[leaf]
        # Kept for its activation and gating rule only; no submodule, because transformers initializes the parameters of that class.
        self.__dict__["container"] = container

    def combine(self, outputs: Tensor) -> Tensor:
        """What the family computes between the products: [M, 2 F] (without a gate [M, F]) -> [M, F]."""
        return self.kind.combine(self.__dict__["container"], outputs)

    def tokens(self, hidden_states: Tensor) -> Tensor:
        """Of what the module is called with, the rows [*, H] that are tokens sent to an expert."""
        rows_SH = hidden_states.reshape(-1, hidden_states.shape[-1])
        return rows_SH if self.kind.routed else rows_SH[_anything(rows_SH)]

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """`routing`, where the kind is routed: [T, K] the experts each token is sent to, [T, K] their weights."""
        return self._routed(hidden_states, *routing) if self.kind.routed else self._every_token(hidden_states)

    def _routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of all tokens -> [T, H]. Indices from E on mean no expert, or one that changes nothing."""
        shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, hidden_states.shape[-1])
        top_k = top_k_index.shape[-1]
        expert_S, weight_S = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        by_expert_S = expert_S.argsort(stable=True)
        counts = torch.bincount(expert_S, minlength=self.num_experts)[: self.num_experts].tolist()
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        sum_TH = torch.zeros_like(hidden_states, dtype=wide)
        for expert, slots_M in zip(self.children(), by_expert_S[: sum(counts)].split(counts), strict=True):
            if slots_M.numel() or self.visit_all:
                tokens_M = slots_M // top_k
                with self._announced(tokens_M):
                    y_MH = expert(hidden_states[tokens_M], self.combine)
                # A token goes to an expert once, so no two rows of one call land on the same token: deterministic on a GPU too.
                sum_TH.index_add_(0, tokens_M, y_MH.to(wide) * weight_S[slots_M, None])
        if self.kind.beyond:
            sum_TH += hidden_states * (top_k_weights * (top_k_index >= self.num_experts)).sum(-1, keepdim=True)
        return sum_TH.to(hidden_states.dtype).reshape(shape)

    def _every_token(self, hidden_states: Tensor) -> Tensor:
        """[E * T, H] -> [E * T, H]. Linears without biases make zeros of zeros, so rows of zeros need no expert."""
        made = []
        for expert, x_TH in zip(self.children(), hidden_states.chunk(self.num_experts), strict=True):
            tokens_M = _anything(x_TH).nonzero()[:, 0]
            made.append(torch.zeros_like(x_TH))
            if tokens_M.numel() or self.visit_all:
                with self._announced(tokens_M):
                    made[-1] = made[-1].index_copy(0, tokens_M, expert(x_TH[tokens_M], self.combine))
        return torch.cat(made)

    @contextmanager
    def _announced(self, tokens_M: Tensor) -> Iterator[None]:
        if not self.visit_all:
            yield
            return
        before = ROUTED.set(tokens_M)
        try:
            yield
        finally:
            ROUTED.reset(before)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters that the container had."""
        shapes: dict[str, tuple[int, ...]] = self.__dict__["shapes"]
        return shapes

    def stacked(self) -> Any:
        """The container again, with the weights that the linears have now."""
        container: Any = self.__dict__["container"]
        for name, shape in self.shapes.items():
            stack, leaf = self._stack(name)
            slices = [
                join([expert.get_submodule(part).get_parameter(leaf) for part in stack.parts], stack.interleaved, stack.transposed)
                for expert in self.children()
            ]
            value = torch.cat([part.flatten() for part in slices])
            unread = value.new_zeros(math.prod(shape) - value.numel())  # rows of experts that are none
            owner, own = owner_of(container, name)
            owner.register_parameter(own, nn.Parameter(torch.cat([value, unread]).reshape(shape)))
        return container

    def pieces(self, name: str, stored: str, owner: str) -> Iterator[tuple[str, Piece]]:
        """What each linear has of the parameter `name`, stored as the tensor `stored`: its name below this module, the piece."""
        stack, leaf = self._stack(name)
        shape = self.shapes[name]
        count = self.num_experts if leaf == "weight" and len(shape) == 2 else shape[0]
        for index in range(self.num_experts):
            for part, linear in enumerate(stack.parts):
                piece = Piece(stored, owner, index, count, part, len(stack.parts), stack.interleaved, stack.transposed)
                yield f"{index}.{linear}.{leaf}", piece

    def _stack(self, name: str) -> tuple[Stack, str]:
        """The stack that a parameter of the container belongs to, as its weights or its biases, and which of the two."""
        if name in self.kind.stacks:
            return self.kind.stacks[name], "weight"
        stack = next(stack for stack in self.kind.stacks.values() if stack.bias == name)
        return replace(stack, transposed=False), "bias"


def replace_experts(model: nn.Module, *, visit_all: bool, among: Iterable[str] | None = None) -> list[str]:
    """Puts an `Experts` on meta in place of every container that can be taken apart, or of those `among` them; returns their names."""
    names = [name for name in (containers(model) if among is None else among) if refusal(model.get_submodule(name)) is None]
    for name in names:
        experts = Experts(model.get_submodule(name), visit_all=visit_all)
        model.set_submodule(name, experts.train(model.training))
    return names


def _anything(x_SH: Tensor) -> Tensor:
    """[S]: which rows are not zero."""
    return (x_SH != 0).any(-1)
