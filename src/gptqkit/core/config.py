"""The options of a quantization: frozen, validated on construction, and round-tripping keys they do not know.

`QuantConfig` says what every linear gets; `Rule`s say where a linear differs; `LinearSpec` is the answer for one linear.
Validation never rewrites what the user set: derived values are properties.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from gptqkit.core.errors import InputError

BITS = (2, 3, 4, 5, 6, 7, 8)
GROUP_SIZES = (32, 64, 128, 256, -1)
METHODS = ("gptq", "awq", "awq+gptq", "rtn", "hqq")
UNCALIBRATED = ("rtn", "hqq")
"""Methods that look at the weights alone: no calibration text is read, and no forward is run."""
PRESETS = ("plain", "fast", "best")
ORDERS = ("natural", "activation", "group-aware")
FORMAT_NAMES = ("gptq", "gptq_v2", "compressed-tensors")


@dataclass(frozen=True, slots=True)
class LinearSpec:
    """How one linear is stored: bits, group size (-1: one group per row), symmetric or not."""

    bits: int
    group_size: int
    sym: bool

    @property
    def bits_per_weight(self) -> float:
        """Bits for codes, float16 scales and zero points (none counted when symmetric) per weight; -1 counts codes only."""
        if self.group_size == -1:
            return float(self.bits)
        return self.bits + (16 + (0 if self.sym else self.bits)) / self.group_size


@dataclass(frozen=True, slots=True)
class Rule:
    """An exception: linears whose name matches `pattern` (re.search) are skipped, or get other bits, group size or symmetry.

    >>> Rule.parse(r"down_proj=bits:8,group_size:32")
    Rule(pattern='down_proj', skip=False, bits=8, group_size=32, sym=None)
    >>> Rule.parse(r"layers\\.0\\.=skip").skip
    True
    """

    pattern: str
    skip: bool = False
    bits: int | None = None
    group_size: int | None = None
    sym: bool | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise InputError(f"--rule {self.pattern!r}: not a regular expression ({error})") from None
        if self.bits is not None:
            _choice("--rule bits", self.bits, BITS)
        if self.group_size is not None:
            _choice("--rule group_size", self.group_size, GROUP_SIZES)

    @classmethod
    def parse(cls, text: str) -> Rule:
        """From the command line's `REGEX=bits:8,group_size:32,sym:false` or `REGEX=skip`. Raises InputError."""
        pattern, equals, action = text.rpartition("=")
        if not equals or not pattern:
            raise InputError(f"--rule {text!r}: expected 'REGEX=bits:8,group_size:32' or 'REGEX=skip'")
        if action == "skip":
            return cls(pattern, skip=True)
        values: dict[str, Any] = {}
        for part in action.split(","):
            key, colon, value = part.strip().partition(":")
            if not colon or key not in ("bits", "group_size", "sym"):
                raise InputError(f"--rule {text!r}: {part!r} is not one of bits:N, group_size:N, sym:true, sym:false, or skip")
            values[key] = _boolean(text, value) if key == "sym" else _integer(text, key, value)
        return cls(pattern, **values)

    def to_dict(self) -> dict[str, Any]:
        return {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if getattr(self, f.name) not in (None, False) or (f.name == "sym" and self.sym is False)
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantConfig:
    """What `quantize` does to every linear of the decoder blocks.

    bits        2 to 8 (the gptq formats hold 2, 3, 4 and 8)
    group_size  columns that share a scale: 32, 64, 128, 256, or -1 for a whole row
    target_bits mean stored bits per weight, 2 to 16: bits and group size of each linear are then chosen by measurement, and `bits` and
                `group_size` only complete the rules. None: every linear gets `bits` and `group_size`
    sym         symmetric grid (zero point in the middle); False stores zero points
    method      how codes are chosen: "gptq"; "awq" (inputs scaled by how strong they are, then rounding); "awq+gptq" (both); or without
                calibration "rtn" (round to nearest) and "hqq" (grids fitted to the weights)
    preset      how much work GPTQ puts into it: "plain" (the textbook, for comparison), "fast", "best"
    signed_scales  symmetric scales may be negative, so that the longer side of the grid faces the longer tail; False for engines
                that take only positive ones
    format      how they are stored: "gptq", "gptq_v2", "compressed-tensors"
    order       in which order GPTQ fixes columns: "group-aware" (None: the default), "activation" (static groups), "natural"
    desc_act    groups follow the activation order: needs a g_idx, which vLLM, MLX and GGUF refuse
    calibrate_all_experts  every expert is solved with all tokens of its layer, not only with those that are routed to it
    damp        damping of the Gram matrix, as a fraction of its diagonal
    lm_head     bits of the output head, which is kept without; a rule that matches it may give it another group size and symmetry
    rules       exceptions by name, first match wins
    extra       keys of `from_dict` that this version does not know, kept for `to_dict`

    >>> QuantConfig(bits=3, group_size=64).spec("model.layers.0.mlp.down_proj")
    LinearSpec(bits=3, group_size=64, sym=True)
    """

    bits: int = 4
    group_size: int = 128
    target_bits: float | None = None
    sym: bool = True
    method: str = "gptq"
    preset: str = "fast"
    signed_scales: bool = True
    format: str = "gptq"
    order: str | None = None
    desc_act: bool = False
    calibrate_all_experts: bool = False
    damp: float = 0.01
    lm_head: int | None = None
    rules: tuple[Rule, ...] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _choice("bits", self.bits, BITS)
        _choice("group_size", self.group_size, GROUP_SIZES)
        if self.target_bits is not None and not (type(self.target_bits) in (int, float) and 2 <= self.target_bits <= 16):
            raise InputError(f"target_bits={self.target_bits!r}; allowed: 2 to 16, such as 3.5")
        _choice("method", self.method, METHODS)
        _choice("preset", self.preset, PRESETS)
        _choice("format", self.format, FORMAT_NAMES)
        if self.lm_head is not None:
            _choice("lm_head", self.lm_head, BITS)
        if self.order is not None:
            _choice("order", self.order, ORDERS)
        if self.desc_act and self.order not in (None, "activation"):
            raise InputError(f"desc_act=True with order={self.order!r}: desc_act means activation order; drop one of the two")
        if self.desc_act and self.method == "awq":
            raise InputError("desc_act=True with method='awq': rounding has no column order; drop desc_act, or use method='awq+gptq'")
        if not (isinstance(self.damp, (int, float)) and 0 < self.damp <= 1):
            raise InputError(f"damp={self.damp!r}; allowed: above 0 and at most 1 (0.01 is usual)")

    @property
    def column_order(self) -> str:
        """The order the solver runs in: one of ORDERS, or "desc-act"."""
        return "desc-act" if self.desc_act else self.order or ("natural" if self.preset == "plain" else "group-aware")

    @property
    def needs_calibration(self) -> bool:
        """Whether the method looks at activations."""
        return self.method not in UNCALIBRATED

    @property
    def solves(self) -> bool:
        """Whether codes come from GPTQ's solver: what preset, order and desc_act are for."""
        return self.method in ("gptq", "awq+gptq")

    @property
    def scales_inputs(self) -> bool:
        """Whether inputs are scaled first, by what makes them: norms and biases change too."""
        return self.method in ("awq", "awq+gptq")

    @property
    def second_stream(self) -> bool:
        """Whether the original model runs beside the quantized one."""
        return self.preset == "best" and self.solves

    def spec(self, name: str) -> LinearSpec | None:
        """The spec of the linear called `name`, or None when a rule skips it."""
        for rule in self.rules:
            if re.search(rule.pattern, name):
                if rule.skip:
                    return None
                return LinearSpec(
                    self.bits if rule.bits is None else rule.bits,
                    self.group_size if rule.group_size is None else rule.group_size,
                    self.sym if rule.sym is None else rule.sym,
                )
        return LinearSpec(self.bits, self.group_size, self.sym)

    def head_spec(self, name: str) -> LinearSpec | None:
        """The spec of the output head, or None when it is kept. Its bits are `lm_head`, the rest is as for any linear.

        >>> QuantConfig(lm_head=8, rules=(Rule("head", group_size=32),)).head_spec("lm_head")
        LinearSpec(bits=8, group_size=32, sym=True)
        """
        spec = None if self.lm_head is None else self.spec(name)
        return None if spec is None or self.lm_head is None else LinearSpec(self.lm_head, spec.group_size, spec.sym)

    @classmethod
    def from_recipe(cls, recipe: str | Path) -> QuantConfig:
        """From a recipe that travels with gptqkit, by its name, or from a YAML file. Raises InputError naming what is wrong or what exists.

        A recipe's samples, seqlen, seed and calibration are no part of a configuration: they are arguments of `quantize`.

        >>> QuantConfig.from_recipe("high-accuracy").group_size
        32
        """
        from gptqkit.core.recipe import read_recipe  # which reads YAML; most configurations come from elsewhere

        return cls.from_dict(read_recipe(recipe).config)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantConfig:
        """From a plain mapping (JSON, YAML). Unknown keys are kept in `extra`. Raises InputError for bad values."""
        known = {f.name for f in fields(cls)} - {"extra"}
        options = {key: value for key, value in values.items() if key in known}
        options["rules"] = tuple(_rule(rule) for rule in values.get("rules", ()))
        return cls(**options, extra={key: value for key, value in values.items() if key not in known})

    def to_dict(self) -> dict[str, Any]:
        """The inverse of `from_dict`; JSON-serialisable."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("rules", "extra")}
        return {**plain, "rules": [rule.to_dict() for rule in self.rules], **self.extra}


def _rule(value: Any) -> Rule:
    if isinstance(value, Rule):
        return value
    if isinstance(value, str):
        return Rule.parse(value)
    if isinstance(value, Mapping) and "pattern" in value:
        unknown = set(value) - {f.name for f in fields(Rule)}
        if unknown:
            raise InputError(f"rule {dict(value)!r}: unknown keys {sorted(unknown)}; allowed: {[f.name for f in fields(Rule)]}")
        return Rule(**value)
    raise InputError(f"rule {value!r}: expected a string 'REGEX=bits:8' or a mapping with 'pattern'")


def _choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    if isinstance(value, bool) or value not in allowed:
        raise InputError(f"{name}={value!r}; allowed: {', '.join(str(a) for a in allowed)}")


def _integer(text: str, key: str, value: str) -> int:
    try:
        return int(value)
    except ValueError:
        raise InputError(f"--rule {text!r}: {key}:{value} is not a number") from None


def _boolean(text: str, value: str) -> bool:
    if value.lower() not in ("true", "false"):
        raise InputError(f"--rule {text!r}: sym:{value} is not true or false")
    return value.lower() == "true"
