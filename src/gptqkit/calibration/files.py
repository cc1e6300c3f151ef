"""Records of a calibration file, one reader for each kind of file. Each yields `(where, record)`.

    .jsonl .ndjson      one JSON value a line; blank lines are left out
    .json               a list of values, or one value, or one value a line
    .csv .tsv           with a header row
    .parquet            needs pyarrow (the extra `data`)
    .txt .md .text      documents are separated by NUL characters. Without any, the file is one running text, cut at paragraph ends into
                        pieces of about 16,000 characters, so that a sample comes from all over it and still has long context

Each but parquet may be compressed with gzip (`.jsonl.gz`). Text is UTF-8.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from gptqkit.calibration.records import COLUMNS
from gptqkit.core.errors import InputError

_PIECE = 16_000
"""Characters: about 4,000 tokens, twice the usual sequence, so most windows lie in one piece."""

Records = Iterator[tuple[str, Any]]


def read_file(path: Path, column: str | None = None) -> Records:
    """The records of a file, by its suffix. Raises InputError for a missing, empty, unreadable or unknown file."""
    if path.is_dir():
        raise InputError(f"{path} is a folder; give one file ({_KNOWN}), or load it in Python and pass the data set itself")
    if not path.is_file():
        raise InputError(f"calibration file {path} does not exist")
    suffix = _suffix(path)
    if not is_readable(path):
        raise InputError(f"{path.name} is of an unknown kind; readable: {_KNOWN}, each but parquet also as .gz")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty")
    if suffix == ".parquet":
        return _parquet(path, column)
    text = _text(path)
    if not text.strip():
        raise InputError(f"{path} holds only white space")
    return _READERS[suffix](text, path.name)


def is_readable(path: Path) -> bool:
    """True if a file with this name is of a kind that `read_file` knows."""
    return _suffix(path) in _READERS or _suffix(path) == ".parquet"


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _text(path: Path) -> str:
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        wrong = error.object[error.start]
        raise InputError(f"{path} is not UTF-8 text (byte {error.start} is 0x{wrong:02x}); convert it to UTF-8") from None
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read: {error}") from None


def _jsonl(text: str, name: str) -> Records:
    # Split at \n only: str.splitlines also splits at U+2028 and other marks that may stand inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{name}, line {number}"
            try:
                yield where, json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f'{where} is not JSON: {error}; each line must be one JSON value such as {{"text": "…"}}') from None


def _json(text: str, name: str) -> Records:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            yield from _jsonl(text, name)
            return
        raise InputError(f"{name}, line {error.lineno} is not JSON: {error.msg}") from None
    except RecursionError:
        raise InputError(f"{name} is nested too deeply to be a list of records") from None
    if not isinstance(value, list):
        value = [value]
    if value and all(isinstance(item, int) for item in value):
        value = [value]
    for index, record in enumerate(value):
        yield f"{name}, record {index}", record


def _csv(text: str, name: str) -> Records:
    return _table(text, name, ",")


def _tsv(text: str, name: str) -> Records:
    return _table(text, name, "\t")


def _table(text: str, name: str, delimiter: str) -> Records:
    # The module's limit of 128 KiB a field is shorter than a book; it is one setting for the process, so it is put back.
    before = csv.field_size_limit(1 << 30)
    try:
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        records = [(f"{name}, line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise InputError(f"{name}: not a table of comma-separated values: {error}") from None
    finally:
        csv.field_size_limit(before)
    yield from records


def _plain(text: str, name: str) -> Records:
    pieces = text.split("\0") if "\0" in text else _cut(text)
    for index, piece in enumerate(pieces):
        yield f"{name}, document {index}", piece


def _cut(text: str) -> Iterator[str]:
    """Pieces of at least _PIECE characters that end at a paragraph, else a line, else a word, else after twice as many."""
    start = 0
    while start < len(text):
        stop = len(text)
        if stop - start > 2 * _PIECE:
            near, far = start + _PIECE, start + 2 * _PIECE
            found = (text.find(mark, near, far) for mark in ("\n\n", "\n", " "))
            stop = next((place for place in found if place >= 0), far)
        yield text[start:stop].strip("\n")
        start = stop


def _parquet(path: Path, column: str | None) -> Records:
    try:
        pyarrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(f"{path.name}: reading parquet needs pyarrow; pip install 'gptqkit[data]', or convert the file to jsonl") from None
    try:
        table = parquet.ParquetFile(path)
        names = table.schema_arrow.names
        wanted = [name for name in (*COLUMNS, "attention_mask", column) if name in names]
        row = 0
        for batch in table.iter_batches(batch_size=1024, columns=wanted or None):
            for record in batch.to_pylist():
                yield f"{path.name}, row {row}", record
                row += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is not a readable parquet file: {error}") from None


_READERS = {
    ".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv, ".txt": _plain, ".text": _plain, ".md": _plain,
}  # fmt: skip
_KNOWN = ", ".join((*_READERS, ".parquet"))
