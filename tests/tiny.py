"""Tiny random models of many families, built in seconds: shapes small, everything else real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
}
_EXPERTS = {"num_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "router_aux_loss_coef": 0.0}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "mistral": _LLAMA,
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 16},
    "phi3": _LLAMA,
    "opt": {
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 256,
        "word_embed_proj_dim": 64,
    },
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "gpt_neox": {k: v for k, v in _LLAMA.items() if k != "num_key_value_heads"},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256},
    "falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256},
    "stablelm": _LLAMA,
    "qwen3_moe": {**_LLAMA, **_EXPERTS, "head_dim": 16},
    "qwen2_moe": {**_LLAMA, **_EXPERTS, "shared_expert_intermediate_size": 64},
    "mixtral": {**_LLAMA, "num_local_experts": 4},
    "olmoe": {**_LLAMA, **_EXPERTS},
    "deepseek_v3": {**_LLAMA, **_EXPERTS, **_LATENT, "num_key_value_heads": 4, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "nemotron_h": {
        **{k: v for k, v in _LLAMA.items() if k != "num_hidden_layers"},
        **_EXPERTS,
        "layers_block_type": ["attention", "moe"],
        "head_dim": 16,
        "moe_shared_expert_intermediate_size": 64,
        "n_group": 1,
        "topk_group": 1,
    },
}

_HIDDEN = {**_LLAMA, "intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
CONTAINERS: dict[str, dict[str, Any]] = {
    "gpt_oss": {**_HIDDEN, "head_dim": 16},
    "granitemoe": _HIDDEN,
    "llama4_text": {**_HIDDEN, "num_experts_per_tok": 1, "intermediate_size_mlp": 64, "head_dim": 16, "attention_chunk_size": 64},
    "aria_text": {**_HIDDEN, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "longcat_flash": {
        **_LLAMA, **_LATENT, "head_dim": 16, "num_layers": 2, "ffn_hidden_size": 64, "expert_ffn_hidden_size": 32, "n_routed_experts": 4,
        "zero_expert_num": 2, "moe_topk": 2,
    },
    "dbrx": {
        "d_model": 64, "n_heads": 4, "n_layers": 2, "vocab_size": 256, "max_seq_len": 64,
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 32, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
    },
}  # fmt: skip
"""Families whose experts are held in another way: transposed, interleaved, with biases, flat, stacked in the checkpoint too."""


def tiny_config(family: str, **changes: Any) -> Any:
    """The family's configuration, shrunk."""
    return AutoConfig.for_model(family, **{**(FAMILIES | CONTAINERS)[family], **_TOKENS, **changes})


def save_tiny(
    folder: Path, family: str = "llama", *, dtype: torch.dtype = torch.float32, shard: str = "5GB", seed: int = 0, **changes: Any
) -> Path:
    """A random model with weights large enough to matter, saved by transformers; no tokenizer. Returns `folder`."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, **changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3 / parameter.shape[-1] ** 0.25)
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def token_ids(count: int = 16, length: int = 32, *, vocab: int = 256, seed: int = 1) -> list[list[int]]:
    """Random calibration sequences as lists of ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocab, (count, length), generator=generator).tolist()
