"""llm-compressor's GPTQ with its default options (static activation order), saved as compressed-tensors. See this folder's __init__."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(model: str, out: str, ids: str, bits: str, group_size: str, seed: str, device: str) -> None:
    """`seed` has drawn the ids; nothing else here is random."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from transformers import AutoModelForCausalLM, AutoTokenizer

    sequences = json.loads(Path(ids).read_text(encoding="utf-8"))
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto", device_map=device)
    # what the presets W2A16 … W8A16 are made of, with the group size open
    weights = QuantizationArgs(num_bits=int(bits), type="int", strategy="group", group_size=int(group_size), symmetric=True, dynamic=False)
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict({"input_ids": sequences, "attention_mask": [[1] * len(row) for row in sequences]}),
        recipe=GPTQModifier(config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}, ignore=["lm_head"]),
        max_seq_length=len(sequences[0]),
        num_calibration_samples=len(sequences),
    )
    loaded.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
