"""One record of a data set, whatever its shape, as one or more documents.

"text"  or  {"text": "…"}                                  -> a text
[{"role": …, "content": …}, …]  or  {"messages": […]}      -> a chat
[1, 5, …], a tensor [T] or [B, T], or  {"input_ids": …}    -> token ids; where "attention_mask" is 0 they are padding and removed
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gptqkit.core.errors import InputError

Kind = Literal["text", "chat", "token ids"]
COLUMNS = ("input_ids", "messages", "text")
"""The columns that are looked for, first match wins."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text (str), a chat (list of messages) or token ids (list of int), and where it was, for messages."""

    kind: Kind
    content: Any
    where: str

    @property
    def rough_tokens(self) -> int:
        """About how many tokens it will be (four characters each), to know how much of an endless source to read."""
        if self.kind == "token ids":
            return len(self.content)
        if self.kind == "text":
            return len(self.content) // 4
        return sum(len(str(message.get("content", ""))) for message in self.content) // 4


def documents_of(record: Any, where: str, column: str | None = None) -> list[Document]:
    """The documents in one record. Raises InputError that names the place, what was found and what can be read."""
    if isinstance(record, Mapping):
        return _from_mapping(record, where, column)
    return _from_value(record, where, None)


def _from_mapping(record: Mapping[str, Any], where: str, column: str | None) -> list[Document]:
    if column is None:
        column = next((name for name in COLUMNS if name in record), None)
    if column is None or column not in record:
        wanted = f"no column {column!r}" if column else "no column 'text', 'messages' or 'input_ids'"
        there = ", ".join(map(str, record)) or "none"
        raise InputError(f"{where}: {wanted}; columns there: {there}. Rename the one that holds the text to 'text'")
    mask = record.get("attention_mask") if column == "input_ids" else None
    return _from_value(record[column], f"{where}, {column}", mask)


def _from_value(value: Any, where: str, mask: Any) -> list[Document]:
    if isinstance(value, str):
        return [Document("text", value, where)]
    if isinstance(value, Sequence) and len(value) > 0 and all(isinstance(message, Mapping) for message in value):
        return [Document("chat", _messages(value, where), where)]
    if isinstance(value, Tensor) or hasattr(value, "__array__") or _numbers(value):
        return [Document("token ids", ids, where) for ids in _token_ids(value, mask, where)]
    found = "an empty list" if isinstance(value, Sequence) and len(value) == 0 else f"{type(value).__name__} {value!r:.60}"
    raise InputError(f"{where}: expected a text, chat messages with role and content, or token ids; found {found}")


def _messages(value: Sequence[Mapping[str, Any]], where: str) -> list[dict[str, Any]]:
    for index, message in enumerate(value):
        if "role" not in message:
            raise InputError(f"{where}: message {index} has no 'role' (keys there: {', '.join(map(str, message)) or 'none'})")
    return [dict(message) for message in value]


def _numbers(value: Any) -> bool:
    """A non-empty list of ints, or of such lists. Booleans and floats count too, so that the message can say what is wrong with them."""
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)) or len(value) == 0:
        return False
    return all(isinstance(item, (int, float)) or _numbers(item) for item in value)


def _token_ids(value: Any, mask: Any, where: str) -> list[list[int]]:
    ids_BT = _integers(value, where, "token ids")
    mask_BT = torch.ones_like(ids_BT) if mask is None else _integers(mask, where, "attention_mask")
    if ids_BT.shape != mask_BT.shape:
        shapes = f"token ids of shape {list(ids_BT.shape)} with an attention_mask of shape {list(mask_BT.shape)}"
        raise InputError(f"{where}: {shapes}; they must agree")
    rows = [ids_T[mask_T != 0].tolist() for ids_T, mask_T in zip(ids_BT, mask_BT, strict=True)]
    if not rows or not all(rows):
        raise InputError(f"{where}: an empty sequence of token ids; leave it out")
    return rows


def _integers(value: Any, where: str, name: str) -> Tensor:
    """As an int64 tensor [B, T]; one sequence gets B = 1."""
    try:
        tensor = torch.as_tensor(value)
    except (ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: {name} are not a rectangular list of integers ({error}); give one list for each sequence") from None
    whole = not (tensor.is_floating_point() or tensor.is_complex() or (tensor.dtype == torch.bool and name == "token ids"))
    if not whole or tensor.dim() not in (1, 2):
        found = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        raise InputError(f"{where}: {name} must be integers of shape [T] or [B, T]; found {found}")
    return torch.atleast_2d(tensor.to("cpu", torch.int64))
