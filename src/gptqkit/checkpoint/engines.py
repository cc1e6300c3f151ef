"""Which engine takes a checkpoint, and why another does not: rules read in the engines' releases, or measured, each with its source.

A rule looks at facts about the checkpoint and returns a reason against it, or None. An engine accepts when no rule speaks. What could not
be checked is said to be unverified, not guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from gptqkit.core.config import LinearSpec
from gptqkit.formats.patterns import FUSED

HEADS = ("lm_head", "embed_out")
"""What output heads are called."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules look at.

    specs       every quantized linear's spec, by name
    dense       modules with a dense weight
    desc_act    what the config says; `reordered` what the tensors say (some g_idx is not the natural one)
    exceptions  the config describes linears that differ from the others, or are skipped inside blocks
    """

    format: str
    specs: Mapping[str, LinearSpec]
    dense: frozenset[str]
    desc_act: bool
    reordered: bool
    exceptions: bool

    @property
    def gptq(self) -> bool:
        return self.format in ("gptq", "gptq_v2")

    @property
    def distinct(self) -> set[LinearSpec]:
        return set(self.specs.values())

    @property
    def sym(self) -> bool:
        return all(spec.sym for spec in self.distinct)

    @property
    def head(self) -> bool:
        """Whether the output head is quantized."""
        return any(name.rpartition(".")[2] in HEADS for name in self.specs)

    @property
    def experts(self) -> bool:
        return any(".experts." in name for name in self.specs)


@dataclass(frozen=True, slots=True)
class Rule:
    """`reason` says why not, or None. `certain` is False for what was neither read nor run."""

    name: str
    source: str
    reason: Callable[[Facts], str | None]
    certain: bool = True


@dataclass(frozen=True, slots=True)
class Verdict:
    """accepts is "yes", "no" or "unverified"; rule, reason and source are those of the rules that spoke, if any."""

    engine: str
    accepts: str
    reasons: tuple[dict[str, str], ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "reasons": list(self.reasons)}


def judge(facts: Facts) -> list[Verdict]:
    """Every engine's verdict, in the order of ENGINES."""
    verdicts = []
    for engine, rules in ENGINES.items():
        found = [(rule, rule.reason(facts)) for rule in rules]
        spoke = [(rule, reason) for rule, reason in found if reason is not None]
        accepts = "yes" if not spoke else "no" if any(rule.certain for rule, _ in spoke) else "unverified"
        said = tuple({"rule": rule.name, "reason": reason, "source": rule.source} for rule, reason in spoke)
        verdicts.append(Verdict(engine, accepts, said))
    return verdicts


def split_units(facts: Facts) -> str | None:
    """The first linears that vLLM joins into one and that do not agree, as a sentence; None when all do."""
    for name in facts.specs:
        prefix, _, leaf = name.rpartition(".")
        for fused, parts in FUSED.items():
            if leaf not in parts:
                continue
            siblings = [f"{prefix}.{part}" for part in parts]
            present = [part for part in siblings if part in facts.specs or part in facts.dense]
            if len({facts.specs.get(part) for part in present}) > 1:
                return f"{', '.join(part.rpartition('.')[2] for part in present)} of {prefix} are joined to {fused} and must have one spec"
    return None


def _split_experts(facts: Facts) -> str | None:
    layers: dict[str, set[LinearSpec | None]] = {}
    for name in (*facts.specs, *facts.dense):
        layer, experts, _ = name.partition(".experts.")
        if experts:
            layers.setdefault(layer, set()).add(facts.specs.get(name))
    split = next((layer for layer, specs in layers.items() if len(specs) > 1), None)
    return None if split is None else f"all experts of a layer are one tensor there and must have one spec; those of {split} differ"


def _values(facts: Facts, field: str) -> list[Any]:
    return sorted({getattr(spec, field) for spec in facts.distinct})


def _gptq_symmetric_4_or_8(facts: Facts) -> str | None:
    if facts.gptq and not (facts.sym and set(_values(facts, "bits")) <= {4, 8}):
        kind = "symmetric" if facts.sym else "asymmetric"
        return f"its gptq loader takes symmetric 4 and 8 bits, this is {kind} {_values(facts, 'bits')}; --format compressed-tensors works"
    return None


def _marlin_groups(facts: Facts) -> str | None:
    odd = [size for size in _values(facts, "group_size") if size not in (-1, 32, 64, 128)]
    return f"its gptq loader takes group sizes -1, 32, 64 and 128, not {odd}" if facts.gptq and odd else None


def _no_desc_act(facts: Facts) -> str | None:
    if (facts.desc_act or facts.reordered) and _values(facts, "group_size") != [-1]:
        return "desc_act (g_idx) with groups is no longer supported; quantize without --desc-act"
    return None


def _ignores_g_idx(facts: Facts) -> str | None:
    if facts.reordered and not facts.desc_act:
        return "g_idx is not trivial but desc_act is false, so the groups would be taken in natural order, silently"
    return None


def _moe_needs_symmetric(facts: Facts) -> str | None:
    plain = facts.sym and set(_values(facts, "bits")) <= {4, 8}
    return "its gptq experts need symmetric 4 or 8 bits" if facts.gptq and facts.experts and not plain else None


def _sglang_compressed(facts: Facts) -> str | None:
    plain = facts.sym and set(_values(facts, "bits")) <= {4, 8}
    return "only symmetric 4 and 8 bits of compressed-tensors are known to work" if not facts.gptq and not plain else None


def _no_compressed_g_idx(facts: Facts) -> str | None:
    return "groups in activation order were removed from compressed-tensors" if not facts.gptq and facts.reordered else None


def _sglang_head(facts: Facts) -> str | None:
    return (
        "whether this release reads a quantized output head of compressed-tensors was not tried" if facts.head and not facts.gptq else None
    )


def _stock_head(facts: Facts) -> str | None:
    return "optimum replaces linears of the blocks only, so the quantized output head is not loaded" if facts.head and facts.gptq else None


def _stock_experts(facts: Facts) -> str | None:
    return "the experts' tensors are not matched and random ones are used, silently" if facts.gptq and facts.experts else None


def _stock_exceptions(facts: Facts) -> str | None:
    differs = facts.exceptions or len(facts.distinct) > 1
    return "optimum does not know `dynamic`: linears that differ or are skipped cannot be described" if facts.gptq and differs else None


def _stock_asymmetric(facts: Facts) -> str | None:
    if facts.gptq or facts.sym:
        return None
    if len(facts.distinct) > 1:
        return "asymmetric compressed-tensors need dequantize=True, which reads all linears with the spec of the first, silently"
    return "asymmetric compressed-tensors load only with CompressedTensorsConfig(dequantize=True)"


def _mlx(facts: Facts) -> str | None:
    if facts.gptq:
        return "it reads gptq tensors in the layout of AWQ and raises on g_idx"
    return "it does not read compressed-tensors"


_SPLIT = Rule("one spec per fused unit", "vLLM: 'Detected some but not all shards ... are quantized'", split_units)
_EXPERTS = Rule("one spec for all experts", "vllm compressed_tensors_moe.py: 'All MoE projections need to have same ...'", _split_experts)

ENGINES: Mapping[str, tuple[Rule, ...]] = {
    "vLLM 0.33": (
        Rule("gptq types", "vllm auto_gptq.py: TYPE_MAP", _gptq_symmetric_4_or_8),
        Rule("gptq group sizes", "vllm verify_marlin_supported", _marlin_groups),
        Rule("no desc_act", "vllm gptq_utils.py: normalize_and_validate_gptq_desc_act", _no_desc_act),
        Rule("g_idx is dropped", "vllm base_config.py: get_checkpoint_weight_mapper", _ignores_g_idx),
        _SPLIT,
        _EXPERTS,
    ),
    "SGLang 0.5.23": (
        Rule("no g_idx in compressed-tensors", "compressed-tensors quant_args.py: GROUP removed 2026-08-27", _no_compressed_g_idx),
        Rule("gptq experts", "sglang moe_wna16", _moe_needs_symmetric),
        Rule("compressed-tensors head", "sglang pull request 28130: read as unquantized before", _sglang_head, certain=False),
        Rule("compressed-tensors widths", "not tried", _sglang_compressed, certain=False),
        _SPLIT,
        _EXPERTS,
    ),
    "transformers with gptqkit": (),
    "transformers with optimum and gptqmodel, or compressed-tensors": (
        Rule("experts", "measured: transformers 5.23, optimum 2.3, gptqmodel 7.7", _stock_experts),
        Rule("quantized head", "optimum gptq/quantizer.py: convert_model", _stock_head),
        Rule("exceptions", "optimum gptq/quantizer.py: convert_model", _stock_exceptions),
        Rule("asymmetric", "measured: transformers 5.23, compressed-tensors 0.20", _stock_asymmetric),
        Rule("no g_idx in compressed-tensors", "compressed-tensors quant_args.py: GROUP removed 2026-08-27", _no_compressed_g_idx),
    ),
    "mlx-lm 0.32": (Rule("layout", "mlx_lm utils.py: _transform_awq_weights", _mlx),),
}
