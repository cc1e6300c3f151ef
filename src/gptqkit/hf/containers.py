"""What transformers holds the experts of a layer in: stacked parameters, most often

    gate_up_proj [E, 2 F, H]     down_proj [E, H, F]         E experts, H hidden size, F expert width

How a family's container differs from that is said by transformers itself: `use_experts_implementation` leaves `has_gate`, `has_bias`,
`is_transposed`, `is_concatenated` and `has_post_expert_norm` on the module, and `_apply_gate` computes what lies between the two products.
Containers with a forward of their own are known by their parameters, a function each in `_KINDS`. `refusal` says of any other what is
unusual about it. `experts.py` takes apart what is described here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Stack:
    """A parameter of a container: [E, out, in], or [E, in, out] if `transposed`, also with the first two dimensions in one.

    parts        the linears that it is made of, side by side along out, or alternating if `interleaved`
    bias         the parameter [E, out] with their biases, if they have any
    """

    parts: tuple[str, ...]
    transposed: bool = False
    interleaved: bool = False
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Kind:
    """How a kind of container holds its experts.

    stacks   its parameters by name; the last one is `down_proj`
    combine  the container and the outputs of all linears but the last, side by side -> what the last reads
    routed   called with tokens and where each goes; else with [E * T, H], every token once for each expert, zeros where it does not go
    beyond   whether indices beyond the experts stand for experts that return their input (else for none)
    """

    stacks: Mapping[str, Stack]
    combine: Callable[[Any, Tensor], Tensor]
    routed: bool = True
    beyond: bool = False

    def fits(self, container: Any) -> bool:
        """Whether the container's parameters are those of this kind, experts of one size."""
        shapes = shapes_of(container)
        expected = {name for stack in self.stacks.items() for name in (stack[0], stack[1].bias) if name is not None}
        if set(shapes) != expected:
            return False
        sizes = [self.sizes(container, name) for name in self.stacks]
        (outputs, hidden), (hidden_too, width) = sizes[0], sizes[-1]
        parts = sum(len(stack.parts) for stack in self.stacks.values()) - 1
        return hidden == hidden_too and outputs * len(sizes[:-1]) == parts * width and all(size == sizes[0] for size in sizes[:-1])

    def experts(self, container: Any) -> int:
        """E. The last stack says: others may have rows for experts that are none."""
        last = list(self.stacks)[-1]
        shape = shapes_of(container)[last]
        return shape[0] if len(shape) == 3 else int(container.num_experts)

    def sizes(self, container: Any, name: str) -> tuple[int, int]:
        """(out, in) of one expert's slice of a stack."""
        *_, rows, columns = shapes_of(container)[name]
        rows = rows if len(shapes_of(container)[name]) == 3 else rows // self.experts(container)
        return (columns, rows) if self.stacks[name].transposed else (rows, columns)


def _flagged(container: Any) -> Kind | None:
    """transformers' own expert implementations, by what they say of themselves."""
    if not hasattr(container, "_apply_gate") or _says(container, "has_post_expert_norm"):
        return None
    gate, transposed, interleaved = container.has_gate, container.is_transposed, container.has_gate and not container.is_concatenated
    first, parts = ("gate_up_proj", ("gate_proj", "up_proj")) if gate else ("up_proj", ("up_proj",))
    biases = (f"{first}_bias", "down_proj_bias") if container.has_bias else (None, None)
    stacks = {first: Stack(parts, transposed, interleaved, biases[0]), "down_proj": Stack(("down_proj",), transposed, bias=biases[1])}
    return Kind(stacks, _interleaved if interleaved else _gated if gate else _activated)


def _every_token(container: Any) -> Kind | None:
    """Llama 4: each expert gets all tokens, scaled by the router, those that do not go there by zero."""
    if hasattr(container, "_apply_gate") or [*inspect.signature(type(container).forward).parameters] != ["self", "hidden_states"]:
        return None
    stacks = {"gate_up_proj": Stack(("gate_proj", "up_proj"), transposed=True), "down_proj": Stack(("down_proj",), transposed=True)}
    return Kind(stacks, _multiplied, routed=False)


def _with_identities(container: Any) -> Kind | None:
    """LongCat: the last experts are no networks but return their input; the first stack has rows for them, which nothing reads."""
    if not hasattr(container, "identity_expert"):
        return None
    return Kind({"gate_up_proj": Stack(("gate_proj", "up_proj")), "down_proj": Stack(("down_proj",))}, _multiplied, beyond=True)


def _flat(container: Any) -> Kind | None:
    """DBRX: three matrices [E * F, H] in a submodule; the third is transposed."""
    stacks = {"mlp.w1": Stack(("gate_proj",)), "mlp.v1": Stack(("up_proj",)), "mlp.w2": Stack(("down_proj",), transposed=True)}
    return Kind(stacks, _multiplied_below) if set(shapes_of(container)) == set(stacks) else None


_KINDS = (_flagged, _every_token, _with_identities, _flat)


def _gated(container: Any, outputs: Tensor) -> Tensor:
    combined: Tensor = container._apply_gate(outputs)
    return combined


def _interleaved(container: Any, outputs: Tensor) -> Tensor:
    return _gated(container, torch.stack(outputs.chunk(2, dim=-1), dim=-1).flatten(-2))


def _activated(container: Any, outputs: Tensor) -> Tensor:
    activated: Tensor = container.act_fn(outputs)
    return activated


def _multiplied(container: Any, outputs: Tensor) -> Tensor:
    gate, up = outputs.chunk(2, dim=-1)
    return _activated(container, gate) * up


def _multiplied_below(container: Any, outputs: Tensor) -> Tensor:
    gate, up = outputs.chunk(2, dim=-1)
    activated: Tensor = container.mlp.activation_fn(gate)
    return activated * up


def is_container(module: nn.Module) -> bool:
    """True for a module of transformers that holds experts as stacked parameters, of any kind."""
    stacks = any(p.ndim == 3 for p in module._parameters.values() if p is not None) or _flat(module) is not None
    return "Experts" in type(module).__name__ and stacks


def _says(container: Any, flag: str) -> Any:
    """What a container says of itself. Before transformers 5.18 there was no norm after experts, and no flag for one."""
    return getattr(container, flag, False) if flag == "has_post_expert_norm" else getattr(container, flag)


def refusal(container: Any) -> str | None:
    """Why the experts of a container cannot be taken apart; None when they can."""
    if kind_of(container) is not None:
        return None
    if hasattr(container, "_apply_gate") and _says(container, "has_post_expert_norm"):
        return "its experts are followed by a norm"
    kinds = [kind for make in _KINDS if (kind := make(container)) is not None]
    if not kinds:
        return "its forward is its own, not one of transformers' expert implementations"
    return f"its parameters are {shapes_of(container)}, not experts of one size in {', '.join(kinds[0].stacks)}"


def kind_of(container: Any) -> Kind | None:
    kinds = (make(container) for make in _KINDS)
    return next((kind for kind in kinds if kind is not None and kind.fits(container)), None)


def owner_of(container: Any, name: str) -> tuple[Any, str]:
    """The module in a container that has a parameter, and what the parameter is called there."""
    prefix, _, leaf = name.rpartition(".")
    return container.get_submodule(prefix), leaf


def shapes_of(container: Any) -> dict[str, tuple[int, ...]]:
    return {name: tuple(parameter.shape) for name, parameter in container.named_parameters()}


def containers(model: nn.Module) -> list[str]:
    """Where in a model experts are held stacked."""
    return [name for name, module in model.named_modules() if is_container(module)]
