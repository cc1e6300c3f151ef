"""What `quantize` is asked to do: the options of a recipe file, overridden by those that were typed.

A recipe is a YAML mapping of QuantConfig's keys, and of those of `quantize` that say which data calibrates:

    bits: 4
    group_size: 64
    rules:
      - 'down_proj=bits:8'
      - {pattern: 'layers\\.0\\.', skip: true}
    samples: 256
    calibration: my-texts.jsonl      # beside the recipe, or as seen from where the command runs, or a hub id
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gptqkit.core.config import QuantConfig, Rule
from gptqkit.core.errors import InputError

_CONFIG_TYPES: dict[str, tuple[type, ...]] = {
    "bits": (int,), "group_size": (int,), "sym": (bool,), "method": (str,), "preset": (str,), "signed_scales": (bool,), "format": (str,),
    "order": (str, type(None)), "desc_act": (bool,), "damp": (int, float), "rules": (list,),
}  # fmt: skip
_DATA_TYPES: dict[str, tuple[type, ...]] = {"samples": (int,), "seqlen": (int,), "seed": (int,), "calibration": (str,)}
_TYPES = {**_CONFIG_TYPES, **_DATA_TYPES}
DATA_DEFAULTS: dict[str, Any] = {"samples": 128, "seqlen": 2048, "seed": 0, "calibration": None}


@dataclass(frozen=True, slots=True)
class Request:
    """A quantization as asked for: the configuration, and the data that calibrates it."""

    config: QuantConfig
    samples: int
    seqlen: int
    seed: int
    calibration: str | None


def make_request(file: str | None, typed: Mapping[str, Any], rules: list[str]) -> Request:
    """Merges a recipe file with what was typed: `typed` holds None where nothing was; typed `rules` come before the file's (first match
    wins). Raises InputError."""
    values = read_recipe(Path(file)) if file is not None else {}
    values.update({key: value for key, value in typed.items() if value is not None})
    values["rules"] = [*(Rule.parse(rule) for rule in rules), *values.get("rules", [])]
    data = {key: values.pop(key, default) for key, default in DATA_DEFAULTS.items()}
    for key in ("samples", "seqlen"):
        if data[key] < 1:
            raise InputError(f"{key}={data[key]}; allowed: 1 or more")
    return Request(QuantConfig.from_dict(values), **data)


def read_recipe(path: Path) -> dict[str, Any]:
    """The mapping in a recipe file, every key known and every value of the right type. Raises InputError naming file and key."""
    import yaml  # only a run with a recipe needs it

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"--recipe {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except yaml.YAMLError as error:
        raise InputError(f"--recipe {path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise InputError(f"--recipe {path}: expected a mapping such as 'bits: 4', found {type(values).__name__}")
    unknown = sorted(str(key) for key in values if key not in _TYPES)
    if unknown:
        raise InputError(f"--recipe {path}: unknown key {', '.join(unknown)}; allowed: {', '.join(_TYPES)}")
    checked = {key: _typed(path, key, value) for key, value in values.items()}
    if "calibration" in checked and (path.parent / checked["calibration"]).exists():
        checked["calibration"] = str(path.parent / checked["calibration"])
    return checked


def _typed(path: Path, key: str, value: Any) -> Any:
    allowed = _TYPES[key]
    if float in allowed and isinstance(value, str):
        # YAML 1.1 reads 1e-2, without a dot, as a string
        try:
            return float(value)
        except ValueError:
            pass
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(kind.__name__ for kind in allowed if kind is not type(None))
        raise InputError(f"--recipe {path}: {key}={value!r}; expected {names}")
    return value
