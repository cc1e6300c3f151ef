"""Our compressed-tensors layout against the compressed-tensors package: its packer, its decompressor, and transformers' loading path."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.strategies import make_weight

from gptqkit.checkpoint.files import write_json, write_shard
from gptqkit.core.bits import pack, unpack
from gptqkit.core.config import LinearSpec
from gptqkit.core.weight import QuantizedWeight
from gptqkit.formats.compressed import COMPRESSED_TENSORS

packer = pytest.importorskip("compressed_tensors.compressors.pack_quantized")
quantization = pytest.importorskip("compressed_tensors.quantization")


def moderate(weight: QuantizedWeight) -> QuantizedWeight:
    """The same codes with scales near 2**-6, so that nothing overflows in float16."""
    scale_OG = (weight.scale_OG.float().abs().log2() / 16 - 6).exp2().copysign(weight.scale_OG.float()).to(torch.float16)
    return replace(weight, scale_OG=scale_OG)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 31, 32, 45, 96])
def test_the_bit_stream_is_the_packages(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), dtype=torch.uint8)
    signed = (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(codes, bits), packer.pack_to_int32(signed, bits))
    assert torch.equal(unpack(packer.pack_to_int32(signed, bits), bits, columns), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_the_package_decompresses_to_our_values(bits: int, sym: bool, group_size: int) -> None:
    weight = moderate(make_weight(bits=bits, group_size=group_size, out_features=37, in_features=48, sym=sym))
    config = COMPRESSED_TENSORS.config({"x": LinearSpec(bits, group_size, sym)}, [], desc_act=False, details={})
    scheme = quantization.QuantizationConfig.model_validate(config).config_groups["group_0"]
    tensors = {name: tensor.float() if name == "weight_scale" else tensor for name, tensor in COMPRESSED_TENSORS.encode(weight).items()}
    found = packer.PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(found, weight.dequantize())


@pytest.mark.parametrize(
    ("sym", "mixed", "head"), [(True, False, False), (True, True, False), (False, False, False), (True, False, True), (True, True, True)]
)
def test_transformers_loads_it_through_the_package(tmp_path: Path, sym: bool, mixed: bool, head: bool) -> None:
    """Asymmetric goes through dequantize=True: the compressed path declares the zero points unpacked and then refuses the packed ones.

    Asymmetric and mixed is left out: dequantize=True takes the first group's scheme for every linear (transformers 5.23).
    """
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    base = transformers.LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=64,
        dtype="float32",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(base).eval()
    specs: dict[str, LinearSpec] = {}
    stored: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and (head or name != "lm_head"):
            bits = 8 if mixed and "layers.1.mlp" in name else 4
            sizes = {"out_features": module.out_features, "in_features": module.in_features}
            weight = moderate(make_weight(bits=bits, group_size=32, sym=sym, **sizes))
            module.weight.data = weight.dequantize()
            specs[name] = LinearSpec(bits, 32, sym)
            stored |= {f"{name}.{local}": tensor for local, tensor in COMPRESSED_TENSORS.encode(weight).items()}
    stored |= {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in specs}
    write_shard(tmp_path / "model.safetensors", stored)
    quantization_config = COMPRESSED_TENSORS.config(specs, [], desc_act=False, details={})
    config = {**base.to_dict(), "architectures": ["LlamaForCausalLM"], "quantization_config": quantization_config}
    write_json(tmp_path / "config.json", config)
    options: dict[str, Any] = {} if sym else {"quantization_config": transformers.CompressedTensorsConfig(dequantize=True)}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **options).eval()
    ids = torch.arange(16)[None]
    with torch.no_grad():
        expected, found = model(ids).logits, loaded(ids).logits
    assert (found - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())
