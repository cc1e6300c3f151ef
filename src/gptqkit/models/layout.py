"""The structure of a model, discovered instead of listed per architecture.

1. The block list is the ModuleList with most parameters that a forward on text calls: first those of the text decoder are tried, where
   transformers says which part of the model that is.
2. The model's own forward runs once on a few tokens, with one real block per distinct kind (weights uninitialised: only identities are
   looked at) and echoes for the others. Pre-hooks on every linear note which tensor it reads. Linears that read the same tensor form an
   input group; groups are ordered by first use. Linears that are not called stay as they are: what only images reach, and what a block
   computes with without calling it.
3. Everything else in a block must be small (norms, biases, gates; kept.py); a large parameter that is no linear stops the run.

What this relies on is checked, not assumed: each block receives the hidden states that the block before returned. Blocks are of one kind
when their classes, the shapes of their parameters, their modules' options and what the configuration lists for them are the same. (The
idea of probing by tensor identity: style guide 5.2; the measured reach is in tests/models/test_every_model.py.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import is_conv1d
from gptqkit.models.kept import LINEAR_OUTSIDE as LINEAR_OUTSIDE
from gptqkit.models.kept import NOT_CALLED, USED_OTHERWISE, Kept, full_precision, kept_inside, kept_outside, kept_whole
from gptqkit.models.kept import ONE_OUTPUT as ONE_OUTPUT
from gptqkit.models.kept import ROUTER as ROUTER
from gptqkit.models.kept import UNQUANTIZED_LINEARS as UNQUANTIZED_LINEARS
from gptqkit.models.kept import is_linear as is_linear
from gptqkit.models.standin import Call, hidden_of, reading, stand_ins

_PROBE_TOKENS = 8
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)
"""What a model's forward may raise when it cannot read plain text."""


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
class BlockList:
    """A ModuleList whose blocks hidden states go through one after the other.

    numbers  of each block, its place in the list: blocks that are not called for text are left out
    outputs  0: a block returns hidden states; n: a tuple of n, of which they are the first
    shares   what the first block returns besides is handed to the others (T5's position biases)
    """

    path: str
    numbers: tuple[int, ...]
    outputs: int
    shares: bool

    def returned(self, hidden: Tensor, extras: Sequence[Any] | None = None) -> Any:
        """What a stand-in returns for a block."""
        return (hidden, *(extras or (None,) * (self.outputs - 1))) if self.outputs else hidden


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the blocks are, what is in each, and what stays as it is. Names in `Kept` are full.

    lists   one list of blocks; two where there is an encoder, in order of use
    blocks  of all lists, as if they were one
    """

    lists: tuple[BlockList, ...]
    blocks: tuple[tuple[InputGroup, ...], ...]
    kept: tuple[Kept, ...]

    @property
    def starts(self) -> tuple[int, ...]:
        """The first block of each list."""
        return tuple(sum(len(earlier.numbers) for earlier in self.lists[:at]) for at in range(len(self.lists)))

    def block_name(self, index: int) -> str:
        for start, blocks in zip(self.starts, self.lists, strict=True):
            if index < start + len(blocks.numbers):
                return f"{blocks.path}.{blocks.numbers[index - start]}"
        raise IndexError(index)

    def holds(self, name: str) -> bool:
        """Whether a parameter lies in one of the lists."""
        return any(name.startswith(f"{blocks.path}.") for blocks in self.lists)


def find_blocks(model: Any) -> list[tuple[str, ...]]:
    """What may be the lists of blocks, likeliest first: the paths of all ModuleLists, the text decoder's first, then by size; of an
    encoder-decoder, the largest of either. Raises InputError when there is none."""
    sizes = {
        name: sum(p.numel() for p in module.parameters())
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    if not sizes:
        raise InputError(f"{type(model).__name__} has no list of blocks; only decoder-style language models can be quantized")

    def within(part: Any) -> list[str]:
        inside = {id(module) for module in part.modules()} if isinstance(part, nn.Module) else set()
        return sorted(sizes, key=lambda name: (id(model.get_submodule(name)) not in inside, -sizes[name]))

    decoder = within(model.get_decoder() if hasattr(model, "get_decoder") else model)
    if getattr(model.config, "is_encoder_decoder", False):
        return [(within(model.get_encoder())[0], decoder[0])]
    return [(path,) for path in decoder]


def discover(model: Any) -> Layout:
    """The layout of a skeleton (parameters on meta). Raises InputError for a structure that cannot be quantized safely."""
    for paths in find_blocks(model):
        probe = _Probe(model, paths)
        probe.run()
        if all(blocks.called for blocks in probe.lists):
            return probe.layout()
    raise InputError(f"{type(model).__name__} calls none of its lists of blocks when it reads text; it cannot be calibrated on text")


class _Uses(TorchFunctionMode):
    """Notes which parameters take part in a computation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") != "__get__":
            self._note(args)
            self._note((kwargs or {}).values())
        return func(*args, **(kwargs or {}))

    def _note(self, values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, nn.Parameter):
                self.seen.add(id(value))
            elif isinstance(value, (tuple, list)):
                self._note(value)

    def take(self, borrowed: list[_Borrowed]) -> set[str]:
        """The names of borrowed parameters that took part; forgets them, since their memory will be given to others."""
        ids = {id(owner._parameters[leaf]): name for name, owner, leaf, _ in borrowed}
        names = {name for name, owner, leaf, _ in borrowed if id(owner._parameters[leaf]) in self.seen}
        self.seen -= set(ids)
        return names


class _Probe:
    """One forward on a few tokens."""

    def __init__(self, model: Any, paths: Sequence[str]) -> None:
        self.model = model
        self.uses = _Uses()
        self.used_outside: set[str] = set()
        self.lists = [_ListProbe(model, path, self.uses) for path in paths]

    def run(self) -> None:
        outside = _materialise_empty(self.model, except_below=[blocks.path for blocks in self.lists])
        ids = torch.zeros((1, _PROBE_TOKENS), dtype=torch.long)
        try:
            with torch.no_grad(), ExitStack() as stack:
                for blocks in self.lists:
                    stack.enter_context(stand_ins(self.model, blocks.path, blocks.handle))
                stack.enter_context(self.uses)
                self.model(**reading(self.model, ids))
            self.used_outside = self.uses.take(outside)
        except InputError:
            raise
        except _FAILURES as error:
            kind = type(self.model).__name__
            raise InputError(f"{kind} could not be probed: its forward failed with {type(error).__name__}: {error}") from error
        finally:
            _back_to_meta(outside)

    def layout(self) -> Layout:
        kept = [kept for blocks in self.lists for kept in blocks.kept()]
        kept += kept_outside(self.model, [blocks.path for blocks in self.lists], self.used_outside)
        groups = tuple(blocks.groups[blocks.kinds[index]] for blocks in self.lists for index in blocks.called)
        if not any(groups):
            raise InputError(f"{type(self.model).__name__}: no linear of {self.lists[-1].path} is called when the model reads text")
        lists = tuple(BlockList(blocks.path, tuple(blocks.called), blocks.outputs, blocks.shares) for blocks in self.lists)
        return Layout(lists, groups, tuple(kept))


class _ListProbe:
    """Handles the calls of one list's stand-ins: runs one block of each kind for real and lets the others echo."""

    def __init__(self, model: Any, path: str, uses: _Uses) -> None:
        blocks = model.get_submodule(path)
        assert isinstance(blocks, nn.ModuleList)
        self.path = path
        self.blocks = list(blocks)
        self.kinds = _kinds(self.blocks, model.config)
        self.groups: dict[Any, tuple[InputGroup, ...]] = {}
        self.called: list[int] = []
        self.outputs = 0
        self.shares = False
        self._idle: dict[Any, dict[str, str]] = {}
        self._uses = uses
        self._last: Tensor | None = None
        self._extras: tuple[Any, ...] = ()
        """What the first block returned beside hidden states; `_later`, what another made anew."""
        self._later: list[Tensor] = []

    def kept(self) -> list[Kept]:
        kept: list[Kept] = []
        owners: dict[int, int] = {}
        for index, block in enumerate(self.blocks):
            name = f"{self.path}.{index}"
            for local, parameter in block.named_parameters():
                if owners.setdefault(id(parameter), index) != index:
                    raise InputError(
                        f"{name}.{local} is also a parameter of block {owners[id(parameter)]}: shared blocks are not supported yet"
                    )
            if index in self.called:
                kept += kept_inside(name, block, self._idle[self.kinds[index]])
            else:
                kept += kept_whole(name, block, NOT_CALLED)
        return kept

    def handle(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden, call = Call.split(args, kwargs)
        if hidden.shape[0] != 1:
            raise InputError(
                f"the blocks of {self.path} are called with hidden states {list(hidden.shape)} for one sequence: their first dimension is "
                "not the batch; not supported yet"
            )
        if self._last is not None and not _same_tensor(hidden, self._last):
            raise InputError(
                f"block {index} does not receive what block {self.called[-1]} returned: this model works on hidden states between its "
                "blocks; not supported yet"
            )
        if index in self.called or (self.called and index < self.called[-1]):
            raise InputError(f"block {index} is called again after block {self.called[-1]}: this model runs its blocks several times")
        given = call.tensors()
        if any(tensor is made for tensor in given for made in self._later):
            raise InputError(
                f"block {index} receives more of what block {self.called[-1]} returned than hidden states, and not from the first block; "
                "not supported yet"
            )
        self.shares |= any(tensor is made for tensor in given for made in self._extras)
        self.called.append(index)
        if self.kinds[index] in self.groups:
            output: Any = (hidden, *self._extras) if self.outputs else hidden
        else:
            output = self._real(index, call, hidden)
            rest = () if isinstance(output, Tensor) else tuple(output[1:])
            if len(self.called) == 1:
                self.outputs, self._extras = (0 if isinstance(output, Tensor) else len(output)), rest
            self._later = [made for made in rest if isinstance(made, Tensor) and not any(made is known for known in self._extras)]
        self._last = hidden_of(output)
        return output

    def _real(self, index: int, call: Call, hidden: Tensor) -> Any:
        block = self.blocks[index]
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
            output = call.output(block, hidden)
            used = self._uses.take(empty)
        finally:
            _back_to_meta(empty)
            for hook in hooks:
                hook.remove()
        self.groups[self.kinds[index]] = _grouped(linears, seen)
        self._idle[self.kinds[index]] = {
            name: USED_OTHERWISE if f"{name}.weight" in used else NOT_CALLED for module, name in linears.items() if module not in seen
        }
        return output


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


def _kinds(blocks: Sequence[nn.Module], config: Any) -> list[Any]:
    """Of each block, what must be equal for two to be of one kind: class, shapes, the options that its modules hold (but the block's own
    number), and its entries of the lists that the configuration has per layer."""
    options = [_options(block) for block in blocks]
    keys = {key for found in options for key in found}
    numbering = {key for key in keys if all(found.get(key, index) == index for index, found in enumerate(options))}
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    listed = [value for _, value in sorted(text.to_dict().items()) if isinstance(value, (list, tuple)) and len(value) == len(blocks)]
    return [
        (
            type(block),
            tuple((name, tuple(p.shape)) for name, p in block.named_parameters()),
            tuple(item for item in found.items() if item[0] not in numbering),
            tuple(str(values[index]) for values in listed),
        )
        for index, (block, found) in enumerate(zip(blocks, options, strict=True))
    ]


def _options(block: nn.Module) -> dict[tuple[str, str], Any]:
    return {
        (name, key): value
        for name, module in block.named_modules()
        for key, value in vars(module).items()
        if isinstance(value, (bool, int, str)) or value is None
    }


_Borrowed = tuple[str, nn.Module, str, nn.Parameter]
"""A parameter's name, its module, its name there, and the meta parameter that it stands in for."""


def _materialise_empty(module: nn.Module, except_below: Sequence[str] = ()) -> list[_Borrowed]:
    """Gives meta parameters uninitialised memory; returns what `_back_to_meta` needs to undo it."""
    done: list[_Borrowed] = []
    twins: dict[int, nn.Parameter] = {}
    for prefix, owner in module.named_modules():
        if any(prefix == path or prefix.startswith(path + ".") for path in except_below):
            continue
        for name, parameter in list(owner._parameters.items()):
            if parameter is not None and parameter.is_meta:
                if id(parameter) not in twins:
                    twins[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
                owner._parameters[name] = twins[id(parameter)]
                done.append((f"{prefix}.{name}" if prefix else name, owner, name, parameter))
    return done


def _back_to_meta(done: list[_Borrowed]) -> None:
    for _, owner, name, parameter in done:
        owner._parameters[name] = parameter
