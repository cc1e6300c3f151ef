"""Reading a safetensors checkpoint tensor by tensor, single or sharded, without ever holding more than what was asked for.

Files are opened by the safetensors library once, which checks their headers against their sizes, and then read with plain positioned
reads rather than through a memory map: mapped pages count as this process's memory until the map goes, and a file that is cut short
while mapped kills the process.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from io import FileIO
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gptqkit.checkpoint.files import read_json
from gptqkit.checkpoint.pieces import Piece
from gptqkit.core.errors import InputError

INDEX_NAME = "model.safetensors.index.json"
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})\.safetensors$")

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies and what it is."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class TensorSource:
    """The tensors of a checkpoint folder by name.

    >>> source = TensorSource.open(folder)                                 # doctest: +SKIP
    >>> source.read("model.embed_tokens.weight").shape                     # doctest: +SKIP
    torch.Size([8192, 512])
    """

    def __init__(
        self,
        folder: Path,
        tensors: dict[str, TensorInfo],
        pieces: Mapping[str, Piece] | None = None,
        coming: dict[str, Future[Tensor]] | None = None,
    ) -> None:
        self.folder = folder
        self._tensors = tensors
        self._coming = {} if coming is None else coming
        self._pieces = dict(pieces or {})
        self._stacked = {piece.stored for piece in self._pieces.values()}

    @classmethod
    def open(cls, folder: Path) -> TensorSource:
        """Checks every header and that the files agree with the index. Raises InputError naming the file or tensor at fault."""
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; expected a model folder with config.json and *.safetensors")
        tensors: dict[str, TensorInfo] = {}
        for file in _files(folder):
            for name, info in _header(folder, file).items():
                if name in tensors:
                    raise InputError(f"{folder}: tensor {name} is in both {tensors[name].file} and {file}")
                tensors[name] = info
        index = folder / INDEX_NAME
        if index.exists():
            _check_index(folder, _weight_map(index), tensors)
        return cls(folder, tensors)

    @classmethod
    def open_file(cls, path: Path) -> TensorSource:
        """One safetensors file by itself. Raises InputError as `open`."""
        return cls(path.parent, _header(path.parent, path.name))

    def with_pieces(self, pieces: Mapping[str, Piece]) -> TensorSource:
        """The same files; stacked tensors are listed and read by the names of their pieces. Raises InputError where one does not fit."""
        for name, piece in pieces.items():
            if not piece.fits(shape := self.info(piece.stored).shape):
                raise InputError(
                    f"tensor {piece.stored} has shape {list(shape)} and cannot hold {name}, one of {piece.parts} parts of each of "
                    f"{piece.count} experts (config.json of another model?)"
                )
        return TensorSource(self.folder, self._tensors, {**self._pieces, **pieces}, self._coming)

    def together(self, names: Collection[str]) -> list[str]:
        """`names`, and for containers all of whose pieces are among them, the tensors that the checkpoint stores in their place."""
        wanted = set(names)
        apart = {piece.container for name, piece in self._pieces.items() if name not in wanted}
        whole = {name: piece.stored for name, piece in self._pieces.items() if piece.container not in apart}
        return list(dict.fromkeys(whole.get(name, name) for name in names))

    @property
    def names(self) -> tuple[str, ...]:
        return (*(name for name in self._tensors if name not in self._stacked), *self._pieces)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.nbytes for info in self._tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self._pieces or (name in self._tensors and name not in self._stacked)

    def info(self, name: str) -> TensorInfo:
        """Where a tensor lies and what it is; of a piece that is scattered, where its slice lies."""
        if (piece := self._pieces.get(name)) is not None:
            whole = self.info(piece.stored)
            shape = piece.shape(whole.shape)
            begin = whole.offset + piece.offset(whole.shape, whole.dtype.itemsize)
            return TensorInfo(whole.file, whole.dtype, shape, begin, math.prod(shape) * whole.dtype.itemsize)
        try:
            return self._tensors[name]
        except KeyError:
            raise InputError(f"{self.folder} holds no tensor {name}") from None

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor; of one that was read ahead the same each time, not to be written to.

        Raises InputError when the file has become shorter than its header says.
        """
        coming = self._coming.get(name)
        return self._fetch(name, pinned=False) if coming is None else coming.result()

    def read_ahead(self, names: Iterable[str]) -> None:
        """Begins to read tensors in the background, into memory that a CUDA device copies from directly, to be kept until `forget`."""
        for name in names:
            if name not in self._coming:
                self._coming[name] = _readers().submit(self._fetch, name, pinned=True)

    def forget(self, names: Iterable[str]) -> None:
        """Gives back what was read ahead."""
        for name in names:
            coming = self._coming.pop(name, None)
            if coming is not None:
                coming.cancel()

    def _fetch(self, name: str, *, pinned: bool) -> Tensor:
        piece, info = self._pieces.get(name), self.info(name)
        if piece is None or piece.contiguous:
            return self._read(name, info, pinned)
        shape = piece.slice_shape(self.info(piece.stored).shape)
        around = replace(info, shape=shape, nbytes=math.prod(shape) * info.dtype.itemsize)
        return piece.cut(self._read(name, around, pinned)).contiguous()

    def _read(self, name: str, info: TensorInfo, pinned: bool) -> Tensor:
        raw = torch.empty(info.nbytes, dtype=torch.uint8, pin_memory=pinned)
        with open(self.folder / info.file, "rb", buffering=0) as file:
            self._fill(raw, file, name, info, 0)
        return raw.view(info.dtype).reshape(info.shape)

    def parts(self, name: str, size: int = 1 << 25) -> list[range]:
        """The bytes of a tensor cut into pieces of `size`, for `read_part`; those of one that is scattered in its file in one piece."""
        piece, nbytes = self._pieces.get(name), self.info(name).nbytes
        step = size if piece is None or piece.contiguous else max(nbytes, 1)
        return [range(start, min(start + step, nbytes)) for start in range(0, max(nbytes, 1), step)]

    def read_part(self, name: str, part: range) -> Tensor:
        """[n] the values of a tensor that lie in some of its bytes. Raises as `read`."""
        piece, info = self._pieces.get(name), self.info(name)
        if piece is not None and not piece.contiguous:
            return self.read(name).reshape(-1)
        raw = torch.empty(len(part), dtype=torch.uint8)
        with open(self.folder / info.file, "rb", buffering=0) as file:
            self._fill(raw, file, name, info, part.start)
        return raw.view(info.dtype)

    def _fill(self, raw: Tensor, file: FileIO, name: str, info: TensorInfo, start: int) -> None:
        """Bytes of a tensor from `start` on, as many as `raw` has."""
        view, done = raw.numpy().data, 0
        file.seek(info.offset + start)
        while done < raw.nbytes:
            count = file.readinto(view[done:])
            if not count:
                raise InputError(f"{self.folder / info.file} is truncated: tensor {name} ends after {start + done} of {info.nbytes} bytes")
            done += count


@functools.cache
def _readers() -> ThreadPoolExecutor:
    """Threads that read ahead: one does not keep up with a GPU, since copying out of the page cache takes it 0.3 s for a block of 8B."""
    return ThreadPoolExecutor(4, thread_name_prefix="gptqkit-read")


def _files(folder: Path) -> list[str]:
    """The safetensors files that make up the checkpoint: those of the index, or the only one, or all."""
    index = folder / INDEX_NAME
    if index.exists():
        return sorted(set(_weight_map(index).values()))
    found = sorted(path.name for path in folder.glob("*.safetensors"))
    if not found:
        pickles = sorted(path.name for path in folder.glob("*.bin"))
        hint = f" ({pickles[0]} is a pickle, which gptqkit never opens: convert it with transformers' save_pretrained)" if pickles else ""
        raise InputError(f"{folder} holds no *.safetensors files{hint}")
    if "model.safetensors" in found:
        return ["model.safetensors"]
    for name in found:
        if match := _NUMBERED.search(name):
            total = int(match[2])
            present = sum(1 for other in found if (m := _NUMBERED.search(other)) and int(m[2]) == total)
            if present != total:
                raise InputError(f"{folder}: {present} of {total} shards are there and {INDEX_NAME} is missing; download the folder again")
    return found


def _weight_map(index: Path) -> dict[str, str]:
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise InputError(f"{index} has no usable weight_map")
    for name, file in weight_map.items():
        if os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise InputError(f"{index}: tensor {name} points to {file!r}, which is not a safetensors file inside the folder")
    return weight_map


def _check_index(folder: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    for name, file in weight_map.items():
        if name not in tensors or tensors[name].file != file:
            raise InputError(f"{folder / file} does not hold tensor {name}, which {INDEX_NAME} says is there")


def _header(folder: Path, file: str) -> dict[str, TensorInfo]:
    path = folder / file
    if not path.is_file():
        raise InputError(f"{path} is missing; the checkpoint is incomplete, download it again")
    try:
        with safe_open(path, framework="pt"), open(path, "rb") as raw:
            start = int.from_bytes(raw.read(8), "little") + 8
            header = json.loads(raw.read(start - 8))
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{path} is not a complete safetensors file ({error}); download it again") from None
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise InputError(f"{path}: tensor {name} has dtype {entry['dtype']}; readable: {', '.join(_DTYPES)}")
        begin, end = entry["data_offsets"]
        tensors[name] = TensorInfo(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start + begin, end - begin)
    return tensors
