"""`gptqkit quantize`: options to a configuration, one call of `api.quantize` (or `api.plan` with --dry-run), and the table of the run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.budget import describe_budget
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Debug, Device, Dtype, Json, Model, Out, Overwrite, TrustRemoteCode, parse_size
from gptqkit.cli.output import Answer, duration, facts, number, percent, size, table
from gptqkit.cli.progress import Progress
from gptqkit.cli.recipe import make_request
from gptqkit.core.config import QuantConfig
from gptqkit.core.events import Event
from gptqkit.core.recipe import shipped_recipes

WORST = 8
"""Linears in the final table: those with the largest error. layers.jsonl has all."""


@guard
def quantize(
    model: Model,
    out: Out,
    bits: Annotated[int | None, typer.Option(metavar="N", help="2 to 8. [default: 4]")] = None,
    group_size: Annotated[
        int | None, typer.Option(metavar="N", help="Columns that share a scale: 32, 64, 128, 256, or -1 for a row. [default: 128]")
    ] = None,
    target_bits: Annotated[
        float | None,
        typer.Option(metavar="X", help="Mean bits per weight, e.g. 3.5: bits and groups of each linear are chosen by measurement."),
    ] = None,
    sym: Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric grid, or zero points. [default: sym]")] = None,
    method: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="How codes are chosen: gptq, awq, awq+gptq; without calibration hqq, rtn. [default: gptq]"),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="How much work goes into it: plain (textbook GPTQ), fast, best. [default: fast]")
    ] = None,
    signed_scales: Annotated[
        bool | None,
        typer.Option("--signed-scales/--no-signed-scales", help="Symmetric scales may be negative. [default: signed]"),
    ] = None,
    format: Annotated[
        str | None, typer.Option(metavar="NAME", help="How they are stored: gptq, gptq_v2, compressed-tensors. [default: gptq]")
    ] = None,
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|DATASET", help="jsonl, json, txt, csv, parquet, or a hub id. [default: the bundled text]")
    ] = None,
    samples: Annotated[int | None, typer.Option(metavar="N", help="Calibration sequences. [default: 128]")] = None,
    seqlen: Annotated[int | None, typer.Option(metavar="N", help="Tokens in each. [default: 2048]")] = None,
    seed: Annotated[int | None, typer.Option(metavar="N", help="Which sequences are drawn. [default: 0]")] = None,
    order: Annotated[
        str | None, typer.Option(metavar="NAME", help="Column order: natural, activation, group-aware. [default: group-aware]")
    ] = None,
    desc_act: Annotated[bool | None, typer.Option("--desc-act", help="Groups follow the activation order; many engines refuse it.")] = None,
    damp: Annotated[float | None, typer.Option(metavar="X", help="Damping, as a fraction of the Gram diagonal. [default: 0.01]")] = None,
    rule: Annotated[
        list[str] | None, typer.Option(metavar="RULE", help="'REGEX=bits:8,group_size:32' or 'REGEX=skip'; repeatable, first match wins.")
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(metavar="NAME|FILE", help=f"{', '.join(shipped_recipes())}, or a YAML file; typed options override it.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Memory for activations, e.g. 8GB; the rest goes to disk. [default: half the free]")
    ] = None,
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
        "bits": bits, "group_size": group_size, "target_bits": target_bits, "sym": sym, "method": method, "preset": preset,
        "signed_scales": signed_scales, "format": format, "order": order, "desc_act": desc_act,
        "damp": damp, "calibration": calibration, "samples": samples, "seqlen": seqlen, "seed": seed,
    }  # fmt: skip
    request = make_request(recipe, typed, rule or [])
    budget = None if memory is None else parse_size("--memory", memory)
    if dry_run:
        plan = api.plan(
            model, request.config, samples=request.samples, seqlen=request.seqlen, device=device, dtype=dtype, memory=budget,
            trust_remote_code=trust_remote_code,
        )  # fmt: skip
        data = replace(plan, events=(*_unused(typed, request.config), *plan.events)).to_dict()
        return Answer(data, describe_plan(data, model, request.config))
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
    options = [f"--{name}" for name in names if typed[name] is not None]
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
    return f"{config.method}, {bits}, {'symmetric' if config.sym else 'asymmetric'}, {groups}{order}, format {config.format}"


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
        ("not quantized", skipped_line(data["skipped"])),
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


def describe_plan(data: Mapping[str, Any], model: str, config: QuantConfig) -> str:
    """What --dry-run prints: linears of equal shape and spec in one row, then the totals."""
    kinds: Counter[tuple[str, str, int, int, bool]] = Counter()
    for linear in data["linears"]:
        shape = "x".join(map(str, linear["shape"]))
        kinds[(linear["name"].rsplit(".", 1)[-1], shape, linear["bits"], linear["group_size"], linear["sym"])] += 1
    rows = [[name, shape, bits, group, "yes" if sym else "no", n] for (name, shape, bits, group, sym), n in kinds.items()]
    pairs = [
        ("linears", f"{len(data['linears'])} in {data['blocks']} blocks"),
        ("not quantized", skipped_line(data["skipped"])),
        ("kept as is", skipped_line(data["kept"])),
        ("size", f"{size(data['size_before'])} -> {size(data['size_after'])}"),
        ("computed on", f"{data['device']} in {data['dtype']}"),
        ("peak memory", f"{size(data['peak_memory'])} predicted; activations wait {_place(data)} between blocks"),
        ("time", duration(data["seconds"]) if data["seconds"] is not None else "not known on this device"),
    ]
    notes = ["", *(f"{event['kind']}: {event['message']}" for event in data["events"])] if data["events"] else []
    lines = [f"{model}: {recipe_line(config)}", "", table(["linear", ">shape", ">bits", ">group", "sym", ">count"], rows), "", facts(pairs)]
    return "\n".join([*lines, *notes, "", "Nothing was computed or written (--dry-run)."])
