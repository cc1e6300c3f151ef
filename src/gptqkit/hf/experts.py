"""Mixture-of-experts layers as modules of ordinary linears.

transformers 5 holds the experts of a layer as two stacked parameters, whatever the checkpoint looks like:

    gate_up_proj [E, 2 F, H]     down_proj [E, H, F]         E experts, H hidden size, F expert width

Nothing that works on linears can see into that: not discovery, not capture, not packing, not a quantized module. `replace_experts` puts an
`Experts` module in its place, with the linears `E.gate_proj`, `E.up_proj`, `E.down_proj`; from there on an expert is three linears like any
others. The names are those under which checkpoints store experts, up to the renaming rules that transformers has per family.

Which families share this container and how others differ is said by transformers itself: `use_experts_implementation` leaves `has_gate`,
`has_bias`, `is_transposed`, `is_concatenated` and `has_post_expert_norm` on the module, and `_apply_gate` computes what lies between the
two products. A kind of container is a row of KINDS. 60 of the 67 model types of transformers 5.23 that stack experts have the kind above;
`refusal` says of any other container what is unusual about it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from gptqkit.algorithms.precision import filled_rows
from gptqkit.core.errors import InputError

ROUTED: ContextVar[Tensor | None] = ContextVar("ROUTED", default=None)
"""While an expert of a module with `visit_all` runs: which tokens its rows are, ascending."""


class EvenLinear(nn.Linear):
    """A linear that multiplies few different numbers of rows, whatever it is called with (precision.py says why)."""

    def forward(self, x_MI: Tensor) -> Tensor:
        return super().forward(filled_rows(x_MI, x_MI.dtype))[: x_MI.shape[0]]


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of container holds its experts.

    flags    what transformers says about such a container
    stacks   its parameters [E, out, in], each with the linears it is made of, concatenated along out; the last of them is `down_proj`
    combine  the container and the outputs of all linears but the last, side by side -> what the last reads
    """

    flags: Mapping[str, bool]
    stacks: Mapping[str, tuple[str, ...]]
    combine: Callable[[Any, Tensor], Tensor]


def _gated(container: Any, gate_up: Tensor) -> Tensor:
    combined: Tensor = container._apply_gate(gate_up)
    return combined


def _activated(container: Any, up: Tensor) -> Tensor:
    activated: Tensor = container.act_fn(up)
    return activated


_PLAIN = {"is_transposed": False, "has_bias": False, "is_concatenated": True, "has_post_expert_norm": False}
KINDS = (
    Kind({**_PLAIN, "has_gate": True}, {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}, _gated),
    Kind({**_PLAIN, "has_gate": False}, {"up_proj": ("up_proj",), "down_proj": ("down_proj",)}, _activated),
)
_UNUSUAL = {
    "is_transposed": "are stored [in, out]",
    "has_bias": "have biases",
    "is_concatenated": "interleave gate and up",
    "has_post_expert_norm": "are followed by a norm",
}


class Expert(nn.Module):
    """One expert: down(combine(gate(x), up(x))), or what its kind has for that."""

    def __init__(self, container: Any, kind: Kind, linear: type[nn.Linear]) -> None:
        super().__init__()
        for stack, parts in kind.stacks.items():
            _, outputs, inputs = container.get_parameter(stack).shape
            for part in parts:
                made = linear(inputs, outputs // len(parts), bias=False, device="meta", dtype=container.get_parameter(stack).dtype)
                self.add_module(part, made)

    @property
    def last(self) -> Any:
        return self.down_proj

    def between(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """What `down_proj` reads, [M, F]."""
        return combine(torch.cat([linear(x_MH) for name, linear in self.named_children() if name != "down_proj"], dim=-1))

    def forward(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        y_MH: Tensor = self.last(self.between(x_MH, combine))
        return y_MH


class Experts(nn.Module):
    """Takes the place of a container of stacked experts: same call, same result.

    Tokens are grouped by expert, so each expert multiplies once per forward. With `visit_all` that holds for experts without tokens too,
    which then see [0, H]: whoever watches the linears meets the same calls in the same order in every forward.
    """

    def __init__(self, container: Any, *, visit_all: bool) -> None:
        super().__init__()
        kind = _kind(container)
        assert kind is not None, refusal(container)
        self.kind = kind
        self.num_experts = container.down_proj.shape[0]
        self.visit_all = visit_all
        for index in range(self.num_experts):
            self.add_module(str(index), Expert(container, kind, EvenLinear if visit_all else nn.Linear))
        container._parameters.clear()
        # Kept for its activation and gating rule only; no submodule, because transformers initializes the parameters of that class.
        self.__dict__["container"] = container

    def combine(self, outputs: Tensor) -> Tensor:
        """What the family computes between the products: [M, 2 F] (without a gate [M, F]) -> [M, F]."""
        return self.kind.combine(self.__dict__["container"], outputs)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, H] of all tokens, [T, K] the experts each is sent to, [T, K] their weights -> [T, H]. Indices from E on mean no expert."""
        top_k = top_k_index.shape[-1]
        expert_S, weight_S = top_k_index.reshape(-1), top_k_weights.reshape(-1)
        by_expert_S = expert_S.argsort(stable=True)
        counts = torch.bincount(expert_S, minlength=self.num_experts)[: self.num_experts].tolist()
        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        sum_TH = torch.zeros_like(hidden_states, dtype=wide)
        for expert, slots_M in zip(self.children(), by_expert_S[: sum(counts)].split(counts), strict=True):
            if slots_M.numel() or self.visit_all:
                tokens_M = slots_M // top_k
                with self._announced(tokens_M):
                    y_MH = expert(hidden_states[tokens_M], self.combine)
                # A token goes to an expert once, so no two rows of one call land on the same token: deterministic on a GPU too.
                sum_TH.index_add_(0, tokens_M, y_MH.to(wide) * weight_S[slots_M, None])
        return sum_TH.to(hidden_states.dtype)

    @contextmanager
    def _announced(self, tokens_M: Tensor) -> Iterator[None]:
        if not self.visit_all:
            yield
            return
        before = ROUTED.set(tokens_M)
        try:
            yield
        finally:
            ROUTED.reset(before)

    def stacked(self) -> Any:
        """The container again, with the weights that the linears have now."""
        container: Any = self.__dict__["container"]
        experts: list[Any] = list(self.children())
        for stack, parts in self.kind.stacks.items():
            values = [torch.cat([expert.get_submodule(part).weight for part in parts]) for expert in experts]
            container.register_parameter(stack, nn.Parameter(torch.stack(values)))
        return container


def is_container(module: nn.Module) -> bool:
    """True for a module of transformers that holds experts as stacked parameters, of any kind."""
    return "Experts" in type(module).__name__ and any(p.ndim == 3 for p in module._parameters.values() if p is not None)


def _says(container: Any, flag: str) -> Any:
    """What a container says of itself. Before transformers 5.18 there was no norm after experts, and no flag for one."""
    return getattr(container, flag, False) if flag == "has_post_expert_norm" else getattr(container, flag)


def refusal(container: Any) -> str | None:
    """Why the experts of a container cannot be taken apart; None when they can."""
    if _kind(container) is not None:
        return None
    if not hasattr(container, "_apply_gate"):
        return "its forward is its own, not one of transformers' expert implementations"
    for flag, meaning in _UNUSUAL.items():
        if _says(container, flag) not in {kind.flags[flag] for kind in KINDS}:
            return f"its experts {meaning}"
    return f"its parameters are {_shapes(container)}, not [E, out, in] of " + " or ".join(", ".join(kind.stacks) for kind in KINDS)


def _kind(container: Any) -> Kind | None:
    return next((kind for kind in KINDS if _is(container, kind)), None)


def _is(container: Any, kind: Kind) -> bool:
    shapes = _shapes(container)
    if not hasattr(container, "_apply_gate") or any(_says(container, flag) is not value for flag, value in kind.flags.items()):
        return False
    if set(shapes) != set(kind.stacks) or any(len(shape) != 3 for shape in shapes.values()):
        return False
    (first, parts), (last, _) = kind.stacks.items()
    (experts, outputs, hidden), (experts_too, hidden_too, width) = shapes[first], shapes[last]
    return (experts, outputs, hidden) == (experts_too, len(parts) * width, hidden_too)


def _shapes(container: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in container.named_parameters()}


def replace_experts(model: nn.Module, *, visit_all: bool) -> list[str]:
    """Puts an `Experts` on meta in place of every container that can be taken apart; returns their names in the model."""
    names = [name for name, module in model.named_modules() if is_container(module) and refusal(module) is None]
    for name in names:
        experts = Experts(model.get_submodule(name), visit_all=visit_all)
        model.set_submodule(name, experts.train(model.training))
    return names


def conversions(transforms: Iterable[Any], model: nn.Module) -> list[Any]:
    """transformers' rules for a model whose experts were replaced: a rule that would stack experts becomes a renaming of their linears.

    Raises InputError for experts that transformers makes in a way that no renaming describes.
    """
    stacked = {f"{owner}.{stack}": parts for owner, experts in _replaced(model).items() for stack, parts in experts.kind.stacks.items()}
    changed: list[Any] = []
    for rule in transforms:
        made = [parts for name, parts in stacked.items() if isinstance(rule, WeightConverter) and name.endswith(rule.target_patterns[0])]
        changed += _renamings(rule, made[0]) if made else [rule]
    return changed


def model_names(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(name in the checkpoint, name in the model, whether loading merges or splits it), by transformers' own renaming rules.

    Raises InputError for a checkpoint that stores stacked what the model, its experts replaced, holds one by one.
    """
    rules = conversions(get_model_conversion_mapping(model), model)
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    replaced, state = _replaced(model), model.state_dict()
    stacked = {f"{owner}.{stack}" for owner, experts in replaced.items() for stack in experts.kind.stacks}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if any(known == target or known.endswith(f".{target}") for known in stacked):
            raise InputError(
                f"tensor {name} stores the experts of {type(model).__name__} stacked; "
                "this version reads checkpoints that store each expert by itself"
            )
        yield name, target, pattern is not None


def _replaced(model: nn.Module) -> dict[str, Experts]:
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def _renamings(rule: WeightConverter, parts: tuple[str, ...]) -> list[WeightRenaming]:
    """experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj   becomes   experts.N.w1. -> experts.N.gate_proj. and so on."""
    before, dot, leaf = rule.target_patterns[0].rpartition(".")
    made = []
    expected = [MergeModulelist, Concatenate][: len(parts)]
    sources = [source.replace("\\", "") for source in rule.source_patterns]
    if [type(op) for op in rule.operations] != expected or len(sources) != len(parts) or not all(s.endswith(".weight") for s in sources):
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
