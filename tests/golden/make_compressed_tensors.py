"""Writes compressed-tensors.safetensors with the compressed-tensors package alone; nothing of gptqkit is imported. See README.md."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file


def main() -> None:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    tensors = {}
    for bits, sym in ((3, False), (4, True), (8, False)):
        out_features, in_features, group = 10, 48, 16
        code_OI = (torch.arange(out_features)[:, None] * 7 + torch.arange(in_features)[None] * 5) % 2**bits
        zero_OG = (torch.arange(out_features)[:, None] * 3 + torch.arange(in_features // group)[None]) % 2**bits
        scale_OG = 2.0 ** -(torch.arange(out_features)[:, None] % 4 + torch.arange(in_features // group)[None])
        middle = 2 ** (bits - 1)
        zero = torch.full_like(zero_OG, middle) if sym else zero_OG
        weight = (code_OI - zero.repeat_interleave(group, 1)) * scale_OG.repeat_interleave(group, 1)
        arguments = QuantizationArgs(num_bits=bits, type="int", symmetric=sym, strategy="group", group_size=group)
        state = {"weight": weight, "weight_scale": scale_OG, "weight_zero_point": (zero - middle).to(torch.int8)}
        packed = PackedQuantizationCompressor.compress(state, QuantizationScheme(targets=["Linear"], weights=arguments))
        for name, tensor in packed.items():
            tensors[f"w{bits}.{name}"] = tensor.to(torch.float16) if name == "weight_scale" else tensor.contiguous()

    save_file(tensors, Path(__file__).with_name("compressed-tensors.safetensors"))


if __name__ == "__main__":
    main()
