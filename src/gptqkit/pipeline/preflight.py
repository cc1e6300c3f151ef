"""What is looked at before long work starts: the output folder, free disk, and every weight once (finite? which bytes?)."""

from __future__ import annotations

import hashlib
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptqkit.checkpoint.files import sha256, writing
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.config import QuantConfig
from gptqkit.core.errors import InputError, ResourceError
from gptqkit.core.version import __version__
from gptqkit.hf.skeleton import transformers_version
from gptqkit.pipeline.journal import FOLDER
from gptqkit.pipeline.plan import Plan


def check_output(out: Path, model: Path, *, resume: bool, overwrite: bool) -> None:
    """Refuses an output folder that would lose something. Raises InputError; touches nothing."""
    if resume and overwrite:
        raise InputError("resume and overwrite contradict each other; give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file; the output is a folder")
    resolved, source = out.resolve(), model.resolve()
    if resolved == source or source.is_relative_to(resolved):
        raise InputError(f"{out} is or contains the model folder {model}; choose another output folder")
    if not out.exists() or not any(out.iterdir()):
        return
    ours = (out / FOLDER / "run.json").exists() or (out / FOLDER / "journal").exists()
    if not ours and {path.name for path in out.iterdir()} != {FOLDER}:
        raise InputError(f"{out} is not empty and was not written by gptqkit; choose another folder, or empty it yourself")
    if (out / FOLDER / "journal" / "job.json").exists():
        if not (resume or overwrite):
            raise InputError(f"{out} holds an unfinished run; go on with --resume, or start over with --overwrite")
    elif (out / FOLDER / "run.json").exists() and not (resume or overwrite):
        raise InputError(f"{out} holds a finished checkpoint; write elsewhere, or replace it with --overwrite")


def clear_output(out: Path) -> None:
    """Empties an output folder that gptqkit wrote (see `check_output`) but for the lock, which the caller holds."""
    kept = (out / FOLDER, out / FOLDER / ".lock")
    with writing(out):
        for path in [*out.iterdir(), *(out / FOLDER).iterdir()]:
            if path not in kept:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def check_disk(out: Path, plan: Plan, *, reused: bool) -> None:
    """Raises InputError when the output cannot be written, ResourceError when it cannot fit; `reused`: what is in `out` makes room for it.

    Half a percent and a megabyte are allowed for headers and side files.
    """
    existing = next(folder for folder in (out, *out.resolve().parents) if folder.exists())
    if not os.access(existing, os.W_OK):
        raise InputError(f"{out} cannot be written: {existing} is read-only or not yours; choose another output folder")
    activations = plan.memory.activations if plan.memory.place == "disk" else 0
    there = sum(path.stat().st_size for path in out.rglob("*") if path.is_file()) if reused and out.exists() else 0
    waiting = 3 if plan.device.startswith("cuda") else 1
    scratch = waiting * plan.size_after // max(plan.blocks, 1)  # a block is on the disk twice until its file is complete
    needed = int(plan.size_after * 1.005) + (1 << 20) + scratch + activations - there
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ResourceError(
            f"{out} needs about {needed / 1e6:.0f} MB and its disk has {free / 1e6:.0f} MB free; free some space or choose another disk"
        )


def fingerprint(folder: Path, source: TensorSource) -> str:
    """sha256 over config.json and all tensors (names, dtypes, shapes, and the sha256 of every 32 MB of their bytes), reading each once.

    Raises InputError naming the first tensor that holds NaN or infinity: found now, not after an hour.
    """
    digest = hashlib.sha256(sha256(folder / "config.json").encode())
    names = sorted(source.names)
    tasks = [(name, part) for name in names for part in source.parts(name)]
    bad = dict.fromkeys(names, 0)
    pool = ThreadPoolExecutor(_HASHING)
    try:
        for (name, part), (found, count) in zip(tasks, pool.map(partial(_looked_through, source), tasks), strict=True):
            bad[name] += count
            if bad[name] and part.stop == source.info(name).nbytes:
                raise InputError(
                    f"tensor {name} in {folder / source.info(name).file} holds {bad[name]} NaN or infinite values; the model is damaged, "
                    "get it again"
                )
            digest.update(f"{name} {source.info(name).dtype} {source.info(name).shape} {part.start} {found}".encode())
    finally:
        pool.shutdown(cancel_futures=True)
    return digest.hexdigest()


_HASHING = min(8, os.cpu_count() or 1)
"""Parts of tensors that are hashed at a time."""


def _looked_through(source: TensorSource, task: tuple[str, range]) -> tuple[str, int]:
    """The hash of a part of a tensor, and how many of its values are NaN or infinite."""
    values = source.read_part(*task)
    digest = hashlib.sha256(values.view(torch.uint8).numpy().data).hexdigest()
    return digest, _nonfinite(values) if values.is_floating_point() else 0


def _nonfinite(tensor: torch.Tensor) -> int:
    """How many NaN or infinite values, a few megabytes at a time."""
    return sum(int((~torch.isfinite(part.float() if part.itemsize == 1 else part)).sum()) for part in tensor.reshape(-1).split(1 << 22))


def fixed_options(plan: Plan, config: QuantConfig, model_hash: str, calibration: dict[str, Any]) -> dict[str, Any]:
    """Everything the output's bytes depend on: what may not change when a run is resumed."""
    return {
        **{f"config.{key}": value for key, value in config.to_dict().items()},
        "model": plan.model,
        "model_sha256": model_hash,
        "calibration_sha256": calibration.get("sha256"),
        "seqlen": plan.seqlen,
        "device": torch.device(plan.device).type,
        "dtype": plan.dtype,
        "gptqkit": __version__,
        "torch": torch.__version__,
        "transformers": transformers_version(),
    }
