"""What this machine is, which backends it can run, and which one each linear shape of a checkpoint gets, with every refusal.

Only configs and file headers are read: no weight is loaded, nothing is computed, no device is allocated on.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch

from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.hf.skeleton import hub_cache, resolve_model
from gptqkit.kernels.dispatch import KERNELS, Decision, decide, forced_backend
from gptqkit.kernels.protocol import Request

PACKAGES = ("torch", "transformers", "safetensors", "accelerate", "compressed-tensors", "triton", "peft")
CPU_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8", "asimd", "bf16", "i8mm", "sve")
"""Instruction sets that decide how fast low-precision products run on a CPU, by their names in /proc/cpuinfo."""


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """A place to compute. `bfloat16`: multiplied in hardware."""

    name: str
    description: str
    memory: int
    available: int
    bfloat16: bool
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class BackendInfo:
    """A kernel and why it cannot run here at all; None when it can."""

    name: str
    unavailable: str | None


@dataclass(frozen=True, slots=True)
class LinearInfo:
    """All linears of a checkpoint that look the same to a kernel, and what each kernel says to them on one device.

    example    the name of one of them; `count` says how many there are
    decisions  (backend, refusal or None) in order of preference; `chosen` is the first without a refusal, None when all refuse
    """

    device: str
    dtype: str
    count: int
    example: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool
    act_order: bool
    bias: bool
    chosen: str | None
    decisions: tuple[tuple[str, str | None], ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The answer of `gptqkit doctor`; sizes in bytes.

    packages  versions; None: not installed
    forced    the backend that GPTQKIT_BACKEND asks for
    cache     where hub downloads go, and what is free on that disk
    linears   empty without a model
    """

    python: str
    system: str
    packages: dict[str, str | None]
    devices: tuple[DeviceInfo, ...]
    cache: str
    cache_free: int
    forced: str | None
    backends: tuple[BackendInfo, ...]
    model: str | None
    format: str | None
    linears: tuple[LinearInfo, ...]

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; `decisions` become a list of {"backend", "refusal"}."""
        plain = asdict(self)
        for linear in plain["linears"]:
            linear["decisions"] = [{"backend": backend, "refusal": refusal} for backend, refusal in linear["decisions"]]
        return plain


def diagnose(model: str | Path | None = None) -> Diagnosis:
    """Looks at this machine and, when given, at the headers of a quantized checkpoint (a folder or a hub id).

    Raises InputError for a model that is not there or not quantized in a format that is read, and for an unknown GPTQKIT_BACKEND.
    """
    forced = forced_backend()
    checkpoint = None if model is None else QuantizedCheckpoint.open(resolve_model(str(model)))
    devices = tuple(_devices())
    cache = hub_cache()
    return Diagnosis(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        packages={name: _version(name) for name in PACKAGES},
        devices=devices,
        cache=str(cache),
        cache_free=shutil.disk_usage(_existing(cache)).free,
        forced=forced,
        backends=tuple(BackendInfo(kernel.name, kernel.unavailable()) for kernel in KERNELS),
        model=None if model is None else str(model),
        format=None if checkpoint is None else checkpoint.format.name,
        linears=() if checkpoint is None else tuple(_linears(checkpoint, [device.name for device in devices])),
    )


def _linears(checkpoint: QuantizedCheckpoint, devices: Iterable[str]) -> Iterable[LinearInfo]:
    dtype = _dtype(checkpoint)
    alike: dict[Request, list[str]] = {}
    for name in checkpoint.linears:
        alike.setdefault(_request(checkpoint, name, dtype), []).append(name)
    kinds = dict.fromkeys(device.partition(":")[0] for device in devices)  # equal cards get equal answers
    for kind in kinds:
        for request, names in alike.items():
            asked = Request(**{**asdict(request), "device": kind})
            decisions = decide(asked)
            yield LinearInfo(
                kind, str(dtype).removeprefix("torch."), len(names), names[0], asked.out_features, asked.in_features, asked.bits,
                asked.group_size, asked.sym, asked.act_order, asked.bias, _chosen(decisions),
                tuple((decision.kernel.name, decision.refusal) for decision in decisions),
            )  # fmt: skip


def _request(checkpoint: QuantizedCheckpoint, name: str, dtype: torch.dtype) -> Request:
    spec = checkpoint.linears[name]
    out_features, in_features = checkpoint.shape(name)
    local = set(checkpoint.local_names(name))
    # gptq files carry a g_idx in either order; whether it is in activation order is only in the config
    ordered = "weight_g_idx" in local or (checkpoint.quantization.get("desc_act") is True and "g_idx" in local)
    return Request(
        bits=spec.bits, group_size=spec.group_size, sym=spec.sym, in_features=in_features, out_features=out_features, dtype=dtype,
        device="cpu", act_order=ordered and spec.group_size != -1, bias=f"{name}.bias" in checkpoint.source,
    )  # fmt: skip


def _dtype(checkpoint: QuantizedCheckpoint) -> torch.dtype:
    """What from_pretrained computes in by default: what config.json says, else that of the first float tensor."""
    for values in (checkpoint.config, checkpoint.config.get("text_config") or {}):
        named = getattr(torch, str(values.get("dtype") or values.get("torch_dtype")).removeprefix("torch."), None)
        if isinstance(named, torch.dtype):
            return named
    found = (checkpoint.source.info(name).dtype for name in checkpoint.dense_names)
    return next((dtype for dtype in found if dtype.is_floating_point), torch.float32)


def _chosen(decisions: Iterable[Decision]) -> str | None:
    return next((decision.kernel.name for decision in decisions if decision.refusal is None), None)


def _devices() -> Iterable[DeviceInfo]:
    memory = psutil.virtual_memory()
    model, flags = _processor()
    # torch's own probes: the flag names differ between processor families
    probes = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    native = any(probe() for probe in probes if probe is not None) or "bf16" in flags
    yield DeviceInfo("cpu", f"{model}, {psutil.cpu_count()} cores", memory.total, memory.available, native, flags)
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(index)
        free = torch.cuda.mem_get_info(index)[0]
        capability = f"sm_{card.major}{card.minor}"
        yield DeviceInfo(f"cuda:{index}", card.name, card.total_memory, free, card.major >= 8, (capability,))


def _processor() -> tuple[str, tuple[str, ...]]:
    """The CPU's name and those of CPU_FLAGS it has; where there is no /proc/cpuinfo, what torch found."""
    info = Path("/proc/cpuinfo")
    if not info.exists():
        return platform.processor() or platform.machine(), (torch.backends.cpu.get_cpu_capability().lower(),)
    fields: dict[str, str] = {}
    for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    present = set((fields.get("flags") or fields.get("features") or "").split())
    return fields.get("model name") or platform.machine(), tuple(flag for flag in CPU_FLAGS if flag in present)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())
