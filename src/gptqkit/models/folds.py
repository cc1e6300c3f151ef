"""What can absorb a scale: the module of a block whose output may be divided by s so that a group of linears may be multiplied by it.

    y = W x = (W S)(S^-1 x),    S = diag(s):    who makes x, and can be divided by s without anybody else noticing?

Either a norm whose output is the very tensor that the group reads, or a linear whose output channels reach the group elementwise and
linearly: up to down (through the gate's product), value to output projection (attention mixes tokens, not channels; with grouped queries
several channels of the reader come from one of the value projection, and share its scale). Candidates are found by tensor identity and by
shape. None of them is believed: the block runs with random scales put in on both sides, and every linear's output and the block's must be
what they were. A router that reads the same norm, a gate that is no product, a norm per head, a linear that is not quantized: whatever
would notice, does. The scales are powers of two, so that equal means equal up to the last bit in any float type (all but norms that
multiply by 1 + weight, whose new weight is rounded).

Experts are tested all at once, since they share their code: one that no token of the probe reaches is taken to be like the others.

Shapes: I = channels that the group reads, R = output channels of the absorber that are divided.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from gptqkit.models.attention import WideAttention
from gptqkit.models.layout import InputGroup, LinearInfo, is_linear, linear_info
from gptqkit.models.standin import Call
from gptqkit.models.supply import streamed_modules

EXACT, ROUNDED = 5e-3, 5e-2
"""How far outputs may be from what they were, relative to their norm: exact scales, and where a weight 1 + w had to be rounded. A wrong
fold with factors of 1, 2 and 4 moves them by more than a third."""
REACH = 2
"""How many groups before its reader an absorbing linear may be: attention and MLP side by side put one between up and down."""


@dataclass(frozen=True, slots=True, eq=False)
class Fold:
    """Where the scale of a group of linears goes.

    group      index of the group among the block's
    absorber   the module, by its name in the block
    channel_I  int64: the output channel of the absorber that each input channel of the group comes from
    offset     a norm multiplies by (offset + weight): 0, or 1 (Gemma); None when the absorber is a linear
    """

    group: int
    absorber: str
    channel_I: Tensor
    offset: float | None = None

    @property
    def share_I(self) -> Tensor | None:
        """Which channels must have the same scale: None when each has its own."""
        distinct_S, share_I = self.channel_I.unique(return_inverse=True)
        return None if distinct_S.numel() == self.channel_I.numel() else share_I

    def divisor(self, scale_I: Tensor, channels: int) -> Tensor:
        """What each output channel of the absorber is divided by, [channels]; 1 where the group reads nothing from."""
        return scale_I.new_ones(channels).index_put_((self.channel_I,), scale_I)


@dataclass(slots=True)
class Folds:
    """What was found for a block: the fold of a group by its index, and in words why there is none for the others."""

    found: dict[int, Fold] = field(default_factory=dict)
    refused: dict[int, str] = field(default_factory=dict)


def find_folds(block: nn.Module, groups: Sequence[InputGroup], quantized: Collection[str], call: Call, hidden_BTH: Tensor) -> Folds:
    """Folds for the groups of a loaded block. `quantized`: names of its linears that will be. Runs the block a few times, on `hidden_BTH`.

    The block's parameters are changed and put back.
    """
    probe = _Probe(block, groups, call, hidden_BTH)
    folds = Folds()
    pending: dict[int, Iterator[Fold]] = {}
    for index, group in enumerate(groups):
        left = [linear.name for linear in group.linears if linear.name not in quantized]
        if left:
            folds.refused[index] = f"{', '.join(left)} reads the same input and stays in full precision"
        elif group.revisited:
            folds.refused[index] = "called more than once in a forward"
        else:
            pending[index] = probe.candidates(index, quantized)
            folds.refused[index] = "no norm or linear makes its input"
    while True:
        roles: dict[tuple[str, str], list[Fold]] = {}
        for index, candidates in pending.items():
            if fold := next(candidates, None):
                folds.refused[index] = "what makes its input, or whoever else reads it, would notice"
                roles.setdefault((_role(groups[index].linears[0].name), _role(fold.absorber)), []).append(fold)
        if not roles:
            return folds
        for fold in probe.proven([role for role in roles.values() if probe.reaches(role)]):
            folds.found[fold.group] = fold
            del folds.refused[fold.group], pending[fold.group]


def fold_norm(offset: float, weight_I: Tensor, bias_I: Tensor | None, scale_I: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """A norm divided by s, in the dtype it is stored in: its weight and bias, and the scale that the rounded weight really stands for.

    The linears then take the latter, so that rounding the norm costs nothing. A channel whose weight would vanish keeps it.
    """
    gain_I = offset + weight_I.float()
    written_I = (gain_I / scale_I - offset).to(weight_I.dtype)
    really_I = gain_I / (offset + written_I.float())
    sound_I = (really_I > scale_I / 2) & (really_I < scale_I * 2)  # false for 0 / 0 as well
    really_I = torch.where(sound_I, really_I, 1.0)
    written_I = torch.where(sound_I, written_I, weight_I)
    return written_I, None if bias_I is None else (bias_I.float() / really_I).to(bias_I.dtype), really_I


def _role(name: str) -> str:
    """The same for modules that differ only by a number in a list: experts."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


@dataclass(slots=True)
class _Seen:
    """One forward: what each linear was given and returned, what each norm-like module was given and returned, and the block's output."""

    inputs: dict[str, list[Tensor]] = field(default_factory=dict)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)
    norms: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    change: list[Tensor] = field(default_factory=list)


class _Probe:
    """The block on a few tokens, with and without scales."""

    def __init__(self, block: nn.Module, groups: Sequence[InputGroup], call: Call, hidden_BTH: Tensor) -> None:
        self._block, self._groups, self._call, self._hidden_BTH = block, groups, call, hidden_BTH
        self._linears = {name: module for name, module in block.named_modules() if is_linear(module)}
        self._norms = {name: module for name, module in block.named_modules() if _is_norm(module)}
        self._streamed = {leaf: expert for expert, leaf in streamed_modules(block)}
        self._base = self._run()

    def candidates(self, index: int, quantized: Collection[str]) -> Iterator[Fold]:
        """What might absorb the scale of a group, likeliest first."""
        group = self._groups[index]
        read = self._base.inputs[group.linears[0].name][0]
        for name, (_, made) in self._base.norms.items():
            if _same(made, read):
                offset = self._offset(name)
                if offset is not None:
                    yield Fold(index, name, torch.arange(group.in_features, device=read.device), offset)
                return
        owner = self._streamed.get(group.linears[0].name)  # nothing passes elementwise from one expert into another
        for earlier in reversed(self._groups[max(0, index - REACH) : index]):
            for linear in reversed(earlier.linears):
                if linear.name in quantized and self._streamed.get(linear.name) == owner:
                    yield from self._from_linear(index, linear)

    def reaches(self, folds: Sequence[Fold]) -> bool:
        """Whether any of their readers was given anything: without, nothing can be proved."""
        readers = [self._base.inputs[self._groups[fold.group].linears[0].name] for fold in folds]
        return any(bool(x.any()) for inputs in readers for x in inputs)

    def proven(self, roles: Sequence[Sequence[Fold]]) -> list[Fold]:
        """The folds of those roles that hold. Most often all do, which one forward shows."""
        everything = [fold for role in roles for fold in role]
        if len(roles) > 1 and self._proves(everything):
            return everything
        return [fold for role in roles if self._proves(role) for fold in role]

    def _proves(self, folds: Sequence[Fold]) -> bool:
        """Whether nothing changes when all of them are put in with random scales."""
        generator = torch.Generator().manual_seed(0)
        with ExitStack() as stack:
            for fold in folds:
                scale_R = 2.0 ** torch.randint(0, 3, (int(fold.channel_I.max()) + 1,), generator=generator)
                stack.enter_context(self._scaled(fold, scale_R.to(fold.channel_I.device)[fold.channel_I]))
            seen = self._run()
        absorbers = {fold.absorber for fold in folds}
        limit = ROUNDED if any(fold.offset for fold in folds) else EXACT
        pairs = [(self._base.outputs[name], outputs) for name, outputs in seen.outputs.items() if name not in absorbers]
        return all(_close(before, after, limit) for before, after in [*pairs, (self._base.change, seen.change)])

    def _from_linear(self, index: int, linear: LinearInfo) -> Iterator[Fold]:
        """Output channels of a linear that have the right number to be what the group reads."""
        wanted = self._groups[index].in_features
        for start, rows in _slices(linear.out_features, wanted):
            size = 1 if rows == wanted else self._head_size(index, linear, start, rows, wanted // rows)
            if size is not None:
                channel_I = torch.arange(wanted, device=self._hidden_BTH.device)
                if rows < wanted:
                    channel_I = channel_I // size // (wanted // rows) * size + channel_I % size
                yield Fold(index, linear.name, start + channel_I)

    def _head_size(self, index: int, linear: LinearInfo, start: int, rows: int, times: int) -> int | None:
        """Where one output channel is met `times` times by the reader, at equal distances: that distance."""
        before = self._base.inputs[self._groups[index].linears[0].name][0]
        channel = start + min(1, rows - 1)
        with self._divided(linear.name, torch.where(torch.arange(linear.out_features, device=before.device) == channel, 0.5, 1.0)):
            after = self._run().inputs[self._groups[index].linears[0].name][0]
        if after.shape != before.shape:
            return None
        moved_I = ((after - before).abs() > before.abs() / 4).reshape(-1, before.shape[-1]).any(0)
        at = moved_I.nonzero().flatten().tolist()
        size = at[1] - at[0] if len(at) == times else 0
        return size if size > 0 and rows % size == 0 and at == [at[0] + k * size for k in range(times)] else None

    def _offset(self, name: str) -> float | None:
        """c of a norm that computes n(x) (c + weight) + bias, by what it makes of weights of 0 and 1; None for any other."""
        module, x = self._norms[name], self._base.norms[name][0]
        zeros = {leaf: torch.zeros_like(p) for leaf, p in module.named_parameters()}
        nothing = functional_call(module, zeros, (x,)).float()
        once = functional_call(module, zeros | {"weight": torch.ones_like(zeros["weight"])}, (x,)).float()
        if not bool(nothing.any()):
            return 0.0 if bool(once.any()) else None
        return 1.0 if torch.allclose(once, 2 * nothing, rtol=2e-2, atol=1e-3) else None

    @contextmanager
    def _scaled(self, fold: Fold, scale_I: Tensor) -> Iterator[None]:
        """The block with the absorber divided and the readers multiplied."""
        with ExitStack() as stack:
            if fold.offset is None:
                channels = linear_info(fold.absorber, self._linears[fold.absorber]).out_features
                stack.enter_context(self._divided(fold.absorber, fold.divisor(scale_I, channels)))
            else:
                module = self._norms[fold.absorber]
                weight_I, bias_I = module.get_parameter("weight").data, getattr(module, "bias", None)
                stack.enter_context(_kept(weight_I))
                stack.enter_context(_kept(bias_I))
                weight_I.copy_((fold.offset + weight_I.float()) / scale_I - fold.offset)
                if isinstance(bias_I, Tensor):
                    bias_I /= scale_I
            for linear in self._groups[fold.group].linears:
                stack.enter_context(self._multiplied(linear.name, scale_I))
            yield

    @contextmanager
    def _divided(self, name: str, divisor_R: Tensor) -> Iterator[None]:
        """A linear whose output is divided: by its parameters, or where those come and go (supply.py), by a hook: equal for powers of 2."""
        module = self._linears[name]
        if name in self._streamed:
            with _hooked(module.register_forward_hook(lambda module, inputs, y_MR: y_MR / divisor_R.to(y_MR.dtype))):
                yield
            return
        weight_RI, bias_R = self._weight(name), module.bias
        with _kept(weight_RI), _kept(bias_R):
            weight_RI /= divisor_R[:, None]
            if isinstance(bias_R, Tensor):
                bias_R /= divisor_R
            yield

    @contextmanager
    def _multiplied(self, name: str, scale_I: Tensor) -> Iterator[None]:
        """A linear whose input is multiplied, in the same way."""
        module = self._linears[name]
        if name in self._streamed:
            with _hooked(module.register_forward_pre_hook(lambda module, inputs: (inputs[0] * scale_I.to(inputs[0].dtype),))):
                yield
            return
        weight_OI = self._weight(name)
        weight_OI *= scale_I
        try:
            yield
        finally:
            weight_OI /= scale_I  # exact: powers of two

    def _weight(self, name: str) -> Tensor:
        """[O, I], a view of the module's own."""
        module = self._linears[name]
        weight: Any = module.weight
        return weight.data.T if linear_info(name, module).transposed else weight.data

    def _run(self) -> _Seen:
        seen = _Seen()

        def linear_hook(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
                seen.inputs.setdefault(name, []).append(inputs[0] if inputs else next(iter(named.values())))
                seen.outputs.setdefault(name, []).append(output)

            return hook

        def norm_hook(name: str) -> Any:
            def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], output: Any) -> None:
                x = inputs[0] if inputs else next(iter(named.values()), None)
                if isinstance(x, Tensor) and isinstance(output, Tensor) and x.numel():
                    seen.norms[name] = (x, output)

            return hook

        handles = [m.register_forward_hook(linear_hook(name), with_kwargs=True) for name, m in self._linears.items()]
        handles += [m.register_forward_hook(norm_hook(name), with_kwargs=True) for name, m in self._norms.items()]
        try:
            with torch.no_grad(), WideAttention():
                # A copy goes in: some models add to their input in place.
                seen.change.append(self._call.run(self._block, self._hidden_BTH.clone()) - self._hidden_BTH)
        finally:
            for handle in handles:
                handle.remove()
        return seen


def _is_norm(module: nn.Module) -> bool:
    """A module that has nothing but a weight, and perhaps a bias, per channel."""
    own = dict(module.named_parameters())
    return "weight" in own and set(own) <= {"weight", "bias"} and all(p.ndim == 1 for p in own.values())


def _slices(out_features: int, wanted: int) -> list[tuple[int, int]]:
    """(first channel, how many) of a linear's output that may make up `wanted` channels: all; up in gate|up; the values in q|k|v."""
    found = [(0, out_features)] if wanted % out_features == 0 else []
    if out_features == 2 * wanted:
        found.append((wanted, wanted))
    values, odd = divmod(out_features - wanted, 2)
    if values > 0 and not odd and wanted % values == 0:
        found.append((out_features - values, values))
    return found


def _same(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr() and (a.storage_offset(), a.numel()) == (
        b.storage_offset(), b.numel(),
    )  # fmt: skip


def _close(before: Sequence[Tensor], after: Sequence[Tensor], limit: float) -> bool:
    if [x.shape for x in before] != [x.shape for x in after]:
        return False
    return all(float((a.float() - b.float()).norm()) <= limit * float(b.float().norm()) for b, a in zip(before, after, strict=True))


@contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _kept(tensor: Any) -> Iterator[None]:
    """Puts a tensor's values back on leaving."""
    before = tensor.data.clone() if isinstance(tensor, Tensor) else None
    try:
        yield
    finally:
        if before is not None:
            tensor.data.copy_(before)
