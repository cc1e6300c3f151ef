"""Tiny random models of several families, rounded to nearest and written the way `quantize` writes them."""

from __future__ import annotations

import json
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
    "falcon": {**SIZES, "new_decoder_architecture": False, "parallel_attn": True, "alibi": False},
}
HEADS = ("lm_head", "embed_out")


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
    specs = {}
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and name not in HEADS:
            transposed = isinstance(module, Conv1D)
            weight = round_to_nearest(module.weight.data.T.contiguous() if transposed else module.weight.data, spec)
            dense_OI = weight.dequantize(dtype)
            module.weight.data = dense_OI.T.contiguous() if transposed else dense_OI
            del tensors[f"{name}.weight"]
            tensors |= {f"{name}.{local}": tensor for local, tensor in layout.encode(weight).items()}
            specs[name] = spec
    folder.mkdir(parents=True)
    config = model.config.to_dict() | {"architectures": [type(model).__name__], "dtype": str(dtype)[6:]}
    quantization = layout.config(specs, [], desc_act=False, details={"unknown_fact": [1, 2]})
    config["quantization_config"] = quantization | {"unknown_key": {"a": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    write_tensors(folder, tensors)
    return Checkpoint(folder, model, tensors)


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
