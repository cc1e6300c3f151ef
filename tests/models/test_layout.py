"""Structure is discovered, not listed: what the probe finds in each family is pinned here."""

from __future__ import annotations

import pytest
import torch
from tests.tiny import FAMILIES, tiny_config
from transformers import AutoConfig

from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import build_skeleton
from gptqkit.models.layout import discover

_SPLIT = "q_proj k_proj v_proj | o_proj | gate_proj up_proj | down_proj"
STRUCTURE = {
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
    "falcon": ("transformer.h", "query_key_value dense_h_to_4h | dense | dense_4h_to_h"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_and_input_groups(family: str) -> None:
    layout = discover(build_skeleton(tiny_config(family), torch.float32))
    path, groups = STRUCTURE[family]
    assert layout.path == path
    assert len(layout.blocks) == 2
    for block in layout.blocks:
        found = " | ".join(" ".join(linear.name.rpartition(".")[2] for linear in group.linears) for group in block)
        assert found == groups


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


def test_fused_experts_are_refused_by_name() -> None:
    config = AutoConfig.for_model(
        "qwen3_moe", hidden_size=64, intermediate_size=128, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=256,
    )  # fmt: skip
    with pytest.raises(
        InputError, match=r"model\.layers\.0\.mlp\.experts\.gate_up_proj .* neither a Linear nor a Conv1D.*dense models only"
    ):
        discover(build_skeleton(config, torch.float32))
