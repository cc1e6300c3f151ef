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
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gptqkit.algorithms.gram import CrossGram, Gram
from gptqkit.hf.experts import Expert, Experts
from gptqkit.models.layout import InputGroup

PRIOR = 2
ENOUGH = 16
SAMPLE = 8
SAMPLE_TOKENS = 16384
"""Bounds the sample: 8 I tokens would be as large as the activations of a run where I is large."""


class Coverage:
    """Watches the experts of one block while calibration runs through it; as a context manager, until the block is done.

    batches, tokens   of one pass over the calibration set
    """

    def __init__(self, block: nn.Module, batches: int, tokens: int) -> None:
        self._block = block
        self._samples: dict[str, deque[Tensor]] = {}
        self._pooled: dict[str, Gram] = {}
        self._hooks = []
        for name, module in block.named_modules():
            if isinstance(module, Experts):
                expert = module.get_submodule("0")
                assert isinstance(expert, Expert)
                wanted = min(SAMPLE_TOKENS, SAMPLE * max(expert.last.in_features, expert.last.out_features))
                # An odd step: an even one could meet the same place of every sequence.
                self._samples[name] = deque(maxlen=batches)  # where the forward is repeated, the last pass counts
                self._hooks.append(module.register_forward_pre_hook(self._sampler(name, tokens // wanted | 1), with_kwargs=True))

    def __enter__(self) -> Coverage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()

    def complete(self, group: InputGroup, gram: Gram, cross: CrossGram | None) -> tuple[str, ...]:
        """Adds tokens of the layer to the Gram matrix of an expert that saw too few. Says so where they were fewer than its features.

        To be called when all batches were seen and before anything of the group is replaced.
        """
        names = group.linears[0].name.split(".")
        owner, needed = ".".join(names[:-2]), group.in_features
        if owner not in self._samples or gram.tokens >= ENOUGH * needed:
            return ()
        sample = self._sample_gram(owner, names[-2], names[-1], needed)
        reached = gram.tokens
        gram.blend(sample, PRIOR * needed)
        if cross is not None:
            cross.blend(sample, PRIOR * needed)
        if reached >= needed:
            return ()
        return (
            f"{reached or 'no'} calibration tokens were routed here, fewer than the {needed} features of its input; "
            f"{sample.tokens} tokens of its layer were added",
        )

    def _sample_gram(self, owner: str, index: str, leaf: str, in_features: int) -> Gram:
        """Of the layer's tokens as gate and up read them, which is the same for all experts; or as this expert's down would."""
        if leaf != "down_proj" and owner in self._pooled:
            return self._pooled[owner]
        experts = self._block.get_submodule(owner)
        expert = experts.get_submodule(index)
        assert isinstance(experts, Experts)
        assert isinstance(expert, Expert)
        gram = Gram(in_features, self._samples[owner][0].device)
        for x_MH in self._samples[owner]:
            gram.add(expert.between(x_MH, experts.combine) if leaf == "down_proj" else x_MH)
        if leaf != "down_proj":
            self._pooled[owner] = gram
        return gram

    def _sampler(self, name: str, stride: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden: Tensor = inputs[0] if inputs else named["hidden_states"]
            self._samples[name].append(hidden.reshape(-1, hidden.shape[-1])[::stride].clone())

        return hook
