"""`load`, `enable` and `disable`: formats and kernels meet transformers. transformers itself is only touched in gptqkit.hf.

save_pretrained of a loaded model writes config.json and the weights, through transformers. It writes no quantize_config.json, because
no hook of transformers knows the folder; engines read `quantization_config` in config.json first.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from gptqkit.checkpoint.quantized import find_quantization, read_config
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.formats import detect
from gptqkit.formats.protocol import Format
from gptqkit.hf import quantizer
from gptqkit.kernels.dispatch import KERNELS, forced_backend
from gptqkit.kernels.linear import QuantLinear

_log = logging.getLogger("gptqkit")
_backend: ContextVar[str | None] = ContextVar("backend", default=None)
_lock = RLock()

_DTYPES = {
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Packed:
    """One quantized linear as the file headers describe it: dtype and shape of each of its tensors by local name."""

    format: Format
    spec: LinearSpec
    tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]


class KernelBinding:
    """gptqkit.hf.quantizer.Binding over gptqkit.formats and gptqkit.kernels."""

    def claims(self, config: Mapping[str, Any]) -> bool:
        try:
            detect(config).specs(config, [])
        except InputError as reason:
            _log.warning("gptqkit leaves this checkpoint to transformers' own loader: %s", reason)
            return False
        return True

    def read(self, config: Mapping[str, Any], files: Sequence[str]) -> tuple[set[str], dict[str, Any]]:
        layout = detect(config)
        headers = _headers(files)
        suffix = f".{layout.packed_name}"
        stems = [name.removesuffix(suffix) for name in headers if name.endswith(suffix)]
        if not stems:
            raise InputError(f"config.json says the model is quantized ({layout.name}), but its files hold no tensor named *{suffix}")
        packed = {}
        for stem, spec in layout.specs(config, stems).items():
            found = {local: headers[f"{stem}.{local}"] for local in sorted(layout.tensor_names) if f"{stem}.{local}" in headers}
            for local, (dtype, _) in found.items():
                if dtype not in _DTYPES:
                    raise InputError(f"tensor {stem}.{local} has dtype {dtype}; readable: {', '.join(_DTYPES)}")
            packed[stem] = Packed(layout, spec, {local: (_DTYPES[dtype], shape) for local, (dtype, shape) in found.items()})
        return set(headers), packed

    def build(self, packed: Packed, place: quantizer.Place, backend: str | None) -> nn.Module:
        tensors = {local: torch.empty(shape, dtype=dtype, device="meta") for local, (dtype, shape) in packed.tensors.items()}
        return QuantLinear(
            place.in_features, place.out_features, format=packed.format, spec=packed.spec, tensors=tensors, bias=place.bias,
            dtype=place.dtype, backend=backend, name=place.name,
        )  # fmt: skip

    def owns(self, module: nn.Module) -> bool:
        return isinstance(module, QuantLinear)

    def finish(self, module: nn.Module) -> None:
        assert isinstance(module, QuantLinear)
        module.loaded()

    def dequantize(self, module: nn.Module, dtype: torch.dtype | None) -> Tensor:
        assert isinstance(module, QuantLinear)
        return module.dequantize(dtype)

    def backend(self, name: str | None) -> str | None:
        """`load(backend=...)` first; then GPTQConfig(backend=...), whose other values name other libraries' kernels."""
        return _backend.get() or (name if name in {kernel.name for kernel in KERNELS} else None)


def enable() -> None:
    """Makes transformers load gptq and compressed-tensors (pack-quantized) checkpoints through gptqkit. Idempotent.

    Other compressed-tensors formats, and gptq checkpoints that gptqkit cannot read, still go to transformers' own loader.
    """
    with _lock:
        quantizer.install(KernelBinding())


def disable() -> None:
    """Undoes `enable`: transformers' entries are what they were before. Models that are loaded keep working."""
    with _lock:
        quantizer.uninstall()


@contextmanager
def enabled() -> Iterator[None]:
    """`enable` for the duration, left as it was found. Only one thread at a time is inside."""
    with _lock:
        installed = quantizer.install(KernelBinding())
        try:
            yield
        finally:
            if installed:
                quantizer.uninstall()


def load_model(model: str | Path, *, device: Any = None, dtype: Any = None, backend: str | None = None, **kwargs: Any) -> Any:
    """A transformers causal LM from a folder or hub id; quantized linears run on our kernels. A dense model loads as it is.

    device   "cpu", "cuda", "cuda:1", a torch.device; "auto" spreads over all devices (needs accelerate). None: as from_pretrained
    dtype    a torch dtype, its name, or "auto" (None: from_pretrained's default, which is what config.json says)
    backend  forces a kernel by name; None takes the first that accepts each linear
    kwargs   for AutoModelForCausalLM.from_pretrained; repository code runs only with trust_remote_code=True among them

    Raises InputError for an unfinished run, a folder that is no model, a missing or malformed tensor, a backend that refuses.
    """
    if backend is not None:
        forced_backend(backend)
    _check_folder(model)
    if dtype is not None:
        kwargs["dtype"] = dtype
    move_to = None
    if device is not None:
        if "device_map" in kwargs:
            raise InputError(f"device={device!r} and device_map={kwargs['device_map']!r} say the same thing; pass one of them")
        if str(device) == "auto" or find_spec("accelerate") is not None:
            kwargs["device_map"] = "auto" if str(device) == "auto" else {"": torch.device(device)}
        else:
            move_to = torch.device(device)  # from_pretrained's device_map needs accelerate, even for one device
    token = _backend.set(backend)
    try:
        with enabled():
            loaded = quantizer.from_pretrained(model, _old_layout(model) if "config" not in kwargs else {}, **kwargs)
    finally:
        _backend.reset(token)
    return loaded if move_to is None else loaded.to(move_to)


def _check_folder(model: str | Path) -> None:
    """Raises InputError for a path that is not there, no model folder, or an unfinished run. A hub id is left to from_pretrained."""
    folder = Path(model).expanduser()
    if folder.exists():
        read_config(folder)
    elif isinstance(model, Path) or str(model).startswith((".", "/", "~")) or str(model).count("/") > 1:
        raise InputError(f"{model} does not exist; expected a model folder or a hub id such as org/name")


def _old_layout(model: str | Path) -> dict[str, Any]:
    """What from_pretrained has to be told about a folder as AutoGPTQ wrote it: options beside config.json, an own file name."""
    folder = Path(model).expanduser()
    if not folder.is_dir():
        return {}
    config = read_config(folder)
    found = find_quantization(folder, config)
    if found is None or "quantization_config" in config:
        return {}
    told: dict[str, Any] = {"quantization_config": {"quant_method": detect(found).name.partition("_")[0], **found}}
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    if len(files) == 1 and files[0] != "model.safetensors":
        told["transformers_weights"] = files[0]
    return told


def _headers(files: Sequence[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name -> (safetensors dtype, shape) of every tensor in the files. Raises InputError naming a file that cannot be read."""
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in files:
        if not path.endswith(".safetensors"):
            raise InputError(f"{path} is not a safetensors file; gptqkit reads no other format")
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (safe_open is no mapping)
                    view = file.get_slice(name)
                    found[name] = (view.get_dtype(), tuple(view.get_shape()))
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a complete safetensors file ({error}); download it again") from None
    return found
