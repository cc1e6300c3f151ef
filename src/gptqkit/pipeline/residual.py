"""Where a linear's output is added to the residual stream, found by looking at numbers.

In a decoder block most outputs go through further layers, but those of the attention's and the MLP's last linear are simply added to the
residual stream h: h + o. When two models run side by side, the quantized one is behind the original by h_f - h_q at that place already, and
a linear that adds to the stream can make up for some of it: its target is W x_f + (h_f - h_q), not W x_f alone.

The place is called an anchor: the block's input, or the input of some module (a norm, usually). It is found by running the block once: A is
the anchor of a linear with output o if the exact tensor A + o is met later, as the input of a module or as the block's output. Models that
do something else with o (another norm, a router's weight) have no such A, and nothing is added to their targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.models.attention import WideAttention
from gptqkit.models.layout import InputGroup
from gptqkit.models.standin import Call

BLOCK_INPUT = ""
"""The anchor that is the block's own input; any other is the name of a module in the block."""


def find_anchors(block: nn.Module, groups: Sequence[InputGroup], call: Call, hidden_BTH: Tensor) -> list[str | None]:
    """For each input group the anchor that its linear adds to, or None. Runs one forward."""
    met: list[tuple[str, Tensor]] = [(BLOCK_INPUT, hidden_BTH)]
    added: dict[str, tuple[int, Tensor]] = {}
    single = {group.linears[0].name for group in groups if len(group.linears) == 1}

    def before(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()), None)
            if isinstance(x, Tensor) and x.shape == hidden_BTH.shape:
                met.append((name, x))

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if output.shape == hidden_BTH.shape:
                added[name] = (len(met), output)

        return hook

    handles = [module.register_forward_pre_hook(before(name), with_kwargs=True) for name, module in block.named_modules() if name]
    handles += [block.get_submodule(name).register_forward_hook(after(name)) for name in single]
    try:
        with WideAttention():
            met.append((BLOCK_INPUT, call.run(block, hidden_BTH)))
    finally:
        for handle in handles:
            handle.remove()
    return [_anchor(*added[name], met) if (name := group.linears[0].name) in added else None for group in groups]


def _anchor(position: int, output: Tensor, met: list[tuple[str, Tensor]]) -> str | None:
    for name, x in met[:position]:
        total = x + output
        if any(torch.equal(total, later) for _, later in met[position:]):
            return name
    return None
