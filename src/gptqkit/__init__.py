"""gptqkit: post-training quantization of language models, with proof.

Importing it is inert: no torch, no CUDA, no environment writes, nothing patched. Names are loaded when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gptqkit.core.version import __version__ as __version__

if TYPE_CHECKING:
    from gptqkit.api import convert, disable, enable, evaluate, inspect, load, plan, quantize, verify
    from gptqkit.core.config import QuantConfig, Rule
    from gptqkit.core.errors import CheckFailed, GptqkitError, InputError, ResourceError

_ORIGIN = {
    **dict.fromkeys(("convert", "disable", "enable", "evaluate", "inspect", "load", "plan", "quantize", "verify"), "gptqkit.api"),
    **dict.fromkeys(("QuantConfig", "Rule"), "gptqkit.core.config"),
    **dict.fromkeys(("CheckFailed", "GptqkitError", "InputError", "ResourceError"), "gptqkit.core.errors"),
}

__all__ = [
    "CheckFailed",
    "GptqkitError",
    "InputError",
    "QuantConfig",
    "ResourceError",
    "Rule",
    "convert",
    "disable",
    "enable",
    "evaluate",
    "inspect",
    "load",
    "plan",
    "quantize",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in _ORIGIN:
        return getattr(import_module(_ORIGIN[name]), name)
    raise AttributeError(f"module 'gptqkit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
