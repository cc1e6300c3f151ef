"""AutoRound with its default options (SignRound, 200 iterations, batches of 8), saved in the gptq format. See this folder's __init__."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

BATCH = 8
"""Its default. A ready-made data set is used in the batches that it comes in."""


def main(model: str, out: str, ids: str, bits: str, group_size: str, seed: str, device: str) -> None:
    """`seed` has drawn the ids, and draws AutoRound's batches."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids_NT = torch.tensor(json.loads(Path(ids).read_text(encoding="utf-8")))
    batches = [{"input_ids": batch, "attention_mask": torch.ones_like(batch)} for batch in ids_NT.split(BATCH)]
    tuned = AutoRound(
        AutoModelForCausalLM.from_pretrained(model, dtype="auto"), AutoTokenizer.from_pretrained(model),
        bits=int(bits), group_size=int(group_size), sym=True, dataset=batches, nsamples=len(ids_NT), seqlen=ids_NT.shape[1],
        batch_size=BATCH, seed=int(seed), device_map=device,
    )  # fmt: skip
    tuned.quantize_and_save(out, format="auto_gptq")
    for config in list(Path(out).glob("*/config.json")):  # it writes into a folder of its own below
        shutil.copytree(config.parent, out, dirs_exist_ok=True)
        shutil.rmtree(config.parent)


if __name__ == "__main__":
    main(*sys.argv[1:])
