"""`bench quality`: what each tool's checkpoint is worth, at which cost, on the same calibration tokens and with one evaluator.

    for each seed, bit width and tool:   quantize in a child process  ->  evaluate here  ->  one line of results.jsonl

The tools take turns, so that a machine that is busy for a while is busy for all of them. Wall and CPU seconds and peak memory are those of
the whole child. A checkpoint of whatever tool is read by our readers and evaluated in float32 against the original, streamed as `gptqkit
eval` does. What is in results.jsonl is not run again; a failure is, and so is what the caller wants to have again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.bench.child import last_error, run_child
from gptqkit.bench.tools import Tool
from gptqkit.calibration.load import load_calibration
from gptqkit.calibration.tokens import CalibrationSet
from gptqkit.checkpoint.files import read_json, sha256
from gptqkit.checkpoint.inspect import inspect_checkpoint
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.errors import GptqkitError, InputError
from gptqkit.core.events import Emit, Event, silent
from gptqkit.evaluation.perplexity import compare, last_hidden, read_windows
from gptqkit.models.device import resolve_device
from gptqkit.models.streamed import StreamedModel

DEQUANTIZED = "dequantized.json"
"""Beside plain weights: how many linears they stand for, and the bits of a weight in the tool's own format (see peers/)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is to be measured. `again` names tools whose results are replaced; `keep` keeps the checkpoints."""

    folder: Path
    out: Path
    tools: Sequence[Tool]
    bits: Sequence[int]
    group_size: int
    seeds: Sequence[int]
    calibration: str | None
    samples: int
    seqlen: int
    texts: Sequence[Path]
    windows: int
    threads: int
    device: str
    again: Sequence[str] = ()
    keep: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One quantization by one tool.

    seed             that drew the calibration tokens; None for a tool without calibration
    error            why there are no figures, in one line; None when there are
    wall, cpu        seconds of the child; peak_mb its largest resident set
    load             the machine's load average before it began: times count only where this is near 0
    bits_per_weight  of the quantized linears as stored, scales and zero points included; linears how many there are
    texts            perplexity, reference_perplexity, kl and top1 for each text
    """

    tool: str
    bits: int
    group_size: int
    seed: int | None
    versions: dict[str, str]
    load: float
    wall: float
    cpu: float
    peak_mb: float
    error: str | None = None
    bits_per_weight: float | None = None
    linears: int | None = None
    texts: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, int, int, int | None]:
        """What a result is of; one of each is kept."""
        return self.tool, self.bits, self.group_size, self.seed


def measure(request: Request, emit: Emit = silent) -> list[Result]:
    """Measures what `request.out` does not hold yet, and returns all that it holds then. Raises InputError before any work for what cannot
    be: broken texts or calibration, or a folder with results of other settings. A tool that fails is a result."""
    (request.out / "logs").mkdir(parents=True, exist_ok=True)
    evaluator = _Evaluator.open(request)
    tokens = _Tokens(request, evaluator.vocabulary)
    _claim(request, tokens)
    file = request.out / "results.jsonl"
    kept = {result.key: result for result in read_results(file)}
    for seed, bits, tool in _tasks(request):
        key = (tool.name, bits, request.group_size, seed if tool.calibrated else None)
        if key in kept and kept[key].error is None and tool.name not in request.again:
            continue
        drawn = "" if key[3] is None else f", seed {seed}"
        emit(Event("stage", f"{tool.name}: {bits} bits, groups of {request.group_size}{drawn}", {"tool": tool.name, "bits": bits}))
        result = _run(request, tool, bits, key[3], tokens, evaluator)
        if result.error is not None:
            emit(Event("warning", f"{tool.name} at {bits} bits failed: {result.error}"))
        kept[key] = result
        _write_results(file, kept.values())
    return list(kept.values())


def read_results(file: Path) -> list[Result]:
    """The lines of results.jsonl; none when there is no such file. Raises InputError for one that is not ours."""
    if not file.exists():
        return []
    try:
        return [Result(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]
    except (ValueError, TypeError) as error:
        raise InputError(f"{file} holds something else than results of this version ({error}); move it away") from None


def _write_results(file: Path, results: Any) -> None:
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(json.dumps(asdict(result)) + "\n" for result in results), encoding="utf-8")
    os.replace(temporary, file)


def _tasks(request: Request) -> Iterator[tuple[int, int, Tool]]:
    """A tool without calibration is run with the first seed only."""
    for number, seed in enumerate(request.seeds):
        for bits in request.bits:
            yield from ((seed, bits, tool) for tool in request.tools if tool.calibrated or number == 0)


def _run(request: Request, tool: Tool, bits: int, seed: int | None, tokens: _Tokens, evaluator: _Evaluator) -> Result:
    """Quantizes and evaluates. The checkpoint is gone afterwards unless it is to be kept, or is wanted to look into a failure."""
    name = f"{tool.name.replace(' ', '-')}-{bits}bit-g{request.group_size}" + ("" if seed is None else f"-seed{seed}")
    out, log = request.out / "checkpoints" / name, request.out / "logs" / f"{name}.log"
    shutil.rmtree(out, ignore_errors=True)
    out.parent.mkdir(exist_ok=True)
    load = os.getloadavg()[0]
    outcome = run_child(_command(request, tool, bits, seed or 0, out, tokens), log, _environment(request))
    result: dict[str, Any] = {
        "tool": tool.name, "bits": bits, "group_size": request.group_size, "seed": seed, "versions": dict(tool.versions), "load": load,
        "wall": outcome.wall, "cpu": outcome.cpu, "peak_mb": outcome.peak_mb,
    }  # fmt: skip
    if outcome.code != 0:
        return Result(**result, error=last_error(log, outcome.code))
    try:
        if tool.ours and seed is not None:
            _check_tokens(out, tokens.of(seed))
        bits_per_weight, linears = _stored(out)
        texts = evaluator.evaluate(out)
    except GptqkitError as error:
        return Result(**result, error=f"its checkpoint cannot be evaluated: {error}")
    if not request.keep:
        shutil.rmtree(out)
    return Result(**result, bits_per_weight=bits_per_weight, linears=linears, texts=texts)


def _command(request: Request, tool: Tool, bits: int, seed: int, out: Path, tokens: _Tokens) -> list[str]:
    """With absolute paths: a child runs in a folder of its own, because some tools leave files where they are started."""
    folder, out = request.folder.absolute(), out.absolute()
    if not tool.ours:
        values = (folder, out, tokens.file(seed).absolute(), bits, request.group_size, seed, request.device)
        return [*tool.arguments, *map(str, values)]
    calibration = request.calibration
    if calibration is not None and Path(calibration).exists():
        calibration = str(Path(calibration).absolute())
    options = {
        "--bits": bits, "--group-size": request.group_size, "--samples": request.samples, "--seqlen": request.seqlen, "--seed": seed,
        "--device": request.device, **({} if calibration is None else {"--calibration": calibration}),
    }  # fmt: skip
    return [*tool.arguments, str(folder), str(out), "--sym", *(str(word) for pair in options.items() for word in pair)]


def _environment(request: Request) -> dict[str, str]:
    """The same for every child. Nothing needs the network: the model is a folder, and so is the data."""
    threads = str(request.threads)
    common = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    return {**common, "CUDA_VISIBLE_DEVICES": ""} if request.device == "cpu" else common


def _check_tokens(out: Path, calibration: CalibrationSet) -> None:
    used = read_json(out / "gptqkit" / "run.json")["calibration"]["sha256"]
    if used != calibration.fingerprint:
        raise InputError("it was calibrated on other tokens than the peers were given")


def _stored(out: Path) -> tuple[float, int]:
    """Bits per quantized weight, and how many linears are quantized. Raises InputError when none is."""
    if (out / DEQUANTIZED).exists():
        about = read_json(out / DEQUANTIZED)
        return float(about["bits_per_weight"]), int(about["linears"])
    found = inspect_checkpoint(out)
    if found.linear_bits_per_weight is None:
        raise InputError("no linear in it is quantized")
    return found.linear_bits_per_weight, len(found.linears)


class _Tokens:
    """The calibration of each seed: exactly what `gptqkit quantize` draws, and a file of token ids for the others."""

    def __init__(self, request: Request, vocabulary: int) -> None:
        self._request, self._vocabulary = request, vocabulary
        self._drawn: dict[int, CalibrationSet] = {}

    def of(self, seed: int) -> CalibrationSet:
        if seed not in self._drawn:
            request = self._request
            self._drawn[seed] = load_calibration(
                request.calibration, tokenizer_folder=request.folder, vocab_size=self._vocabulary, samples=request.samples,
                seqlen=request.seqlen, seed=seed,
            )  # fmt: skip
        return self._drawn[seed]

    def file(self, seed: int) -> Path:
        file = self._request.out / f"ids-seed{seed}.json"
        file.write_text(json.dumps([ids_T.tolist() for ids_T in self.of(seed).ids]), encoding="utf-8")
        return file


class _Evaluator:
    """The original and the texts, held ready: every checkpoint is compared with the same hidden states."""

    def __init__(self, reference: StreamedModel, windows: dict[str, list[Tensor]], device: torch.device) -> None:
        self._reference, self._windows, self._device = reference, windows, device
        self._hidden: dict[str, Tensor] = {}
        self.vocabulary = reference.vocabulary

    @classmethod
    def open(cls, request: Request) -> _Evaluator:
        names = [text.name for text in request.texts]
        if len(set(names)) < len(names):
            raise InputError(f"--text: two files are called {max(names, key=names.count)}; rename one, since tables tell them by name")
        device = resolve_device(request.device)
        reference = StreamedModel.open(request.folder, device=device, dtype=torch.float32)
        windows = {
            text.name: read_windows(request.folder, text, request.windows, request.seqlen, reference, False) for text in request.texts
        }
        return cls(reference, windows, device)

    def evaluate(self, folder: Path) -> dict[str, dict[str, float]]:
        """For each text perplexity, the original's, KL and top-1. Raises InputError for a checkpoint that cannot be read."""
        subject = StreamedModel.open(folder, device=self._device, dtype=torch.float32)
        scores = {}
        for name, sequences in self._windows.items():
            if name not in self._hidden:
                with torch.inference_mode():
                    self._hidden[name] = last_hidden(self._reference, torch.stack(sequences), "original", silent)
            found = compare(subject, self._reference, sequences, original=self._hidden[name])
            scores[name] = {key: getattr(found, key) for key in ("perplexity", "reference_perplexity", "kl", "top1")}
        return scores


def describe_settings(request: Request) -> dict[str, Any]:
    """What all results of a folder have in common, without a path of this machine."""
    return {
        "model": request.folder.name,
        "model_bytes": TensorSource.open(request.folder).nbytes,
        "calibration": "bundled" if request.calibration is None else Path(request.calibration).name,
        "samples": request.samples,
        "seqlen": request.seqlen,
        "windows": request.windows,
        "texts": {text.name: sha256(text) for text in request.texts},
        "threads": request.threads,
        "device": request.device,
    }


def _claim(request: Request, tokens: _Tokens) -> None:
    """Writes the settings, or checks that the folder's are the same, so that no table mixes two."""
    settings = {**describe_settings(request), "calibration_sha256": tokens.of(0).fingerprint}
    file = request.out / "settings.json"
    if file.exists():
        held = read_json(file)
        differing = [key for key in settings if held.get(key) != settings[key]]
        if differing:
            key = differing[0]
            raise InputError(
                f"{request.out} holds results with {key}={held.get(key)!r}, and this run has {settings[key]!r}; name another --out, or "
                "measure with the same options"
            )
    file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
