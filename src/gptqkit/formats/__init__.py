"""The checkpoint layouts, one file each, and how to recognise them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from gptqkit.core.errors import InputError
from gptqkit.formats.compressed import COMPRESSED_TENSORS, LAYOUT
from gptqkit.formats.gptq import GPTQ, GPTQ_V2
from gptqkit.formats.protocol import Format

FORMATS: tuple[Format, ...] = (GPTQ, GPTQ_V2, COMPRESSED_TENSORS)

_READS = "gptqkit reads quant_method gptq (checkpoint_format gptq or gptq_v2) and compressed-tensors (format pack-quantized)"


def get_format(name: str) -> Format:
    """The format called `name`. Raises InputError that lists the names there are."""
    for candidate in FORMATS:
        if candidate.name == name:
            return candidate
    raise InputError(f"format={name!r}; allowed: {', '.join(candidate.name for candidate in FORMATS)}")


def detect(config: Mapping[str, Any]) -> Format:
    """The format that a `quantization_config` describes. Raises InputError that says what was found and what is read.

    >>> detect({"quant_method": "gptq", "bits": 4}).name
    'gptq'
    """
    method = config.get("quant_method")
    if method is None and "bits" in config and "group_size" in config:
        # AutoGPTQ's own quantize_config.json, before transformers gave the method a name
        method = "gptq"
    if method in ("gptq", "gptqmodel"):
        version = config.get("checkpoint_format") or config.get("format") or "gptq"
        if version == "gptq":
            return replace(GPTQ, word_arithmetic=_written_by_gptqmodel(config))
        if version == "gptq_v2":
            return GPTQ_V2
        raise InputError(f"quantization_config: checkpoint_format={version!r} with quant_method={method!r}; {_READS}")
    if method == "compressed-tensors":
        if config.get("format") == LAYOUT or (config.get("format") == "mixed-precision" and _all_packed(config)):
            return COMPRESSED_TENSORS
        raise InputError(f"quantization_config: format={config.get('format')!r} with quant_method={method!r}; {_READS}")
    raise InputError(f"quantization_config: quant_method={method!r}; {_READS}")


def _written_by_gptqmodel(config: Mapping[str, Any]) -> bool:
    meta = config.get("meta")
    quantizer = meta.get("quantizer") if isinstance(meta, Mapping) else None
    names = quantizer if isinstance(quantizer, list) else [quantizer]
    return any(isinstance(name, str) and name.lower().startswith("gptqmodel") for name in names)


def _all_packed(config: Mapping[str, Any]) -> bool:
    groups = config.get("config_groups")
    return isinstance(groups, Mapping) and all(isinstance(g, Mapping) and g.get("format") == LAYOUT for g in groups.values())
