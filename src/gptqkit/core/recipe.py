"""Recipes: options in a YAML file that can be read, compared and shared.

A recipe is a mapping of QuantConfig's keys, and of those arguments of `quantize` that say which data calibrates:

    bits: 4
    group_size: 64
    rules:
      - 'down_proj=bits:8'
      - {pattern: 'layers\\.0\\.', skip: true}
    samples: 256
    calibration: my-texts.jsonl      # beside the recipe, or as seen from where the command runs, or a hub id

Some travel with the package (src/gptqkit/recipes/) and are asked for by name. The comment that begins a recipe says when to use it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from gptqkit.core.errors import InputError

CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "bits": (int,), "group_size": (int,), "target_bits": (int, float), "sym": (bool,), "method": (str,), "preset": (str,),
    "signed_scales": (bool,), "format": (str,), "order": (str, type(None)), "desc_act": (bool,), "damp": (int, float), "rules": (list,),
    "lm_head": (int, type(None)), "calibrate_all_experts": (bool,),
}  # fmt: skip
DATA_TYPES: dict[str, tuple[type, ...]] = {"samples": (int,), "seqlen": (int,), "seed": (int,), "calibration": (str,)}
_TYPES = {**CONFIG_TYPES, **DATA_TYPES}
_SUFFIX = ".yaml"


@dataclass(frozen=True, slots=True)
class RecipeUse:
    """Which recipe the options of a run were taken from, for the record; `overridden`: key -> {"recipe": its value, "used": another}."""

    name: str
    sha256: str
    overridden: Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a recipe says.

    name    the shipped recipe's, or the file's; never a path
    sha256  of the file's bytes
    values  its keys, each known and of the right type
    """

    name: str
    sha256: str
    values: Mapping[str, Any]

    @property
    def config(self) -> dict[str, Any]:
        """The keys that are QuantConfig's."""
        return {key: value for key, value in self.values.items() if key in CONFIG_TYPES}

    def used_for(self, values: Mapping[str, Any]) -> RecipeUse:
        """The record of a run with these `values`. A key that the recipe leaves open has None there."""
        differing = {
            key: {"recipe": _publishable(key, self.values.get(key)), "used": _publishable(key, value)}
            for key, value in values.items()
            if value != self.values.get(key)
        }
        return RecipeUse(self.name, self.sha256, differing)


def shipped_recipes() -> dict[str, str]:
    """Name -> the first sentence of what it says about itself."""
    found = {}
    for entry in _folder().iterdir():
        if entry.name.endswith(_SUFFIX):
            comment = " ".join(line.lstrip("# ") for line in entry.read_text(encoding="utf-8").splitlines() if line.startswith("#"))
            found[entry.name.removesuffix(_SUFFIX)] = comment.partition(": ")[0]
    return dict(sorted(found.items()))


def read_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by its name, or a file. Raises InputError naming file and key, or what exists."""
    import yaml  # only a run with a recipe needs it

    path = Path(name)
    shipped = isinstance(name, str) and name in shipped_recipes()
    if not shipped and path.suffix == "" and not path.exists():
        listed = "\n".join(f"  {known:<18}{about}" for known, about in shipped_recipes().items())
        raise InputError(f"--recipe {name}: there is no recipe of this name and no such file. Recipes are\n{listed}")
    try:
        content = (_folder() / f"{name}{_SUFFIX}" if shipped else path).read_bytes()
        values = yaml.safe_load(content.decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {name}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"--recipe {name}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--recipe {name}: expected a mapping such as 'bits: 4', found {type(values).__name__}")
    unknown = sorted(str(key) for key in values if key not in _TYPES)
    if unknown:
        raise InputError(f"--recipe {name}: unknown key {', '.join(unknown)}; allowed: {', '.join(_TYPES)}")
    checked = {key: _typed(name, key, value) for key, value in values.items()}
    if "calibration" in checked and not shipped and (path.parent / checked["calibration"]).exists():
        checked["calibration"] = str(path.parent / checked["calibration"])
    return Recipe(str(name) if shipped else path.name, hashlib.sha256(content).hexdigest(), checked)


def _publishable(key: str, value: Any) -> Any:
    """The value without this machine's folders: a run's record may be published."""
    return Path(value).name if key == "calibration" and value is not None and Path(value).exists() else value


def _folder() -> Any:
    return files("gptqkit") / "recipes"


def _typed(recipe: str | Path, key: str, value: Any) -> Any:
    allowed = _TYPES[key]
    if float in allowed and isinstance(value, str):
        # YAML 1.1 reads 1e-2, without a dot, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
        raise InputError(f"--recipe {recipe}: {key}={value!r}; expected {names}")
    return value
