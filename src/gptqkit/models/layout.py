"""The structure of a model, discovered instead of listed per architecture.

1. The block list is the ModuleList that holds most parameters.
2. The model's own forward runs once on a few tokens, with one real block per distinct shape (weights uninitialised: only identities are
   looked at) and echoes for the others. Pre-hooks on every linear note which tensor it reads. Linears that read the same tensor form an
   input group; groups are ordered by first use.
3. Everything else in a block must be small (norms, biases, gates); a large parameter that is no linear stops the run.

What this relies on is checked, not assumed: each block receives the hidden states that the block before returned, and each linear is
called. (The idea of probing by tensor identity: style guide 5.2; the measured reach is in tests/models.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.core.errors import InputError
from gptqkit.hf.containers import is_container, refusal
from gptqkit.hf.skeleton import is_conv1d
from gptqkit.models.standin import Call, hidden_of, stand_ins

LINEAR_OUTSIDE = "linear outside the blocks"
"""The reason of a kept weight that could have been quantized had it been in a block: worth an event, an error under `strict`."""

ROUTER = "router"
"""The reason of a kept weight that decides which experts a token goes to."""
ONE_OUTPUT = "linear of one output"
UNQUANTIZED_LINEARS = (ROUTER, ONE_OUTPUT)
"""Reasons of kept weights that engines hold as linears: the written configuration has to name them."""
ROUTERS = ("gate", "router")
"""What routers are called beside `experts`."""

_PROBE_TOKENS = 8
_SMALL_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """One linear of a block. `name` is relative to the block; `transposed` means the weight is stored [in, out]."""

    name: str
    out_features: int
    in_features: int
    transposed: bool
    bias: bool


@dataclass(frozen=True, slots=True)
class InputGroup:
    """Linears that read the same tensor, in order of use. They share one Gram matrix."""

    linears: tuple[LinearInfo, ...]
    revisited: bool = False
    """True when a member is called more than once in a forward."""

    @property
    def in_features(self) -> int:
        return self.linears[0].in_features


@dataclass(frozen=True, slots=True)
class Kept:
    """A parameter that stays as it is, and why."""

    name: str
    numel: int
    reason: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks are, what is in each, and what lies outside them. Names in `outside` and `Kept` are full."""

    path: str
    blocks: tuple[tuple[InputGroup, ...], ...]
    kept: tuple[Kept, ...]
    returns_tuple: bool

    def block_name(self, index: int) -> str:
        return f"{self.path}.{index}"


def find_blocks(model: nn.Module) -> str:
    """The path of the ModuleList with most parameters. Raises InputError when there is none."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise InputError(f"{type(model).__name__} has no list of blocks; only decoder-style language models can be quantized")
    return max(sizes, key=lambda name: sizes[name])


def discover(model: Any) -> Layout:
    """The layout of a skeleton (parameters on meta). Raises InputError for a structure that cannot be quantized safely."""
    path = find_blocks(model)
    blocks = model.get_submodule(path)
    assert isinstance(blocks, nn.ModuleList)
    kept = [*_kept_inside(path, blocks), *_kept_outside(model, path)]
    probe = _Probe(list(blocks))
    outside = _materialise_empty(model, except_below=path)
    try:
        with torch.no_grad(), stand_ins(model, path, probe.handle):
            model(input_ids=torch.zeros((1, _PROBE_TOKENS), dtype=torch.long), use_cache=False)
    except InputError:
        raise
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError) as error:
        raise InputError(f"{type(model).__name__} could not be probed: its forward failed with {type(error).__name__}: {error}") from error
    finally:
        _back_to_meta(outside)
    groups = tuple(probe.groups[_signature(block)] for block in blocks)
    return Layout(path, groups, tuple(kept), probe.returns_tuple)


class _Probe:
    """Handles the calls of the stand-ins: runs one block of each shape for real and lets the others echo."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        self.blocks = blocks
        self.groups: dict[Any, tuple[InputGroup, ...]] = {}
        self.returns_tuple = False
        self._last: Tensor | None = None

    def handle(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        block = self.blocks[index]
        hidden, call = Call.split(args, kwargs)
        if self._last is not None and not _same_tensor(hidden, self._last):
            raise InputError(
                f"block {index} does not receive what block {index - 1} returned: this model works on hidden states between its blocks; "
                "not supported yet"
            )
        if _signature(block) not in self.groups:
            output = self._run(block, call, hidden)
            self.returns_tuple = not isinstance(output, Tensor)
            hidden = hidden_of(output)
        self._last = hidden
        return (hidden,) if self.returns_tuple else hidden

    def _run(self, block: nn.Module, call: Call, hidden: Tensor) -> Any:
        linears = {module: name for name, module in block.named_modules() if is_linear(module) and full_precision(block, name) is None}
        seen: dict[nn.Module, list[tuple[Any, ...]]] = {}
        alive: list[Tensor] = []

        def note(module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = inputs[0] if inputs else next(iter(named.values()))
            alive.append(x)
            seen.setdefault(module, []).append(_identity(x))

        hooks = [module.register_forward_pre_hook(note, with_kwargs=True) for module in linears]
        empty = _materialise_empty(block)
        try:
            if call.slot == "args":
                output = block(hidden, *call.args, **call.kwargs)
            else:
                output = block(*call.args, **{call.slot: hidden}, **call.kwargs)
        finally:
            _back_to_meta(empty)
            for hook in hooks:
                hook.remove()
        unused = [name for module, name in linears.items() if module not in seen]
        if unused:
            raise InputError(
                f"{type(block).__name__}: the linears {', '.join(unused)} are not called in a forward, so their inputs cannot be seen; "
                "not supported yet"
            )
        self.groups[_signature(block)] = _grouped(linears, seen)
        return output


def is_linear(module: nn.Module) -> bool:
    """True for what can be quantized: nn.Linear (and subclasses) and Conv1D."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def linear_info(name: str, module: nn.Module) -> LinearInfo:
    """Shape facts of an nn.Linear or Conv1D."""
    weight, transposed = module.weight, is_conv1d(module)
    assert isinstance(weight, Tensor)
    out_features, in_features = reversed(weight.shape) if transposed else weight.shape
    return LinearInfo(name, out_features, in_features, transposed, getattr(module, "bias", None) is not None)


def _grouped(linears: dict[nn.Module, str], seen: dict[nn.Module, list[tuple[Any, ...]]]) -> tuple[InputGroup, ...]:
    by_input: dict[tuple[Any, ...], list[nn.Module]] = {}
    for module, identities in seen.items():
        by_input.setdefault(identities[0], []).append(module)
    return tuple(
        InputGroup(tuple(linear_info(linears[m], m) for m in members), revisited=any(len(seen[m]) > 1 for m in members))
        for members in by_input.values()
    )


def _identity(x: Tensor) -> tuple[Any, ...]:
    """Equal for views of the same values: storage, offset, size, and the version counter that in-place writes advance.

    Empty tensors (of experts that no token reached) have no memory to tell them apart; there the storage object does it.
    """
    storage = x.untyped_storage()
    return (storage.data_ptr() or storage._cdata, x.storage_offset(), x.numel(), x.dtype, x._version)


def _same_tensor(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and _identity(a)[:3] == _identity(b)[:3]


def _signature(block: nn.Module) -> tuple[Any, ...]:
    return (type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters()))


def full_precision(block: nn.Module, linear: str) -> str | None:
    """Why a linear of a block is left as it is; None when it is to be quantized.

    A router decides which experts run at all, and a gate of one output scales a whole expert: next to nothing to save, everything to lose.
    """
    if _below_router(block, linear):
        return ROUTER
    if linear_info(linear, block.get_submodule(linear)).out_features == 1:
        return ONE_OUTPUT
    return None


def _below_router(block: nn.Module, name: str) -> bool:
    """True for what belongs to a child `gate` or `router` of a module that has a child `experts`."""
    path = name.split(".")
    owners = (block.get_submodule(".".join(path[:depth])) for depth in range(len(path)))
    return any(part in ROUTERS and hasattr(owner, "experts") for part, owner in zip(path, owners, strict=True))


def _kept_inside(path: str, blocks: nn.ModuleList) -> list[Kept]:
    kept = []
    for index, block in enumerate(blocks):
        linears = {name: full_precision(block, name) for name, module in block.named_modules() if is_linear(module)}
        total = sum(p.numel() for p in block.parameters())
        for name, parameter in block.named_parameters():
            owner, _, leaf = name.rpartition(".")
            if leaf == "weight" and owner in linears:
                reason = linears[owner]
                if reason is None:
                    continue
            elif _below_router(block, name):
                reason = ROUTER
            elif parameter.ndim >= 2 and parameter.numel() > _SMALL_SHARE * total:
                raise _unknown(f"{path}.{index}.{name}", parameter, total, block.get_submodule(owner))
            else:
                reason = "bias" if leaf.endswith("bias") else "norm or small parameter"
            kept.append(Kept(f"{path}.{index}.{name}", parameter.numel(), reason))
    return kept


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


def _kept_outside(model: Any, path: str) -> list[Kept]:
    heads = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    kept = []
    for name, parameter in model.named_parameters():
        if name.startswith(path + "."):
            continue
        owner = model.get_submodule(name.rpartition(".")[0])
        if owner is heads:
            reason = "output head"
        elif isinstance(owner, nn.Embedding):
            reason = "embedding"
        elif is_linear(owner) and name.endswith(".weight"):
            reason = LINEAR_OUTSIDE
        else:
            reason = "outside the blocks"
        kept.append(Kept(name, parameter.numel(), reason))
    return kept


def _materialise_empty(module: nn.Module, except_below: str | None = None) -> list[tuple[nn.Module, str, nn.Parameter]]:
    """Gives meta parameters uninitialised memory; returns what `_back_to_meta` needs to undo it."""
    done: list[tuple[nn.Module, str, nn.Parameter]] = []
    twins: dict[int, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        if except_below is not None and (prefix == except_below or prefix.startswith(except_below + ".")):
            continue
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in twins:
                    twins[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                owner._parameters[name] = twins[id(parameter)]
                done.append((owner, name, parameter))
    return done


def _back_to_meta(done: list[tuple[nn.Module, str, nn.Parameter]]) -> None:
    for owner, name, parameter in done:
        owner._parameters[name] = parameter
