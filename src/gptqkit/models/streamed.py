"""A causal LM that is never whole in memory: weights arrive block by block and leave again.

    skeleton (meta) --embed--> hidden states, block calls --block 0, 1, …--> hidden states --head--> logits

Everything outside the blocks is run by the model's own forward (see standin.py); its weights are loaded when a module is first called and
dropped at the end of the phase. Shapes: B = sequences of one batch, T = their length, H = hidden size, V = vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptqkit.core.errors import InputError
from gptqkit.hf.names import find_pieces
from gptqkit.hf.skeleton import build_skeleton, checkpoint_names, is_conv1d, load_config
from gptqkit.models.layout import Layout, discover
from gptqkit.models.standin import Call, CallStore, StopForward, reading, stand_ins
from gptqkit.models.supply import ExpertSupply, streamed_modules
from gptqkit.models.weights import Weights, open_weights


class StreamedModel:
    """A model folder, ready to be run phase by phase on one device.

    >>> model = StreamedModel.open(Path("MODEL"), device=torch.device("cpu"), dtype=torch.float32)      # doctest: +SKIP
    >>> hidden = model.embed(ids_BT, batch=0, calls=calls)                                              # doctest: +SKIP
    """

    def __init__(self, skeleton: Any, layout: Layout, weights: Weights, device: torch.device, dtype: torch.dtype) -> None:
        self.skeleton = skeleton
        self.layout = layout
        self.weights = weights.with_pieces(find_pieces(skeleton, weights.names))
        self.device = device
        self.dtype = dtype
        self.disk_name = checkpoint_names(skeleton, self.weights.names)
        self._twins = _twins(skeleton)
        self._places = {name: [_place(skeleton, twin) for twin in twins] for name, twins in self._twins.items()}
        self._meta: dict[str, nn.Parameter] = {}
        self._supply: tuple[str, ExpertSupply] | None = None
        self._check_complete()
        for name, buffer in list(skeleton.named_buffers()):
            self._set_buffer(name, self.weights.read(self.disk_name[name]) if name in self.disk_name else buffer)

    @classmethod
    def open(cls, folder: Path, *, device: torch.device, dtype: torch.dtype, trust_remote_code: bool = False) -> StreamedModel:
        """Builds the skeleton and checks that every parameter has its tensor. Raises InputError naming what is wrong."""
        config = load_config(folder, trust_remote_code=trust_remote_code)
        skeleton = build_skeleton(config, dtype, trust_remote_code=trust_remote_code)
        return cls(skeleton, discover(skeleton), open_weights(folder), device, dtype)

    def with_weights(self, weights: Weights) -> StreamedModel:
        """The same architecture on another checkpoint's weights. Both may be used in turn, and their outsides at the same time.

        Raises InputError as `open`.
        """
        return StreamedModel(copy.deepcopy(self.skeleton), self.layout, weights, self.device, self.dtype)

    def with_dtype(self, dtype: torch.dtype, *, trust_remote_code: bool = False) -> StreamedModel:
        """The same model, computing in another dtype. Raises InputError as `open`."""
        if dtype == self.dtype:
            return self
        skeleton = build_skeleton(self.skeleton.config, dtype, trust_remote_code=trust_remote_code)
        return StreamedModel(skeleton, self.layout, self.weights, self.device, dtype)

    @property
    def block_count(self) -> int:
        return len(self.layout.blocks)

    @property
    def context(self) -> int | None:
        """The longest sequence the model takes, where its configuration says so."""
        value = getattr(self.skeleton.config, "max_position_embeddings", None)
        return value if isinstance(value, int) and value > 0 else None

    @property
    def vocabulary(self) -> int:
        """Rows of the input embedding: token ids must be below."""
        return self.skeleton.get_input_embeddings().weight.shape[0]

    def block(self, index: int) -> nn.Module:
        return self.skeleton.get_submodule(self.layout.block_name(index))

    @contextmanager
    def loaded_block(self, index: int) -> Iterator[nn.Module]:
        """The block with its weights on the device, in the run's dtype, those of experts one expert at a time (supply.py); dropped on
        leaving. Inside, `put_parameter` replaces weights."""
        with self.loaded_copies(index, 1) as (block,):
            yield block

    @contextmanager
    def loaded_copies(self, index: int, count: int) -> Iterator[tuple[nn.Module, ...]]:
        """As `loaded_block`, with copies of the block after it, on which `put_parameter` has no effect."""
        prefix = self.layout.block_name(index) + "."
        streamed = {prefix + leaf for _, leaf in streamed_modules(self.block(index))}
        names = [
            name for name, _ in self.skeleton.named_parameters() if name.startswith(prefix) and name.rpartition(".")[0] not in streamed
        ]
        ahead = self._read_ahead(index)
        self._load(names)
        self._read_ahead(index + 1)
        supplies: list[ExpertSupply] = []
        try:
            blocks = (self.block(index), *(copy.deepcopy(self.block(index)) for _ in range(count - 1)))
            for block in blocks:
                supplies.append(ExpertSupply(block, lambda name: self.read_parameter(prefix + name), self.device, self.dtype))
            self._supply = (prefix, supplies[0])
            yield blocks
        finally:
            self._supply = None
            for supply in supplies:
                supply.close()
            self._drop(names)
            self.weights.forget(ahead)

    @contextmanager
    def loaded_outside(self) -> Iterator[None]:
        """While inside, modules outside the blocks load their weights when they are first called; all are dropped on leaving."""
        loaded: list[str] = []

        def load(names: list[str]) -> None:
            missing = [name for name in names if self._parameter(name).is_meta]
            self._load(missing)
            loaded.extend(missing)

        hooks = []
        for prefix, names in self._outside().items():
            owner = self.skeleton.get_submodule(prefix)
            if next(owner.children(), None) is None:
                hooks.append(owner.register_forward_pre_hook(lambda module, inputs, names=names: load(names)))
            else:
                load(names)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            self._drop(loaded)

    def embed(self, ids_BT: Tensor, batch: int, calls: CallStore, encoded_BTH: Tensor | None = None) -> Tensor:
        """What the first block receives, [B, T, H]; how every block is called for this batch goes into `calls`.

        encoded_BTH  what the encoder's last block returned: then the decoder's blocks are meant
        """
        earlier = 0 if encoded_BTH is None else 1
        start, blocks = self.layout.starts[earlier], self.layout.lists[earlier]
        received: list[Tensor] = []
        extras: Sequence[Any] | None = None

        def record(index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            nonlocal extras
            hidden, call = Call.split(args, kwargs)
            calls.put(batch, start + index, call)
            if index == 0:
                received.append(hidden)
                extras = None if first is None else call.output(first, hidden)[1:]
            if index == len(blocks.numbers) - 1:
                raise StopForward
            return blocks.returned(hidden, extras)

        ids_BT = ids_BT.to(self.device)
        self.skeleton.get_input_embeddings()(ids_BT[:1, :1])  # loads it: Llama 4 asks where its weight is before calling it
        with ExitStack() as stack:
            first = stack.enter_context(self.loaded_block(start)) if blocks.shares else None
            stack.enter_context(self._injected(earlier, encoded_BTH))
            stack.enter_context(stand_ins(self.skeleton, blocks.path, record, blocks.numbers))
            stack.enter_context(suppress(StopForward))
            self.skeleton(**reading(self.skeleton, ids_BT))
        return received[0]

    def head(self, ids_BT: Tensor, hidden_BTH: Tensor) -> Tensor:
        """The logits [B, T, V] that follow from what the last block returned."""
        embedding = self.skeleton.get_input_embeddings()
        self.skeleton.set_input_embeddings(_Blank(embedding.embedding_dim, self.dtype, self.device))
        try:
            with self._injected(len(self.layout.lists), hidden_BTH):
                return self.skeleton(**reading(self.skeleton, ids_BT.to(self.device))).logits
        finally:
            self.skeleton.set_input_embeddings(embedding)

    @contextmanager
    def _injected(self, lists: int, hidden_BTH: Tensor | None) -> Iterator[None]:
        """The blocks of the first `lists` lists return `hidden_BTH`, whatever they are called with."""
        with ExitStack() as stack:
            for blocks in self.layout.lists[:lists]:
                stack.enter_context(stand_ins(self.skeleton, blocks.path, lambda *call, blocks=blocks: blocks.returned(hidden_BTH)))
            yield

    def _read_ahead(self, index: int) -> list[str]:
        """Begins to read a block, where a CUDA device would wait for it. Returns what is to be forgotten once the block is left."""
        if self.device.type != "cuda" or index >= self.block_count:
            return []
        prefix = self.layout.block_name(index) + "."
        names = [disk for name, disk in self.disk_name.items() if name.startswith(prefix)]
        self.weights.read_ahead(names)
        return names

    def read_parameter(self, name: str) -> Tensor:
        """The checkpoint's tensor for a parameter, in the orientation of the module, in the checkpoint's dtype, on the run's device."""
        tensor = self.weights.read(self.disk_name[name], self.device)
        return tensor.T.contiguous() if self._flips(name) else tensor

    def put_parameter(self, name: str, value: Tensor, again: Callable[[], Tensor]) -> None:
        """Overwrites a parameter of the loaded block, cast to the run's dtype. `again` makes the value anew, for an expert that has to make
        room for others and comes back."""
        if self._supply is not None and (local := name.removeprefix(self._supply[0])) in self._supply[1].names:
            self._supply[1].put(local, value, again)
        else:
            self._parameter(name).data.copy_(value)

    def put_back(self, name: str) -> None:
        """Undoes `put_parameter`."""
        if self._supply is not None and (local := name.removeprefix(self._supply[0])) in self._supply[1].names:
            self._supply[1].put_back(local)
        else:
            self._parameter(name).data.copy_(self.read_parameter(name))

    def drop_experts(self) -> None:
        """Nothing of an expert stays loaded until it is called again."""
        if self._supply is not None:
            self._supply[1].drop()

    def _parameter(self, name: str) -> nn.Parameter:
        owner, leaf = self._places[name][0]
        parameter = owner._parameters[leaf]
        assert parameter is not None
        return parameter

    def _load(self, names: list[str]) -> None:
        for name in names:
            self._meta[name] = self._parameter(name)
            value = self.read_parameter(name).to(device=self.device, dtype=self.dtype)
            self._set(name, nn.Parameter(value, requires_grad=False))

    def _drop(self, names: list[str]) -> None:
        for name in names:
            self._set(name, self._meta.pop(name))

    def _set(self, name: str, parameter: nn.Parameter) -> None:
        for owner, leaf in self._places[name]:
            owner._parameters[leaf] = parameter

    def _set_buffer(self, name: str, value: Tensor) -> None:
        prefix, _, leaf = name.rpartition(".")
        owner = self.skeleton.get_submodule(prefix)
        current = owner._buffers[leaf]
        assert current is not None
        owner._buffers[leaf] = value.to(device=self.device, dtype=current.dtype)

    def _outside(self) -> dict[str, list[str]]:
        """Owner module -> names of its own parameters, for everything outside the blocks; tied ones under each owner."""
        owners: dict[str, list[str]] = {}
        for name, twins in self._twins.items():
            if not self.layout.holds(name):
                for twin in twins:
                    owners.setdefault(twin.rpartition(".")[0], []).append(name)
        return owners

    def _check_complete(self) -> None:
        for name, twins in list(self._twins.items()):
            present = [twin for twin in twins if twin in self.disk_name]
            if not present:
                raise InputError(f"the checkpoint holds no tensor for {name}, which {type(self.skeleton).__name__} needs")
            self.disk_name[name] = self.disk_name[present[0]]
        for name in self._twins:
            expected = self._parameter(name).shape
            disk_name = self.disk_name[name]
            shape = self.weights.shape(disk_name)
            if self._flips(name):
                shape = tuple(reversed(shape))
            if shape != tuple(expected):
                raise InputError(
                    f"tensor {disk_name} has shape {list(shape)}; {type(self.skeleton).__name__} needs {list(expected)} "
                    "(config.json of another model?)"
                )

    def _flips(self, name: str) -> bool:
        """True when the checkpoint gives [out, in] for a module that holds [in, out]."""
        owner = self.skeleton.get_submodule(name.rpartition(".")[0])
        return self.weights.is_expanded(self.disk_name[name]) and is_conv1d(owner)


class _Blank(nn.Module):
    """Stands for the embedding where its values do not matter: what comes before the blocks, when only what comes after them is wanted."""

    def __init__(self, width: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.weight = torch.zeros(1, width, dtype=dtype, device=device)  # models ask it where they are

    def forward(self, ids_BT: Tensor) -> Tensor:
        return self.weight[0].expand(*ids_BT.shape, -1).clone()  # some models scale it in place


def _place(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that owns a parameter, and the parameter's name there."""
    prefix, _, leaf = name.rpartition(".")
    return model.get_submodule(prefix), leaf


def _twins(model: nn.Module) -> dict[str, list[str]]:
    """Every distinct parameter under its first name -> all names it goes by (tied weights)."""
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        canonical = first.setdefault(id(parameter), name)
        names.setdefault(canonical, []).append(name)
    return names
