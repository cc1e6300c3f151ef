"""What a checkpoint holds, from its configs, headers, scales and group indices; codes are not read, so this is quick on any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from gptqkit.checkpoint.engines import HEADS, Facts, Verdict, judge
from gptqkit.checkpoint.files import read_json
from gptqkit.checkpoint.quantized import QuantizedCheckpoint, find_quantization, read_config
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.accounting import DENSE, EXTRA, KEPT, OUTSIDE_MODEL, QUANTIZED, SKIPPED, Account, Entry, spec_rule

SCALE_NAMES = ("scales", "weight_scale")
GROUP_NAMES = ("g_idx", "weight_g_idx")
TOKEN_EMBEDDINGS = ("embed_tokens", "wte", "embed_in", "word_embeddings", "embeddings")
EMBEDDINGS = (*TOKEN_EMBEDDINGS, "wpe", "embed_positions")


@dataclass(frozen=True, slots=True)
class LinearRow:
    """One quantized linear. g_idx is "none", "natural" or "reordered"; negative_scales a fraction; nbytes those of all its tensors."""

    name: str
    out_features: int
    in_features: int
    bits: int
    group_size: int
    sym: bool
    g_idx: str
    negative_scales: float
    nbytes: int


@dataclass(frozen=True, slots=True)
class DenseRow:
    """One tensor that is not part of a quantized linear."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint at a glance.

    format                  "gptq", "gptq_v2", "compressed-tensors", or "dense" for a model that is not quantized
    quantizer               who wrote it, as far as the config says
    parameters, nbytes      weights and bytes of the whole model; for linears and dense tensors apart in the rows
    bits_per_weight         8 * nbytes / parameters; linear_bits_per_weight the same over the quantized linears (None: there are none)
    specs                   how many linears and weights have which bits, group size and symmetry, most weights first
    tied_head               there is no output head of its own
    account                 what is quantized how and what is kept why: from the run's record where there is one, else from names and shapes
    engines                 who can serve it; empty for a dense model
    """

    format: str
    model_type: str | None
    architectures: tuple[str, ...]
    dtype: str | None
    quantizer: tuple[str, ...]
    parameters: int
    nbytes: int
    bits_per_weight: float
    linear_bits_per_weight: float | None
    desc_act: bool
    tied_head: bool
    specs: tuple[dict[str, Any], ...]
    linears: tuple[LinearRow, ...]
    not_quantized: tuple[DenseRow, ...]
    not_quantized_nbytes: int
    account: Account
    engines: tuple[Verdict, ...]

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "account": self.account.to_dict(), "engines": [verdict.to_dict() for verdict in self.engines]}


def inspect_checkpoint(folder: Path) -> Inspection:
    """Describes a model folder, quantized or not. Raises InputError when it cannot be read."""
    config = read_config(folder)
    quantization = find_quantization(folder, config)
    if quantization is None:
        source = TensorSource.open(folder)
        return _inspection(config, {}, "dense", source, source.names, (), ())
    checkpoint = QuantizedCheckpoint.open(folder)
    rows = tuple(linear_row(checkpoint, name) for name in checkpoint.linears)
    verdicts = tuple(judge(facts_of(checkpoint, reordered=any(row.g_idx == "reordered" for row in rows))))
    return _inspection(config, quantization, checkpoint.format.name, checkpoint.source, checkpoint.dense_names, rows, verdicts)


def linear_row(checkpoint: QuantizedCheckpoint, name: str) -> LinearRow:
    """The facts about one linear. Raises InputError when its tensors cannot be read."""
    spec = checkpoint.linears[name]
    out_features, in_features = checkpoint.shape(name)
    local = checkpoint.local_names(name)
    scale = next((checkpoint.read_tensor(name, s) for s in SCALE_NAMES if s in local), torch.empty(0))
    stored = next((checkpoint.read_tensor(name, g) for g in GROUP_NAMES if g in local), None)
    order = "none" if stored is None else "natural"
    if stored is not None:
        size = in_features if spec.group_size == -1 else spec.group_size
        groups = -(-in_features // size)
        natural = torch.arange(in_features, dtype=torch.int64) // size
        found = torch.where(stored < 0, stored + groups, stored).to(torch.int64)
        if not torch.equal(found, natural) and not bool((stored == -1).all()):
            order = "reordered"
    negative = float((scale < 0).double().mean()) if scale.numel() else 0.0
    return LinearRow(
        name, out_features, in_features, spec.bits, spec.group_size, spec.sym, order, round(negative, 4), checkpoint.nbytes(name)
    )


def facts_of(checkpoint: QuantizedCheckpoint, *, reordered: bool) -> Facts:
    """What the engines' rules look at."""
    quantization = checkpoint.quantization
    return Facts(
        format=checkpoint.format.name,
        specs=checkpoint.linears,
        dense=frozenset(name.removesuffix(".weight") for name in checkpoint.dense_names if name.endswith(".weight")),
        desc_act=bool(quantization.get("desc_act", False)),
        reordered=reordered,
        exceptions=bool(quantization.get("dynamic")),
    )


def _inspection(
    config: Mapping[str, Any], quantization: Mapping[str, Any], name: str, source: TensorSource, dense: tuple[str, ...],
    rows: tuple[LinearRow, ...], verdicts: tuple[Verdict, ...],
) -> Inspection:  # fmt: skip
    not_quantized = tuple(_dense_row(source, tensor) for tensor in dense)
    linear_weights = sum(row.out_features * row.in_features for row in rows)
    parameters = linear_weights + sum(prod(row.shape) for row in not_quantized)
    meta = quantization.get("meta")
    return Inspection(
        format=name,
        model_type=config.get("model_type"),
        architectures=_strings(config.get("architectures")),
        dtype=config.get("dtype") or config.get("torch_dtype"),
        quantizer=_strings(meta.get("quantizer") if isinstance(meta, Mapping) else None),
        parameters=parameters,
        nbytes=source.nbytes,
        bits_per_weight=round(8 * source.nbytes / max(parameters, 1), 4),
        linear_bits_per_weight=round(8 * sum(row.nbytes for row in rows) / linear_weights, 4) if linear_weights else None,
        desc_act=any(row.g_idx == "reordered" for row in rows),
        tied_head=not any(module.rpartition(".")[2] in HEADS for module in (*(row.name for row in rows), *_modules(dense))),
        specs=_specs(rows),
        linears=rows,
        not_quantized=not_quantized,
        not_quantized_nbytes=sum(row.nbytes for row in not_quantized),
        account=_account(source, rows, not_quantized),
        engines=verdicts,
    )


def _account(source: TensorSource, rows: tuple[LinearRow, ...], dense: tuple[DenseRow, ...]) -> Account:
    recorded = _recorded_rules(source.folder)
    linears = [
        Entry(QUANTIZED, spec_rule(row.bits, row.group_size, sym=row.sym), row.out_features * row.in_features, None, row.nbytes)
        for row in rows
    ]
    state = KEPT if rows else DENSE
    kept = [Entry(*recorded.get(row.name, (state, _guessed_rule(row))), prod(row.shape), None, row.nbytes) for row in dense]
    return Account.of([*linears, *kept])


def _recorded_rules(folder: Path) -> dict[str, tuple[str, str]]:
    """State and rule of each tensor that the run which wrote the folder left as it was; empty without its record."""
    path = folder / "gptqkit" / "run.json"
    record = read_json(path) if path.exists() else {}
    found: dict[str, tuple[str, str]] = {}
    for key, state in (("kept", KEPT), ("skipped", SKIPPED)):
        for tensor in record.get(key) or ():
            rule = str(tensor["reason"])
            found[str(tensor["name"])] = (EXTRA if rule in OUTSIDE_MODEL else state, rule)
    return found


def _guessed_rule(row: DenseRow) -> str:
    """What a tensor is, as far as its name and shape tell."""
    path = row.name.split(".")
    if any(mark in path[-2:-1] for mark in EMBEDDINGS):
        return "embedding"
    if path[-2:-1] and path[-2] in HEADS:
        return "output head"
    if path[-1].endswith("bias"):
        return "bias"
    if len(row.shape) < 2 or min(row.shape) == 1:
        return "norm or small parameter"
    return "matrix of a block" if any(part.isdigit() for part in path) else "matrix outside the blocks"


def _strings(value: Any) -> tuple[str, ...]:
    """A string or a list of them, as configs have it, as a tuple; nothing for anything else."""
    if isinstance(value, str):
        return (value,)
    return tuple(str(entry) for entry in value) if isinstance(value, list) else ()


def _modules(tensors: tuple[str, ...]) -> list[str]:
    return [tensor.rpartition(".")[0] for tensor in tensors]


def _specs(rows: tuple[LinearRow, ...]) -> tuple[dict[str, Any], ...]:
    linears: Counter[tuple[int, int, bool]] = Counter()
    weights: Counter[tuple[int, int, bool]] = Counter()
    for row in rows:
        key = (row.bits, row.group_size, row.sym)
        linears[key] += 1
        weights[key] += row.out_features * row.in_features
    return tuple(
        {"bits": bits, "group_size": group_size, "sym": sym, "linears": linears[bits, group_size, sym], "weights": count}
        for (bits, group_size, sym), count in weights.most_common()
    )


def _dense_row(source: TensorSource, name: str) -> DenseRow:
    info = source.info(name)
    return DenseRow(name, str(info.dtype).removeprefix("torch."), info.shape, info.nbytes)
