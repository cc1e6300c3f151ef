"""Peak memory of quantizing a model that is larger than the memory it gets: predicted, recorded, and measured from outside.

    python benchmarks/stream_memory.py WORK [--blocks 24] [--samples 16] [--seqlen 512]

Writes a random Llama of about 3 GB (bfloat16, sharded, one block at a time) into WORK/model, quantizes it in a fresh process with the
command line, and prints how far that process's memory rose above its own start, beside what `--dry-run` predicted. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig

HIDDEN, FFN, HEADS, VOCAB = 2048, 6144, 16, 48000


def write_model(folder: Path, blocks: int) -> int:
    """A random Llama, one file per block; returns its size in bytes."""
    folder.mkdir(parents=True)
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=blocks, num_attention_heads=HEADS, num_key_value_heads=HEADS,
        vocab_size=VOCAB, tie_word_embeddings=False, dtype="bfloat16", architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    shapes = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (HIDDEN, HIDDEN)}
    shapes |= {"self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
    shapes |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN)}
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    files: dict[str, str] = {}
    total = 0
    for number in range(blocks + 1):
        if number < blocks:
            tensors = {f"model.layers.{number}.{name}.weight": random(*shape) for name, shape in shapes.items()}
            tensors |= {f"model.layers.{number}.{n}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for n in ("input", "post_attention")}
        else:
            tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
            tensors |= {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}
        name = f"model-{number + 1:05d}-of-{blocks + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}))
    return total


RUN = """
import json, sys, psutil, resource, gptqkit, gptqkit.pipeline.run
model, out, ids, samples, seqlen = sys.argv[1:]
start = psutil.Process().memory_info().rss
config = gptqkit.QuantConfig(bits=4, group_size=128)
plan = gptqkit.plan(model, config, samples=int(samples), seqlen=int(seqlen))
run = gptqkit.quantize(model, out, config, calibration=json.load(open(ids)), samples=int(samples), seqlen=int(seqlen))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
print(json.dumps({"start": start, "predicted": plan.peak_memory, "recorded": run.peak_memory, "measured": growth,
                  "paused": plan.memory.paused, "seconds": sum(run.seconds.values())}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    options = parser.parse_args()
    started = time.time()
    size = write_model(options.work / "model", options.blocks)
    print(f"model: {size / 1e9:.2f} GB in {options.blocks} blocks, written in {time.time() - started:.0f} s")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (options.samples + 2, options.seqlen), generator=generator).tolist()
    (options.work / "ids.json").write_text(json.dumps(ids))
    arguments = [str(options.work / name) for name in ("model", "out", "ids.json")] + [str(options.samples), str(options.seqlen)]
    done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    for name in ("predicted", "recorded", "measured"):
        print(f"{name:10} {result[name] / 1e6:8.0f} MB above {result['start'] / 1e6:.0f} MB at the start")
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today())}
    print(json.dumps({**result, **machine, "model_bytes": size, "samples": options.samples, "seqlen": options.seqlen}))


if __name__ == "__main__":
    main()
