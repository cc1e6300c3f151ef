"""`BaseQuantizeConfig` as AutoGPTQ scripts use it, and what it means here.

    desc_act=True                      desc_act: groups follow the activation order, a real g_idx is stored
    desc_act=True, static_groups=True  order "activation": the columns are solved in that order, the groups stay where they are, no g_idx
    desc_act=False                     gptqkit's default order, which needs no g_idx either and loses less than the natural one

It is the one config that is not frozen: scripts assign to its fields.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gptqkit.checkpoint.files import read_json, write_json
from gptqkit.compat.once import say_once
from gptqkit.core.config import QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import resolve_model

_FILES = ("quantize_config.json", "quant_config.json", "config.json")
_SYNONYMS = {"w_bit": "bits", "q_group_size": "group_size"}


@dataclass
class BaseQuantizeConfig:
    """The recipe of an AutoGPTQ script; names, order and defaults of the fields are AutoGPTQ's (group_size=-1, desc_act=True).

    `extra` keeps keys of a file that are not known, for `to_dict`. Raises InputError for values out of range.

    >>> BaseQuantizeConfig(bits=4, group_size=128, static_groups=True).quant_config().column_order
    'activation'
    """

    bits: int = 4
    group_size: int = -1
    damp_percent: float = 0.01
    desc_act: bool = True
    static_groups: bool = False
    sym: bool = True
    true_sequential: bool = True
    quant_method: str = "gptq"
    checkpoint_format: str = "gptq"
    model_name_or_path: str | None = None
    model_file_base_name: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.bits not in (2, 3, 4, 8) or isinstance(self.bits, bool):
            raise InputError(f"bits={self.bits!r}; allowed: 2, 3, 4, 8")
        if self.group_size != -1 and self.group_size <= 0:
            raise InputError(f"group_size={self.group_size!r}; allowed: -1 (one group over a row) or a positive number")
        if not 0 < self.damp_percent < 1:
            raise InputError(f"damp_percent={self.damp_percent!r}; allowed: above 0 and below 1 (0.01 is usual)")

    def quant_config(self) -> QuantConfig:
        """What `quantize` is called with. Raises InputError for what gptqkit does not write."""
        if self.quant_method != "gptq":
            raise InputError(f"quant_method={self.quant_method!r}; a model can be quantized with 'gptq' here")
        if self.checkpoint_format not in ("gptq", "gptq_v2"):
            raise InputError(
                f"checkpoint_format={self.checkpoint_format!r}; allowed: gptq, gptq_v2. "
                "Engines that multiply with Marlin kernels repack a gptq checkpoint when they load it"
            )
        if not self.true_sequential:
            say_once("true_sequential=False has no effect: each linear is always calibrated behind the quantized ones before it")
        return QuantConfig(
            bits=self.bits, group_size=self.group_size, sym=self.sym, damp=self.damp_percent, format=self.checkpoint_format,
            desc_act=self.desc_act and not self.static_groups, order="activation" if self.desc_act and self.static_groups else None,
        )  # fmt: skip

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable, the inverse of `from_dict`."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "extra"} | self.extra

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BaseQuantizeConfig:
        """From the content of quantize_config.json or of config.json's quantization_config."""
        renamed = {_SYNONYMS.get(key.lower(), key.lower()): value for key, value in values.items()}
        if renamed.pop("is_marlin_format", False):
            renamed["checkpoint_format"] = "marlin"
        known = {f.name for f in fields(cls)} - {"extra"}
        given = {key: value for key, value in renamed.items() if key in known and value is not None}
        return cls(**given, extra={key: value for key, value in renamed.items() if key not in known})

    @classmethod
    def from_pretrained(cls, save_dir: str | Path, **kwargs: Any) -> BaseQuantizeConfig:
        """From the quantize_config.json, quant_config.json or config.json of a folder or a hub id. Raises InputError without one."""
        for name in sorted(set(kwargs) - {"trust_remote_code"}):
            say_once(f"BaseQuantizeConfig.from_pretrained({name}=…) has no effect; hub downloads follow the environment variables HF_*")
        folder = resolve_model(str(save_dir))
        for name in _FILES:
            if not (folder / name).is_file():
                continue
            content = read_json(folder / name)
            values = content.get("quantization_config") if isinstance(content, dict) and name == "config.json" else content
            if isinstance(values, dict):
                return cls.from_dict(values)
        raise InputError(f"{save_dir} has none of {', '.join(_FILES)} with a quantization config; it is not a quantized model")

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """Writes quantize_config.json into the folder, which is made if needed. A path of this machine is not written."""
        for name in sorted(kwargs):
            say_once(f"BaseQuantizeConfig.save_pretrained({name}=…) has no effect")
        folder = Path(save_dir)
        folder.mkdir(parents=True, exist_ok=True)
        values = self.to_dict()
        origin = self.model_name_or_path
        if origin and (os.path.isabs(origin) or os.path.exists(origin)):
            values["model_name_or_path"] = None
        write_json(folder / "quantize_config.json", values)
