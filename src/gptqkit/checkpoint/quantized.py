"""A quantized checkpoint folder, read linear by linear.

A linear is quantized because its packed tensors are in the files, not because the config says so: configs describe exceptions by pattern,
and patterns go wrong. The config only says how to read what is there, and where the two disagree nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.checkpoint.files import read_json
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import detect
from gptqkit.formats.protocol import Format

CONFIG_NAMES = ("quantize_config.json", "quant_config.json")
"""Where the quantization_config also is; the only place in checkpoints that AutoGPTQ wrote by itself."""


@dataclass(frozen=True, slots=True)
class QuantizedCheckpoint:
    """An open checkpoint: nothing but headers has been read.

    config        the whole config.json
    quantization  its quantization_config (or quantize_config.json, for old checkpoints)
    linears       the spec of each quantized linear, by module name, in file order
    dense_names   the tensors that are not part of a quantized linear
    """

    folder: Path
    config: dict[str, Any]
    quantization: dict[str, Any]
    format: Format
    source: TensorSource
    linears: dict[str, LinearSpec]
    dense_names: tuple[str, ...]

    @classmethod
    def open(cls, folder: Path) -> QuantizedCheckpoint:
        """Reads the configs and headers. Raises InputError: an unfinished run, not quantized, a layout that is not read, a broken or
        missing file, packed tensors that the config contradicts."""
        config = read_config(folder)
        quantization = find_quantization(folder, config)
        if quantization is None:
            raise InputError(f"{folder} is not quantized: config.json has no quantization_config; quantize it with `gptqkit quantize`")
        with reading(folder):
            layout = detect(quantization)
        source = TensorSource.open(folder)
        names, dense = _split(folder, source, layout)
        if not names:
            raise InputError(
                f"{folder}: the config says {layout.name}, but no tensor is called *.{layout.packed_name}; "
                "the weights are not quantized, or not in this layout"
            )
        with reading(folder):
            linears = layout.specs(quantization, names)
        return cls(folder, config, quantization, layout, source, linears, dense)

    def read_linear(self, name: str, device: torch.device | str = "cpu") -> QuantizedWeight:
        """One weight, on a device. Raises InputError that names the tensor which is missing, misshapen, out of range or truncated."""
        spec = self._spec(name)
        tensors = {local: self.source.read(f"{name}.{local}").to(device) for local in self.local_names(name)}
        with reading(self.folder, name):
            return self.format.decode(tensors, spec)

    def shape(self, name: str) -> tuple[int, int]:
        """(out_features, in_features) of a linear, without reading its codes. Raises InputError."""
        spec = self._spec(name)
        shapes = {local: self.source.info(f"{name}.{local}").shape for local in self.local_names(name)}
        with reading(self.folder, name):
            return self.format.shape(shapes, lambda local: self.source.read(f"{name}.{local}"), spec)

    def local_names(self, name: str) -> list[str]:
        """The tensors of one linear that are there, without the linear's name in front."""
        return sorted(local for local in self.format.tensor_names if f"{name}.{local}" in self.source)

    def read_tensor(self, name: str, local: str) -> Tensor:
        """One tensor of a linear, as stored."""
        return self.source.read(f"{name}.{local}")

    def nbytes(self, name: str) -> int:
        """Bytes of all tensors of one linear."""
        return sum(self.source.info(f"{name}.{local}").nbytes for local in self.local_names(name))

    def _spec(self, name: str) -> LinearSpec:
        try:
            return self.linears[name]
        except KeyError:
            raise InputError(f"{self.folder} holds no quantized linear {name}") from None


@contextmanager
def reading(folder: Path, name: str | None = None) -> Iterator[None]:
    """Puts the folder (and the linear) in front of an InputError's message, so that it says where."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{folder}: {name}: {error}" if name else f"{folder}: {error}") from None


def is_quantized(folder: Path) -> bool:
    """Whether the folder's config says that its weights are quantized, in whatever layout. Raises InputError as `read_config`."""
    return find_quantization(folder, read_config(folder)) is not None


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a finished model folder. Raises InputError for a missing or broken one, and for an unfinished run."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; expected a model folder with config.json and *.safetensors")
    if (folder / "gptqkit" / "journal").exists():
        raise InputError(f"{folder} is an unfinished run; finish it with `gptqkit quantize MODEL {folder} --resume`")
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} holds {type(config).__name__}; expected an object")
    return config


def find_quantization(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The quantization_config of config.json, else the file that older tools wrote beside it, else None. Raises InputError."""
    found = config.get("quantization_config")
    place = "config.json: quantization_config"
    if found is None:
        beside = next((name for name in CONFIG_NAMES if (folder / name).exists()), None)
        if beside is None:
            return None
        found, place = read_json(folder / beside), beside
    if not isinstance(found, dict) or not found:
        raise InputError(f"{folder}: {place} is {found!r}; expected an object with quant_method")
    return found


def _split(folder: Path, source: TensorSource, layout: Format) -> tuple[list[str], tuple[str, ...]]:
    """The quantized linears, and the tensors that belong to none. Raises InputError for parts of a linear without its codes."""
    packed = "." + layout.packed_name
    names = [name.removesuffix(packed) for name in source.names if name.endswith(packed)]
    known, dense = set(names), []
    for tensor in source.names:
        owner, _, local = tensor.rpartition(".")
        if local in layout.tensor_names and owner in known:
            continue
        if local in layout.tensor_names:
            raise InputError(f"{folder}: {tensor} is there without {owner}.{layout.packed_name}; the checkpoint is incomplete")
        if local == "weight" and owner in known:
            raise InputError(f"{folder}: {owner} has both a dense weight and {layout.packed_name}; one of them is left over")
        dense.append(tensor)
    return names, tuple(dense)
