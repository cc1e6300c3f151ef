"""What a bit budget may choose: the linears of a model in units of one spec each, found in its layout.

Linears that read the same tensor are one unit, because engines fuse what is among them ({q, k, v}, {gate, up}). All experts of a layer are
one unit, gate, up and down alike: vLLM's and SGLang's fused experts take one spec for all of them (checkpoint/engines.py). A linear that
one of the user's rules matches is fixed by that rule and a unit of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import takewhile

from gptqkit.core.config import LinearSpec, QuantConfig, Rule
from gptqkit.core.errors import InputError
from gptqkit.formats import get_format
from gptqkit.formats.patterns import exact_patterns
from gptqkit.models.layout import InputGroup, LinearInfo
from gptqkit.models.streamed import StreamedModel
from gptqkit.planner.budget import Unit, allocate, specs_for


def linear_name(model: StreamedModel, block: int, linear: str) -> str:
    """The checkpoint's name of a linear, without `.weight`."""
    return model.disk_name[f"{model.layout.block_name(block)}.{linear}.weight"].removesuffix(".weight")


def find_units(model: StreamedModel, config: QuantConfig) -> list[Unit]:
    """All linears of the blocks, in order. Raises InputError for one that no option of the budget fits."""
    return [unit for block, groups in enumerate(model.layout.blocks) for unit in _units_of(model, block, groups, config)]


def config_for(config: QuantConfig, units: Sequence[Unit], specs: Sequence[LinearSpec | None]) -> QuantConfig:
    """The configuration in which every unit has its spec: the user's rules, then one for each spec that was chosen."""
    names: dict[LinearSpec | None, list[str]] = {}
    for unit, spec in zip(units, specs, strict=True):
        if not unit.fixed:
            names.setdefault(spec, []).extend(unit.linears)
    chosen = []
    for spec, linears in names.items():
        pattern = "|".join(exact_patterns(linears))
        if spec is None:
            chosen.append(Rule(pattern, skip=True))
        else:
            chosen.append(Rule(pattern, bits=spec.bits, group_size=spec.group_size, sym=spec.sym))
    return replace(config, rules=(*config.rules, *chosen))


def equal_allocation(units: Sequence[Unit], target_bits: float) -> list[LinearSpec | None]:
    """What the budget would give if all weights mattered equally: the sizes of a plan before anything is measured."""
    losses = {unit.name: [0.0 if spec is None else unit.weights * 4.0**-spec.bits_per_weight for spec in unit.options] for unit in units}
    return allocate(units, losses, target_bits)


def _units_of(model: StreamedModel, block: int, groups: Sequence[InputGroup], config: QuantConfig) -> list[Unit]:
    free: dict[object, list[LinearInfo]] = {}
    units: list[Unit] = []
    for number, group in enumerate(groups):
        for info in group.linears:
            name = linear_name(model, block, info.name)
            if any(re.search(rule.pattern, name) for rule in config.rules):
                units.append(Unit(name, block, (name,), (_shape(info),), (config.spec(name),)))
            else:
                owner, experts, _ = info.name.partition(".experts.")
                free.setdefault(owner if experts else number, []).append(info)
    for members in free.values():
        names = tuple(linear_name(model, block, info.name) for info in members)
        options = _options(names, members, config)
        units.append(Unit(_common_name(names), block, names, tuple(_shape(info) for info in members), options))
    return units


def _options(names: Sequence[str], members: Sequence[LinearInfo], config: QuantConfig) -> tuple[LinearSpec | None, ...]:
    form = get_format(config.format)
    fitting: list[LinearSpec | None] = []
    refusal = ""
    for spec in specs_for([info.in_features for info in members], sym=config.sym):
        reasons = [
            f"{name}: {reason}"
            for name, info in zip(names, members, strict=True)
            if (reason := form.refuses_spec(spec, info.out_features, info.in_features, config.desc_act))
        ]
        if reasons:
            refusal = reasons[0]
        else:
            fitting.append(spec)
    if not fitting:
        raise InputError(f"{refusal}; or exclude it with --rule '{re.escape(names[0])}=skip'")
    return (*fitting, None)


def _shape(info: LinearInfo) -> tuple[int, int]:
    return info.out_features, info.in_features


def _common_name(names: Sequence[str]) -> str:
    """One name for several linears.

    >>> _common_name(["h.0.attn.q_proj", "h.0.attn.k_proj"]), _common_name(["h.0.moe.experts.0.up", "h.0.moe.experts.1.up"])
    ('h.0.attn.{q_proj,k_proj}', 'h.0.moe.experts')
    """
    if len(names) == 1:
        return names[0]
    if all(".experts." in name for name in names):
        return names[0].partition(".experts.")[0] + ".experts"
    levels = zip(*(name.split(".") for name in names), strict=False)
    common = ".".join(parts[0] for parts in takewhile(lambda parts: len(set(parts)) == 1, levels))
    return f"{common}.{{{','.join(name.removeprefix(common + '.') for name in names)}}}"
