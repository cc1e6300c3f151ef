"""Reading what somebody else wrote: tensors and config values are checked here, with errors that name them, before they are used."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from gptqkit.core.errors import InputError

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def tensor(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype, dims: int) -> Tensor:
    """The tensor called `name`, with that dtype and number of dimensions. Raises InputError."""
    if name not in tensors:
        raise InputError(f"{name} is missing; found {', '.join(sorted(tensors)) or 'nothing'}")
    found = tensors[name]
    if found.dtype != dtype:
        raise InputError(f"{name} has dtype {_dtype(found)}; expected {str(dtype).removeprefix('torch.')}")
    if found.dim() != dims or 0 in found.shape:
        raise InputError(f"{name} has shape {list(found.shape)}; expected {dims} non-empty dimensions")
    return found


def expect_shape(name: str, found: Tensor, shape: tuple[int, ...], cause: str) -> None:
    """Raises InputError that says why the shape should be another."""
    if tuple(found.shape) != shape:
        raise InputError(f"{name} has shape {list(found.shape)}; expected {list(shape)} for {cause}")


def half_scales(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    """A two-dimensional scale tensor as float16, whatever float type stores it. Raises InputError when that would change a value."""
    if name not in tensors:
        raise InputError(f"{name} is missing; found {', '.join(sorted(tensors)) or 'nothing'}")
    found = tensors[name]
    if found.dtype not in _FLOATS:
        raise InputError(f"{name} has dtype {_dtype(found)}; expected float16, bfloat16 or float32")
    if found.dim() != 2 or 0 in found.shape:
        raise InputError(f"{name} has shape {list(found.shape)}; expected 2 non-empty dimensions")
    if not bool(torch.isfinite(found).all()):
        raise InputError(f"{name} holds {int((~torch.isfinite(found)).sum())} values that are not finite")
    half = found.to(torch.float16)
    if found.dtype != torch.float16 and not torch.equal(half.to(found.dtype), found):
        worst = found[half.to(found.dtype) != found].abs().max().item()
        raise InputError(f"{name} is {_dtype(found)} and {worst:g} among its values is not a float16 number; scales are kept in float16")
    return half


def integer(config: Mapping[str, Any], key: str, low: int, high: int, *, also: tuple[int, ...] = (), default: int | None = None) -> int:
    """config[key] as an integer from low to high, or one of `also`. Raises InputError."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not (low <= value <= high or value in also):
        extra = "".join(f" or {a}" for a in also)
        raise InputError(f"quantization_config: {key}={value!r}; allowed: an integer from {low} to {high}{extra}")
    return value


def boolean(config: Mapping[str, Any], key: str, default: bool) -> bool:
    """config[key] as true or false. Raises InputError."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise InputError(f"quantization_config: {key}={value!r}; allowed: true, false")
    return value


def pattern(key: str, text: Any) -> re.Pattern[str]:
    """A regular expression of a config. Raises InputError."""
    try:
        return re.compile(text)
    except (re.error, TypeError) as error:
        raise InputError(f"quantization_config: {key}: {text!r} is not a regular expression ({error})") from None


def _dtype(found: Tensor) -> str:
    return str(found.dtype).removeprefix("torch.")
