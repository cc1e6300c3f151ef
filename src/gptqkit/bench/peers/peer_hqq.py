"""HQQ with its default options but for bits and groups, along the input axis as engines need it. See this folder's __init__.

Its zero points are floats, which no checkpoint format of ours holds, so the dequantized weights are saved instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, out: str, ids: str, bits: str, group_size: str, seed: str, device: str) -> None:
    """HQQ needs no calibration: `ids` and `seed` are not used."""
    import torch
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    head = loaded.get_output_embeddings()
    linears = [module for module in loaded.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    weights, bytes_held = 0, 0.0
    for linear in linears:
        config = BaseQuantizeConfig(nbits=int(bits), group_size=int(group_size), axis=1)
        quantized = HQQLinear(linear, config, compute_dtype=torch.float16, device=device, del_orig=False)
        linear.weight.data = quantized.dequantize().float().cpu()
        weights += linear.weight.numel()
        bytes_held += int(bits) * linear.weight.numel() / 8
        bytes_held += sum(quantized.meta[name].numel() * quantized.meta[name].element_size() for name in ("scale", "zero"))
    loaded.save_pretrained(out)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)
    about = {"linears": len(linears), "bits_per_weight": 8 * bytes_held / weights}
    Path(out, "dequantized.json").write_text(json.dumps(about) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
