"""Small real checkpoints to look at and to break: the bundled llama, rounded to nearest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.files import write_json, write_shard
from gptqkit.checkpoint.source import TensorSource
from gptqkit.checkpoint.writer import copy_side_files, shard_name, write_index
from gptqkit.core.config import LinearSpec
from gptqkit.formats import get_format

LLAMA = Path(__file__).parents[2] / "src" / "gptqkit" / "data" / "llama-tiny"
W4 = LinearSpec(4, 64, True)
Choose = Callable[[str], LinearSpec | None]


def build(folder: Path, format: str, choose: Choose = lambda name: W4, *, shards: int = 1, reorder: bool = False) -> Path:
    """Writes the bundled model with the blocks' linears quantized as `choose` says (None: left dense), over `shards` files."""
    source, layout = TensorSource.open(LLAMA), get_format(format)
    tensors: dict[str, Tensor] = {}
    specs, skipped = {}, []
    for tensor in source.names:
        name = tensor.removesuffix(".weight")
        spec = choose(name) if "_proj" in name else None
        if spec is None:
            tensors[tensor] = source.read(tensor)
            skipped += [name] if "_proj" in name else []
            continue
        weight_OI = source.read(tensor).float()
        group_I = torch.arange(weight_OI.shape[1], dtype=torch.int32).flip(0) // spec.group_size if reorder else None
        tensors |= {f"{name}.{local}": stored for local, stored in layout.encode(round_to_nearest(weight_OI, spec, group_I)).items()}
        specs[name] = spec
    folder.mkdir(parents=True, exist_ok=True)
    names, files = list(tensors), {}
    for number in range(1, shards + 1):
        part = names[(number - 1) * len(names) // shards : number * len(names) // shards]
        write_shard(folder / shard_name(number, shards), {name: tensors[name] for name in part})
        files |= dict.fromkeys(part, shard_name(number, shards))
    if shards > 1:
        write_index(folder, files, sum(tensor.nbytes for tensor in tensors.values()))
    copy_side_files(LLAMA, folder)
    quantization = layout.config(specs, skipped, desc_act=reorder, details={"damp_percent": 0.02})
    write_json(folder / "quantize_config.json", quantization)
    write_json(folder / "config.json", {**json.loads((LLAMA / "config.json").read_text()), "quantization_config": quantization})
    return folder


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of the quantization_config in both files."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    write_json(folder / "config.json", config)
    write_json(folder / "quantize_config.json", config["quantization_config"])


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrites the single weight file of `folder`."""
    source = TensorSource.open(folder)
    tensors = {name: source.read(name) for name in source.names}
    change(tensors)
    write_shard(folder / "model.safetensors", tensors)
