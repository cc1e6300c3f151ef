"""The GPTQ checkpoint layouts: `gptq` (version 1, what AutoGPTQ wrote and every engine reads) and `gptq_v2`.

A linear [O, I] of b bits becomes (G groups; words are the dense stream of core/bits.py)

    qweight  int32    [I * b / 32, O]    codes, packed along I
    qzeros   int32    [G, O * b / 32]    zero points, packed along O; version 1 stores zero - 1, version 2 stores zero
    scales   float16  [G, O]
    g_idx    int32    [I]                the group of each column

    value = scales[g_idx[i], o] * (code[o, i] - zero[g_idx[i], o])

Version 1 has no agreed encoding of zero = 0. It stores -1, which readers that mask each field take for 2**b - 1 (and read back as 0),
readers that do not mask take for 2**b, and gptqmodel, which adds 1 to all fields of a word in a single addition, carries into the
neighbouring field. So zero = 0 is never written to version 1; and files that gptqmodel wrote are read with its own arithmetic. At 3 bits,
where fields straddle words, gptqmodel adds field by field now; its older releases added constants that are not aligned with the fields,
which a symmetric file gives away, since there the result must be the middle code.

Symmetric files store the middle code as zero point, so that engines that ignore `sym` compute the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import gcd
from typing import Any

import torch
from torch import Tensor

from gptqkit.core.bits import pack, packed_words, unpack
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.version import __version__
from gptqkit.core.weight import QuantizedWeight, group_count
from gptqkit.formats import fields
from gptqkit.formats.patterns import unit_patterns

BITS = (2, 3, 4, 8)
HEADS = ("lm_head", "embed_out")
"""Output heads need no pattern: `lm_head: false` says it."""

_OLD_3_BIT_WORDS = (0x24924924, 0x92492492, 0x49249249)


@dataclass(frozen=True, slots=True)
class GptqFormat:
    """One of the two versions.

    zero_offset      what is subtracted from a zero point before it is stored
    word_arithmetic  the file was written by gptqmodel: see the module's note on zero points
    """

    name: str
    zero_offset: int
    word_arithmetic: bool = False
    packed_name: str = "qweight"
    tensor_names: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})

    def refuses_spec(self, spec: LinearSpec, out_features: int, in_features: int, desc_act: bool) -> str | None:
        if spec.bits not in BITS:
            return f"{self.name} holds 2, 3, 4 or 8 bits, not {spec.bits}; use --format compressed-tensors"
        for what, count in (("out", out_features), ("in", in_features)):
            if count * spec.bits % 32:
                whole = 32 // gcd(32, spec.bits)
                return (
                    f"{self.name} needs {what}_features to be a multiple of {whole} at {spec.bits} bits, and it is {count}; "
                    "use --format compressed-tensors, which pads"
                )
        return None

    def nbytes(self, spec: LinearSpec, out_features: int, in_features: int) -> int:
        groups = group_count(in_features, spec.group_size)
        words = packed_words(in_features, spec.bits) * out_features + groups * packed_words(out_features, spec.bits)
        return 4 * words + 2 * groups * out_features + 4 * in_features

    def refuses(self, weight: QuantizedWeight) -> str | None:
        spec = LinearSpec(weight.bits, weight.group_size, weight.sym)
        reason = self.refuses_spec(spec, weight.out_features, weight.in_features, weight.group_I is not None)
        if reason is None and self.zero_offset and weight.zero_OG is not None and bool((weight.zero_OG == 0).any()):
            count = int((weight.zero_OG == 0).sum())
            return (
                f"{count} of its zero points are 0, which {self.name} stores as -1 and readers disagree about; "
                "use --format gptq_v2 or --format compressed-tensors"
            )
        return reason

    def encode(self, weight: QuantizedWeight) -> dict[str, Tensor]:
        if reason := self.refuses(weight):
            raise InputError(reason)
        scale_OG, zero_OG = weight.scale_OG, weight.zero_OG
        if zero_OG is None:
            zero_OG = torch.full_like(scale_OG, weight.natural_zero, dtype=torch.uint8)
        return {
            "qweight": pack(weight.codes_OI, weight.bits).T.contiguous(),
            "qzeros": pack((zero_OG - self.zero_offset).T.contiguous(), weight.bits),
            "scales": scale_OG.T.contiguous(),
            "g_idx": weight.column_groups().to(torch.int32),
        }

    def decode(self, tensors: Mapping[str, Tensor], spec: LinearSpec) -> QuantizedWeight:
        if spec.bits not in BITS:
            raise InputError(f"quantization_config: bits={spec.bits}; {self.name} holds 2, 3, 4 or 8 bits")
        words_IO = fields.tensor(tensors, "qweight", torch.int32, 2)
        rows, out_features = words_IO.shape
        in_features = rows * 32 // spec.bits
        if rows * 32 % spec.bits:
            raise InputError(f"qweight has {rows} rows, not a whole number of {spec.bits}-bit columns; bits is wrong in config.json")
        groups = group_count(in_features, spec.group_size)
        scale_GO = fields.half_scales(tensors, "scales")
        shape = f"{out_features} x {in_features} at {spec.bits} bits in groups of {spec.group_size}"
        fields.expect_shape("scales", scale_GO, (groups, out_features), shape)
        return QuantizedWeight(
            bits=spec.bits,
            group_size=spec.group_size,
            codes_OI=unpack(words_IO.T.contiguous(), spec.bits, in_features),
            scale_OG=scale_GO.T.contiguous(),
            zero_OG=self._zeros(tensors, spec, groups, out_features),
            group_I=_groups(tensors, groups, in_features, spec.group_size),
        )

    def shape(self, shapes: Mapping[str, tuple[int, ...]], read: Callable[[str], Tensor], spec: LinearSpec) -> tuple[int, int]:
        if len(shapes["qweight"]) != 2:
            raise InputError(f"qweight has shape {list(shapes['qweight'])}; expected 2 dimensions")
        rows, out_features = shapes["qweight"]
        return out_features, rows * 32 // spec.bits

    def config(self, specs: Mapping[str, LinearSpec], skipped: list[str], *, desc_act: bool, details: Mapping[str, Any]) -> dict[str, Any]:
        if not specs:
            raise InputError("no linear was quantized, so there is nothing to describe; check the --rule ...=skip patterns")
        default = Counter(specs.values()).most_common(1)[0][0]
        meta = {key: value for key, value in details.items() if key not in ("damp_percent", "true_sequential", "static_groups", "order")}
        choice: dict[str, LinearSpec | None] = {**specs, **{name: None for name in skipped if name.rpartition(".")[2] not in HEADS}}
        dynamic = dict(_dynamic(pattern, spec) for pattern, spec in unit_patterns(choice, default))
        return {
            "quant_method": "gptq",
            "bits": default.bits,
            "group_size": default.group_size,
            "desc_act": desc_act,
            "sym": default.sym,
            "checkpoint_format": self.name,
            "format": self.name,
            "damp_percent": details.get("damp_percent", 0.01),
            "true_sequential": details.get("true_sequential", True),
            "static_groups": details.get("static_groups", False),
            "lm_head": any(name.rpartition(".")[2] in HEADS for name in specs),
            **({"dynamic": dynamic} if dynamic else {}),
            "meta": {**meta, "quantizer": [f"gptqkit:{__version__}"]},
        }

    def specs(self, config: Mapping[str, Any], names: list[str]) -> dict[str, LinearSpec]:
        default = _spec(config, {})
        rules = _rules(config)
        result = {}
        for name in names:
            override = next((values for pattern, values in rules if pattern.match(name)), default)
            if override is None:
                raise InputError(f"quantization_config: dynamic says that {name} is not quantized, but its packed tensors are there")
            result[name] = override
        return result

    def _zeros(self, tensors: Mapping[str, Tensor], spec: LinearSpec, groups: int, out_features: int) -> Tensor | None:
        """[O, G] zero points, or None for a symmetric linear, whose stored zero points must all be the middle code."""
        words_GO = fields.tensor(tensors, "qzeros", torch.int32, 2)
        if out_features * spec.bits % 32:
            raise InputError(f"qweight has {out_features} columns, whose {spec.bits}-bit zero points do not fill 32-bit words")
        expected = (groups, packed_words(out_features, spec.bits))
        fields.expect_shape("qzeros", words_GO, expected, f"{groups} groups of {out_features} zero points at {spec.bits} bits")
        candidates = [self._unpack_zeros(words_GO, spec.bits, out_features)]
        if self.word_arithmetic and spec.sym and spec.bits == 3:
            candidates.append(unpack(_add(words_GO, _OLD_3_BIT_WORDS), 3, out_features))
        if not spec.sym:
            return candidates[0].T.contiguous()
        if not any(bool((zero_GO == 2 ** (spec.bits - 1)).all()) for zero_GO in candidates):
            found = sorted(set(candidates[0].flatten().tolist()))[:4]
            raise InputError(
                f"config.json says sym=true, so all zero points must be {2 ** (spec.bits - 1)}, but qzeros holds {found}, ...; "
                "set sym to false there if the file is right"
            )
        return None

    def _unpack_zeros(self, words_GO: Tensor, bits: int, out_features: int) -> Tensor:
        if self.zero_offset and self.word_arithmetic and bits != 3:
            one_per_field = sum(1 << field for field in range(0, 32, bits))
            return unpack(_add(words_GO, (one_per_field,)), bits, out_features)
        return (unpack(words_GO, bits, out_features) + self.zero_offset) & (2**bits - 1)


def _add(words_GO: Tensor, constants: tuple[int, ...]) -> Tensor:
    """Adds constants[j % len] to column j modulo 2**32."""
    addend = torch.tensor([constants[j % len(constants)] for j in range(words_GO.shape[1])], device=words_GO.device)
    total = (words_GO.to(torch.int64) + addend) & 0xFFFFFFFF
    return torch.where(total >= 2**31, total - 2**32, total).to(torch.int32)


def _groups(tensors: Mapping[str, Tensor], groups: int, in_features: int, group_size: int) -> Tensor | None:
    """The group of each column, or None for the natural order. A missing g_idx is natural; negative entries count from the end."""
    if "g_idx" not in tensors:
        return None
    group_I = fields.tensor(tensors, "g_idx", torch.int32, 1)
    fields.expect_shape("g_idx", group_I, (in_features,), f"the {in_features} columns of qweight")
    group_I = torch.where(group_I < 0, group_I + groups, group_I)
    if int(group_I.min()) < 0 or int(group_I.max()) >= groups:
        raise InputError(f"g_idx holds {int(tensors['g_idx'].max())} or {int(tensors['g_idx'].min())}; allowed: 0 to {groups - 1}")
    size = in_features if group_size == -1 else group_size
    return None if torch.equal(group_I, torch.arange(in_features, dtype=torch.int32, device=group_I.device) // size) else group_I


def _rules(config: Mapping[str, Any]) -> list[tuple[Any, LinearSpec | None]]:
    """The `dynamic` field as (pattern, spec or None for "not quantized"), in its order: the first match decides."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise InputError(f"quantization_config: dynamic={dynamic!r}; expected a mapping of patterns to options")
    rules: list[tuple[Any, LinearSpec | None]] = []
    for key, values in dynamic.items():
        skip = key.startswith("-:")
        if not skip and not isinstance(values, Mapping):
            raise InputError(f"quantization_config: dynamic: {key!r} maps to {values!r}; expected options such as {{'bits': 8}}")
        rules.append((fields.pattern("dynamic", key.removeprefix("-:").removeprefix("+:")), None if skip else _spec(config, values)))
    return rules


def _spec(config: Mapping[str, Any], override: Mapping[str, Any]) -> LinearSpec:
    merged = {**config, **override}
    return LinearSpec(
        fields.integer(merged, "bits", 2, 8),
        fields.integer(merged, "group_size", 1, 2**31 - 1, also=(-1,), default=-1),
        fields.boolean(merged, "sym", True),
    )


def _dynamic(pattern: str, spec: LinearSpec | None) -> tuple[str, dict[str, Any]]:
    if spec is None:
        return f"-:{pattern}", {}
    return f"+:{pattern}", {"bits": spec.bits, "group_size": spec.group_size, "sym": spec.sym}


GPTQ = GptqFormat("gptq", zero_offset=1)
GPTQ_V2 = GptqFormat("gptq_v2", zero_offset=0)
