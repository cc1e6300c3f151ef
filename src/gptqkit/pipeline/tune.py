"""Tuning what the block computes as a whole, after its linears were solved one by one.

The solver fits every linear to its own target; what counts is what the block hands on. With the codes fixed, the block's output depends
smoothly on the scales of its groups, so some steps of gradient descent on

    || block_q(x_q) - block(x) ||^2,     x_q: what the quantized model feeds it, x: what the original does,

move them all together (the block-wise stage of EfficientQAT, arXiv:2407.11062, starting from solved codes). The result is kept only if
that loss falls on tokens that were not trained on. Scales are rounded to float16, as they are stored, before that is asked.
Shapes: B = sequences of a batch, T = their length, H = hidden size; weights as in core/weight.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptqkit.core.grid import round_scale
from gptqkit.core.weight import QuantizedWeight
from gptqkit.models.attention import WideAttention
from gptqkit.models.standin import Call, hidden_of
from gptqkit.pipeline.activations import Activations

RATE = 2e-3
"""Learning rate of Adam on the logarithm of the scales, falling linearly to 0. 1e-3 and 5e-3 were no better at 2, 3 and 4 bits."""
STEP_TOKENS, MOST_TOKENS = 1024, 32768
"""Tokens of one step and of all steps. Each token is seen once: four passes over twice as many gained nothing more."""
HELD_BACK = 1 / 8
"""Share of the batches that judge instead of training."""


@dataclass(frozen=True, slots=True)
class Tuned:
    """Tuned weights by linear, and the mean squared error of the block's output on the held-back tokens before and after."""

    weights: dict[str, QuantizedWeight]
    before: float
    after: float

    @property
    def accepted(self) -> bool:
        return self.after < self.before


def tune_block(
    block: nn.Module,
    calls: Sequence[Call],
    inputs: Activations,
    targets: Activations,
    weights: Mapping[str, tuple[QuantizedWeight, bool]],
) -> Tuned:
    """Tunes the scales of `weights`: linear of the block -> (weight, whether the module holds it transposed).

    inputs, targets  by batch, [B, T, H]: what the quantized block receives, and what the original block made of what *it* receives. The
                     last batches are held back; with a single batch there is none to judge by and nothing is changed
    """
    held = max(1, round(HELD_BACK * len(calls)))
    train, test = range(len(calls) - held), range(len(calls) - held, len(calls))
    untouched = {name: weight for name, (weight, _) in weights.items()}
    if not train:
        return Tuned(untouched, 0.0, 0.0)
    with torch.inference_mode(False), torch.enable_grad():
        tuner = _Tuner(block, calls, inputs, targets, weights)
        before = tuner.measure(test)
        tuner.descend(train)
        tuned = {name: linear.rounded() for name, linear in tuner.linears.items()}
        after = tuner.measure(test)
    return Tuned({name: replace(untouched[name], scale_OG=scale_OG) for name, scale_OG in tuned.items()}, before, after)


class _Linear:
    """One linear of the block whose scales are exp(log) times what they were."""

    def __init__(self, weight: QuantizedWeight, transposed: bool) -> None:
        self._transposed = transposed
        self._group_I = weight.column_groups().clone()
        zero = weight.natural_zero if weight.zero_OG is None else weight.zero_OG.float()[:, self._group_I]
        self._level_OI = weight.codes_OI.float() - zero
        self._scale_OG = weight.scale_OG.float()
        self.log_OG = torch.zeros_like(self._scale_OG).requires_grad_()

    def value(self) -> Tensor:
        value_OI = self._level_OI * (self._scale_OG * self.log_OG.exp())[:, self._group_I]
        return value_OI.T if self._transposed else value_OI

    @torch.no_grad()
    def rounded(self) -> Tensor:
        """The scales as they can be stored, [O, G] float16; from now on the linear computes with them."""
        self._scale_OG = round_scale(self._scale_OG * self.log_OG.exp())
        self.log_OG.zero_()
        return self._scale_OG.to(torch.float16)


class _Tuner:
    """The block as a function of its scales."""

    def __init__(
        self,
        block: nn.Module,
        calls: Sequence[Call],
        inputs: Activations,
        targets: Activations,
        weights: Mapping[str, tuple[QuantizedWeight, bool]],
    ) -> None:
        self.linears = {name: _Linear(weight, transposed) for name, (weight, transposed) in weights.items()}
        self._block, self._calls, self._inputs, self._targets = block, calls, inputs, targets
        self._fixed = {name: parameter.detach().clone() for name, parameter in block.named_parameters() if not parameter.is_meta}

    def measure(self, batches: Sequence[int]) -> float:
        with torch.no_grad():
            return sum(float(self._loss(batch, slice(None))) for batch in batches) / len(batches)

    def descend(self, batches: Sequence[int]) -> None:
        """Adam. Deterministic: batches in order, nothing drawn."""
        optimizer = torch.optim.Adam([linear.log_OG for linear in self.linears.values()], lr=RATE, betas=(0.9, 0.95))
        steps = list(self._steps(batches))
        for number, (batch, rows) in enumerate(steps):
            optimizer.param_groups[0]["lr"] = RATE * (1 - number / len(steps))
            optimizer.zero_grad()
            self._loss(batch, rows).backward()
            optimizer.step()

    def _steps(self, batches: Sequence[int]) -> Iterator[tuple[int, slice]]:
        left = MOST_TOKENS
        for batch in batches:
            sequences, length = self._inputs[batch].shape[:2]
            step = max(1, STEP_TOKENS // length)
            for start in range(0, sequences, step):
                if left > 0:
                    yield batch, slice(start, start + step)
                left -= step * length

    def _loss(self, batch: int, rows: slice) -> Tensor:
        # Clones: what was computed under inference mode cannot be saved for backward.
        x_BTH, wanted_BTH = self._inputs[batch][rows].clone(), self._targets[batch][rows].clone()
        values = {f"{name}.weight": linear.value() for name, linear in self.linears.items()}
        parameters = self._fixed | {name: value.to(self._block.get_parameter(name).dtype) for name, value in values.items()}
        made_BTH = _run(self._block, parameters, _cut(self._calls[batch], self._inputs[batch].shape[0], rows), x_BTH)
        return (made_BTH.float() - wanted_BTH.float()).square().mean()


def _cut(call: Call, sequences: int, rows: slice) -> Call:
    """The call for some of the batch's sequences: tensors with one entry a sequence are cut."""

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor):
            return (value[rows] if value.ndim and value.shape[0] == sequences > 1 else value).clone()
        return tuple(cut(item) for item in value) if type(value) is tuple else value

    return Call(tuple(cut(value) for value in call.args), {name: cut(value) for name, value in call.kwargs.items()}, call.slot)


def _run(block: nn.Module, parameters: dict[str, Tensor], call: Call, x_BTH: Tensor) -> Tensor:
    with WideAttention():
        if call.slot == "args":
            return hidden_of(functional_call(block, parameters, (x_BTH, *call.args), call.kwargs))
        return hidden_of(functional_call(block, parameters, call.args, {call.slot: x_BTH, **call.kwargs}))
