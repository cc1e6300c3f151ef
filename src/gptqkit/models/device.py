"""Which device and dtype a run computes with, how much memory it may use, and how much it did use."""

from __future__ import annotations

import ctypes
import resource
import sys

import psutil
import torch

from gptqkit.core.errors import InputError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_device(device: str) -> torch.device:
    """The torch device of "auto", "cpu", "cuda" or "cuda:N". Raises InputError for one that is not here."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device={device!r}; allowed: auto, cpu, cuda, cuda:N") from None
    if resolved.type not in ("cpu", "cuda"):
        raise InputError(f"device={device!r}; this version computes on cpu or cuda")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"device={device!r}, but torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The dtype of the forward passes. "auto" is bfloat16 where the device multiplies it natively, else float32."""
    if dtype == "auto":
        return torch.bfloat16 if native_bfloat16(device) else torch.float32
    name = _SHORT.get(dtype, dtype)
    if name not in _DTYPES:
        raise InputError(f"dtype={dtype!r}; allowed: auto, {', '.join(_DTYPES)}")
    return _DTYPES[name]


def native_bfloat16(device: torch.device) -> bool:
    """True when bfloat16 products run in hardware: CUDA from sm_80 on, CPUs with AVX512-BF16 or AMX."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(probe() for probe in probes if probe is not None)


def available_memory(device: torch.device) -> int:
    """Bytes that can still be allocated: on the card, or in RAM."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def give_back_memory() -> None:
    """Returns freed heap pages to the system. glibc keeps blocks below 32 MB for reuse and its heap does not shrink by itself where
    something small lies at its end: a run of many phases would hold the sum of their scraps. Does nothing on other C libraries."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


class MemoryMeter:
    """Measures how far this process's memory rose since the meter was made.

    RAM: the kernel's high-water mark of the resident set less the resident set at the start (exact once it has been passed).
    CUDA: the allocator's peak.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start = psutil.Process().memory_info().rss
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    def host_growth(self) -> int:
        unit = 1 if sys.platform == "darwin" else 1024
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit - self._start)

    def device_peak(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
