"""Where calibration documents come from: a file, a hub data set, or something in memory.

A file or a list is read whole, because it may be sorted and the sample must come from all of it. A stream (a hub data set, a
generator) may have no end: of it about four times as many tokens as are needed are read, and the sample is drawn from those.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from gptqkit.calibration.files import is_readable, read_file
from gptqkit.calibration.records import Document, Kind, documents_of
from gptqkit.core.errors import InputError
from gptqkit.data import calibration_texts

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<split>[\w.\[\]%:-]+))?")
_STREAM_FACTOR = 4
BUNDLED = "bundled text"
"""The name of the text that travels with the package."""


@dataclass(frozen=True, slots=True)
class Documents:
    """name is fit to be published: it holds no path; `whole` is False where only the beginning of a stream was read."""

    name: str
    kind: Kind
    items: list[Document]
    empty: int
    whole: bool


def read_documents(source: Any, *, column: str | None, tokens: int, sequences: int) -> Documents:
    """The documents of a source; None is the bundled text. Of a stream, enough for `tokens` tokens and `sequences` sequences.

    Raises InputError for a source that is missing, empty, unreadable, of mixed kinds, or of no kind that is known.
    """
    name, records, endless = _open(source, column)
    items: list[Document] = []
    empty, seen, whole = 0, 0, True
    for where, record in records:
        for document in documents_of(record, where, column):
            if document.kind == "text" and not document.content.strip():
                empty += 1
                continue
            if items and document.kind != items[0].kind:
                raise InputError(
                    f"{document.where} is {document.kind}, but {items[0].where} is {items[0].kind}; one source must be of one kind"
                )
            items.append(document)
            seen += document.rough_tokens
        if endless and seen >= _STREAM_FACTOR * tokens and len(items) >= sequences:
            whole = False
            break
    if not items:
        raise InputError(f"{name} holds no documents" + (f" but {empty} empty ones" if empty else ""))
    return Documents(name, items[0].kind, items, empty, whole)


def _open(source: Any, column: str | None) -> tuple[str, Iterator[tuple[str, Any]], bool]:
    """A publishable name, the records with their places, and whether they may have no end."""
    if source is None:
        return BUNDLED, read_file(calibration_texts(), column), False
    if isinstance(source, Path):
        return source.name, read_file(source, column), False
    if isinstance(source, str):
        return _open_string(source, column)
    if isinstance(source, Mapping):
        return _open_mapping(source)
    if isinstance(source, (bytes, bytearray)) or not isinstance(source, Iterable):
        raise InputError(
            f"calibration={source!r:.80} is a {type(source).__name__}; give a file, a hub data set id, texts, chats or token ids"
        )
    name = _name(source)
    return name, ((f"{name}, item {index}", record) for index, record in enumerate(source)), not hasattr(source, "__len__")


def _open_string(source: str, column: str | None) -> tuple[str, Iterator[tuple[str, Any]], bool]:
    if "\n" in source or len(source) > 1000:
        raise InputError(f"calibration={source[:40]!r}… is a text, not the name of a file; to calibrate on a text pass a list: [text]")
    path = Path(source)
    match = _HUB_ID.fullmatch(source)
    if path.exists() or match is None or is_readable(path):
        return path.name, read_file(path, column), False
    return _hub(match["name"], match["split"] or "train", source)


def _open_mapping(source: Mapping[str, Any]) -> tuple[str, Iterator[tuple[str, Any]], bool]:
    if "input_ids" in source:
        return "the given token ids", iter([("the given token ids", source)]), False
    keys = ", ".join(map(repr, source)) or "none"
    first = next(iter(source), "train")
    raise InputError(f"calibration is a mapping with the keys {keys}; if these are splits, pass one of them: data[{first!r}]")


def _name(source: Any) -> str:
    """What to call a source in memory. A Dataset of the datasets library tells where it came from; a path would not be published."""
    builder = getattr(getattr(source, "info", None), "builder_name", None)
    if builder:
        return f"data set {builder}"
    return f"the given {type(source).__name__}"


def _hub(name: str, split: str, source: str) -> tuple[str, Iterator[tuple[str, Any]], bool]:
    try:
        datasets = import_module("datasets")
    except ImportError:
        raise InputError(
            f"calibration={source!r} is no file here; as a hub data set it needs the datasets library: pip install 'gptqkit[data]'"
        ) from None
    try:
        stream = datasets.load_dataset(name, split=split, streaming=True)
    except (OSError, ValueError, RuntimeError, LookupError) as error:  # the library's own errors derive from these
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"calibration={source!r} is no file here, and as a hub data set (split {split!r}) it cannot be opened: {reason}. "
            "Give 'owner/name:split', or load it with the datasets library and pass the data set itself"
        ) from error
    return f"{name}:{split}", ((f"{name}:{split}, row {index}", record) for index, record in enumerate(stream)), True
