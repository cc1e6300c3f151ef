"""Durable files: written beside their place, flushed to the disk, then renamed. A reader never sees half a file.

Failures that a user can cause (a full disk, a folder that may not be written) become errors that say which.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from gptqkit.core.errors import InputError, ResourceError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the operating system's refusals while writing `path` into ResourceError (full, vanished) or InputError (read-only)."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise ResourceError(f"no space left while writing {path}; free some disk and run again (quantize: with --resume)") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise InputError(f"{path} cannot be written ({error.strerror}); choose another output folder") from error
        raise ResourceError(f"writing {path} failed: {error.strerror or error}") from error
    except SafetensorError as error:
        if "No space left" in str(error) or "os error 28" in str(error) or "os error 122" in str(error):
            raise ResourceError(f"no space left while writing {path}; free some disk and run again (quantize: with --resume)") from error
        raise ResourceError(f"writing {path} failed: {error}") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Atomically replaces `path`. Raises ResourceError or InputError."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        rename(temporary, path)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    """As `write_bytes`; indented and newline-terminated, keys in the order given."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """The parsed file. Raises InputError that names the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not readable JSON: {error}") from None


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Atomically writes one safetensors file (metadata format=pt) and returns its sha256. Raises ResourceError or InputError."""
    temporary = path.with_name(path.name + ".tmp")
    with writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary, metadata={"format": "pt"})
        temporary.chmod(mode)  # safetensors makes its files private to the user; published ones follow the umask
        with open(temporary, "rb") as file:
            digest = _sha256(file)
            os.fsync(file.fileno())
        rename(temporary, path)
    return digest


def sha256(path: Path) -> str:
    """Hex digest of a file's content."""
    with open(path, "rb") as file:
        return _sha256(file)


def rename(source: Path, target: Path) -> None:
    """os.replace, and the folder's entry made durable."""
    os.replace(source, target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _sha256(file: Any) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
