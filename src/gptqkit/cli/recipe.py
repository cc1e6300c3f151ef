"""What `quantize` is asked to do: the options of a recipe, overridden by those that were typed, and a record of what overrode what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gptqkit.core.config import QuantConfig, Rule
from gptqkit.core.errors import InputError
from gptqkit.core.recipe import Recipe, RecipeUse, read_recipe

DATA_DEFAULTS: dict[str, Any] = {"samples": 128, "seqlen": 2048, "seed": 0, "calibration": None}


@dataclass(frozen=True, slots=True)
class Request:
    """A quantization as asked for: the configuration, the data that calibrates it, and the recipe they were taken from, if any."""

    config: QuantConfig
    samples: int
    seqlen: int
    seed: int
    calibration: str | None
    recipe: RecipeUse | None


def make_request(name: str | None, typed: Mapping[str, Any], rules: list[str]) -> Request:
    """Merges a recipe with what was typed: `typed` holds None where nothing was; typed `rules` come before the recipe's (first match
    wins). Raises InputError."""
    recipe = None if name is None else read_recipe(name)
    written = {} if recipe is None else dict(recipe.values)
    asked = {key: value for key, value in typed.items() if value is not None}
    values = {**written, **asked}
    _one_way_to_choose_bits(asked, values, recipe)
    if rules:
        values["rules"] = [*rules, *written.get("rules", [])]
    use = None if recipe is None else recipe.used_for(values)
    data = {key: values.pop(key, default) for key, default in DATA_DEFAULTS.items()}
    for key in ("samples", "seqlen"):
        if data[key] < 1:
            raise InputError(f"{key}={data[key]}; allowed: 1 or more")
    values["rules"] = [Rule.parse(rule) if isinstance(rule, str) else rule for rule in values.get("rules", [])]
    return Request(QuantConfig.from_dict(values), **data, recipe=use)


def _one_way_to_choose_bits(asked: Mapping[str, Any], values: Mapping[str, Any], recipe: Recipe | None) -> None:
    """A budget chooses bits and group sizes; typing them as well cannot be what was meant."""
    clashing = [key for key in ("bits", "group_size") if key in asked]
    if values.get("target_bits") is not None and clashing:
        where = "--target-bits" if "target_bits" in asked else f"target_bits of the recipe {recipe.name if recipe else ''}"
        options = " and ".join(f"--{key.replace('_', '-')} {asked[key]}" for key in clashing)
        raise InputError(
            f"{options} with {where}: a bit budget chooses bits and group size of every linear. Drop one of the two, or fix single "
            "linears with --rule 'REGEX=bits:4,group_size:128'"
        )
