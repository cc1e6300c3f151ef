"""Mixture-of-experts layers as modules of ordinary linears.

transformers 5 holds the experts of a layer as two stacked parameters, whatever the checkpoint looks like:

    gate_up_proj [E, 2 F, H]     down_proj [E, H, F]         E experts, H hidden size, F expert width

Nothing that works on linears can see into that: not discovery, not capture, not packing, not a quantized module. `replace_experts` puts an
`Experts` module in its place, with the linears `E.gate_proj`, `E.up_proj`, `E.down_proj`; from there on an expert is three linears like any
others. The names are those under which checkpoints store experts, up to the renaming rules that transformers has per family.

Which families share this container and how they differ is said by transformers itself: `use_experts_implementation` leaves `has_gate`,
`has_bias`, `is_transposed`, `is_concatenated` and `has_post_expert_norm` on the module, and `_apply_gate` computes what lies between the
two products. 60 of the 66 model types of transformers 5.23 that fuse experts have the kind above; `refusal` says what another one lacks.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from gptqkit.algorithms.precision import filled_rows
from gptqkit.core.errors import InputError

FUSED = ("gate_up_proj", "down_proj")
"""The stacked parameters of a container, by transformers' names."""
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked parameter -> the linears it is made of, in the order in which transformers concatenates them."""

ROUTED: ContextVar[Tensor | None] = ContextVar("ROUTED", default=None)
"""While an expert of a module with `visit_all` runs: which tokens its rows are, ascending."""


class EvenLinear(nn.Linear):
    """A linear that multiplies few different numbers of rows, whatever it is called with (precision.py says why)."""

    def forward(self, x_MI: Tensor) -> Tensor:
        return super().forward(filled_rows(x_MI, x_MI.dtype))[: x_MI.shape[0]]


class Expert(nn.Module):
    """One expert: down(combine(gate(x), up(x)))."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype, linear: type[nn.Linear]) -> None:
        super().__init__()
        self.gate_proj = linear(hidden, width, bias=False, device="meta", dtype=dtype)
        self.up_proj = linear(hidden, width, bias=False, device="meta", dtype=dtype)
        self.down_proj = linear(width, hidden, bias=False, device="meta", dtype=dtype)

    def between(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        """What `down_proj` reads, [M, F]."""
        return combine(torch.cat((self.gate_proj(x_MH), self.up_proj(x_MH)), dim=-1))

    def forward(self, x_MH: Tensor, combine: Callable[[Tensor], Tensor]) -> Tensor:
        return self.down_proj(self.between(x_MH, combine))


class Experts(nn.Module):
    """Takes the place of a container of stacked experts: same call, same result.

    Tokens are grouped by expert, so each expert multiplies once per forward. With `visit_all` that holds for experts without tokens too,
    which then see [0, H]: whoever watches the linears meets the same calls in the same order in every forward.
    """

    def __init__(self, container: Any, *, visit_all: bool) -> None:
        super().__init__()
        experts, hidden, width = container.down_proj.shape
        for index in range(experts):
            self.add_module(str(index), Expert(hidden, width, container.down_proj.dtype, EvenLinear if visit_all else nn.Linear))
        self.num_experts = experts
        self.visit_all = visit_all
        container._parameters.clear()
        # Kept for its activation and gating rule only; no submodule, because transformers initializes the parameters of that class.
        self.__dict__["container"] = container

    def combine(self, gate_up_MF: Tensor) -> Tensor:
        """What the family computes between the two products: [M, 2 F] -> [M, F]."""
        combined: Tensor = self.__dict__["container"]._apply_gate(gate_up_MF)
        return combined

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
        gate_up = [torch.cat((expert.gate_proj.weight, expert.up_proj.weight)) for expert in experts]
        container.gate_up_proj = nn.Parameter(torch.stack(gate_up))
        container.down_proj = nn.Parameter(torch.stack([expert.down_proj.weight for expert in experts]))
        return container


def is_container(module: nn.Module) -> bool:
    """True for a module of transformers that holds experts as stacked parameters, of any kind."""
    return any(parameter.ndim == 3 for parameter in module._parameters.values() if parameter is not None) and hasattr(module, "num_experts")


def refusal(container: Any) -> str | None:
    """Why the experts of a container cannot be taken apart; None when they can."""
    if not hasattr(container, "_apply_gate"):
        return "its forward is its own, not one of transformers' expert implementations"
    for flag, wanted, meaning in (
        ("has_gate", True, "have no gate"),
        ("is_transposed", False, "are stored [in, out]"),
        ("has_bias", False, "have biases"),
        ("is_concatenated", True, "interleave gate and up"),
        ("has_post_expert_norm", False, "are followed by a norm"),
    ):
        if getattr(container, flag) is not wanted:
            return f"its experts {meaning}"
    shapes = {name: tuple(p.shape) for name, p in container.named_parameters()}
    down = shapes.get("down_proj", ())
    if set(shapes) != set(FUSED) or len(down) != 3 or shapes["gate_up_proj"] != (down[0], 2 * down[2], down[1]):
        return f"its parameters are {shapes}, not gate_up_proj [E, 2 F, H] and down_proj [E, H, F]"
    return None


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
    stacked = [f"{owner}.{leaf}" for owner in _replaced(model) for leaf in FUSED]
    changed: list[Any] = []
    for rule in transforms:
        target = rule.target_patterns[0]
        if isinstance(rule, WeightConverter) and any(name.endswith(target) for name in stacked):
            changed += _renamings(rule, target)
        else:
            changed.append(rule)
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
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        owner, _, leaf = target.rpartition(".")
        if leaf in FUSED and any(known == owner or known.endswith(f".{owner}") for known in replaced):
            raise InputError(
                f"tensor {name} stores the experts of {type(model).__name__} stacked; "
                "this version reads checkpoints that store each expert by itself"
            )
        yield name, target, pattern is not None


def _replaced(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Experts)}


def _renamings(rule: WeightConverter, target: str) -> list[WeightRenaming]:
    """experts.*.w1.weight, experts.*.w3.weight -> experts.gate_up_proj   becomes   experts.N.w1. -> experts.N.gate_proj. and so on."""
    before, leaf = target[: target.rindex(".") + 1], target.rpartition(".")[2]
    parts, made = _PARTS[leaf], []
    expected = [MergeModulelist, Concatenate][: len(parts)]
    sources = [source.replace("\\", "") for source in rule.source_patterns]
    if [type(op) for op in rule.operations] != expected or len(sources) != len(parts) or not all(s.endswith(".weight") for s in sources):
        raise InputError(
            f"transformers makes {leaf} from {', '.join(sources)} by {', '.join(type(op).__name__ for op in rule.operations)}; "
            "gptqkit knows only experts that are stacked as they are"
        )
    for source, part in zip(sources, parts, strict=True):
        own = f"{before}*.{part}.weight"
        if source != own:
            pattern = re.escape(source.removesuffix("weight")).replace(r"\*", r"(\d+)")
            renaming = WeightRenaming(pattern, f"{before}\\1.{part}.")
            renaming.scope_prefix, renaming.base_model_prefix = rule.scope_prefix, rule.base_model_prefix
            made.append(renaming)
    return made
