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
from concurrent.futures import Executor, Future, wait
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

    def __init__(self, path: Path, writer: Executor | None = None) -> None:
        """With a `writer`, tensors are written by its thread; what goes wrong there is raised by the next `read` or `publish`. That thread
        itself sets `writer` to None before it goes on with a spool."""
        self._path = path
        self.writer = writer
        self._underway: list[Future[None]] = []
        self._entries: dict[str, tuple[int, int, torch.dtype, tuple[int, ...]]] = {}
        """(offset, bytes, dtype, shape)."""
        self._end = 0

    def __enter__(self) -> Spool:
        with writing(self._path):
            self._file: BinaryIO = open(self._path, "w+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        wait(self._underway)
        self._file.close()
        self._path.unlink(missing_ok=True)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def put(self, name: str, tensor: Tensor) -> None:
        """Takes a tensor, which must not be written to afterwards. With a writer, nothing waits for a CUDA device here."""
        flat = tensor.detach().contiguous().reshape(-1)
        entry = (self._end, flat.nbytes, tensor.dtype, tuple(tensor.shape))
        self._entries[name] = entry
        self._end += flat.nbytes
        if self.writer is None:
            self._write(flat.cpu(), entry[0])
        else:
            self._underway.append(self.writer.submit(self._write_fetched, *_fetched(flat), entry[0]))

    def _write_fetched(self, flat: Tensor, ready: torch.cuda.Event | None, offset: int) -> None:
        if ready is not None:
            ready.synchronize()
        self._write(flat, offset)

    def _write(self, flat: Tensor, offset: int) -> None:
        view = flat.view(torch.uint8).numpy().data
        done = 0
        with writing(self._path):
            while done < flat.nbytes:
                done += os.pwrite(self._file.fileno(), view[done:], offset + done)

    def _settle(self) -> None:
        underway, self._underway = self._underway, []
        for one in underway:
            one.result()

    def read(self, name: str) -> Tensor:
        """A fresh CPU tensor."""
        self._settle()
        _, nbytes, dtype, shape = self._entries[name]
        raw = torch.empty(nbytes, dtype=torch.uint8)
        view, done = raw.numpy().data, 0
        for chunk in self._chunks(name):
            view[done : done + len(chunk)] = chunk
            done += len(chunk)
        return raw.view(dtype).reshape(shape)

    def publish(self, path: Path) -> str:
        """Atomically writes the safetensors file (metadata format=pt) and returns its sha256."""
        self._settle()
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
            chunk = os.pread(self._file.fileno(), min(left, _CHUNK), offset)
            assert chunk, f"{self._path} was cut short"
            yield chunk
            offset, left = offset + len(chunk), left - len(chunk)


def _fetched(flat: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A CPU copy of a CUDA device's tensor, which is there once the event has come about."""
    if not flat.is_cuda:
        return flat, None
    host, ready = torch.empty_like(flat, device="cpu", pin_memory=True), torch.cuda.Event()
    host.copy_(flat, non_blocking=True)
    ready.record()
    return host, ready
