"""`gptqkit bench quantize`: how long a run takes and what memory, on a model of a known shape with random weights. Nothing is downloaded.

Every run is a process of its own. It is done twice: once as a user runs it, whose times count, and once with the device waited for at
every turn, which says how they are divided.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.bench.tables import machine
from gptqkit.checkpoint.files import write_json, write_shard
from gptqkit.checkpoint.source import INDEX_NAME
from gptqkit.core.config import QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event
from gptqkit.hf.skeleton import build_skeleton, load_config
from gptqkit.models.device import resolve_device

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3-8b": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "llama-3-70b": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
        num_attention_heads=64, num_key_value_heads=8, vocab_size=128256, max_position_embeddings=8192, rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    ),
    "qwen3-30b-a3b": dict(
        model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"], hidden_size=2048, intermediate_size=6144,
        moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True, num_hidden_layers=48,
        num_attention_heads=32, num_key_value_heads=4, head_dim=128, vocab_size=151936, max_position_embeddings=40960,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    ),
    "tiny": dict(
        model_type="llama", architectures=["LlamaForCausalLM"], hidden_size=128, intermediate_size=256, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, vocab_size=512, max_position_embeddings=2048,
    ),
}  # fmt: skip
"""Configurations by name, as their published models have them; `tiny` is for trying this out."""


def bench_quantize(
    shape: str, work: Path, *, blocks: int | None, presets: Sequence[str], config: QuantConfig, samples: int, seqlen: int, device: str,
    memory: int | None, breakdown: bool, keep: bool, emit: Emit,
) -> dict[str, Any]:  # fmt: skip
    """Measures each preset (or "rtn") on `blocks` blocks of a shape; options as in cli/bench.py; `config` says bits, group and format.

    Raises InputError before any work for a name that is not known.
    """
    if shape not in SHAPES:
        raise InputError(f"--shape {shape}; allowed: {', '.join(SHAPES)}")
    total = SHAPES[shape]["num_hidden_layers"]
    blocks = total if blocks is None else blocks
    if not 1 <= blocks <= total:
        raise InputError(f"--blocks {blocks}; {shape} has {total}: allowed are 1 to {total}")
    configs = {preset: _config(config, preset) for preset in presets}
    name = str(resolve_device(device))
    folder = work / f"{shape}-{blocks}"
    if not (folder / "config.json").exists():
        emit(Event("stage", f"writing a {shape} of {blocks} blocks with random weights"))
        write_model(folder, shape, blocks, torch.device(name))
    write_json(work / "ids.json", random_ids(SHAPES[shape]["vocab_size"], samples, seqlen))
    rows = []
    for preset, chosen in configs.items():
        runs = []
        for exact in (False, True) if breakdown else (False,):
            emit(Event("stage", f"{preset}: quantizing" + (", phase by phase" if exact else "")))
            job = {
                "model": str(folder), "out": str(work / "out"), "ids": str(work / "ids.json"), "config": chosen.to_dict(),
                "samples": samples, "seqlen": seqlen, "device": name, "memory": memory, "synchronized": exact,
            }  # fmt: skip
            runs.append(_run(job))
            shutil.rmtree(work / "out")
        rows.append(_row(preset, runs, total))
    if not keep:
        shutil.rmtree(folder)
    return {
        "benchmark": "quantize", "shape": shape, "blocks": blocks, "of_blocks": total, "samples": samples, "seqlen": seqlen,
        "device": torch.cuda.get_device_name(name) if name.startswith("cuda") else name, "machine": machine(), "torch": torch.__version__,
        "date": str(date.today()), "config": config.to_dict(), "rows": rows,
    }  # fmt: skip


def write_model(folder: Path, shape: str, blocks: int, device: torch.device) -> None:
    """A checkpoint in bfloat16: what is outside the blocks in the first shard, a shard for each block."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {**SHAPES[shape], "num_hidden_layers": blocks, "dtype": "bfloat16", "bos_token_id": 1, "eos_token_id": 2}
    write_json(folder / "config.json", config)
    skeleton = build_skeleton(load_config(folder), torch.bfloat16)
    (folder / "config.json").unlink()  # until all is there
    shards: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for name, parameter in skeleton.named_parameters():
        number = int(name.split("layers.")[1].split(".")[0]) + 2 if "layers." in name else 1
        shards.setdefault(f"model-{number:05d}-of-{blocks + 1:05d}.safetensors", []).append((name, tuple(parameter.shape)))
    generator = torch.Generator(device).manual_seed(0)
    for file, entries in shards.items():
        write_shard(folder / file, {name: _random(name, size, generator) for name, size in entries})
    files = {name: file for file, entries in shards.items() for name, _ in entries}
    write_json(folder / INDEX_NAME, {"metadata": {}, "weight_map": files})
    write_json(folder / "config.json", config)


def random_ids(vocabulary: int, samples: int, seqlen: int) -> list[list[int]]:
    """Calibration tokens, and two sequences more that are held back for the check."""
    generator = torch.Generator().manual_seed(1)
    ids: list[list[int]] = torch.randint(3, vocabulary, (samples + 2, seqlen), generator=generator).tolist()
    return ids


def child() -> None:
    """One run, described on standard input; what it took, on standard output. Starts after the imports."""
    import gptqkit
    from gptqkit.pipeline.clock import synchronized
    from gptqkit.pipeline.run import run_job  # noqa: F401  with all that a run imports

    job = json.load(sys.stdin)
    ids = json.loads(Path(job["ids"]).read_text())
    blocks: list[dict[str, Any]] = []

    def listen(event: Event) -> None:
        if "phases" in event.data:
            blocks.append(event.data)

    def quantize() -> Any:
        return gptqkit.quantize(
            job["model"], job["out"], QuantConfig.from_dict(job["config"]), calibration=ids, samples=job["samples"], seqlen=job["seqlen"],
            device=job["device"], memory=job["memory"], overwrite=True, emit=listen,
        )  # fmt: skip

    started = time.perf_counter()
    if job["synchronized"]:
        with synchronized():
            run = quantize()
    else:
        run = quantize()
    facts = {
        "seconds": time.perf_counter() - started, "stages": run.seconds, "blocks": [b["seconds"] for b in blocks],
        "phases": [b["phases"] for b in blocks], "device_bytes": run.device_memory, "host_bytes": run.peak_memory,
        "predicted_bytes": run.predicted_memory, "rounded": sum(record.method == "rtn" for record in run.linears),
    }  # fmt: skip
    print(json.dumps(facts), flush=True)  # noqa: T201


def _config(config: QuantConfig, preset: str) -> QuantConfig:
    changed = {"method": preset} if preset in ("rtn", "hqq", "awq", "awq+gptq") else {"preset": preset}
    return QuantConfig.from_dict({**config.to_dict(), **changed})


def _random(name: str, size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    value = torch.empty(size, dtype=torch.bfloat16, device=generator.device)
    return value.normal_(std=1.0 if "embed" in name else size[-1] ** -0.5, generator=generator)


def _run(job: Mapping[str, Any]) -> dict[str, Any]:
    command = [sys.executable, "-c", "from gptqkit.bench.quantize import child; child()"]
    done = subprocess.run(command, input=json.dumps(job), stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise InputError(f"the run failed with exit code {done.returncode}; see above")
    facts: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return facts


def _row(preset: str, runs: Sequence[Mapping[str, Any]], total: int) -> dict[str, Any]:
    """What a user waits for, what a block takes once all is warm, and that for all of the shape's blocks."""
    first, last = runs[0], runs[-1]
    steady = statistics.median(first["blocks"][1:-1] or first["blocks"])
    phases = {}
    for name in dict.fromkeys(name for block in last["phases"] for name in block):
        phases[name] = round(statistics.median(block.get(name, 0.0) for block in last["phases"][1:-1] or last["phases"]), 4)
    missing = total - len(first["blocks"])
    return {
        "preset": preset, "seconds": round(first["seconds"], 2), "block": round(steady, 4),
        "whole": round(first["seconds"] + missing * steady, 2), "phases": phases, "stages": first["stages"],
        "blocks": [round(seconds, 4) for seconds in first["blocks"]],
        **{key: first[key] for key in ("device_bytes", "host_bytes", "predicted_bytes", "rounded")},
    }  # fmt: skip
