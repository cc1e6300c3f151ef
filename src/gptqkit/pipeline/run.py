"""One quantization from beginning to end: check, calibrate, quantize block by block, write, read back, measure, publish."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.calibration.load import load_calibration
from gptqkit.calibration.tokens import CalibrationSet
from gptqkit.checkpoint.files import read_json, write_json, write_text
from gptqkit.checkpoint.source import TensorSource
from gptqkit.checkpoint.writer import copy_side_files, write_index
from gptqkit.core.accounting import Account
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.errors import CheckFailed, InputError, ResourceError
from gptqkit.core.events import Emit, Event
from gptqkit.core.recipe import RecipeUse
from gptqkit.core.version import __version__
from gptqkit.evaluation.perplexity import Evaluation, compare
from gptqkit.formats import get_format
from gptqkit.hf.skeleton import transformers_version
from gptqkit.models.device import MemoryMeter
from gptqkit.models.head import says_tied, untied
from gptqkit.models.layout import LINEAR_OUTSIDE, UNQUANTIZED_LINEARS
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.weights import open_weights
from gptqkit.pipeline.accounting import KeptTensor, unbuilt_matrices
from gptqkit.pipeline.budget import Budget, spend
from gptqkit.pipeline.card import model_card
from gptqkit.pipeline.coverage import BlockCoverage
from gptqkit.pipeline.journal import FOLDER, Journal
from gptqkit.pipeline.plan import Plan, Prepared, prepare
from gptqkit.pipeline.preflight import check_disk, check_output, clear_output, fingerprint, fixed_options
from gptqkit.pipeline.recipe import recipe_text
from gptqkit.pipeline.stream import Stream, quantize_blocks
from gptqkit.pipeline.worker import LinearRecord


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """The arguments of `gptqkit.api.quantize`."""

    model: str
    out: Path
    config: QuantConfig
    calibration: Any = None
    samples: int = 128
    seqlen: int = 2048
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    memory: int | None = None
    resume: bool = False
    overwrite: bool = False
    strict: bool = False
    trust_remote_code: bool = False
    recipe: RecipeUse | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The record of a finished run; `gptqkit/run.json` holds the same. Sizes and memory in bytes, times in seconds.

    account           what became of every parameter, by rule
    check             the written checkpoint against the original on held-back calibration tokens; None without such tokens
    peak_memory       how far this process's memory rose above its start
    predicted_memory  what the plan said it would be
    device_memory     the peak on the accelerator, 0 on a CPU
    coverage          for each block of experts how the calibration tokens were spread over them
    recipe            the one that the options were taken from, if any; gptqkit/recipe.yaml holds the options that were used
    budget            how `target_bits` was spent, if it was given
    """

    out: Path
    model: str
    config: QuantConfig
    linears: tuple[LinearRecord, ...]
    skipped: tuple[KeptTensor, ...]
    kept: tuple[KeptTensor, ...]
    account: Account
    calibration: dict[str, Any]
    check: Evaluation | None
    size_before: int
    size_after: int
    bits_per_weight: float
    seconds: dict[str, float]
    peak_memory: int
    predicted_memory: int
    device_memory: int
    environment: dict[str, Any]
    inputs: dict[str, Any]
    events: tuple[Event, ...]
    coverage: tuple[BlockCoverage, ...]
    recipe: RecipeUse | None
    budget: Budget | None

    @property
    def format(self) -> str:
        return self.config.format

    def to_dict(self) -> dict[str, Any]:
        """JSON-serialisable; holds no path of this machine."""
        plain = {
            name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("out", "config", "linears", "check", "account")
        }
        return {
            **{key: [asdict(item) for item in value] if isinstance(value, tuple) else value for key, value in plain.items()},
            "format": self.format,
            "config": self.config.to_dict(),
            "linears": [asdict(record) for record in self.linears],
            "account": self.account.to_dict(),
            "check": None if self.check is None else self.check.to_dict(),
            "recipe": None if self.recipe is None else asdict(self.recipe),
            "budget": None if self.budget is None else self.budget.to_dict(),
        }


def run_job(job: Job, emit: Emit) -> Run:
    """See `gptqkit.api.quantize`."""
    recorder = _Recorder(emit)
    with _out_of_memory():
        prepared, calibration = _prepare(job, recorder)
        meter = MemoryMeter(prepared.model.device)
        with recorder.phase("hash", "looking through the weights"):
            source = prepared.weights.source
            inputs = fixed_options(prepared.plan, job.config, fingerprint(prepared.folder, source), calibration.description)
        if job.resume and _is_finished(job.out):
            raise InputError(f"{job.out} is finished already; there is nothing to resume")
        with Journal(job.out) as journal:
            if job.overwrite:
                clear_output(job.out)
            _begin(journal, inputs)
            config, budget = job.config, None
            if config.target_bits is not None:
                with recorder.phase("budget", "measuring how much each linear matters"):
                    prepared, config, budget = spend(
                        config.target_bits, prepared, config, calibration.ids, journal, recorder, trust_remote_code=job.trust_remote_code
                    )
            _tell_skipped(prepared.plan, recorder)
            stream = Stream(prepared.model, source, prepared.plan, config, journal, recorder)
            with recorder.phase("quantize", "quantizing"):
                records = quantize_blocks(stream, calibration.ids)
            with recorder.phase("write", "completing the checkpoint"):
                _finish_checkpoint(stream, prepared, records)
            with recorder.phase("check", "reading it back"):
                check = _check(stream, prepared, calibration.held_back, trust_remote_code=job.trust_remote_code)
            coverage = [BlockCoverage(**record["coverage"]) for record in journal.records() if record.get("coverage")]
            run = _result(job, prepared, calibration, records, coverage, check, budget, meter, inputs, recorder)
            with recorder.phase("publish", "publishing"):
                _publish(run, journal, job)
        if check is not None and not check.perplexity < float("inf"):
            raise CheckFailed(f"the checkpoint in {job.out} reads back, but its perplexity is not finite; see {FOLDER}/layers.jsonl there")
    return run


class _Recorder:
    """Passes events on and keeps those that belong in the record; times the phases."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.events: list[Event] = []
        self.seconds: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if event.kind in ("warning", "skip", "fallback", "note"):
            self.events.append(event)
        self._emit(event)

    @contextmanager
    def phase(self, name: str, message: str) -> Iterator[None]:
        started = time.perf_counter()
        self(Event("stage", message, {"name": name}))
        yield
        self.seconds[name] = round(time.perf_counter() - started, 3)


def _prepare(job: Job, emit: _Recorder) -> tuple[Prepared, CalibrationSet]:
    """Everything that can refuse the job, before anything is written."""
    with emit.phase("prepare", "opening the model"):
        prepared = prepare(
            job.model, job.config, samples=job.samples, seqlen=job.seqlen, device=job.device, dtype=job.dtype, memory=job.memory,
            trust_remote_code=job.trust_remote_code,
        )  # fmt: skip
        check_output(job.out, prepared.folder, resume=job.resume, overwrite=job.overwrite)
        check_disk(job.out, prepared.plan, reused=job.resume or job.overwrite)
        for event in prepared.plan.events:
            emit(event)
        unasked = [*_unasked(prepared.plan), *unbuilt_matrices(prepared.model, prepared.plan.kept)]
        if job.strict and unasked:
            names = ", ".join(tensor.name for tensor in unasked)
            raise InputError(
                f"--strict: {names} would stay in full precision, since only the blocks are quantized; run without --strict to accept that"
            )
        if not job.config.needs_calibration:
            return prepared, CalibrationSet([], [], {"kind": "none", "sha256": None}, "")
        calibration = load_calibration(
            job.calibration, tokenizer_folder=prepared.folder, vocab_size=prepared.model.vocabulary, samples=job.samples,
            seqlen=prepared.plan.seqlen, seed=job.seed, trust_remote_code=job.trust_remote_code, emit=emit,
        )  # fmt: skip
    return prepared, calibration


def _tell_skipped(plan: Plan, emit: Emit) -> None:
    """One event for each linear that is left in full precision."""
    for tensor in (*plan.skipped, *_unasked(plan)):
        emit(Event("skip", f"{tensor.name} stays in full precision: {tensor.reason}", {"name": tensor.name}))


def _unasked(plan: Plan) -> list[KeptTensor]:
    return [tensor for tensor in plan.kept if tensor.reason == LINEAR_OUTSIDE]


def _begin(journal: Journal, inputs: dict[str, Any]) -> None:
    if journal.unfinished:
        journal.check_same(inputs)
        journal.unpublish()
    else:
        journal.begin(inputs)


def _finish_checkpoint(stream: Stream, prepared: Prepared, records: list[LinearRecord]) -> None:
    """Index, configs and side files beside the shards: the journal's checkpoint folder becomes complete, config.json last."""
    folder = stream.journal.checkpoint
    if (folder / "config.json").exists():
        return
    files, total = {}, 0
    for number in range(1, stream.shard_count + 1):
        shard = TensorSource.open_file(folder / stream.shard_name(number))
        files.update(dict.fromkeys(shard.names, stream.shard_name(number)))
        total += shard.nbytes
    if stream.shard_count > 1:
        write_index(folder, files, total)
    copy_side_files(prepared.folder, folder)
    specs = {record.name: LinearSpec(record.bits, record.group_size, record.sym) for record in records}
    unquantized = [tensor for tensor in prepared.plan.kept if tensor.reason in UNQUANTIZED_LINEARS and tensor.name.endswith(".weight")]
    unquantized += unbuilt_matrices(prepared.model, prepared.plan.kept)  # an engine that builds them must know
    skipped = [tensor.name.removesuffix(".weight") for tensor in (*prepared.plan.skipped, *unquantized)]
    config = stream.config
    details = {
        "damp_percent": config.damp,
        "true_sequential": True,
        "static_groups": config.column_order == "activation",
        "quantizer": [f"gptqkit:{__version__}"],
    }
    quantization = get_format(config.format).config(specs, skipped, desc_act=config.desc_act, details=details)
    write_json(folder / "quantize_config.json", quantization)
    original = read_json(prepared.folder / "config.json")
    head = prepared.plan.head
    written = untied(original) if head is not None and (head.tied or says_tied(original)) else original
    write_json(folder / "config.json", {**written, "quantization_config": quantization})


def _written(folder: Path, prepared: Prepared, *, trust_remote_code: bool) -> StreamedModel:
    """The model that was written: the original's structure, unless its head was untied."""
    head = prepared.plan.head
    if head is not None and head.tied:
        own = prepared.model
        return StreamedModel.open(folder, device=own.device, dtype=own.dtype, trust_remote_code=trust_remote_code)
    return prepared.model.with_weights(open_weights(folder))


def _check(stream: Stream, prepared: Prepared, held_back: list[Tensor], *, trust_remote_code: bool) -> Evaluation | None:
    """The written files, opened afresh, against the original on tokens the calibration did not see."""
    if not held_back:
        return None
    shortest = min(sequence.numel() for sequence in held_back)
    if shortest < 2:
        return None
    written = _written(stream.journal.checkpoint, prepared, trust_remote_code=trust_remote_code)
    result = compare(written, prepared.model, [sequence[:shortest] for sequence in held_back], stream.emit)
    if result.reference_perplexity is not None and not result.perplexity < 3 * result.reference_perplexity:
        times = result.perplexity / result.reference_perplexity
        stream.emit(
            Event(
                "warning", f"perplexity is {times:.1f} times the original's on held-back tokens; use more bits or a smaller group size", {}
            )
        )
    return replace(result, seconds=round(result.seconds, 3))


def _result(
    job: Job, prepared: Prepared, calibration: CalibrationSet, records: list[LinearRecord], coverage: list[BlockCoverage],
    check: Evaluation | None, budget: Budget | None, meter: MemoryMeter, inputs: dict[str, Any], recorder: _Recorder,
) -> Run:  # fmt: skip
    plan = prepared.plan
    weights = sum(record.shape[0] * record.shape[1] for record in records)
    folder = job.out / FOLDER / "journal" / "checkpoint"
    shards = [*folder.glob("*.safetensors"), *job.out.glob("*.safetensors")]
    packed = sum(
        source.info(name).nbytes
        for source in map(TensorSource.open_file, shards)
        for name in source.names
        if name not in prepared.weights.source
    )
    return Run(
        out=job.out,
        model=plan.model,
        config=job.config,
        linears=tuple(records),
        skipped=plan.skipped,
        kept=plan.kept,
        account=plan.account,
        calibration=calibration.description,
        check=check,
        size_before=plan.size_before,
        size_after=sum(path.stat().st_size for path in shards),
        bits_per_weight=round(8 * packed / max(weights, 1), 4),
        seconds=recorder.seconds,
        peak_memory=meter.host_growth(),
        predicted_memory=plan.memory.peak,
        device_memory=meter.device_peak(),
        environment=_environment(plan.device, plan.dtype),
        inputs=inputs,
        events=tuple(recorder.events),
        coverage=tuple(coverage),
        recipe=job.recipe,
        budget=budget,
    )


def _environment(device: str, dtype: str) -> dict[str, Any]:
    cuda = torch.cuda.get_device_name(device) if device.startswith("cuda") else None
    return {
        "gptqkit": __version__, "torch": torch.__version__, "transformers": transformers_version(), "python": platform.python_version(),
        "device": cuda or f"{platform.machine()} CPU", "threads": torch.get_num_threads(), "dtype": dtype,
    }  # fmt: skip


def _publish(run: Run, journal: Journal, job: Job) -> None:
    """The record and the model card, then the checkpoint itself; the journal goes last."""
    write_text(journal.out / FOLDER / "layers.jsonl", "".join(json.dumps(asdict(record)) + "\n" for record in run.linears))
    write_json(journal.out / FOLDER / "run.json", {key: value for key, value in run.to_dict().items() if key != "linears"})
    data = {"samples": job.samples, "seqlen": job.seqlen, "seed": job.seed}
    write_text(journal.out / FOLDER / "recipe.yaml", recipe_text(job.config, data, run.calibration, job.recipe))
    write_text(journal.out / "README.md", model_card(run))
    journal.publish()
    journal.remove()


def _is_finished(out: Path) -> bool:
    return (out / FOLDER / "run.json").exists() and (out / "config.json").exists() and not (out / FOLDER / "journal").exists()


@contextmanager
def _out_of_memory() -> Iterator[None]:
    """Memory that ran out is a ResourceError with a remedy, whoever noticed it."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(
            f"the device ran out of memory ({str(error).splitlines()[0]}); lower --samples or --memory and run again with --resume"
        ) from error
    except MemoryError as error:
        raise ResourceError("memory ran out; lower --samples or --memory and run again with --resume") from error
    except RuntimeError as error:
        if "can't allocate memory" in str(error):
            raise ResourceError("memory ran out; lower --samples or --memory and run again with --resume") from error
        raise
