"""The recipe of a finished run, gptqkit/recipe.yaml beside its checkpoint: every option spelt out, so that it can be repeated and shared.

Defaults are written too, because a later version may have others. No path of this machine is: a calibration file stands there by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptqkit.calibration.documents import BUNDLED
from gptqkit.core.config import QuantConfig
from gptqkit.core.recipe import CONFIG_TYPES, RecipeUse
from gptqkit.core.version import __version__


def recipe_text(config: QuantConfig, data: Mapping[str, Any], calibration: Mapping[str, Any], used: RecipeUse | None) -> str:
    """YAML that `--recipe` takes. `data`: samples, seqlen, seed as asked for; `calibration`: the description of what was read."""
    import yaml  # written once, at the end of a run

    values = {key: value for key, value in config.to_dict().items() if key in CONFIG_TYPES and value is not None}
    lines = [
        f"# What made this checkpoint, with gptqkit {__version__}. To repeat it: gptqkit quantize MODEL OUT --recipe THIS-FILE",
        *([] if used is None else _origin(used)),
    ]
    if calibration.get("sha256"):
        values |= data
        if calibration["source"] != BUNDLED:
            values["calibration"] = calibration["source"]
            lines.append(f"# Calibration: {calibration['source']}, {calibration['tokens']} tokens, sha256 {calibration['sha256']};")
            lines.append("# a file is looked for beside this one and where the command runs, or give it with --calibration.")
    return "\n".join([*lines, yaml.safe_dump(values, sort_keys=False, allow_unicode=True, width=140)])


def _origin(used: RecipeUse) -> list[str]:
    """Where the options came from and what was changed, as comments."""
    lines = [f"# Taken from the recipe {used.name} (sha256 {used.sha256})" + (", changed:" if used.overridden else ", unchanged.")]
    for key, values in used.overridden.items():
        before = "not in the recipe" if values["recipe"] is None else repr(values["recipe"])
        lines.append(f"#   {key}: {before} -> {values['used']!r}")
    return lines
