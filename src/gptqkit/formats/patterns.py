"""Regular expressions over linear names, as quantization configs use them, kept short by merging layer numbers.

A config names exceptions by pattern. Engines match these patterns (with re.match) against *their* names, and vLLM fuses linears: what is
q_proj, k_proj and v_proj on disk is asked about as qkv_proj. So a pattern is written for the largest unit whose linears all agree (a block,
a submodule), and where only part of a submodule differs, the fused name is written beside its parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Choice = TypeVar("Choice", bound=Hashable)

FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
"""vLLM's names for linears it joins (packed_modules_mapping), and their parts on disk."""


def exact_patterns(names: Iterable[str]) -> list[str]:
    """Patterns that match `names` and nothing else; names that differ only in their first number share one.

    >>> exact_patterns(["h.0.mlp.up", "h.7.mlp.up", "head"])
    ['^h\\\\.(?:0|7)\\\\.mlp\\\\.up$', '^head$']
    """
    return _merged([(name, "$") for name in names])


def unit_patterns(choice: Mapping[str, Choice], default: Choice) -> list[tuple[str, Choice]]:
    """Patterns for all names whose choice is not `default`, each with that choice, for the largest units that agree.

    `choice` must hold every linear of the model's blocks, those that keep the default included: it decides what agrees.

    >>> unit_patterns({"h.0.mlp.gate_proj": 8, "h.0.mlp.up_proj": 8, "h.0.mlp.down_proj": 4, "h.1.mlp.down_proj": 8}, 4)
    [('^h\\\\.0\\\\.mlp\\\\.(?:gate_proj|up_proj|gate_up_proj)$', 8), ('^h\\\\.1(?:\\\\..*)?$', 8)]
    """
    under: dict[str, set[Choice]] = defaultdict(set)
    for name, value in choice.items():
        for unit in _units(name):
            under[unit].add(value)
    units: dict[Choice, dict[tuple[str, str], None]] = defaultdict(dict)
    for name, value in choice.items():
        if value != default:
            agreeing = next((unit for unit in _units(name) if len(under[unit]) == 1), None)
            units[value][(agreeing, r"(?:\..*)?$") if agreeing else _with_fused(name, choice)] = None
    return [(pattern, value) for value, found in units.items() for pattern in _merged(found)]


def _units(name: str) -> list[str]:
    """The block of a linear and the modules between, outermost first; a name without a number has none."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts))
    return [".".join(parts[:end]) for end in range(number + 1, len(parts))]


def _with_fused(name: str, choice: Mapping[str, Choice]) -> tuple[str, str]:
    """(prefix, rest of the pattern) for one linear, or for all parts of a fused one together with the fused name."""
    prefix, _, leaf = name.rpartition(".")
    for fused, parts in FUSED.items():
        if leaf in parts and all(choice.get(f"{prefix}.{part}") == choice[name] for part in parts):
            return prefix, rf"\.(?:{'|'.join((*parts, fused))})$"
    return name, "$"


def _merged(found: Iterable[tuple[str, str]]) -> list[str]:
    """Joins (name, rest) pairs that differ only in the first number of the name."""
    numbers: dict[tuple[str, str | None, str], list[int]] = defaultdict(list)
    for name, rest in found:
        parts = name.split(".")
        at = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if at is None:
            numbers[name, None, rest].append(0)
        else:
            numbers["".join(p + "." for p in parts[:at]), "".join("." + p for p in parts[at + 1 :]), rest].append(int(parts[at]))
    patterns = []
    for (before, after, rest), values in numbers.items():
        layers = "" if after is None else str(values[0]) if len(values) == 1 else f"(?:{'|'.join(str(v) for v in sorted(values))})"
        patterns.append("^" + re.escape(before) + layers + re.escape(after or "") + rest)
    return patterns
