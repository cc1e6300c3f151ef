"""Structure is discovered, not listed: what the probe finds in each family is pinned here."""

from __future__ import annotations

import re

import pytest
import torch
from tests.tiny import FAMILIES, tiny_config
from transformers import AutoConfig

from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import build_skeleton
from gptqkit.models.layout import ONE_OUTPUT, ROUTER, discover

_SPLIT = "q_proj k_proj v_proj | o_proj | gate_proj up_proj | down_proj"
EXPERTS = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h")
STRUCTURE: dict[str, tuple[str, str | tuple[str, str]]] = {
    "llama": ("model.layers", _SPLIT),
    "qwen2": ("model.layers", _SPLIT),
    "qwen3": ("model.layers", _SPLIT),
    "mistral": ("model.layers", _SPLIT),
    "gemma2": ("model.layers", _SPLIT),
    "stablelm": ("model.layers", _SPLIT),
    "phi3": ("model.layers", "qkv_proj | o_proj | gate_up_proj | down_proj"),
    "opt": ("model.decoder.layers", "q_proj k_proj v_proj | out_proj | fc1 | fc2"),
    "gpt2": ("transformer.h", "c_attn | c_proj | c_fc | c_proj"),
    "gpt_neox": ("gpt_neox.layers", "query_key_value | dense | dense_h_to_4h | dense_4h_to_h"),
    "bloom": ("transformer.h", "query_key_value | dense | dense_h_to_4h | dense_4h_to_h"),
    "qwen3_moe": ("model.layers", _SPLIT),
    "qwen2_moe": ("model.layers", "q_proj k_proj v_proj | o_proj | gate_proj up_proj | down_proj | gate_proj up_proj | down_proj"),
    "mixtral": ("model.layers", _SPLIT),
    "olmoe": ("model.layers", _SPLIT),
    "nemotron_h": ("model.layers", ("q_proj k_proj v_proj | o_proj", "up_proj | down_proj | up_proj | down_proj")),
    "deepseek_v3": (
        "model.layers",
        (
            "q_a_proj kv_a_proj_with_mqa | q_b_proj | kv_b_proj | o_proj | gate_proj up_proj | down_proj",
            "q_a_proj kv_a_proj_with_mqa | q_b_proj | kv_b_proj | o_proj | gate_proj up_proj | down_proj | gate_proj up_proj | down_proj",
        ),
    ),
    "falcon": ("transformer.h", "query_key_value dense_h_to_4h | dense | dense_4h_to_h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_input_groups(family: str) -> None:
    """Of experts, the first stands for all."""
    layout = discover(build_skeleton(tiny_config(family), torch.float32))
    path, groups = STRUCTURE[family]
    assert [blocks.path for blocks in layout.lists] == [path]
    assert len(layout.blocks) == 2
    for block, expected in zip(layout.blocks, groups if isinstance(groups, tuple) else (groups, groups), strict=True):
        first = [group for group in block if not re.search(r"experts\.[1-9]", group.linears[0].name)]
        found = " | ".join(" ".join(linear.name.rpartition(".")[2] for linear in group.linears) for group in first)
        assert found == expected
        if family in EXPERTS:
            experts = [group for group in block if ".experts." in group.linears[0].name]
            assert len(experts) in (0, 2 * 4), "one group for gate and up and one for down of each expert, tokens or not"
            assert all(len({linear.name.split(".")[2] for linear in group.linears}) == 1 for group in experts)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_is_accounted_for(family: str) -> None:
    model = build_skeleton(tiny_config(family), torch.float32)
    layout = discover(model)
    linears = sum(x.out_features * x.in_features for block in layout.blocks for group in block for x in group.linears)
    assert linears + sum(kept.numel for kept in layout.kept) == sum(p.numel() for p in model.parameters())
    assert all(p.is_meta for p in model.parameters()), "the probe must give its memory back"


def test_conv1d_is_transposed_and_linear_is_not() -> None:
    gpt2 = discover(build_skeleton(tiny_config("gpt2"), torch.float32))
    c_fc = gpt2.blocks[0][2].linears[0]
    assert (c_fc.transposed, c_fc.out_features, c_fc.in_features, c_fc.bias) == (True, 256, 64, True)
    llama = discover(build_skeleton(tiny_config("llama"), torch.float32))
    assert not any(x.transposed or x.bias for group in llama.blocks[0] for x in group.linears)


@pytest.mark.parametrize("family", EXPERTS)
def test_routers_and_single_outputs_stay_as_they_are(family: str) -> None:
    layout = discover(build_skeleton(tiny_config(family), torch.float32))
    owner = "mixer" if family == "nemotron_h" else "mlp"
    reasons = {kept.name: kept.reason for kept in layout.kept if kept.name.startswith(f"model.layers.1.{owner}.")}
    assert reasons.pop(f"model.layers.1.{owner}.gate.weight") == ROUTER
    assert reasons == ({"model.layers.1.mlp.shared_expert_gate.weight": ONE_OUTPUT} if family == "qwen2_moe" else {})


def test_experts_that_cannot_be_taken_apart_are_refused_by_name() -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_local_experts": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("jetmoe", **sizes, kv_channels=16, num_experts_per_tok=2, vocab_size=256)
    with pytest.raises(InputError, match=r"input_linear\.weight .* its forward is its own, not one of transformers'"):
        discover(build_skeleton(config, torch.float32))
