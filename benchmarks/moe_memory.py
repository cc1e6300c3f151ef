"""Peak memory of quantizing blocks of more and more experts of equal size: what grows with their number, and what does not.

    python benchmarks/moe_memory.py WORK [--experts 16 32 64 128] [--preset fast] [--samples 16] [--seqlen 512] [--held 1]

Writes random Qwen3-MoE models of two blocks (bfloat16, one tensor per expert and linear, as such models are published) into WORK and
quantizes each in a fresh process. Prints how far that process's memory rose above its own start, beside what `--dry-run` predicted and what
the experts of one block weigh. `--held` sets how many experts may have weights at the same time (gptqkit.models.supply.HELD): with as many
as there are, it shows what it costs to hold a block whole. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

HIDDEN, WIDTH, HEADS, VOCAB, BLOCKS, CHOSEN = 1024, 768, 8, 4096, 2, 8


def write_model(folder: Path, experts: int) -> None:
    """A random Qwen3-MoE, one file per block."""
    folder.mkdir(parents=True)
    config = Qwen3MoeConfig(
        hidden_size=HIDDEN, intermediate_size=2 * WIDTH, moe_intermediate_size=WIDTH, num_hidden_layers=BLOCKS, num_experts=experts,
        num_experts_per_tok=CHOSEN, num_attention_heads=HEADS, num_key_value_heads=HEADS, head_dim=HIDDEN // HEADS, vocab_size=VOCAB,
        tie_word_embeddings=False, dtype="bfloat16", architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * 0.02).bfloat16()

    files: dict[str, str] = {}
    for number in range(BLOCKS + 1):
        if number < BLOCKS:
            tensors = {f"model.layers.{number}.{name}": random(*shape) for name, shape in shapes_of_a_block(experts)}
            tensors = {name: torch.ones_like(tensor) if "norm" in name else tensor for name, tensor in tensors.items()}
        else:
            tensors = {"model.embed_tokens.weight": random(VOCAB, HIDDEN), "lm_head.weight": random(VOCAB, HIDDEN)}
            tensors |= {"model.norm.weight": torch.ones(HIDDEN).bfloat16()}
        name = f"model-{number + 1:05d}-of-{BLOCKS + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


def shapes_of_a_block(experts: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield f"self_attn.{name}.weight", (HIDDEN, HIDDEN)
    for name in ("q_norm", "k_norm"):
        yield f"self_attn.{name}.weight", (HIDDEN // HEADS,)
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{name}.weight", (HIDDEN,)
    yield "mlp.gate.weight", (experts, HIDDEN)
    for index in range(experts):
        for name, shape in (("gate_proj", (WIDTH, HIDDEN)), ("up_proj", (WIDTH, HIDDEN)), ("down_proj", (HIDDEN, WIDTH))):
            yield f"mlp.experts.{index}.{name}.weight", shape


RUN = """
import json, sys, psutil, resource, gptqkit, gptqkit.pipeline.run
from gptqkit.models import supply
model, out, ids, preset, samples, seqlen, held = sys.argv[1:]
supply.HELD = int(held)
start = psutil.Process().memory_info().rss
config = gptqkit.QuantConfig(bits=4, group_size=128, preset=preset)
plan = gptqkit.plan(model, config, samples=int(samples), seqlen=int(seqlen))
run = gptqkit.quantize(model, out, config, calibration=json.load(open(ids)), samples=int(samples), seqlen=int(seqlen))
growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - start
print(json.dumps({"start": start, "predicted": plan.peak_memory, "measured": growth, "seconds": round(sum(run.seconds.values()), 1)}))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 32, 64, 128])
    parser.add_argument("--preset", default="fast")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seqlen", type=int, default=512)
    parser.add_argument("--held", type=int, default=1)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (options.samples + 2, options.seqlen), generator=generator).tolist()
    (options.work / "ids.json").write_text(json.dumps(ids))
    rows = []
    for experts in options.experts:
        model, out = options.work / f"model-{experts}", options.work / f"out-{experts}"
        # In a process of its own: the peak that the kernel reports for a child begins with what its parent has at that moment.
        writer = multiprocessing.get_context("spawn").Process(target=write_model, args=(model, experts))
        writer.start()
        writer.join()
        arguments = [str(path) for path in (model, out, options.work / "ids.json")]
        arguments += [options.preset, str(options.samples), str(options.seqlen), str(options.held)]
        done = subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, stdout=subprocess.PIPE, text=True)
        row = {"experts": experts, "bytes_of_experts": experts * 3 * WIDTH * HIDDEN * 2, **json.loads(done.stdout)}
        print(
            f"{experts:4} experts of {3 * WIDTH * HIDDEN * 2 / 1e6:.1f} MB, {row['bytes_of_experts'] / 1e6:5.0f} MB a block: "
            f"measured {row['measured'] / 1e6:5.0f} MB, predicted {row['predicted'] / 1e6:5.0f} MB above {row['start'] / 1e6:.0f} MB "
            f"at the start, {row['seconds']:.0f} s",
            flush=True,
        )
        rows.append(row)
        shutil.rmtree(model)
        shutil.rmtree(out)
    machine = {"machine": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__, "date": str(date.today())}
    print(json.dumps({"runs": rows, **machine, "preset": options.preset, "held": options.held, "tokens": options.samples * options.seqlen}))


if __name__ == "__main__":
    main()
