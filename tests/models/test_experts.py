"""Taken apart, a container of stacked experts computes what it computed, and every tensor of a checkpoint finds its linear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests.tiny import save_tiny, tiny_config
from transformers import AutoConfig, AutoModelForCausalLM

from gptqkit.core.errors import InputError
from gptqkit.hf.experts import EvenLinear, Experts, is_container, refusal, replace_experts
from gptqkit.hf.skeleton import build_skeleton, checkpoint_names

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h")
TOKENS, TOP_K, HIDDEN = 10, 2, 64


def containers(family: str, **changes: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return {name: module for name, module in model.named_modules() if is_container(module)}


def taken_apart(container: Any, *, visit_all: bool) -> Experts:
    weights = {name: parameter.detach().clone() for name, parameter in container.named_parameters()}
    experts = Experts(copy.deepcopy(container), visit_all=visit_all)
    state = {}
    for index in range(container.num_experts):
        state |= {f"{index}.{part}.weight": value for part, value in parts_of(weights, index).items()}
    experts.load_state_dict(state, assign=True)
    return experts


def parts_of(stacks: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """The linears of one expert, cut out of the stacked parameters."""
    if "up_proj" in stacks:
        return {part: stacks[part][index] for part in ("up_proj", "down_proj")}
    gate, up = stacks["gate_up_proj"][index].chunk(2)
    return {"gate_proj": gate, "up_proj": up, "down_proj": stacks["down_proj"][index]}


def routed(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, and two distinct experts of 0, 1 and 3 for each: nobody goes to 2."""
    torch.manual_seed(seed)
    chosen = torch.stack([torch.randperm(3)[:TOP_K] for _ in range(TOKENS)])
    return torch.randn(TOKENS, HIDDEN), torch.tensor([0, 1, 3])[chosen], torch.rand(TOKENS, TOP_K)


@pytest.mark.parametrize("visit_all", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_container_computed(family: str, visit_all: bool) -> None:
    container = next(iter(containers(family).values()))
    experts = taken_apart(container, visit_all=visit_all)
    hidden, chosen, weights = routed()
    with torch.no_grad():
        expected = container(hidden, chosen, weights)
        assert (experts(hidden, chosen, weights) - expected).abs().max() <= 1e-5 * expected.abs().max()
        again = experts.stacked()
        assert type(again) is type(container)
        assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in container.named_parameters())
        assert torch.equal(again(hidden, chosen, weights), expected)


@pytest.mark.parametrize(("visit_all", "called"), [(True, [0, 1, 2, 3]), (False, [0, 1, 3])])
def test_every_expert_is_called_once_in_order(visit_all: bool, called: list[int]) -> None:
    experts = taken_apart(containers("qwen3_moe")["model.layers.0.mlp.experts"], visit_all=visit_all)
    hidden, chosen, weights = routed()
    seen: list[tuple[int, int]] = []
    for index, expert in enumerate(experts.children()):
        expert.register_forward_pre_hook(lambda _, inputs, index=index: seen.append((index, inputs[0].shape[0])))
    experts(hidden, chosen, weights)
    assert seen == [(index, int((chosen == index).sum())) for index in called]


def test_indices_beyond_the_experts_mean_no_expert() -> None:
    experts = taken_apart(containers("qwen3_moe")["model.layers.0.mlp.experts"], visit_all=True)
    hidden, chosen, weights = routed()
    without = weights.masked_fill(chosen == 1, 0)
    with torch.no_grad():
        assert torch.equal(experts(hidden, chosen.masked_fill(chosen == 1, 4), weights), experts(hidden, chosen, without))


def test_gradients_reach_the_input_and_the_routing_weights() -> None:
    container = containers("mixtral")["model.layers.0.mlp.experts"]
    hidden, chosen, weights = (x.requires_grad_() if x.is_floating_point() else x for x in routed())
    expected = torch.autograd.grad(container(hidden, chosen, weights).square().sum(), (hidden, weights))
    got = torch.autograd.grad(taken_apart(container, visit_all=False)(hidden, chosen, weights).square().sum(), (hidden, weights))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 300])
def test_filled_rows_change_no_value_and_no_gradient(rows: int) -> None:
    torch.manual_seed(rows)
    x, weight = torch.randn(rows, 64, dtype=torch.bfloat16, requires_grad=True), torch.randn(32, 64, dtype=torch.bfloat16)
    even, plain = EvenLinear(64, 32, bias=False, dtype=torch.bfloat16), torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    for linear in (even, plain):
        linear.weight = torch.nn.Parameter(weight.clone())
    results = [(linear(x), *torch.autograd.grad(linear(x).float().sum(), (x, linear.weight))) for linear in (even, plain)]
    assert all(torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(*results, strict=True))


def test_no_expert_is_forgotten_when_the_model_is_copied() -> None:
    experts = taken_apart(containers("olmoe")["model.layers.0.mlp.experts"], visit_all=False)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(experts)(*routed()), experts(*routed()))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_a_checkpoint_finds_its_place(family: str, tmp_path: Path) -> None:
    """The values of each expert's tensors, compared with the slice of the stacked parameters that they were saved from."""
    folder = save_tiny(tmp_path / "model", family)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        names = checkpoint_names(build_skeleton(model.config, torch.float32), file.keys())
        assert sorted(names.values()) == sorted(file.keys())
        checked = 0
        for name, disk_name in names.items():
            owner, is_expert, rest = name.partition(".experts.")
            if not is_expert:
                continue
            index, part, _ = rest.split(".")
            expected = parts_of(dict(model.get_submodule(f"{owner}.experts").named_parameters()), int(index))[part]
            assert torch.equal(file.get_tensor(disk_name), expected), f"{disk_name} -> {name}"
            checked += 1
        assert checked == len(containers(family)) * 4 * (2 if family == "nemotron_h" else 3)


def test_a_checkpoint_that_stores_experts_stacked_is_refused_by_name() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_local_experts": 4, "num_attention_heads": 4, "num_key_value_heads": 2}
    skeleton = build_skeleton(AutoConfig.for_model("granitemoe", num_hidden_layers=1, vocab_size=256, **sizes), torch.float32)
    with pytest.raises(
        InputError, match=r"input_linear\.weight stores the experts of GraniteMoeForCausalLM stacked; .* each expert by itself"
    ):
        checkpoint_names(skeleton, ["model.layers.0.block_sparse_moe.input_linear.weight"])


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_transposed": True}, "its experts are stored [in, out]"),
        ({"has_bias": True}, "its experts have biases"),
        ({"has_gate": False}, "not [E, out, in] of gate_up_proj, down_proj or up_proj, down_proj"),
        ({"is_concatenated": False}, "its experts interleave gate and up"),
        ({"has_post_expert_norm": True}, "its experts are followed by a norm"),
        (
            {"gate_up_proj": torch.nn.Parameter(torch.zeros(4, 32, 64))},
            "its parameters are {'gate_up_proj': (4, 32, 64), 'down_proj': (4, 64, 32)}, not",
        ),
    ],
)
def test_containers_of_other_kinds_are_left_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    container = containers("qwen3_moe")["model.layers.0.mlp.experts"]
    assert refusal(container) is None
    for key, value in changes.items():
        setattr(container, key, value)
    assert reason in str(refusal(container))
    model = torch.nn.ModuleDict({"experts": container})
    assert replace_experts(model, visit_all=True) == []
    assert model["experts"] is container
