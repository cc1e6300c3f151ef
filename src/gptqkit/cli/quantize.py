"""`gptqkit quantize`: options to a configuration, one call of `api.quantize` (or `api.plan` with --dry-run), and the table of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.account import account_table
from gptqkit.cli.budget import describe_budget
from gptqkit.cli.failures import guard
from gptqkit.cli.options import (
    Bits,
    CalibrateAllExperts,
    Calibration,
    Damp,
    Debug,
    DescAct,
    Device,
    Dtype,
    Format,
    GroupSize,
    Json,
    LmHead,
    Memory,
    Method,
    Model,
    Order,
    Out,
    Overwrite,
    Preset,
    RecipeName,
    RuleOptions,
    Samples,
    Seed,
    Seqlen,
    SignedScales,
    Sym,
    TargetBits,
    TrustRemoteCode,
    parse_size,
)
from gptqkit.cli.output import Answer, duration, facts, number, percent, size, table
from gptqkit.cli.progress import Progress
from gptqkit.cli.recipe import make_request
from gptqkit.core.accounting import EXTRA, KEPT
from gptqkit.core.config import QuantConfig
from gptqkit.core.events import Event

WORST = 8
"""Linears in the final table: those with the largest error. layers.jsonl has all."""


@guard
def quantize(
    model: Model,
    out: Out,
    bits: Bits = None,
    group_size: GroupSize = None,
    target_bits: TargetBits = None,
    sym: Sym = None,
    lm_head: LmHead = None,
    method: Method = None,
    preset: Preset = None,
    signed_scales: SignedScales = None,
    format: Format = None,
    calibration: Calibration = None,
    samples: Samples = None,
    seqlen: Seqlen = None,
    seed: Seed = None,
    order: Order = None,
    desc_act: DescAct = None,
    calibrate_all_experts: CalibrateAllExperts = None,
    damp: Damp = None,
    rule: RuleOptions = None,
    recipe: RecipeName = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Memory = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the unfinished run in OUT.")] = False,
    overwrite: Overwrite = False,
    strict: Annotated[bool, typer.Option("--strict", help="A linear left unquantized without a rule is an error.")] = False,
    trust_remote_code: TrustRemoteCode = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done; compute and write nothing.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Quantize MODEL into OUT, and check what was written.

    \b
    Examples:
      gptqkit quantize meta-llama/Llama-3.2-1B ./llama-4bit
      gptqkit quantize ./llama ./llama-4bit --calibration my-texts.jsonl
      gptqkit quantize ./llama ./llama-3bit --bits 3 --group-size 64 --rule 'down_proj=bits:4'
      gptqkit quantize ./llama ./llama-small --target-bits 3.25
      gptqkit quantize ./llama ./llama-best --recipe high-accuracy
      gptqkit quantize ./llama ./llama-4bit --dry-run
      gptqkit quantize ./llama ./llama-4bit --resume
    """
    typed = {
        "bits": bits, "group_size": group_size, "target_bits": target_bits, "sym": sym, "lm_head": lm_head,
        "method": method, "preset": preset, "signed_scales": signed_scales, "format": format, "order": order, "desc_act": desc_act,
        "calibrate_all_experts": calibrate_all_experts, "damp": damp, "calibration": calibration, "samples": samples,
        "seqlen": seqlen, "seed": seed,
    }  # fmt: skip
    request = make_request(recipe, typed, rule or [])
    budget = None if memory is None else parse_size("--memory", memory)
    if dry_run:
        plan = api.plan(
            model, request.config, samples=request.samples, seqlen=request.seqlen, device=device, dtype=dtype, memory=budget,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        data = replace(plan, events=(*_unused(typed, request.config), *plan.events)).to_dict()
        return Answer(data, describe_plan(data, model, request.config) + "\n\nNothing was computed or written (--dry-run).")
    with Progress() as emit:
        for event in _unused(typed, request.config):
            emit(event)
        run = api.quantize(
            model, out, request.config, calibration=request.calibration, samples=request.samples, seqlen=request.seqlen, seed=request.seed,
            device=device, dtype=dtype, memory=budget, resume=resume, overwrite=overwrite, strict=strict,
            trust_remote_code=trust_remote_code, recipe=request.recipe, emit=emit,
        )  # fmt: skip
    data = run.to_dict()
    return Answer(data, describe_run(data, model, out, request.config))


def _unused(typed: Mapping[str, Any], config: QuantConfig) -> list[Event]:
    """Says which typed options have no effect with the method."""
    names = [] if config.needs_calibration else ["calibration", "samples", "seqlen"]
    names += [] if config.solves else ["preset", "order"]
    names += [] if config.needs_calibration else ["calibrate_all_experts"]
    options = [f"--{name.replace('_', '-')}" for name in names if typed[name] is not None]
    if not options:
        return []
    return [Event("warning", f"{', '.join(options)}: without effect, since method {config.method} has no use for it", {"options": options})]


def recipe_line(config: QuantConfig) -> str:
    """A configuration in one line.

    >>> recipe_line(QuantConfig(bits=3, group_size=-1, sym=False))
    'gptq, 3 bits, asymmetric, one group per row, order group-aware, format gptq'
    """
    groups = "one group per row" if config.group_size == -1 else f"groups of {config.group_size}"
    bits = f"{config.bits} bits"
    if config.target_bits is not None:
        bits, groups = f"{config.target_bits:g} bits on average", "groups by measurement"
    order = f", order {config.column_order}" if config.solves else ""
    head = "" if config.lm_head is None else f", output head {config.lm_head} bits"
    return f"{config.method}, {bits}, {'symmetric' if config.sym else 'asymmetric'}, {groups}{head}{order}, format {config.format}"


def describe_run(data: Mapping[str, Any], model: str, out: str, config: QuantConfig) -> str:
    """The last words of a run: the worst linears, the totals, and what to type next."""
    linears = list(data["linears"])
    parts = [f"{model} -> {out}", recipe_line(config)]
    if data["budget"]:
        parts += ["", describe_budget(data["budget"])]
    if linears:
        parts += ["", _worst_linears(linears)]
    pairs = [
        ("size", f"{size(data['size_before'])} -> {size(data['size_after'])}, {number(data['bits_per_weight'])} bits per quantized weight"),
        ("error", _error_line(linears)),
        ("fallbacks", _fallback_line(linears)),
        *([("experts", _coverage_line(data["coverage"]))] if data["coverage"] else []),
        ("not quantized", skipped_line(data["skipped"])),
        ("kept", _kept_line(data["account"])),
        ("check", _check_line(data["check"])),
        ("time", _time_line(data["seconds"])),
        ("peak memory", _memory_line(data)),
        ("written to", out),
    ]
    parts += ["", facts(pairs), "", "Next:"]
    parts += [f"  gptqkit eval {out} --against {model}", f'  gptqkit generate {out} --prompt "Once upon a time"']
    return "\n".join(parts)


def _worst_linears(linears: list[Mapping[str, Any]]) -> str:
    ranked = sorted(linears, key=lambda linear: -(linear["error"] or 0.0))
    rows = [
        [linear["name"], "x".join(map(str, linear["shape"])), linear["bits"], number(linear["error"]), number(linear["weight_change"])]
        for linear in ranked[:WORST]
    ]
    title = f"The {len(rows)} of {len(linears)} linears with the largest error" if len(linears) > WORST else "Linears by error"
    legend = "error: of the output, relative to its energy; change: ||Wq - W|| / ||W||"
    return "\n".join([title, table(["linear", ">shape", ">bits", ">error", ">change"], rows), legend])


def _error_line(linears: list[Mapping[str, Any]]) -> str:
    known = [linear for linear in linears if linear["error"] is not None]
    if not known:
        return "not measured (this method does not look at activations)" if linears else "nothing was quantized"
    worst = max(known, key=lambda linear: linear["error"])
    mean = sum(linear["error"] for linear in known) / len(known)
    return f"mean {number(mean)}, worst {number(worst['error'])} in {worst['name']}"


def _fallback_line(linears: list[Mapping[str, Any]]) -> str:
    touched = [linear for linear in linears if linear.get("events")]
    if not touched:
        return "none"
    names = ", ".join(linear["name"] for linear in touched[:3])
    return f"{len(touched)} linears ({names}{', …' if len(touched) > 3 else ''}); see gptqkit/layers.jsonl"


def _coverage_line(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How the calibration tokens were spread over the experts of all blocks.

    >>> _coverage_line([{"block": 3, "experts": 8, "least": 0, "middle": 90.0, "most": 400, "under": 2, "never": 1}])
    '8 in 1 block; tokens each 0 to 400, median 90; too few for 2, none for 1 (most in block 4)'
    """
    experts, under, never = (sum(block[key] for block in blocks) for key in ("experts", "under", "never"))
    middle = sorted(block["middle"] for block in blocks)[len(blocks) // 2]
    spread = f"{min(block['least'] for block in blocks)} to {max(block['most'] for block in blocks)}, median {middle:g}"
    said = f"{experts} in {len(blocks)} block{'s' * (len(blocks) > 1)}; tokens each {spread}"
    if not under:
        return said
    worst = max(blocks, key=lambda block: block["under"])
    return f"{said}; too few for {under}, none for {never} (most in block {worst['block'] + 1})"


def skipped_line(skipped: Sequence[Mapping[str, Any]]) -> str:
    """What was left in full precision, grouped by reason.

    >>> skipped_line([{"name": "lm_head", "reason": "outside the blocks"}])
    'lm_head (outside the blocks)'
    """
    reasons = Counter(entry["reason"] for entry in skipped)
    said = []
    for reason, count in reasons.items():
        first = next(entry["name"] for entry in skipped if entry["reason"] == reason)
        said.append(f"{first} ({reason})" if count == 1 else f"{count} tensors such as {first} ({reason})")
    return "; ".join(said) or "nothing"


def _kept_line(account: Mapping[str, Any]) -> str:
    """The share of the model that keeps its precision, and the rules that say so."""
    kept = [row for row in account["rows"] if row["state"] == KEPT]
    rules = ", ".join(f"{row['rule']} {percent(row['share'])}" for row in kept)
    outside = "".join(f"; {row['rule']}: {size(row['after'])}" for row in account["rows"] if row["state"] == EXTRA)
    return f"{percent(sum(row['share'] for row in kept))} of the parameters ({rules}){outside}"


def _check_line(check: Mapping[str, Any] | None) -> str:
    if not check:
        return "not made: there were no held-back tokens"
    before, after = number(check["reference_perplexity"], 4), number(check["perplexity"], 4)
    quality = f"perplexity {before} -> {after}, KL {number(check['kl'])}, same top token {percent(check['top1'])}"
    return f"{quality} ({check['tokens']} held-back tokens)"


def _time_line(seconds: Mapping[str, float]) -> str:
    longest = sorted(seconds.items(), key=lambda item: -item[1])[:2]
    return f"{duration(sum(seconds.values()))} ({', '.join(f'{name} {duration(value)}' for name, value in longest)})"


def _memory_line(data: Mapping[str, Any]) -> str:
    device = f", {size(data['device_memory'])} on the device" if data["device_memory"] else ""
    return f"{size(data['peak_memory'])} above the start (predicted {size(data['predicted_memory'])}){device}"


def _place(data: Mapping[str, Any]) -> str:
    places = {"device": "in memory" if data["device"] == "cpu" else "on the device", "ram": "in memory", "disk": "on disk"}
    return places[data["memory"]["place"]]


def _linear_count(data: Mapping[str, Any]) -> str:
    head = data["head"]
    inside = f"{len(data['linears']) - (head is not None)} in {data['blocks']} blocks"
    return inside if head is None else f"{inside}, and the output head {head['name']}"


def describe_plan(data: Mapping[str, Any], model: str, config: QuantConfig) -> str:
    """A plan in words: linears of equal shape and spec in one row, what becomes of every parameter, and the totals."""
    kinds: Counter[tuple[str, str, int, int, bool]] = Counter()
    for linear in data["linears"]:
        shape = "x".join(map(str, linear["shape"]))
        kinds[(linear["name"].rsplit(".", 1)[-1], shape, linear["bits"], linear["group_size"], linear["sym"])] += 1
    rows = [[name, shape, bits, group, "yes" if sym else "no", n] for (name, shape, bits, group, sym), n in kinds.items()]
    pairs = [
        ("linears", _linear_count(data)),
        ("not quantized", skipped_line(data["skipped"])),
        ("size", f"{size(data['size_before'])} -> {size(data['size_after'])}"),
        ("computed on", f"{data['device']} in {data['dtype']}"),
        ("peak memory", f"{size(data['peak_memory'])} predicted; activations wait {_place(data)} between blocks"),
        ("time", duration(data["seconds"]) if data["seconds"] is not None else "not known on this device"),
    ]
    notes = ["", *(f"{event['kind']}: {event['message']}" for event in data["events"])] if data["events"] else []
    linears = table(["linear", ">shape", ">bits", ">group", "sym", ">count"], rows)
    parts = [f"{model}: {recipe_line(config)}", "", linears, "", account_table(data["account"]), "", facts(pairs), *notes]
    return "\n".join(parts)
