"""Whether a quantized checkpoint is sound: every tensor read once, checked for what can be known without running the model.

With the original at hand each linear is also compared with it. ||Q - W|| / ||W|| by itself says little (2 bits move a weight far), so it is
judged against rounding the original to nearest with the same bits and groups: a method that minimises the error of the *output* moves the
weights further than rounding does, but not many times further. A wrong tensor, a wrong scale or a shuffled column does.

A file that cannot even be opened raises InputError; whatever is wrong inside is a failed check that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptqkit.checkpoint.engines import HEADS, Verdict, judge
from gptqkit.checkpoint.files import read_json
from gptqkit.checkpoint.inspect import TOKEN_EMBEDDINGS, facts_of, linear_row
from gptqkit.checkpoint.quantized import CONFIG_NAMES, QuantizedCheckpoint
from gptqkit.checkpoint.source import INDEX_NAME
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event
from gptqkit.core.grid import SCALE_MIN
from gptqkit.core.weight import QuantizedWeight
from gptqkit.evaluation.against import Comparison, LinearError, compare_weights

_NAMED = 3


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer; `detail` is a sentence with numbers or the names of the first tensors at fault."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True, slots=True)
class NotQuantized:
    """A matrix that is stored in full precision, and why, as far as the checkpoint says."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    why: str


@dataclass(frozen=True, slots=True)
class Verification:
    """The verdict `ok` is that all checks hold. `errors` has one row a linear when there was an original to compare with."""

    format: str
    checks: tuple[Check, ...]
    engines: tuple[Verdict, ...]
    not_quantized: tuple[NotQuantized, ...]
    errors: tuple[LinearError, ...]

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def to_dict(self) -> dict[str, Any]:
        return {"ok": self.ok, **asdict(self), "engines": [verdict.to_dict() for verdict in self.engines]}


@dataclass(slots=True)
class _Problems:
    """What was found wrong, by check, while the linears are read once."""

    unreadable: list[str] = field(default_factory=list)
    scales: list[str] = field(default_factory=list)
    zeros: list[str] = field(default_factory=list)
    reordered: list[str] = field(default_factory=list)


def verify_checkpoint(folder: Path, *, against: str | None, emit: Emit) -> Verification:
    """Checks a quantized model folder, and with `against` (a folder or hub id) compares every tensor with the original's.

    Raises InputError when the folder is not a quantized checkpoint, or its files or configs cannot be opened at all.
    """
    checkpoint = QuantizedCheckpoint.open(folder)
    emit(Event("stage", f"checking {len(checkpoint.linears)} linears", {"name": "check"}))
    problems = _Problems()
    for name in checkpoint.linears:
        _check_linear(checkpoint, name, problems)
        emit(Event("linear", name, {"name": name}))
    count = len(checkpoint.linears)
    checks = [
        _check_files(checkpoint),
        _result("tensors", problems.unreadable, f"{count} linears: shapes, types, codes and group indices are as the config says"),
        _result("scales", problems.scales, "all finite and normal in float16"),
        _result("zero points", problems.zeros, "all representable in this format"),
        _check_order(checkpoint, problems.reordered),
        _check_blocks(checkpoint),
        _check_head(checkpoint),
        _check_dense(checkpoint),
        _check_configs(checkpoint),
    ]
    errors: tuple[LinearError, ...] = ()
    if against is not None:
        compared = compare_weights(checkpoint, against, emit)
        errors = compared.errors
        checks += [
            _result("weights against the original", compared.implausible, _errors_line(errors)),
            _result("other tensors against the original", compared.changed, _equal_line(compared)),
        ]
    facts = facts_of(checkpoint, reordered=bool(problems.reordered))
    return Verification(checkpoint.format.name, tuple(checks), tuple(judge(facts)), tuple(_not_quantized(checkpoint)), errors)


def _check_linear(checkpoint: QuantizedCheckpoint, name: str, problems: _Problems) -> None:
    try:
        weight = checkpoint.read_linear(name)
        row = linear_row(checkpoint, name)
    except InputError as error:
        problems.unreadable.append(str(error).removeprefix(f"{checkpoint.folder}: "))
        return
    magnitude_OG = weight.scale_OG.abs()
    if float(magnitude_OG.min()) < SCALE_MIN:
        small = int((magnitude_OG < SCALE_MIN).sum())
        problems.scales.append(f"{name} has {small} scales below 2**-14, which engines flush to zero")
    if reason := _zero_problem(checkpoint, weight):
        problems.zeros.append(f"{name}: {reason}")
    if row.g_idx == "reordered":
        problems.reordered.append(name)


def _zero_problem(checkpoint: QuantizedCheckpoint, weight: QuantizedWeight) -> str | None:
    if checkpoint.format.name == "gptq" and weight.zero_OG is not None and bool((weight.zero_OG == 0).any()):
        return f"{int((weight.zero_OG == 0).sum())} zero points are 0, stored as -1, which readers disagree about; convert to gptq_v2"
    return None


def _check_files(checkpoint: QuantizedCheckpoint) -> Check:
    source = checkpoint.source
    files = {source.info(name).file for name in source.names}
    index = checkpoint.folder / INDEX_NAME
    if not index.exists():
        return _result("files", [], f"{len(files)} weight files, {len(source.names)} tensors")
    listed = set(read_json(index)["weight_map"])
    missing = [f"{name} is in {source.info(name).file} but not in {INDEX_NAME}" for name in source.names if name not in listed]
    return _result("files", missing, f"{len(files)} weight files, {len(source.names)} tensors, all in the index")


def _check_order(checkpoint: QuantizedCheckpoint, reordered: list[str]) -> Check:
    declared = bool(checkpoint.quantization.get("desc_act", False))
    if reordered and not declared and checkpoint.format.name != "compressed-tensors":
        return Check("column order", False, f"desc_act is false, but g_idx is not trivial in {_names(reordered)}")
    return Check("column order", True, f"g_idx in {len(reordered)} linears, desc_act={str(declared).lower()}" if reordered else "natural")


def _check_blocks(checkpoint: QuantizedCheckpoint) -> Check:
    """Every block that the config announces has quantized or dense tensors."""
    total = checkpoint.config.get("num_hidden_layers", checkpoint.config.get("n_layer"))
    if isinstance(total, bool) or not isinstance(total, int) or not 0 < total < 10_000:
        return Check("blocks", True, "config.json does not say how many there are")
    found = {int(match[1]) for name in (*checkpoint.linears, *checkpoint.dense_names) if (match := re.search(r"\.(\d+)\.", f".{name}."))}
    missing = [f"block {index} has no tensors" for index in range(total) if index not in found]
    return _result("blocks", missing, f"{total}, none missing")


def _check_head(checkpoint: QuantizedCheckpoint) -> Check:
    """A tied head shares the embedding's tensor, an untied one has its own."""
    head = next((n for n in (*checkpoint.linears, *_modules(checkpoint)) if n.rpartition(".")[2] in HEADS), None)
    embedding = next((name for name in _modules(checkpoint) if name.rpartition(".")[2] in TOKEN_EMBEDDINGS), None)
    problem = _head_problem(checkpoint, head, embedding)
    if problem is None and head is None:
        return Check("output head", True, "tied to the embedding")
    precision = "quantized" if head in checkpoint.linears else "full precision"
    return Check("output head", problem is None, problem or f"{head}, {precision}")


def _head_problem(checkpoint: QuantizedCheckpoint, head: str | None, embedding: str | None) -> str | None:
    tied, vocabulary = checkpoint.config.get("tie_word_embeddings"), checkpoint.config.get("vocab_size")
    if tied is False and head is None:
        return "config.json says tie_word_embeddings=false, but there is no output head"
    if tied is True and head in checkpoint.linears:
        return f"config.json says tie_word_embeddings=true, but {head} is quantized: engines would use the embedding instead"
    if embedding is None:
        return None
    rows = checkpoint.source.info(f"{embedding}.weight").shape[0]
    if isinstance(vocabulary, int) and rows != vocabulary:
        return f"{embedding} has {rows} rows, and config.json says vocab_size={vocabulary}"
    if tied is True and head is not None and not _equal(checkpoint, f"{head}.weight", f"{embedding}.weight"):
        return f"config.json says tie_word_embeddings=true, but {head} differs from {embedding}"
    return None


def _check_dense(checkpoint: QuantizedCheckpoint) -> Check:
    bad = []
    for name in checkpoint.dense_names:
        try:
            tensor = checkpoint.source.read(name)
        except InputError as error:
            bad.append(str(error))
            continue
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all()):
            bad.append(f"{name} holds values that are not finite")
    return _result("dense tensors", bad, f"{len(checkpoint.dense_names)} tensors, all finite")


def _check_configs(checkpoint: QuantizedCheckpoint) -> Check:
    found = [name for name in CONFIG_NAMES if (checkpoint.folder / name).exists()]
    different = []
    for name in found:
        try:
            if "quantization_config" in checkpoint.config and read_json(checkpoint.folder / name) != checkpoint.quantization:
                different.append(f"{name} differs from config.json's quantization_config")
        except InputError as error:
            different.append(str(error))
    return _result("configs", different, f"{' and '.join(['config.json', *found])} agree" if found else "only config.json")


def _not_quantized(checkpoint: QuantizedCheckpoint) -> Iterator[NotQuantized]:
    for name in checkpoint.dense_names:
        info = checkpoint.source.info(name)
        if len(info.shape) >= 2:
            dtype = str(info.dtype).removeprefix("torch.")
            yield NotQuantized(name, dtype, info.shape, info.nbytes, _why(checkpoint, name.rpartition(".")[0]))


def _why(checkpoint: QuantizedCheckpoint, module: str) -> str:
    leaf = module.rpartition(".")[2]
    if leaf in HEADS:
        return "output head"
    if leaf in TOKEN_EMBEDDINGS or "emb" in leaf or leaf == "wpe":
        return "embedding"
    if checkpoint.format.name == "compressed-tensors":
        targets = checkpoint.quantization.get("ignore") or []
        skips = [t.removeprefix("re:") if t.startswith("re:") else re.escape(t) + "$" for t in targets]
    else:
        skips = [key.removeprefix("-:") for key in checkpoint.quantization.get("dynamic") or {} if key.startswith("-:")]
    if any(re.match(pattern, module) for pattern in skips):
        return "the config says to leave it"
    return "not in a quantized layout; the config does not mention it"


def _modules(checkpoint: QuantizedCheckpoint) -> list[str]:
    return [name.removesuffix(".weight") for name in checkpoint.dense_names if name.endswith(".weight")]


def _equal(checkpoint: QuantizedCheckpoint, name: str, other: str) -> bool:
    a: Tensor = checkpoint.source.read(name)
    b: Tensor = checkpoint.source.read(other)
    return a.dtype == b.dtype and torch.equal(a, b)


def _result(name: str, problems: list[str], fine: str) -> Check:
    return Check(name, not problems, _names(problems, "; ") if problems else fine)


def _names(values: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
    return separator.join(values[:_NAMED]) + more


def _equal_line(compared: Comparison) -> str:
    carrying = f"; {compared.rescaled} norms and biases carry the scales of inputs" if compared.rescaled else ""
    return f"{compared.equal} are bit-equal{carrying}"


def _errors_line(errors: tuple[LinearError, ...]) -> str:
    if not errors:
        return "nothing to compare"
    worst = max(errors, key=lambda row: row.error / row.limit)
    mean = sum(row.error for row in errors) / len(errors)
    return f"mean ||Q - W|| / ||W|| {mean:.4f}; nearest to its limit: {worst.name} {worst.error:.4f} (limit {worst.limit:.4f})"
