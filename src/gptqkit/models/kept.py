"""The rules by which a parameter stays as it is. Together with the linears of the blocks they explain every parameter of a model.

A rule looks at what a parameter is (of which module, of what shape, how large beside its block) and at what the probe saw of it
(layout.py). A large parameter that none explains stops the run: quantizing around it would miss most of the model.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from gptqkit.core.errors import InputError
from gptqkit.hf.containers import is_container, refusal
from gptqkit.hf.skeleton import is_conv1d

LINEAR_OUTSIDE = "linear outside the blocks"
"""The reason of a kept weight that could have been quantized had it been in a block: worth an event, an error under `strict`."""

NOT_CALLED = "not used when the model reads text"
"""Towers for images and sound, cross-attention to what they return, keys and values of layers that take another layer's."""
USED_OTHERWISE = "linear whose weight is used without calling it"
"""Nothing is seen of its input, and a quantized module could not stand in for it."""
ROUTER = "router"
"""The reason of a kept weight that decides which experts a token goes to."""
ONE_OUTPUT = "linear of one output"
CONVOLUTION = "convolution"
UNQUANTIZED_LINEARS = (ROUTER, ONE_OUTPUT, NOT_CALLED, USED_OTHERWISE)
"""Reasons of kept weights that engines hold as linears: the written configuration has to name them."""
ROUTERS = ("gate", "router")
"""What routers are called beside `experts`."""

_SMALL_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Kept:
    """A parameter that stays as it is, and why."""

    name: str
    numel: int
    reason: str


def is_linear(module: nn.Module) -> bool:
    """True for what can be quantized: nn.Linear (and subclasses) and Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def full_precision(block: nn.Module, linear: str) -> str | None:
    """Why a linear of a block is left as it is; None when it is to be quantized.

    A router decides which experts run at all, and a gate of one output scales a whole expert: next to nothing to save, everything to lose.
    """
    if _below_router(block, linear):
        return ROUTER
    module = block.get_submodule(linear)
    assert isinstance(module.weight, nn.Parameter)
    if module.weight.shape[-1 if is_conv1d(module) else 0] == 1:
        return ONE_OUTPUT
    return None


def kept_inside(name: str, block: nn.Module, idle: dict[str, str]) -> list[Kept]:
    """What stays of the block called `name`. `idle` are the linears that were not called, with the reason.

    Raises InputError for a large parameter that no rule explains.
    """
    linears = {local: full_precision(block, local) or idle.get(local) for local, module in block.named_modules() if is_linear(module)}
    total = sum(p.numel() for p in block.parameters())
    kept = []
    for local, parameter in block.named_parameters():
        owner, _, leaf = local.rpartition(".")
        module = block.get_submodule(owner)
        if leaf == "weight" and owner in linears:
            reason = linears[owner]
            if reason is None:
                continue
        elif _below_router(block, local):
            reason = ROUTER
        elif isinstance(module, _ConvNd) and module.groups > 1:
            reason = CONVOLUTION
        elif parameter.ndim >= 2 and parameter.numel() > _SMALL_SHARE * total:
            raise _unknown(f"{name}.{local}", parameter, total, module)
        else:
            reason = "bias" if leaf.endswith("bias") else "norm or small parameter"
        kept.append(Kept(f"{name}.{local}", parameter.numel(), reason))
    return kept


def kept_whole(name: str, module: nn.Module, reason: str) -> list[Kept]:
    """All of a module that stays for one reason."""
    return [Kept(f"{name}.{local}", parameter.numel(), reason) for local, parameter in module.named_parameters()]


def kept_outside(model: Any, paths: Sequence[str], used: Set[str]) -> list[Kept]:
    """What stays outside the blocks at `paths`; `used` are the parameters there that took part in the probe's forward."""
    heads = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = []
    for name, parameter in model.named_parameters():
        if any(name.startswith(path + ".") for path in paths):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if owner is heads:
            reason = "output head"
        elif name not in used:
            reason = NOT_CALLED
        elif isinstance(owner, nn.Embedding):
            reason = "embedding"
        elif is_linear(owner) and name.endswith(".weight"):
            reason = LINEAR_OUTSIDE
        else:
            reason = "outside the blocks"
        kept.append(Kept(name, parameter.numel(), reason))
    return kept


def _below_router(block: nn.Module, name: str) -> bool:
    """True for what belongs to a child `gate` or `router` of a module that has a child `experts`."""
    path = name.split(".")
    owners = (block.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    return any(part in ROUTERS and hasattr(owner, "experts") for part, owner in zip(path, owners, strict=True))


def _unknown(name: str, parameter: nn.Parameter, total: int, owner: nn.Module) -> InputError:
    share = 100 * parameter.numel() / total
    why = (
        f"stacked experts of a kind that this version cannot take apart: {refusal(owner)}"
        if is_container(owner)
        else "no Linear, no Conv1D"
    )
    return InputError(
        f"{name} {tuple(parameter.shape)} is {share:.0f} % of its block and cannot be quantized ({why}); "
        "quantizing around it would miss most of the model"
    )
