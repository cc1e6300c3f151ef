"""From one quantized layout to another: the same codes, scales and zero points, packed differently. Nothing is ever requantized.

Every linear is read and asked about before anything is written, so a refusal (or a broken file) leaves nothing behind. The new checkpoint
grows in OUT/gptqkit/partial, shard by shard, and is moved into place when it is complete, config.json last.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from gptqkit.checkpoint.files import rename, write_json, write_shard, writing
from gptqkit.checkpoint.quantized import QuantizedCheckpoint, reading
from gptqkit.checkpoint.writer import copy_side_files, shard_name, side_files, write_index
from gptqkit.core.errors import InputError, ResourceError
from gptqkit.core.events import Emit, Event
from gptqkit.formats import get_format
from gptqkit.formats.protocol import Format

OWN = "gptqkit"
"""The subfolder of a checkpoint that holds our own records."""

SHARD_BYTES = 1 << 30
_EMBEDDINGS = ("emb", "wte", "wpe")


@dataclass(frozen=True, slots=True)
class Conversion:
    """What was converted. Bytes are those of the tensors; `files` are the weight files written."""

    source_format: str
    format: str
    linears: int
    dense_tensors: int
    bytes_before: int
    bytes_after: int
    files: list[str]
    copied: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def convert_checkpoint(model: Path, out: Path, *, format: str, overwrite: bool, emit: Emit) -> Conversion:
    """Writes the quantized checkpoint `model` into the folder `out` in another format. At most about a gigabyte is held in memory.

    Raises InputError (nothing written) when a tensor cannot be represented without loss, which it names, when the input is broken, or when
    `out` would lose something; ResourceError when the disk is full (what was written is removed again).
    """
    target = get_format(format)
    _check_out(out, model, overwrite)
    source = QuantizedCheckpoint.open(model)
    side_files(model)
    desc_act = _check_linears(source, target, emit)
    config = _config(source, target, desc_act)
    with _partial(out, source.source.nbytes) as folder:
        files, after = _write_shards(source, target, folder, emit)
        shards = sorted(set(files.values()))
        if len(shards) > 1:
            write_index(folder, files, after)
        copied = copy_side_files(model, folder)
        result = Conversion(
            source.format.name, target.name, len(source.linears), len(source.dense_names), source.source.nbytes, after, shards, copied
        )
        (folder / OWN).mkdir()
        write_json(folder / OWN / "convert.json", result.to_dict())
        write_json(folder / "quantize_config.json", config)
        write_json(folder / "config.json", {**source.config, "quantization_config": config})
        _publish(folder, out)
    return result


def _check_out(out: Path, model: Path, overwrite: bool) -> None:
    """Refuses an output folder that would lose something. Raises InputError; touches nothing."""
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; the output is a folder")
    if model.resolve().is_relative_to(out.resolve()):
        raise InputError(f"{out} is or contains the model folder {model}; choose another output folder")
    if not out.exists():
        return
    inside = {path.name for path in out.iterdir()}
    if (out / OWN / "journal").exists():
        raise InputError(f"{out} holds an unfinished run of quantize; choose another output folder")
    if inside <= {OWN} and not (out / OWN / "run.json").exists():
        return
    if not any((out / OWN / record).exists() for record in ("run.json", "convert.json")):
        raise InputError(f"{out} is not empty and was not written by gptqkit; choose another folder, or empty it yourself")
    if not overwrite:
        raise InputError(f"{out} holds a finished checkpoint; write elsewhere, or replace it with --overwrite")


def _check_linears(source: QuantizedCheckpoint, target: Format, emit: Emit) -> bool:
    """Reads every linear and raises InputError for the first that `target` cannot hold. True when one has its groups reordered."""
    emit(Event("stage", f"checking that {target.name} can hold every linear", {"name": "check"}))
    if source.quantization.get("kv_cache_scheme") and target.name != source.format.name:
        raise InputError(f"{source.folder}: its kv_cache_scheme would be lost: {target.name} describes weights only")
    desc_act = False
    for name in source.linears:
        weight = source.read_linear(name)
        if reason := target.refuses(weight):
            raise InputError(f"{name} cannot be stored without loss: {reason}. Nothing was written")
        desc_act |= weight.group_I is not None
        emit(Event("linear", name, {"name": name}))
    return desc_act


def _config(source: QuantizedCheckpoint, target: Format, desc_act: bool) -> dict[str, Any]:
    """The new quantization_config; facts about how the weights were made are carried over."""
    old = source.quantization
    meta = old.get("meta") if isinstance(old.get("meta"), Mapping) else {}
    details: dict[str, Any] = {key: old[key] for key in ("damp_percent", "true_sequential", "static_groups") if key in old}
    details |= {key: value for key, value in dict(meta or {}).items() if key != "quantizer"}
    if meta and "quantizer" in meta:
        details["source_quantizer"] = meta.get("source_quantizer", meta["quantizer"])
    details["source_format"] = source.format.name
    with reading(source.folder):
        return target.config(source.linears, _left_dense(source), desc_act=desc_act, details=details)


def _left_dense(source: QuantizedCheckpoint) -> list[str]:
    """Modules that look like linears left in full precision: two-dimensional weights that are no embedding."""
    weights = (name for name in source.dense_names if name.endswith(".weight") and len(source.source.info(name).shape) == 2)
    modules = (name.removesuffix(".weight") for name in weights)
    return [name for name in modules if not any(mark in name.rpartition(".")[2] for mark in _EMBEDDINGS)]


def _shards(source: QuantizedCheckpoint) -> list[list[str]]:
    """Names of linears and dense tensors in the order of the source's files, cut so that a shard stays under SHARD_BYTES."""
    sizes = {}
    for tensor in source.source.names:
        owner, _, local = tensor.rpartition(".")
        if owner in source.linears and local == source.format.packed_name:
            sizes[owner] = source.nbytes(owner)
    sizes |= {name: source.source.info(name).nbytes for name in source.dense_names}
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _write_shards(source: QuantizedCheckpoint, target: Format, folder: Path, emit: Emit) -> tuple[dict[str, str], int]:
    """Tensor name to file, and the bytes of all tensors."""
    emit(Event("stage", f"writing {target.name}", {"name": "write"}))
    shards = _shards(source)
    files: dict[str, str] = {}
    total = 0
    for number, names in enumerate(shards, start=1):
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in source.linears:
                encoded = target.encode(source.read_linear(name))
                tensors |= {f"{name}.{local}": tensor for local, tensor in encoded.items()}
                emit(Event("linear", name, {"name": name}))
            else:
                tensors[name] = source.source.read(name)
        file = shard_name(number, len(shards))
        write_shard(folder / file, tensors)
        files |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    return files, total


@contextmanager
def _partial(out: Path, needed: int) -> Iterator[Path]:
    """A fresh folder inside `out` to build in; gone afterwards, and `out` with it when it was made here and nothing was published."""
    created = not out.exists()
    folder = out / OWN / "partial"
    with writing(out):
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    try:
        free = shutil.disk_usage(out).free
        if free < needed:
            raise ResourceError(f"{out} needs about {needed / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free; free some space")
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if created and not (out / "config.json").exists():
            shutil.rmtree(out, ignore_errors=True)


def _publish(folder: Path, out: Path) -> None:
    """Replaces what `out` holds by what `folder` holds. config.json goes first and comes last, so that `out` is never half and half."""
    with writing(out):
        (out / "config.json").unlink(missing_ok=True)
        for path in out.iterdir():
            if path.name != OWN:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in (out / OWN).iterdir():
            if path != folder:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        for path in sorted((p for p in folder.rglob("*") if p.is_file()), key=lambda p: (p == folder / "config.json", str(p))):
            place = out / path.relative_to(folder)
            place.parent.mkdir(exist_ok=True)
            rename(path, place)
