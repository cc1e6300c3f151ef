"""The other side of quantize_cpu.py: llm-compressor's GPTQ, W4A16, on given token ids. Runs in llm-compressor's own environment.

    python llmcompressor_gptq.py MODEL OUT IDS.json

IDS.json holds a list of lists of token ids, all of one length. Options are llm-compressor's defaults but for the scheme (W4A16: 4 bits,
symmetric, groups of 128) and the head, which neither side quantizes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_folder: str, out: str, ids_file: str) -> None:
    ids = json.loads(Path(ids_file).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    oneshot(
        model=model,
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=GPTQModifier(targets="Linear", scheme="W4A16", ignore=["lm_head"]),
        max_seq_length=len(ids[0]),
        num_calibration_samples=len(ids),
    )
    model.save_pretrained(out, save_compressed=True)
    AutoTokenizer.from_pretrained(model_folder).save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
