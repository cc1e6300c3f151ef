"""Tiny random models of several families, rounded to nearest and written the way `quantize` writes them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from gptqkit.core.config import LinearSpec
from gptqkit.core.grid import encode, minmax_grid
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats import get_format

COMMON = {"vocab_size": 96, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
GATED = {**SIZES, "intermediate_size": 96, "num_key_value_heads": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {**GATED, "tie_word_embeddings": False},
    "llama-tied": {**GATED, "tie_word_embeddings": True},
    "qwen2": {**GATED},
    "mistral": {**GATED},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "opt": {**SIZES, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "gpt_neox": {**SIZES, "intermediate_size": 96},
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "phi3": {**GATED},
    "gemma2": {**GATED, "head_dim": 16},
    "qwen3_moe": {**GATED, "head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2},
    "mixtral": {**GATED, "num_local_experts": 3},
    "falcon": {**SIZES, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
}
HEADS = ("lm_head", "embed_out")
EXPERT_NAMES = {"mixtral": ("block_sparse_moe", "w1", "w3", "w2")}
"""Where a family's checkpoints do not name gate, up and down like Qwen's."""


@dataclass(frozen=True)
class Checkpoint:
    """The folder, the same model with dequantized dense weights, and the tensors that were written."""

    folder: Path
    dense: Any
    tensors: dict[str, torch.Tensor]


def build_model(family: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    options = FAMILIES[family]
    config = transformers.AutoConfig.for_model(family.partition("-")[0], **COMMON, **options)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "mlp.gate.weight" in name or "experts" in name:  # routers start as zeros
            parameter.data.normal_(std=0.1)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases and norms start as constants, which would hide a mix-up
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


def round_to_nearest(weight_OI: torch.Tensor, spec: LinearSpec) -> QuantizedWeight:
    out_features, in_features = weight_OI.shape
    size = in_features if spec.group_size == -1 else spec.group_size
    grouped = weight_OI.float().reshape(-1, size)
    grid = minmax_grid(grouped, bits=spec.bits, sym=spec.sym)
    groups = in_features // size
    return QuantizedWeight(
        bits=spec.bits,
        group_size=spec.group_size,
        codes_OI=encode(grouped, grid, spec.bits).to(torch.uint8).reshape(out_features, in_features),
        scale_OG=grid.scale_R.half().reshape(out_features, groups),
        zero_OG=None if spec.sym else grid.zero_R.to(torch.uint8).reshape(out_features, groups),
    )


def make_checkpoint(
    folder: Path,
    family: str,
    format_name: str = "gptq",
    spec: LinearSpec = LinearSpec(4, 32, True),  # noqa: B008 (frozen)
    *,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    layout = get_format(format_name)
    model = build_model(family, dtype)
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for tied in model.all_tied_weights_keys or {}:
        tensors.pop(tied, None)
    if family == "mixtral":
        tensors = {name.replace(".mlp.gate.", ".block_sparse_moe.gate."): tensor for name, tensor in tensors.items()}
    specs = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name not in HEADS:
            transposed = isinstance(module, Conv1D)
            stored = [(name, module.weight.data.T if transposed else module.weight.data)]
            del tensors[f"{name}.weight"]
        elif hasattr(module, "gate_up_proj") and hasattr(module, "num_experts"):
            stored = list(experts_on_disk(family, name, module))
            del tensors[f"{name}.gate_up_proj"], tensors[f"{name}.down_proj"]
        else:
            continue
        for disk_name, weight_OI in stored:
            weight = round_to_nearest(weight_OI.contiguous(), spec)
            weight_OI.copy_(weight.dequantize(dtype))
            tensors |= {f"{disk_name}.{local}": tensor for local, tensor in layout.encode(weight).items()}
            specs[disk_name] = spec
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(dtype)[6:]}
    quantization = layout.config(specs, [], desc_act=False, details={"unknown_fact": [1, 2]})
    config["quantization_config"] = quantization | {"unknown_key": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors)
    return Checkpoint(folder, model, tensors)


def experts_on_disk(family: str, name: str, module: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The name in a checkpoint of each linear of each expert, and a view [O, I] of its weight in the stacked parameters."""
    names = EXPERT_NAMES.get(family, ("mlp", "gate_proj", "up_proj", "down_proj"))
    for expert in range(module.num_experts):
        gate, up = module.gate_up_proj.data[expert].chunk(2)
        prefix = f"{name.replace('.mlp.', f'.{names[0]}.')}.{expert}"
        yield from zip((f"{prefix}.{part}" for part in names[1:]), (gate, up, module.down_proj.data[expert]), strict=True)


def write_tensors(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    names = sorted(tensors)
    files = {f"model-{i + 1:05}-of-{shards:05}.safetensors": names[i::shards] for i in range(shards)}
    files = files if shards > 1 else {"model.safetensors": names}
    for file, part in files.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"})
    if shards > 1:
        weight_map = {name: file for file, part in files.items() for name in part}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def tokens(rows: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 96, (rows, length), generator=torch.Generator().manual_seed(1))
