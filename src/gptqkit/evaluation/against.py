"""Weights of a quantized checkpoint against the original's, one tensor at a time.

A method that scales inputs (algorithms/awq.py) multiplies the columns of a weight, and divides its rows where it makes somebody's input. If
the run's record says that one did, a linear is compared with the original up to such factors, which are fitted; norms and biases, which
carry the other half, may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptqkit.algorithms.rtn import round_to_nearest
from gptqkit.checkpoint.engines import HEADS
from gptqkit.checkpoint.files import read_json
from gptqkit.checkpoint.inspect import TOKEN_EMBEDDINGS
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event
from gptqkit.hf.names import find_pieces
from gptqkit.hf.skeleton import build_skeleton, load_config, resolve_model
from gptqkit.models.weights import Weights, open_weights

TIMES_ROUNDING = 5.0
"""How much further than rounding to nearest a method may move a weight. The solver itself refuses more (algorithms/gptq.py)."""

UNRELATED = 1.25
"""Two unrelated matrices of one size are about sqrt(2) apart; nothing that stands for the original is further than this."""


@dataclass(frozen=True, slots=True)
class LinearError:
    """error = ||Q - W|| / ||W||; rounded is the same for rounding to nearest; limit is what is plausible."""

    name: str
    error: float
    rounded: float
    limit: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """One row a linear that both have; what is implausible or changed, in words; how many other tensors are equal bit for bit, and how
    many carry scales."""

    errors: tuple[LinearError, ...]
    implausible: list[str]
    changed: list[str]
    equal: int
    rescaled: int


def compare_weights(checkpoint: QuantizedCheckpoint, against: str, emit: Emit) -> Comparison:
    """Compares every tensor with the model `against` (a folder or hub id). Raises InputError when that cannot be read."""
    folder = resolve_model(against)
    original = open_weights(folder)
    names = set(original.names)
    if any(f"{name}.weight" not in names for name in checkpoint.linears):  # stored stacked there
        pieces = find_pieces(build_skeleton(load_config(folder), torch.float32), names)
        original = original.with_pieces({name: piece for name, piece in pieces.items() if piece.stored not in checkpoint.dense_names})
        names = set(original.names)
    emit(Event("stage", "comparing with the original", {"name": "compare"}))
    scaled = _scales_inputs(checkpoint)
    errors, implausible = [], []
    for name, spec in checkpoint.linears.items():
        try:
            row = _linear_error(checkpoint, name, spec, original, names, scaled=scaled)
        except InputError as error:
            implausible.append(str(error))
            continue
        errors.append(row)
        if not row.error <= row.limit:
            implausible.append(f"{name} is {row.error:.4g} of its norm away (rounding: {row.rounded:.4g}; plausible: {row.limit:.4g})")
        emit(Event("linear", name, {"name": name, "error": row.error}))
    changed, equal, rescaled = _dense(checkpoint, original, names, scaled=scaled)
    return Comparison(tuple(errors), implausible, changed, equal, rescaled)


def _scales_inputs(checkpoint: QuantizedCheckpoint) -> bool:
    """Whether the record beside the checkpoint names a method that scales inputs."""
    record = checkpoint.folder / "gptqkit" / "run.json"
    config = read_json(record).get("config") if record.exists() else None
    return isinstance(config, dict) and str(config.get("method")).startswith("awq")


def _linear_error(
    checkpoint: QuantizedCheckpoint, name: str, spec: LinearSpec, original: Weights, names: set[str], *, scaled: bool
) -> LinearError:
    stored = _stored_name(name, names)
    weight = checkpoint.read_linear(name)
    quantized_OI = weight.dequantize()
    found = original.read(stored).float()
    sizes = (weight.out_features, weight.in_features)
    if tuple(found.shape) not in (sizes, sizes[::-1]):
        raise InputError(f"{name} is {sizes[0]} x {sizes[1]}, and {list(found.shape)} in the original")
    # Conv1D stores [in, out]; where the shape cannot tell, the nearer one is meant
    candidates = [m for m, shape in ((found, found.shape), (found.T, found.shape[::-1])) if tuple(shape) == sizes]
    if original.is_expanded(stored):
        candidates = candidates[:1]
    candidates = [_rescaled(m, quantized_OI) for m in candidates] if scaled else candidates
    error, original_OI = min(((_relative(quantized_OI - m, m), m) for m in candidates), key=lambda pair: pair[0])
    rounded = _relative(round_to_nearest(original_OI.contiguous(), spec).dequantize() - original_OI, original_OI)
    limit = min(max(TIMES_ROUNDING * rounded, 2.0**-spec.bits), UNRELATED)
    return LinearError(name, error, rounded, limit)


def _stored_name(name: str, names: set[str]) -> str:
    """The tensor of the original that a linear was made from: for a head that was untied, the embedding. Raises InputError."""
    if f"{name}.weight" in names:
        return f"{name}.weight"
    shared = [other for other in names if other.endswith(".weight") and other.split(".")[-2] in TOKEN_EMBEDDINGS]
    if name.rpartition(".")[2] in HEADS and len(shared) == 1:
        return shared[0]
    raise InputError(f"the original has no {name}.weight")


def _rescaled(weight_OI: Tensor, quantized_OI: Tensor) -> Tensor:
    """The original with its columns and rows multiplied as they seem to have been, by positive factors."""
    for dim in (0, 1, 0, 1):
        gain = (weight_OI * quantized_OI).sum(dim, keepdim=True) / weight_OI.square().sum(dim, keepdim=True).clamp_min(1e-30)
        weight_OI = weight_OI * torch.where(gain > 0, gain, 1.0)
    return weight_OI


def _dense(checkpoint: QuantizedCheckpoint, original: Weights, names: set[str], *, scaled: bool) -> tuple[list[str], int, int]:
    """What differs, how many do not, and how many may. A tensor may be stored in another float type if the values were only cast."""
    changed, equal, rescaled = [], 0, 0
    for name in checkpoint.dense_names:
        if name not in names:
            changed.append(f"the original has no {name}")
            continue
        try:
            found, expected = checkpoint.source.read(name), original.read(name)
        except InputError as error:
            changed.append(str(error))
            continue
        if found.shape == expected.shape and torch.equal(_raw(found), _raw(expected.to(found.dtype))):
            equal += 1
        elif scaled and found.ndim == 1 and found.shape == expected.shape:
            rescaled += 1
        else:
            changed.append(f"{name} differs from the original's")
    kept = {*checkpoint.dense_names, *(f"{name}.weight" for name in checkpoint.linears)}
    tied = checkpoint.config.get("tie_word_embeddings") is not False
    for name in sorted(names - kept):
        if not (tied and name.removesuffix(".weight").rpartition(".")[2] in HEADS):
            changed.append(f"{name} of the original is missing")
    return changed, equal, rescaled


def _relative(change: Tensor, whole: Tensor) -> float:
    norm = float(whole.double().norm())
    distance = float(change.double().norm())
    return distance / norm if norm > 0 else (0.0 if distance == 0 else float("inf"))


def _raw(tensor: Tensor) -> Tensor:
    """The bytes, so that equal means the same bits."""
    return tensor.contiguous().flatten().view(torch.uint8)
