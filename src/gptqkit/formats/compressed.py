"""`compressed-tensors`, its pack-quantized layout: what llm-compressor writes and what vLLM takes at every width from 2 to 8 bits.

A linear [O, I] of b bits becomes (G groups; words are the dense stream of core/bits.py)

    weight_packed      int32    [O, ceil(I * b / 32)]    codes, packed along I
    weight_scale       float16  [O, G]                   G = 1 with strategy "channel"
    weight_zero_point  int32    [ceil(O * b / 32), G]    asymmetric only; packed along O
    weight_shape       int64    [2]                      (O, I)

    value = scale[o, g] * (code[o, i] - zero[o, g])

The library thinks of codes as signed and stores code + 2**(b - 1), which is exactly our unsigned code, and likewise for zero points.

Groups in activation order (a weight_g_idx) were removed from the library and its engines in 2026: they are read here and never written.
A symmetric checkpoint has no zero points at all. Asymmetric ones need `dequantize=True` in stock transformers: its compressor declares the
zero point unpacked on the meta device and then finds a packed one (compressed-tensors 0.20, and before).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptqkit.core.bits import pack, packed_words, unpack
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.weight import QuantizedWeight, group_count
from gptqkit.formats import fields
from gptqkit.formats.patterns import exact_patterns

HEADS = ("lm_head", "embed_out")
LAYOUT = "pack-quantized"
_STATIC_ORDERS = ("activation", "group-aware")


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    """The pack-quantized layout of compressed-tensors."""

    name: str = "compressed-tensors"
    packed_name: str = "weight_packed"
    tensor_names: frozenset[str] = frozenset({"weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"})

    def refuses_spec(self, spec: LinearSpec, out_features: int, in_features: int, desc_act: bool) -> str | None:
        if desc_act:
            return f"{self.name} cannot hold groups in activation order (g_idx), which it removed in 2026; use --format gptq"
        if spec.group_size != -1 and in_features % spec.group_size:
            return (
                f"{self.name} needs group_size to divide in_features: {in_features} is no multiple of {spec.group_size}; "
                "use a smaller --group-size or -1"
            )
        return None

    def nbytes(self, spec: LinearSpec, out_features: int, in_features: int) -> int:
        groups = group_count(in_features, spec.group_size)
        zeros = 0 if spec.sym else packed_words(out_features, spec.bits) * groups
        return 4 * (out_features * packed_words(in_features, spec.bits) + zeros) + 2 * groups * out_features + 16

    def refuses(self, weight: QuantizedWeight) -> str | None:
        spec = LinearSpec(weight.bits, weight.group_size, weight.sym)
        return self.refuses_spec(spec, weight.out_features, weight.in_features, weight.group_I is not None)

    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if reason := self.refuses(weight):
            raise InputError(reason)
        tensors = {
            "weight_packed": pack(weight.codes_OI, weight.bits),
            "weight_scale": weight.scale_OG.contiguous(),
            "weight_shape": torch.tensor([weight.out_features, weight.in_features], device=weight.codes_OI.device),
        }
        if weight.zero_OG is not None:
            tensors["weight_zero_point"] = pack(weight.zero_OG.T.contiguous(), weight.bits).T.contiguous()
        return tensors

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedWeight:
        out_features, in_features = _shape(tensors)
        words_OI = fields.tensor(tensors, "weight_packed", torch.int32, 2)
        shape = f"{out_features} x {in_features} at {spec.bits} bits in groups of {spec.group_size}"
        fields.expect_shape("weight_packed", words_OI, (out_features, packed_words(in_features, spec.bits)), shape)
        groups = group_count(in_features, spec.group_size)
        scale_OG = fields.half_scales(tensors, "weight_scale")
        fields.expect_shape("weight_scale", scale_OG, (out_features, groups), shape)
        return QuantizedWeight(
            bits=spec.bits,
            group_size=spec.group_size,
            codes_OI=unpack(words_OI, spec.bits, in_features),
            scale_OG=scale_OG.contiguous(),
            zero_OG=None if spec.sym else _zeros(tensors, spec, out_features, groups),
            group_I=_groups(tensors, groups, in_features, spec.group_size),
        )

    def shape(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], spec: LinearSpec) -> tuple[int, int]:
        return _shape({"weight_shape": read("weight_shape")} if "weight_shape" in shapes else {})

    def config(self, specs: Mapping[str, LinearSpec], skipped: list[str], *, desc_act: bool, details: Mapping[str, Any]) -> dict[str, Any]:
        if not specs:
            raise InputError("no linear was quantized, so there is nothing to describe; check the --rule ...=skip patterns")
        if desc_act:
            raise InputError(f"{self.name} cannot hold groups in activation order (g_idx); use --format gptq")
        by_spec: dict[LinearSpec, list[str]] = {}
        for name, spec in specs.items():
            by_spec.setdefault(spec, []).append(name)
        actorder = "static" if details.get("order") in _STATIC_ORDERS else None
        groups: dict[str, dict[str, Any]] = {
            f"group_{i}": {
                "targets": ["Linear"] if len(by_spec) == 1 else ["re:" + pattern for pattern in exact_patterns(names)],
                "weights": _arguments(spec, actorder),
                "input_activations": None,
                "output_activations": None,
                "format": LAYOUT,
            }
            for i, (spec, names) in enumerate(by_spec.items())
        }
        quantized = [name for name in specs if name.rpartition(".")[2] in HEADS]
        if quantized and len(by_spec) == 1:
            # vLLM's head is not of class Linear: it has to be called by its name
            groups["group_0"]["targets"] += ["re:" + pattern for pattern in exact_patterns(quantized)]
        heads = [] if quantized else [HEADS[0]]
        return {
            "quant_method": self.name,
            "format": LAYOUT,
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": [*heads, *(name for name in skipped if name not in heads)],
            "kv_cache_scheme": None,
            "meta": dict(details),
        }

    def specs(self, config: Mapping[str, Any], names: list[str]) -> dict[str, LinearSpec]:
        groups = config.get("config_groups")
        if not isinstance(groups, Mapping) or not groups:
            raise InputError(f"quantization_config: config_groups={groups!r}; expected a mapping of names to targets and weights")
        parsed = [(_targets(key, group), _spec(key, group)) for key, group in groups.items()]
        ignore = config.get("ignore") or []
        if not isinstance(ignore, list):
            raise InputError(f"quantization_config: ignore={ignore!r}; expected a list of names")
        ignored = [_target("ignore", target) for target in ignore]
        result = {}
        for name in names:
            if any(_named(target, name) for target in ignored):
                raise InputError(f"quantization_config: ignore lists {name}, but its packed tensors are there")
            by_name = (spec for targets, spec in parsed if any(_named(target, name) for target in targets))
            by_class = (spec for targets, spec in parsed if any(isinstance(target, str) and target in _CLASSES for target in targets))
            spec = next(by_name, None) or next(by_class, None)
            if spec is None:
                raise InputError(f"quantization_config: no config group has {name} among its targets, but its packed tensors are there")
            result[name] = spec
        return result


_CLASSES = ("Linear", "Conv1D")
"""Targets that are class names: they mean every linear that no other group names."""


def _arguments(spec: LinearSpec, actorder: str | None) -> dict[str, Any]:
    channel = spec.group_size == -1
    return {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.sym,
        "strategy": "channel" if channel else "group",
        "group_size": None if channel else spec.group_size,
        "dynamic": False,
        **({"actorder": actorder} if actorder and not channel else {}),
    }


def _shape(tensors: Mapping[str, Tensor]) -> tuple[int, int]:
    found = fields.tensor(tensors, "weight_shape", torch.int64, 1)
    values = found.tolist()
    if len(values) != 2 or min(values) < 1 or max(values) > 2**31:
        raise InputError(f"weight_shape holds {values}; expected the two sizes of the weight")
    return values[0], values[1]


def _zeros(tensors: Mapping[str, Tensor], spec: LinearSpec, out_features: int, groups: int) -> Tensor:
    """[O, G]. Packed along O; early releases stored them as they are, signed."""
    shape = f"{groups} groups of {out_features} zero points at {spec.bits} bits"
    found = tensors.get("weight_zero_point")
    if found is not None and found.dtype == torch.int8:
        fields.expect_shape("weight_zero_point", found, (out_features, groups), shape)
        zero_OG = found.to(torch.int16) + 2 ** (spec.bits - 1)
        if int(zero_OG.min()) < 0 or int(zero_OG.max()) >= 2**spec.bits:
            raise InputError(f"weight_zero_point holds {int(found.min())} to {int(found.max())}, outside the {spec.bits}-bit signed range")
        return zero_OG.to(torch.uint8)
    words_OG = fields.tensor(tensors, "weight_zero_point", torch.int32, 2)
    fields.expect_shape("weight_zero_point", words_OG, (packed_words(out_features, spec.bits), groups), shape)
    return unpack(words_OG.T.contiguous(), spec.bits, out_features).T.contiguous()


def _groups(tensors: Mapping[str, Tensor], groups: int, in_features: int, group_size: int) -> Tensor | None:
    """The group of each column; None when there is no weight_g_idx, when it is the natural one, or all -1 (declared, never filled)."""
    if "weight_g_idx" not in tensors:
        return None
    group_I = fields.tensor(tensors, "weight_g_idx", torch.int32, 1)
    fields.expect_shape("weight_g_idx", group_I, (in_features,), f"{in_features} columns")
    size = in_features if group_size == -1 else group_size
    if bool((group_I == -1).all()) or torch.equal(group_I, torch.arange(in_features, dtype=torch.int32, device=group_I.device) // size):
        return None
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise InputError(f"weight_g_idx holds {int(group_I.min())} to {int(group_I.max())}; allowed: 0 to {groups - 1}")
    return group_I


def _targets(key: str, group: Any) -> list[Any]:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(targets, list) or not targets:
        raise InputError(f"quantization_config: config_groups.{key} has no targets")
    return [_target(f"config_groups.{key}.targets", target) for target in targets]


def _target(key: str, target: Any) -> Any:
    """A compiled pattern for "re:...", else the name itself."""
    if not isinstance(target, str):
        raise InputError(f"quantization_config: {key}: {target!r} is not a string")
    return fields.pattern(key, target.removeprefix("re:")) if target.startswith("re:") else target


def _named(target: Any, name: str) -> bool:
    return target == name if isinstance(target, str) else target.match(name) is not None


def _spec(key: str, group: Mapping[str, Any]) -> LinearSpec:
    place = f"quantization_config: config_groups.{key}"
    for what in ("input_activations", "output_activations"):
        if group.get(what) is not None:
            raise InputError(f"{place} quantizes {what.replace('_', ' ')}; gptqkit reads checkpoints with quantized weights only")
    if group.get("format") not in (None, LAYOUT):
        raise InputError(f"{place}.format={group['format']!r}; gptqkit reads {LAYOUT}")
    weights = group.get("weights")
    if not isinstance(weights, Mapping) or weights.get("type", "int") != "int":
        raise InputError(f"{place}.weights={weights!r}; gptqkit reads integer weights")
    strategy = weights.get("strategy") or ("channel" if weights.get("group_size") in (None, -1) else "group")
    if strategy not in ("group", "channel"):
        raise InputError(f"{place}.weights.strategy={strategy!r}; gptqkit reads group, channel")
    group_size = -1 if strategy == "channel" else fields.integer(weights, "group_size", 1, 2**31 - 1)
    return LinearSpec(fields.integer(weights, "num_bits", 2, 8), group_size, fields.boolean(weights, "symmetric", True))


COMPRESSED_TENSORS = CompressedTensorsFormat()
