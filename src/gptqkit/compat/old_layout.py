"""Checkpoint folders as old AutoGPTQ versions wrote them, seen as the standard layout.

Before transformers learned to read gptq, the weights were in `gptq_model-4bit-128g.safetensors` (or a name of the user's) and the recipe
only in quantize_config.json. Loading goes through transformers, which wants `model.safetensors` and a `quantization_config` inside
config.json: a temporary folder with links to the files and a completed config.json gives it that. The user's folder is not touched.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from gptqkit.checkpoint.files import read_json, write_json
from gptqkit.core.errors import InputError

_STANDARD = ("model.safetensors", "model.safetensors.index.json")


def standard_view(folder: Path, basename: str | None, recipe: dict[str, Any] | None) -> TemporaryDirectory[str] | None:
    """A temporary folder in the standard layout, or None when `folder` already is in it.

    basename  the weights' file name without ".safetensors", if the user gave one
    recipe    the quantization config, if the user gave one: its values replace those in the folder
    Raises InputError when the weights or the recipe cannot be found.
    """
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise InputError(f"{folder / 'config.json'} is not a model configuration")
    weights = _weights(folder, basename)
    if weights is None and recipe is None and "quantization_config" in config:
        return None
    config["quantization_config"] = _recipe(folder, config, recipe)
    view = TemporaryDirectory(prefix="gptqkit-view-")
    target = Path(view.name)
    for path in folder.iterdir():
        is_weights = path.suffix == ".safetensors" or path.name in _STANDARD
        if path.is_file() and path.name != "config.json" and not (weights is not None and is_weights):
            _link(path, target / path.name)
    if weights is not None:
        _link(weights, target / "model.safetensors")
    write_json(target / "config.json", config)
    return view


def _weights(folder: Path, basename: str | None) -> Path | None:
    """The weights' file if it is not under the standard name, else None."""
    if basename is not None and basename.removesuffix(".safetensors") != "model":
        path = folder / f"{basename.removesuffix('.safetensors')}.safetensors"
        if path.is_file():
            return path
        if not any((folder / name).is_file() for name in _STANDARD):
            raise InputError(f"{path} does not exist, and {folder} has no model.safetensors; leave out model_basename, or correct it")
        return None
    if any((folder / name).is_file() for name in _STANDARD):
        return None
    found = sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    pickles = sorted(path.name for path in (*folder.glob("*.bin"), *folder.glob("*.pt")))
    if not found and pickles:
        raise InputError(f"{folder} holds {pickles[0]}, a pickle, which gptqkit never opens; download the safetensors files of this model")
    names = ", ".join(path.name for path in found) or "none"
    raise InputError(f"{folder} has no model.safetensors and not exactly one other *.safetensors file ({names}); name it: model_basename=…")


def _recipe(folder: Path, config: dict[str, Any], recipe: dict[str, Any] | None) -> dict[str, Any]:
    """What the folder says, with the user's values over it."""
    stored: Any = config.get("quantization_config")
    if not isinstance(stored, dict):
        name = next((name for name in ("quantize_config.json", "quant_config.json") if (folder / name).is_file()), None)
        stored = read_json(folder / name) if name else {}
    if not stored and recipe is None:
        raise InputError(f"{folder} has no quantization config (config.json, quantize_config.json); pass quantize_config=…")
    merged = {"quant_method": "gptq", "checkpoint_format": "gptq"} | stored | (recipe or {})
    return {key: value for key, value in merged.items() if value is not None}


def _link(source: Path, target: Path) -> None:
    try:
        os.symlink(source.resolve(), target)
    except (OSError, NotImplementedError):  # file systems and accounts that may not make links
        shutil.copyfile(source, target)
