"""Taken apart, a container of stacked experts computes what it computed, and every tensor of a checkpoint finds its linear."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import CONTAINERS, save_tiny, tiny_config
from transformers import AutoModelForCausalLM
from transformers.models.aria import modeling_aria

from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.errors import InputError
from gptqkit.hf.containers import is_container, refusal, shapes_of
from gptqkit.hf.experts import EvenLinear, Experts, replace_experts
from gptqkit.hf.names import find_pieces
from gptqkit.hf.skeleton import build_skeleton, checkpoint_names

FAMILIES = ["qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h", *CONTAINERS]
if hasattr(modeling_aria, "AriaGroupedExpertsGemm"):  # transformers 5.17, which cannot read its own configuration of DBRX either
    FAMILIES = [family for family in FAMILIES if family not in ("aria_text", "dbrx")]
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
    for index in range(experts.num_experts):
        state |= {f"{index}.{name}": value for name, value in parts_of(weights, index).items()}
    experts.load_state_dict(state, assign=True)
    return experts


def parts_of(stacks: dict[str, torch.Tensor], index: int) -> dict[str, torch.Tensor]:
    """The linears of one expert, cut out of the stacked parameters: spelled out, where the code under test computes."""
    if "up_proj" in stacks:  # nemotron_h
        return {f"{part}.weight": stacks[part][index] for part in ("up_proj", "down_proj")}
    if "mlp.w1" in stacks:  # dbrx
        gate, up, down = (stacks[f"mlp.{name}"].view(4, -1, HIDDEN)[index] for name in ("w1", "v1", "w2"))
        return {"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down.T.contiguous()}
    if "gate_up_proj_bias" in stacks:  # gpt_oss
        rows, biases = stacks["gate_up_proj"][index].T, stacks["gate_up_proj_bias"][index]
        return {
            "gate_proj.weight": rows[0::2].contiguous(),
            "gate_proj.bias": biases[0::2],
            "up_proj.weight": rows[1::2].contiguous(),
            "up_proj.bias": biases[1::2],
            "down_proj.weight": stacks["down_proj"][index].T.contiguous(),
            "down_proj.bias": stacks["down_proj_bias"][index],
        }
    rows, down = stacks["gate_up_proj"][index], stacks["down_proj"][index]
    if rows.shape[0] == HIDDEN != rows.shape[1] // 2 and down.shape[1] == HIDDEN:  # llama4, aria: [in, out]
        rows, down = rows.T, down.T
    gate, up = rows.chunk(2)
    return {"gate_proj.weight": gate.contiguous(), "up_proj.weight": up.contiguous(), "down_proj.weight": down.contiguous()}


def routed(family: str = "", seed: int = 0) -> tuple[torch.Tensor, ...]:
    """What a container is called with: tokens, and two distinct experts of 0, 1 and 3 for each, so that nobody goes to 2."""
    torch.manual_seed(seed)
    chosen = torch.stack([torch.randperm(3)[:TOP_K] for _ in range(TOKENS)])
    hidden, experts, weights = torch.randn(TOKENS, HIDDEN), torch.tensor([0, 1, 3])[chosen], torch.rand(TOKENS, TOP_K)
    if family == "llama4_text":
        scores = torch.zeros(TOKENS, 4).scatter(1, experts, weights)
        return ((hidden * scores.T[..., None]).reshape(-1, HIDDEN),)
    if family == "longcat_flash":
        return hidden, experts + (experts == 3), weights  # 4 and 5 are experts that change nothing
    return hidden[None] if family == "dbrx" else hidden, experts, weights


@pytest.mark.parametrize("visit_all", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_computes_what_the_container_computed(family: str, visit_all: bool) -> None:
    container = next(iter(containers(family).values()))
    experts = taken_apart(container, visit_all=visit_all)
    called = routed(family)
    with torch.no_grad():
        expected = container(*called)
        assert (experts(*called) - expected).abs().max() <= 1e-5 * expected.abs().max()
        again = experts.stacked()
        assert type(again) is type(container)
        assert shapes_of(again) == shapes_of(container)
        if family != "longcat_flash":  # which has rows that nothing reads
            assert all(torch.equal(again.get_parameter(name), parameter) for name, parameter in container.named_parameters())
        assert torch.equal(again(*called), expected)


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
    skeleton, stored = build_skeleton(model.config, torch.float32), TensorSource.open(folder)
    source = stored.with_pieces(find_pieces(skeleton, stored.names))
    assert (len(source.names) > len(stored.names)) == (family in CONTAINERS and family != "longcat_flash")
    names = checkpoint_names(skeleton, source.names)
    unread = {name for name in source.names if ".experts.4." in name or ".experts.5." in name}  # longcat's experts that are none
    assert sorted(names.values()) == sorted(set(source.names) - unread)
    checked = 0
    for name, disk_name in names.items():
        owner, is_expert, rest = name.partition(".experts.")
        if not is_expert:
            continue
        index, _, local = rest.partition(".")
        expected = parts_of(dict(model.get_submodule(f"{owner}.experts").named_parameters()), int(index))[local]
        assert torch.equal(source.read(disk_name), expected), f"{disk_name} -> {name}"
        assert source.info(disk_name).shape == expected.shape
        checked += 1
    assert checked == len(containers(family)) * 4 * {"nemotron_h": 2, "gpt_oss": 6}.get(family, 3)


def test_stacks_are_written_as_they_were_where_no_expert_of_a_layer_is_changed(tmp_path: Path) -> None:
    stored = TensorSource.open(save_tiny(tmp_path / "model", "gpt_oss"))
    source = stored.with_pieces(find_pieces(build_skeleton(tiny_config("gpt_oss"), torch.float32), stored.names))
    assert sorted(source.together(source.names)) == sorted(stored.names)
    left = [name for name in source.names if name != "model.layers.0.mlp.experts.2.up_proj.weight"]
    together = source.together(left)
    assert "model.layers.0.mlp.experts.down_proj" not in together, "the whole container is written apart"
    assert "model.layers.1.mlp.experts.down_proj" in together
    assert {name for name in together if ".0.mlp.experts." in name} == {name for name in left if ".0.mlp.experts." in name}


def test_stacks_of_another_size_are_refused_by_name(tmp_path: Path) -> None:
    stored = TensorSource.open(save_tiny(tmp_path / "model", "granitemoe"))
    pieces = find_pieces(build_skeleton(tiny_config("granitemoe", num_local_experts=3), torch.float32), stored.names)
    with pytest.raises(InputError, match=r"input_linear\.weight has shape \[4, 64, 64\] and cannot hold .* of each of 3 experts"):
        stored.with_pieces(pieces)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"is_transposed": True}, "not experts of one size in gate_up_proj, down_proj"),
        ({"has_bias": True}, "not experts of one size in gate_up_proj, down_proj"),
        ({"has_gate": False}, "not experts of one size in up_proj, down_proj"),
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
