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
from typing import Any

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming, rename_source_key

from gptqkit.core.errors import InputError

FUSED = ("gate_up_proj", "down_proj")
"""The stacked parameters of a container, by transformers' names."""
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Stacked parameter -> the linears it is made of, in the order in which transformers concatenates them."""


class Expert(nn.Module):
    """One expert: down(combine(gate(x), up(x)))."""

    def __init__(self, hidden: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False, device="meta", dtype=dtype)
        self.up_proj = nn.Linear(hidden, width, bias=False, device="meta", dtype=dtype)
        self.down_proj = nn.Linear(width, hidden, bias=False, device="meta", dtype=dtype)

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

    def __init__(self, container: Any) -> None:
        super().__init__()
        experts, hidden, width = container.down_proj.shape
        for index in range(experts):
            self.add_module(str(index), Expert(hidden, width, container.down_proj.dtype))
        self.num_experts = experts
        self.visit_all = True
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
        start = 0
        for expert, count in zip(self.children(), counts, strict=True):
            if count or self.visit_all:
                slots_M = by_expert_S[start : start + count]
                tokens_M = slots_M // top_k
                y_MH = expert(hidden_states[tokens_M], self.combine)
                # A token goes to an expert once, so no two rows of one call land on the same token: deterministic on a GPU too.
                sum_TH.index_add_(0, tokens_M, y_MH.to(wide) * weight_S[slots_M, None])
            start += count
        return sum_TH.to(hidden_states.dtype)


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


def replace_experts(model: nn.Module) -> list[str]:
    """Puts an `Experts` on meta in place of every container that can be taken apart; returns their names in the model."""
    names = [name for name, module in model.named_modules() if is_container(module) and refusal(module) is None]
    for name in names:
        experts = Experts(model.get_submodule(name))
        model.set_submodule(name, experts.train(model.training))
    return names


def model_names(model: Any, names: Iterable[str]) -> Iterator[tuple[str, str, bool]]:
    """(name in the checkpoint, name in the model, whether loading merges or splits it), by transformers' own renaming rules.

    What transformers would stack is, for experts that were replaced, one linear of one expert: no merge. Raises InputError for a checkpoint
    that stores such experts stacked.
    """
    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    prefix = getattr(model, "base_model_prefix", None)
    replaced = {name for name, module in model.named_modules() if isinstance(module, Experts)}
    state: dict[str, Any] = model.state_dict()
    known = {**state, **{f"{owner}.{leaf}": True for owner in replaced for leaf in FUSED}}
    for name in names:
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        owner, _, leaf = target.rpartition(".")
        if owner in replaced and leaf in FUSED:
            if pattern is None:
                raise InputError(
                    f"tensor {name} stores the experts of {type(model).__name__} stacked; this version reads checkpoints that store each "
                    "expert by itself (load the model with transformers and save it again: save_pretrained writes them so)"
                )
            plain, _ = rename_source_key(name, renamings, [], prefix, known)
            yield name, f"{owner}.{_expert_linear(plain, leaf, pattern, converters)}.weight", False
            continue
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        yield name, target, pattern is not None


def _expert_linear(name: str, leaf: str, pattern: str, converters: list[WeightConverter]) -> str:
    """ "7.up_proj" of the tensor of one expert, from the rule that would have stacked it into the parameter `leaf`."""
    rule = next(c for c in converters if pattern in c.source_patterns)
    parts = _PARTS[leaf]
    expected = [MergeModulelist, Concatenate][: len(parts)]
    found = re.search(pattern.replace("*.", r"(\d+)\."), name)
    if [type(op) for op in rule.operations] != expected or len(rule.source_patterns) != len(parts) or found is None:
        raise InputError(
            f"tensor {name}: transformers makes {leaf} from {', '.join(rule.source_patterns)} by "
            f"{', '.join(type(op).__name__ for op in rule.operations)}; gptqkit knows how to read only experts that are stacked as they are"
        )
    return f"{int(found[1])}.{parts[rule.source_patterns.index(pattern)]}"
