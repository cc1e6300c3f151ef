"""A safetensors file that is made tensor by tensor, without ever being whole in memory.

The format begins with a header that says where every tensor lies, so it can only be written once all are known. Until then they are
appended to a scratch file, from which they can be read again; a tensor that is replaced is appended anew. `publish` writes the header and
copies the tensors behind it, in the order and with the bytes of the safetensors library: most aligned first, then by name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from gptqkit.checkpoint.files import rename, writing

_RANK = (
    "BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64",
)  # fmt: skip
"""The library's order of dtypes, of which the last comes first in a file."""
_NAMES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32", torch.float32: "F32",
    torch.float64: "F64", torch.int64: "I64",
}  # fmt: skip
_CHUNK = 1 << 20


class Spool:
    """Tensors by name in the scratch file `path`; a context manager, which deletes it. Raises ResourceError or InputError as all writing.

    >>> with Spool(folder / "scratch") as spool:                          # doctest: +SKIP
    ...     spool.put("a.weight", torch.ones(2, 2))
    ...     digest = spool.publish(folder / "model.safetensors")
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._entries: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        """(offset, bytes, dtype, shape)."""
        self._end = 0

    def __enter__(self) -> Spool:
        with writing(self._path):
            self._file: BinaryIO = open(self._path, "w+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def put(self, name: str, tensor: Tensor) -> None:
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        view = flat.view(torch.uint8).numpy().data
        with writing(self._path):
            self._file.seek(self._end)
            done = 0
            while done < flat.nbytes:
                done += self._file.write(view[done:])
        self._entries[name] = (self._end, flat.nbytes, tensor.dtype, tuple(tensor.shape))
        self._end += flat.nbytes

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor."""
        _, nbytes, dtype, shape = self._entries[name]
        raw = torch.empty(nbytes, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        for chunk in self._chunks(name):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return raw.view(dtype).reshape(shape)

    def publish(self, path: Path) -> str:
        """Atomically writes the safetensors file (metadata format=pt) and returns its sha256."""
        names = sorted(self._entries, key=lambda name: (-_RANK.index(_NAMES[self._entries[name][2]]), name.encode()))
        temporary = path.with_name(path.name + ".tmp")
        digest = hashlib.sha256()
        with writing(path):
            with open(temporary, "wb") as file:
                for part in self._content(names):
                    digest.update(part)
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            rename(temporary, path)
        return digest.hexdigest()

    def _content(self, names: list[str]) -> Iterator[bytes]:
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in names:
            _, nbytes, dtype, shape = self._entries[name]
            header[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [end, end + nbytes]}
            end += nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        yield len(text).to_bytes(8, "little") + text
        for name in names:
            yield from self._chunks(name)

    def _chunks(self, name: str) -> Iterator[bytes]:
        offset, left, _, _ = self._entries[name]
        while left:
            self._file.seek(offset)
            chunk = self._file.read(min(left, _CHUNK))
            assert chunk, f"{self._path} was cut short"
            yield chunk
            offset, left = offset + len(chunk), left - len(chunk)
