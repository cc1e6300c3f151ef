"""Experts that few calibration tokens reach: what their Gram matrices are made of.

A router sends each token to a few experts of many, so an expert sees a fraction of the calibration tokens, and some see none. A Gram
matrix of n tokens in I features is a poor estimate long before it becomes singular at n < I: measured at 3 bits on a model of 8 experts,
an expert solved on n = I of its own tokens has 1.7 (gate, up) and 2.7 (down) times the error, on its other tokens, of one solved on all;
on n = 4 I still 1.1 and 1.2 times. Rounding to nearest: 3.3 and 2.0 times.

So an expert is also shown tokens of its layer that were not sent to it: an even sample of what the router distributes, which the expert's
own gate and up turn into inputs of its down. They weigh as much as `PRIOR * I` tokens, however many came by the router (a prior of fixed
strength, shrinkage in other words):

    G = (sum over routed tokens of x x^T  +  PRIOR I / |sample| * sum over the sample of x x^T) / (n + PRIOR I)

That leaves 1.07 and 1.09 times the error at n = I, 1.02 and 1.04 at 4 I, and 1.2 and 1.1 where no token came at all. Strengths of 0.25 to 4
and samples of 2 I to 8 I were tried. From `ENOUGH * I` tokens on, an expert is left to its own.

The pooled Gram of what *other* experts' down projections read would be no use: the inner features of two experts have nothing in common.

With `everything` (--calibrate-all-experts) the sample is all tokens of the layer, with a weight of 1 each, for every expert: who gets
them in the forward stays as the router decides. What gate and up of all experts read is then the same matrix, factored once; so it is for
experts that no token reached at all. Only what down reads has to be computed for each, which is most of what an expert costs: a layer
then costs E / K times its forward, not E forwards.

What is left after that is the solver's business: the fewer tokens, the stronger the damping (factor.sample_damp), and a result that is
worse than rounding is replaced by it (algorithms/gptq.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from statistics import median
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gptqkit.algorithms.gptq import Factors
from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.hf.experts import Expert, Experts
from gptqkit.models.layout import InputGroup

PRIOR = 2
ENOUGH = 16
SAMPLE = 8
LAST = "down_proj"
"""The linear of an expert that reads what the others made; those all read the layer's tokens."""
SAMPLE_TOKENS = 16384
"""Bounds the sample: 8 I tokens would be as large as the activations of a run where I is large."""


@dataclass(frozen=True, slots=True)
class Covered:
    """What a group of linears is solved with.

    gram_II  the mean of x x^T
    tokens   what it is worth in equally weighted tokens
    factors  factorizations of it, where other groups have the same matrix; None where it is this group's alone
    notes    what a user should know, in words
    """

    gram_II: Tensor
    tokens: float
    factors: Factors | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockCoverage:
    """How the calibration tokens of a block were spread over its experts.

    least, middle, most  tokens of an expert: minimum, median, maximum
    under                experts that saw fewer tokens than a linear of theirs has input features, `never` among them
    never                experts that saw none
    """

    block: int
    experts: int
    least: int
    middle: float
    most: int
    under: int
    never: int

    @classmethod
    def of(cls, block: int, experts: Iterable[tuple[int, int]]) -> BlockCoverage:
        """From the tokens of each expert and what it needs."""
        pairs = list(experts)
        tokens = sorted(tokens for tokens, _ in pairs)
        under = sum(tokens < needed for tokens, needed in pairs)
        return cls(block, len(pairs), tokens[0], float(median(tokens)), tokens[-1], under, tokens.count(0))

    def __str__(self) -> str:
        few = f"; {self.under} saw fewer than they have features, {self.never} of them none" if self.under else ""
        return f"{self.experts} experts saw {self.least} to {self.most} calibration tokens, median {self.middle:g}{few}"


class Coverage:
    """Watches the experts of one block while calibration runs through it; as a context manager, until the block is done.

    batches, tokens   of one pass over the calibration set
    everything        every expert is solved with all tokens of its layer
    """

    def __init__(self, block: nn.Module, batches: int, tokens: int, *, everything: bool = False) -> None:
        self._block = block
        self._everything = everything
        self._samples: dict[str, deque[Tensor]] = {}
        self._pooled: dict[str, Gram] = {}
        self._shared: dict[str, Covered] = {}
        self._routed: dict[str, tuple[int, int]] = {}
        self._hooks = []
        for name, module in block.named_modules():
            if isinstance(module, Experts):
                expert = module.get_submodule("0")
                assert isinstance(expert, Expert)
                wanted = min(SAMPLE_TOKENS, SAMPLE * max(expert.last.in_features, expert.last.out_features))
                # An odd step: an even one could meet the same place of every sequence.
                stride = 1 if everything else tokens // wanted | 1
                self._samples[name] = deque(maxlen=batches)  # where the forward is repeated, the last pass counts
                self._hooks.append(module.register_forward_pre_hook(self._sampler(name, stride), with_kwargs=True))

    def __enter__(self) -> Coverage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def replaces(self, group: InputGroup) -> bool:
        """Whether the group is solved with all tokens of its layer, whatever is routed to it."""
        return self._everything and _owner(group)[0] in self._samples

    def finish(self, group: InputGroup, gram: Gram, cross: CrossGram | None) -> Covered:
        """What the group is solved with, from what it was given. With a second stream `cross` is completed in the same way.

        To be called when all batches were seen and before anything of the group is replaced.
        """
        owner, index, leaf = _owner(group)
        if owner not in self._samples:
            return Covered(gram.finish(), gram.effective_tokens)
        reached, needed = self._routed.get(f"{owner}.{index}", (gram.tokens, 0))
        self._routed[f"{owner}.{index}"] = (reached, max(needed, group.in_features))
        if self._everything:
            return self._finish_with_all(group, gram, cross)
        notes = self.complete(group, gram, cross)
        if gram.tokens or leaf == LAST:
            return Covered(gram.finish(), gram.effective_tokens, notes=notes)
        if owner not in self._shared:
            self._shared[owner] = Covered(gram.finish(), gram.effective_tokens, [])
        return replace(self._shared[owner], notes=notes)

    def _finish_with_all(self, group: InputGroup, gram: Gram, cross: CrossGram | None) -> Covered:
        owner, index, leaf = _owner(group)
        if leaf == LAST:
            whole = self._sample_gram(owner, index, leaf, group.in_features)
            seen = Covered(whole.finish(), whole.tokens)
        else:
            if owner not in self._shared:
                whole = self._sample_gram(owner, index, leaf, group.in_features)
                self._shared[owner] = Covered(whole.finish(), whole.tokens, [])
            seen = self._shared[owner]
        if cross is not None:
            cross.complete(seen.gram_II, int(seen.tokens), gram)
        if gram.tokens >= group.in_features:
            return seen
        return replace(seen, notes=(f"{_few(gram, group)}; all {int(seen.tokens)} tokens of its layer were shown to it",))

    def complete(self, group: InputGroup, gram: Gram, cross: CrossGram | None) -> tuple[str, ...]:
        """Adds tokens of the layer to the Gram matrix of an expert that saw too few. Says so where they were fewer than its features."""
        (owner, index, leaf), needed = _owner(group), group.in_features
        if owner not in self._samples or gram.tokens >= ENOUGH * needed:
            return ()
        sample = self._sample_gram(owner, index, leaf, needed)
        reached = gram.tokens
        gram.blend(sample, PRIOR * needed)
        if cross is not None:
            cross.blend(sample, PRIOR * needed)
        if reached >= needed:
            return ()
        return (f"{_few(gram, group)}; {sample.tokens} tokens of its layer were added",)

    def summary(self, block: int) -> BlockCoverage | None:
        """How tokens were spread over the experts, once all are solved; None for a block without."""
        return BlockCoverage.of(block, self._routed.values()) if self._routed else None

    def _sample_gram(self, owner: str, index: str, leaf: str, in_features: int) -> Gram:
        """Of the layer's tokens as gate and up read them, which is the same for all experts; or as this expert's down would."""
        if leaf != LAST and owner in self._pooled:
            return self._pooled[owner]
        experts = self._block.get_submodule(owner)
        expert = experts.get_submodule(index)
        assert isinstance(experts, Experts)
        assert isinstance(expert, Expert)
        gram = Gram(in_features, self._samples[owner][0].device)
        for x_MH in self._samples[owner]:
            gram.add(expert.between(x_MH, experts.combine) if leaf == LAST else x_MH)
        if leaf != LAST and not self._everything:
            self._pooled[owner] = gram
        return gram

    def _sampler(self, name: str, stride: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            assert isinstance(module, Experts)
            tokens_MH = module.tokens(inputs[0] if inputs else named["hidden_states"])
            # All of them are alive anyway while forwards wait; a sample must not keep the rest.
            self._samples[name].append(tokens_MH if stride == 1 else tokens_MH[::stride].clone())

        return hook


def _owner(group: InputGroup) -> tuple[str, str, str]:
    """(container, index, linear) of the first linear of a group, if it is an expert's."""
    names = group.linears[0].name.split(".")
    return ".".join(names[:-2]), ".".join(names[-2:-1]), names[-1]


def _few(gram: Gram, group: InputGroup) -> str:
    return f"{gram.tokens or 'no'} calibration tokens were routed here, fewer than the {group.in_features} features of its input"
