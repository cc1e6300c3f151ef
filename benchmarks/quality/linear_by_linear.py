"""Is any linear further from the original than rounding to nearest would leave it?

    python benchmarks/quality/linear_by_linear.py ORIGINAL ROUNDED CHECKPOINT... --text FILE

For every linear, KL per token of the original model with only this one replaced: by what CHECKPOINT holds, and by what ROUNDED (made with
`gptqkit quantize --method rtn`) holds. The experts of a layer are replaced together. Prints the worst ratio of each checkpoint.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptqkit.checkpoint.quantized import QuantizedCheckpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("rounded", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--seqlen", type=int, default=256)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(options.original, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(options.original)(options.text.read_text()[:1_000_000], return_tensors="pt").input_ids[0]
    batch = ids[: options.windows * options.seqlen].view(options.windows, options.seqlen)
    original = F.log_softmax(logits(model, batch), dim=-1)
    rounded: dict[str, float] = {}
    for folder in (options.rounded, *options.checkpoints):
        kls = {unit: one_unit(model, names, folder, batch, original) for unit, names in units(folder).items()}
        if not rounded:
            rounded = kls
            continue
        ratios = {unit: kl / rounded[unit] for unit, kl in kls.items()}
        worst, above = max(ratios, key=ratios.__getitem__), [unit for unit, ratio in ratios.items() if ratio > 1]
        median = sorted(ratios.values())[len(ratios) // 2]
        print(
            f"{folder.name}: median {median:.3f}, worst {ratios[worst]:.3f} ({worst}), above 1: {above or 'none'} of {len(ratios)}",
            flush=True,
        )


def units(folder: Path) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in QuantizedCheckpoint.open(folder).linears:
        grouped.setdefault(re.sub(r"experts\.\d+\.\w+", "experts", name), []).append(name)
    return grouped


@torch.inference_mode()
def logits(model: nn.Module, batch: Tensor) -> Tensor:
    return torch.cat([model(row[None]).logits[0] for row in batch])


def one_unit(model: nn.Module, names: list[str], folder: Path, batch: Tensor, original: Tensor) -> float:
    checkpoint = QuantizedCheckpoint.open(folder)
    kept = []
    for name in names:
        target = place(model, name)
        kept.append(target.clone())
        target.copy_(checkpoint.read_linear(name).dequantize())
    changed = F.log_softmax(logits(model, batch), dim=-1)
    for name, weight in zip(names, kept, strict=True):
        place(model, name).copy_(weight)
    return float(F.kl_div(changed, original, log_target=True, reduction="none").sum(-1).double().mean())


def place(model: nn.Module, name: str) -> Tensor:
    """The [O, I] tensor of a linear; of an expert, its part of the stack."""
    expert = re.fullmatch(r"(.*experts)\.(\d+)\.(\w+)", name)
    if expert is None:
        return model.get_submodule(name).weight.data
    container, index, local = model.get_submodule(expert[1]), int(expert[2]), expert[3]
    if local == "down_proj":
        return container.down_proj.data[index]
    gate, up = container.gate_up_proj.data[index].chunk(2)
    return gate if local == "gate_proj" else up


if __name__ == "__main__":
    main()
