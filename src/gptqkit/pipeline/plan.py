"""The plan of a quantization: every linear and its spec, what stays as it is, sizes, and predicted memory. Pure: nothing is computed.

`quantize` carries out exactly this object and `--dry-run` prints it, so what is refused is refused here, before long work.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gptqkit.checkpoint.quantized import is_quantized, read_config
from gptqkit.core.accounting import Account
from gptqkit.core.config import LinearSpec, QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Event
from gptqkit.formats import get_format
from gptqkit.hf.skeleton import resolve_model
from gptqkit.models.device import resolve_device, resolve_dtype
from gptqkit.models.head import Head, check_unties, find_head, output_names, says_tied
from gptqkit.models.streamed import StreamedModel
from gptqkit.models.weights import DenseWeights
from gptqkit.pipeline.accounting import KeptTensor, PlannedLinear, copied, kept_tensors, make_account, planned_linear, unbuilt_notes
from gptqkit.pipeline.memory import Memory, predict_head, predict_measuring, predict_memory
from gptqkit.pipeline.units import config_for, equal_allocation, find_units
from gptqkit.pipeline.units import linear_name as linear_name


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will do. Sizes in bytes.

    linears  of the blocks, in order, and last the output head if it is to be quantized; `head` says where that comes from
    account  what becomes of every parameter of the model
    """

    model: str
    blocks: int
    linears: tuple[PlannedLinear, ...]
    skipped: tuple[KeptTensor, ...]
    kept: tuple[KeptTensor, ...]
    head: Head | None
    account: Account
    size_before: int
    size_after: int
    device: str
    dtype: str
    memory: Memory
    seqlen: int
    seconds: float | None = None
    events: tuple[Event, ...] = field(default=())

    @property
    def peak_memory(self) -> int:
        return self.memory.peak

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_memory": self.memory.peak}


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan together with the opened model it was made from."""

    folder: Path
    model: StreamedModel
    weights: DenseWeights
    plan: Plan


def make_plan(model: str, config: QuantConfig, **options: Any) -> Plan:
    """See `gptqkit.api.plan`."""
    return prepare(model, config, **options).plan


def prepare(
    model: str,
    config: QuantConfig,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    trust_remote_code: bool = False,
) -> Prepared:
    """Opens the model and plans. Raises InputError for everything that can be known to fail."""
    for name, value in (("samples", samples), ("seqlen", seqlen)):
        if value < 1:
            raise InputError(f"{name}={value}; allowed: 1 or more")
    on = resolve_device(device)
    compute = resolve_dtype(dtype, on)
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    if is_quantized(folder):
        raise InputError(f"{model} is quantized already; use `gptqkit convert` for another format, or start from the original model")
    streamed = StreamedModel.open(folder, device=on, dtype=compute, trust_remote_code=trust_remote_code)
    weights = streamed.weights
    assert isinstance(weights, DenseWeights)
    settled = config if config.target_bits is None else _before_measuring(streamed, config, config.target_bits)
    contents = _contents(streamed, settled)
    events = [*_notes(streamed, config, seqlen), *unbuilt_notes(streamed, contents.kept)]
    if contents.head is not None and (contents.head.tied or says_tied(read_config(folder))):
        check_unties(streamed, folder, read_config(folder), trust_remote_code=trust_remote_code)
    if contents.head is not None and contents.head.tied:
        events.append(_untied_note(contents.head, contents.linears[-1]))
    seqlen = min(seqlen, streamed.context or seqlen)
    plan = Plan(
        model=folder.resolve().name,
        blocks=streamed.block_count,
        linears=contents.linears,
        skipped=contents.skipped,
        kept=contents.kept,
        head=contents.head,
        account=contents.account,
        size_before=weights.source.nbytes,
        size_after=contents.size_after,
        device=str(on),
        dtype=str(compute).removeprefix("torch."),
        memory=_memory(streamed, config, contents, samples * seqlen, memory),
        seqlen=seqlen,
        events=tuple(events),
    )
    return Prepared(folder, streamed, weights, plan)


def replan(prepared: Prepared, config: QuantConfig) -> Prepared:
    """The same with other rules: what a bit budget has chosen."""
    contents = _contents(prepared.model, config)
    changed = {name: getattr(contents, name) for name in contents.__dataclass_fields__}
    return replace(prepared, plan=replace(prepared.plan, **changed))


def _memory(model: StreamedModel, config: QuantConfig, contents: _Contents, tokens: int, budget: int | None) -> Memory:
    memory = predict_memory(model, tokens if config.needs_calibration else 0, budget, streams=1 + config.second_stream)
    if contents.head is not None:
        stored = copied(model, contents.head.source, "").bytes
        at_head = predict_head(memory, contents.linears[-1].shape, stored, config, model)
        memory = replace(memory, peak=max(memory.peak, at_head))
    if config.target_bits is None:
        return memory
    units = sum(not unit.fixed for unit in find_units(model, config))
    return replace(memory, peak=max(memory.peak, predict_measuring(model, memory, tokens, units)))


def _before_measuring(model: StreamedModel, config: QuantConfig, target_bits: float) -> QuantConfig:
    """Stands in for what a bit budget will choose: right in size, and refused where no choice would do."""
    if not config.needs_calibration:
        raise InputError(f"target_bits measures with calibration text, and method {config.method} reads none; use --method gptq")
    if len(model.layout.lists) > 1:
        raise InputError("target_bits does not measure models with an encoder and a decoder; use --bits, and --rule for exceptions")
    units = find_units(model, config)
    return config_for(config, units, equal_allocation(units, target_bits))


@dataclass(frozen=True, slots=True)
class _Contents:
    """What becomes of each tensor: the parts of a plan that follow from the rules."""

    linears: tuple[PlannedLinear, ...]
    skipped: tuple[KeptTensor, ...]
    kept: tuple[KeptTensor, ...]
    head: Head | None
    account: Account
    size_after: int


def _contents(model: StreamedModel, config: QuantConfig) -> _Contents:
    head = _head(model, config)
    linears, skipped = _linears(model, config, head)
    kept = kept_tensors(model, {f"{linear.name}.weight" for linear in linears}, {tensor.name for tensor in skipped})
    account = make_account(model, linears, skipped, kept)
    assert account.after is not None
    return _Contents(linears, skipped, kept, head, account, account.after)


def _head(model: StreamedModel, config: QuantConfig) -> Head | None:
    """The output head if it is to be quantized. A rule that skips it keeps it."""
    if config.lm_head is None:
        return None
    head = find_head(model)
    return None if config.head_spec(head.name) is None else head


def _linears(model: StreamedModel, config: QuantConfig, head: Head | None) -> tuple[tuple[PlannedLinear, ...], tuple[KeptTensor, ...]]:
    planned, skipped = [], []
    for index, groups in enumerate(model.layout.blocks):
        for info in (linear for group in groups for linear in group.linears):
            name = linear_name(model, index, info.name)
            spec = config.spec(name)
            if spec is None:
                skipped.append(copied(model, f"{name}.weight", "skipped by a rule"))
                continue
            _check(name, spec, info.out_features, info.in_features, config)
            planned.append(planned_linear(name, info, spec, config))
    inside = [linear.name for linear in planned] + [tensor.name.removesuffix(".weight") for tensor in skipped]
    if head is not None and (spec := config.head_spec(head.name)):
        _check(head.name, spec, head.info.out_features, head.info.in_features, config)
        planned.append(planned_linear(head.name, head.info, spec, config))
    _check_rules(model, config, inside, head)
    if config.desc_act and not config.needs_calibration:
        raise InputError(f"desc_act needs calibration, and method {config.method} has none; drop --desc-act or use --method gptq")
    return tuple(planned), tuple(skipped)


def _check_rules(model: StreamedModel, config: QuantConfig, names: list[str], head: Head | None) -> None:
    """Raises InputError for a rule without effect: it matches nothing, or asks for what is not done."""
    for rule in config.rules:
        if any(re.search(rule.pattern, name) for name in names):
            continue
        if head is not None and re.search(rule.pattern, head.name):
            if rule.bits not in (None, config.lm_head):
                raise InputError(
                    f"--rule {rule.pattern!r} gives {head.name} {rule.bits} bits, and --lm-head {config.lm_head}; say one of them"
                )
            continue
        if any(re.search(rule.pattern, name) for name in output_names(model)):
            if rule.skip:
                continue
            raise InputError(f"--rule {rule.pattern!r} matches the output head, which is quantized with --lm-head BITS")
        embeddings = [kept.name for kept in model.layout.kept if kept.reason == "embedding"]
        if any(re.search(rule.pattern, name) for name in embeddings):
            raise InputError(
                f"--rule {rule.pattern!r} matches only {embeddings[0]}: embeddings stay in full precision, since no format that vLLM, "
                "SGLang and transformers load holds a quantized one; --lm-head BITS quantizes the output head"
            )
        raise InputError(f"--rule {rule.pattern!r} matches no linear; names look like {names[0]}")


def _check(name: str, spec: LinearSpec, out_features: int, in_features: int, config: QuantConfig) -> None:
    if spec.group_size != -1 and in_features % spec.group_size:
        fitting = [str(size) for size in (32, 64, 128, 256) if in_features % size == 0] + ["-1"]
        raise InputError(
            f"group_size={spec.group_size} does not divide in_features={in_features} of {name}; "
            f"use {' or '.join(fitting)}, or exclude it with --rule '{re.escape(name)}=skip'"
        )
    reason = get_format(config.format).refuses_spec(spec, out_features, in_features, config.desc_act)
    if reason is not None:
        raise InputError(f"{name}: {reason}")


def _untied_note(head: Head, linear: PlannedLinear) -> Event:
    words = (
        f"{head.name} shares its weight with the embedding, which stays in full precision: the checkpoint holds a head of its own beside "
        f"it ({linear.bits} bits, {linear.bytes / 1e6:.1f} MB more) and says tie_word_embeddings=false"
    )
    return Event("note", words, {"name": head.name, "bytes": linear.bytes})


def _notes(model: StreamedModel, config: QuantConfig, seqlen: int) -> list[Event]:
    notes = []
    if config.needs_calibration and model.context is not None and seqlen > model.context:
        notes.append(
            Event("warning", f"seqlen {seqlen} is longer than the model's context; using {model.context}", {"seqlen": model.context})
        )
    if config.target_bits is not None:
        notes.append(
            Event(
                "note",
                f"target_bits={config.target_bits:g}: the run measures which linear needs how many bits; a plan made before has the "
                "right size, but takes all weights for equally important",
                {"target_bits": config.target_bits},
            )
        )
    if config.scales_inputs:
        words = (
            "divides norms, biases and scales by what it multiplies the weights behind them with; the rest that is kept is copied as it is"
        )
        notes.append(Event("note", f"method {config.method} {words}", {"method": config.method}))
    if config.desc_act:
        notes.append(
            Event(
                "warning",
                "desc_act writes a real g_idx: vLLM 0.33, mlx-lm, compressed-tensors and GGUF refuse it; --order activation needs none",
                {},
            )
        )
    return notes
