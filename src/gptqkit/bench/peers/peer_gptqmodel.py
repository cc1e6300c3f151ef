"""GPTQModel with its default options (symmetric, group-aware reordering), saved in the gptq format. See this folder's __init__."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main(model: str, out: str, ids: str, bits: str, group_size: str, seed: str, device: str) -> None:
    """`seed` has drawn the ids; nothing else here is random."""
    # 7.7 makes a pool of (cores + 1) // 2 threads and then asks it for two, so that loading fails on one or two cores
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    sequences = json.loads(Path(ids).read_text(encoding="utf-8"))
    quantized = GPTQModel.load(model, QuantizeConfig(bits=int(bits), group_size=int(group_size)), device=device)
    quantized.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in sequences])
    quantized.save(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
