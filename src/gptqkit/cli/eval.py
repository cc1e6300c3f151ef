"""`gptqkit eval`: perplexity, and the distance to the original; limits turn it into a check. --tasks hands the model to lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Against, Debug, Device, Dtype, Json, Model, TrustRemoteCode
from gptqkit.cli.output import Answer, duration, facts, number, percent, table
from gptqkit.cli.progress import Progress
from gptqkit.core.errors import InputError


@guard
def evaluate(
    model: Model,
    against: Against = None,
    text: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out text, UTF-8. [default: the bundled one]")] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of the text that are scored.")] = 60,
    seqlen: Annotated[int, typer.Option(metavar="N", help="Tokens in a window.")] = 512,
    max_kl: Annotated[float | None, typer.Option(metavar="X", help="Exit 1 when KL to the original is above X nats per token.")] = None,
    max_ppl_ratio: Annotated[float | None, typer.Option(metavar="X", help="Exit 1 when perplexity exceeds X times the original's.")] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="NAMES", help="Comma-separated lm-eval tasks instead of perplexity; needs gptqkit[eval].")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Measure perplexity, and the distance to the original.

    \b
    Examples:
      gptqkit eval ./llama-4bit
      gptqkit eval ./llama-4bit --against ./llama --text heldout.txt
      gptqkit eval ./llama-4bit --against ./llama --max-kl 0.05 --max-ppl-ratio 1.03
      gptqkit eval ./llama-4bit --tasks hellaswag,arc_easy
    """
    if against is None and (max_kl is not None or max_ppl_ratio is not None):
        raise InputError("--max-kl and --max-ppl-ratio compare with the original; add --against ORIGINAL")
    if tasks is not None:
        if against is not None or text is not None:
            raise InputError("--tasks runs lm-eval and takes neither --against nor --text; run eval twice to have both")
        return _run_tasks(model, tasks, device, dtype, trust_remote_code)
    with Progress() as emit:
        result = api.evaluate(
            model, against=against, text=text, windows=windows, seqlen=seqlen, device=device, dtype=dtype,
            trust_remote_code=trust_remote_code, emit=emit,
        )  # fmt: skip
    data = dict(result.to_dict())
    checks = _checks(data, max_kl, max_ppl_ratio)
    failed = [f"{c['name']} is {number(c['value'], 4)}, above the limit of {c['limit']:g}" for c in checks if not c["ok"]]
    if checks:
        data["checks"] = checks
    return Answer(data, describe_evaluation(data), "; ".join(failed) or None)


def _checks(data: Mapping[str, Any], max_kl: float | None, max_ppl_ratio: float | None) -> list[dict[str, Any]]:
    checks = []
    if max_kl is not None:
        checks.append({"name": "KL", "value": data["kl"], "limit": max_kl})
    if max_ppl_ratio is not None:
        checks.append({"name": "perplexity ratio", "value": data["perplexity"] / data["reference_perplexity"], "limit": max_ppl_ratio})
    # "not above" would let NaN pass
    return [{**check, "ok": check["value"] <= check["limit"]} for check in checks]


def describe_evaluation(data: Mapping[str, Any]) -> str:
    """Perplexity, the original's when there is one, and how they differ."""
    pairs = [("perplexity", number(data["perplexity"], 5))]
    if data.get("reference_perplexity") is not None:
        ratio = data["perplexity"] / data["reference_perplexity"]
        pairs += [
            ("of the original", f"{number(data['reference_perplexity'], 5)} (ratio {number(ratio, 4)})"),
            ("KL", f"{number(data['kl'])} nats per token, KL(original||model)"),
            ("same top token", percent(data["top1"])),
        ]
    pairs.append(("tokens", f"{data['tokens']} in {data['windows']} windows of {data['seqlen']}, {duration(data['seconds'])}"))
    for check in data.get("checks", ()):
        pairs.append((check["name"], f"at most {check['limit']:g}: {'holds' if check['ok'] else 'FAILS'}"))
    return facts(pairs)


def _run_tasks(model: str, tasks: str, device: str, dtype: str, trust_remote_code: bool) -> Answer:
    from gptqkit.integrations.lm_eval import run_tasks  # an optional extra

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise InputError("--tasks names no task; write it like --tasks hellaswag,arc_easy")
    results = run_tasks(model, names, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    rows = [[task, metric, number(value, 4)] for task, scores in results.items() for metric, value in scores.items()]
    return Answer({"model": model, "tasks": results}, table(["task", "metric", ">value"], rows))
