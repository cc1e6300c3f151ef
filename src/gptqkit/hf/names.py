"""Under which names checkpoints store what a model has: transformers' own renaming rules, minus the stacking of experts that were
taken apart."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from gptqkit.checkpoint.pieces import Piece
from gptqkit.core.errors import InputError
from gptqkit.hf.containers import Stack
from gptqkit.hf.experts import Experts


def conversions(transforms: Iterable[Any], model: nn.Module) -> list[Any]:
    """transformers' rules for a model whose experts were replaced: a rule that would stack experts becomes a renaming of their linears.

    Raises InputError for experts that transformers makes in a way that no renaming describes.
    """
    stacked = {f"{owner}.{name}": stack for owner, experts in _replaced(model).items() for name, stack in experts.kind.stacks.items()}
    changed: list[Any] = []
    for rule in transforms:
        made = [stack for name, stack in stacked.items() if isinstance(rule, WeightConverter) and name.endswith(rule.target_patterns[0])]
        changed += _renamings(rule, made[0]) if made else [rule]
    return changed


def renames_stack(rule: Any, model: nn.Module) -> bool:
    """Whether a rule names a parameter of experts that the checkpoint stores stacked under another name."""
    stacks = (f"{owner}.{name}" for owner, experts in _replaced(model).items() for name in experts.shapes)
    return type(rule) is WeightRenaming and any(name.endswith(rule.target_patterns[0]) for name in stacks)


def model_names(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(name in the checkpoint, name in the model, whether loading merges or splits it), by transformers' own renaming rules."""
    rules = conversions(get_model_conversion_mapping(model), model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    state = model.state_dict()
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        yield name, target, pattern is not None


def find_pieces(model: Any, names: Iterable[str]) -> dict[str, Piece]:
    """Where a checkpoint stores stacked what the model, its experts replaced, holds one by one: the linears' tensors by the names under
    which they are written, which are those of the model below the names that the checkpoint has for its blocks."""
    stacked = {f"{owner}.{name}": (owner, name) for owner, experts in _replaced(model).items() for name in experts.shapes}
    found: dict[str, Piece] = {}
    for stored, target, _ in model_names(model, names) if stacked else ():
        known = next((known for known in stacked if known == target or known.endswith(f".{target}")), None)
        if known is None:
            continue
        owner, name = stacked[known]
        below = _below_number(owner)
        head = stored[: len(stored) - len(_below_number(stored))]
        for local, piece in model.get_submodule(owner).pieces(name, stored, owner):
            found[f"{head}{below}.{local}"] = piece
    return found


def _below_number(name: str) -> str:
    """What follows the first number in a name, the number of its block."""
    return re.sub(r"^.*?\.\d+\.", "", name, count=1)


def _renamings(rule: WeightConverter, stack: Stack) -> list[WeightRenaming]:
    """experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj   becomes   experts.N.w1. -> experts.N.gate_proj. and so on."""
    before, dot, leaf = rule.target_patterns[0].rpartition(".")
    made, parts = [], stack.parts
    expected = [MergeModulelist, Concatenate][: len(parts)]
    sources = [source.replace("\\", "") for source in rule.source_patterns]
    as_they_are = not stack.transposed and not stack.interleaved
    if (
        not as_they_are
        or [type(op) for op in rule.operations] != expected
        or len(sources) != len(parts)
        or not all(s.endswith(".weight") for s in sources)
    ):
        raise InputError(
            f"transformers makes {leaf} from {', '.join(sources)} by {', '.join(type(op).__name__ for op in rule.operations)}; "
            "gptqkit knows only experts that are stacked as they are"
        )
    for source, part in zip(sources, parts, strict=True):
        own = f"{before}{dot}*.{part}.weight"
        if source != own:
            pattern = re.escape(source.removesuffix("weight")).replace(r"\*", r"(\d+)")
            renaming = WeightRenaming(pattern, f"{before}{dot}\\1.{part}.")
            renaming.scope_prefix, renaming.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
            made.append(renaming)
    return made


def _replaced(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}
