"""The account of a plan: every tensor of the checkpoint with what becomes of it and the rule that says so. Its sum is the model.

Tensors that no parameter of the model is loaded from are accounted for as well: buffers that older releases stored, second copies of tied
weights, a head that the run unties, and parts that transformers does not build, such as the layers that predict several tokens at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.accounting import (
    BUFFER,
    EXTRA,
    KEPT,
    NOT_A_PARAMETER,
    QUANTIZED,
    SECOND_COPY,
    SKIPPED,
    UNTIED_HEAD,
    Account,
    Entry,
    spec_rule,
)
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Event
from gptqkit.formats import get_format
from gptqkit.models.layout import LinearInfo
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.weights import DenseWeights

_NAMED = 3


@dataclass(frozen=True, slots=True)
class PlannedLinear:
    """A linear that will be quantized; `name` as in the checkpoint, `bytes` those of all tensors that are written for its weight."""

    name: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    sym: bool
    bytes: int


@dataclass(frozen=True, slots=True)
class KeptTensor:
    """A tensor that is copied unchanged, and why."""

    name: str
    reason: str
    bytes: int
    parameters: int


def planned_linear(name: str, info: LinearInfo, spec: LinearSpec, config: QuantConfig) -> PlannedLinear:
    """A linear with its spec, and what that takes in the format."""
    size = get_format(config.format).nbytes(spec, info.out_features, info.in_features)
    return PlannedLinear(name, (info.out_features, info.in_features), spec.bits, spec.group_size, spec.sym, size)


def copied(model: StreamedModel, name: str, reason: str) -> KeptTensor:
    """A tensor that is left as it is."""
    info = _source(model).info(name)
    return KeptTensor(name, reason, info.nbytes, prod(info.shape))


def kept_tensors(model: StreamedModel, planned: set[str], skipped: set[str]) -> tuple[KeptTensor, ...]:
    """Everything in the checkpoint that is neither planned nor skipped, each with the rule that keeps it."""
    reasons = {**_rules_outside_model(model), **{model.disk_name[kept.name]: kept.reason for kept in model.layout.kept}}
    return tuple(
        copied(model, name, reasons.get(name, NOT_A_PARAMETER))
        for name in _source(model).names
        if name not in planned and name not in skipped
    )


def make_account(
    model: StreamedModel, linears: Sequence[PlannedLinear], skipped: Sequence[KeptTensor], kept: Sequence[KeptTensor]
) -> Account:
    """Adds up what becomes of each tensor. Raises InputError when the sum is not the model: a parameter that no rule speaks of."""
    own = _parameter_names(model)
    accounted: dict[str, int] = {}
    entries = []
    for linear in linears:
        count = linear.shape[0] * linear.shape[1]
        name, rule = f"{linear.name}.weight", spec_rule(linear.bits, linear.group_size, sym=linear.sym)
        before = _source(model).info(name).nbytes if name in _source(model) else 0
        if name in own:
            accounted[name] = count
            entries.append(Entry(QUANTIZED, rule, count, before, linear.bytes))
        else:
            entries.append(Entry(EXTRA, f"{UNTIED_HEAD}, {rule}", count, before, linear.bytes))
    for state, tensors in ((SKIPPED, skipped), (KEPT, kept)):
        for tensor in tensors:
            inside = tensor.name in own
            if inside:
                accounted[tensor.name] = tensor.parameters
            entries.append(Entry(state if inside else EXTRA, tensor.reason, tensor.parameters, tensor.bytes, tensor.bytes))
    account = Account.of(entries)
    _check_sum(model, own, accounted, account)
    return account


def _parameter_names(model: StreamedModel) -> dict[str, int]:
    """Name in the checkpoint -> size, for every parameter of the model, tied ones once."""
    return {model.disk_name[name]: parameter.numel() for name, parameter in model.skeleton.named_parameters()}


def _rules_outside_model(model: StreamedModel) -> dict[str, str]:
    """Name in the checkpoint -> rule, for what the model has a place for that is no parameter."""
    buffers, own = dict(model.skeleton.named_buffers()), _parameter_names(model)
    return {disk: BUFFER if target in buffers else SECOND_COPY for target, disk in model.disk_name.items() if disk not in own}


def unbuilt_matrices(model: StreamedModel, kept: Sequence[KeptTensor]) -> list[KeptTensor]:
    """What could have been quantized had transformers built it."""
    left = [tensor for tensor in kept if tensor.reason == NOT_A_PARAMETER and tensor.name.endswith(".weight")]
    return [tensor for tensor in left if len(model.weights.shape(tensor.name)) == 2]


def unbuilt_notes(model: StreamedModel, kept: Sequence[KeptTensor]) -> list[Event]:
    """Says which matrices the checkpoint holds that the model does not have: they are copied, so they stay as large as they are."""
    left = unbuilt_matrices(model, kept)
    if not left:
        return []
    total = sum(tensor.bytes for tensor in left)
    names = [tensor.name for tensor in left]
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    kind = type(model.skeleton).__name__
    words = f"{len(left)} weights ({total / 1e6:.1f} MB) are not part of {kind}: {listed}; they stay in full precision, copied as they are"
    return [Event("skip", words, {"names": names, "bytes": total, "rule": NOT_A_PARAMETER})]


def _check_sum(model: StreamedModel, own: dict[str, int], accounted: dict[str, int], account: Account) -> None:
    wrong = [name for name, count in own.items() if accounted.get(name) != count]
    total = sum(parameter.numel() for parameter in model.skeleton.parameters())
    if wrong or account.parameters != total:
        named = f"; first: {wrong[0]}" if wrong else ""
        raise InputError(
            f"{type(model.skeleton).__name__} has {total} parameters, and the plan accounts for {account.parameters}{named}; "
            "please report this model: nothing is quantized before every parameter is explained"
        )


def _source(model: StreamedModel) -> TensorSource:
    assert isinstance(model.weights, DenseWeights), "plans are made of models that are not quantized"
    return model.weights.source
