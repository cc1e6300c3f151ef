"""`gptqkit doctor`: one call of `integrations.doctor.diagnose`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from gptqkit.cli.failures import guard
from gptqkit.cli.options import Debug, Json
from gptqkit.cli.output import Answer, facts, size, table


@guard
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="A quantized checkpoint.", show_default=False)] = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Explain this machine, and the backends MODEL gets.

    For each linear shape of MODEL: which backend is chosen, and why every other one was refused.

    \b
    Examples:
      gptqkit doctor
      gptqkit doctor ./llama-4bit
    """
    from gptqkit.integrations.doctor import diagnose  # imports torch, which --help must not

    diagnosis = diagnose(model)
    data = diagnosis.to_dict()
    return Answer(data, describe_diagnosis(data))


def describe_diagnosis(data: Mapping[str, Any]) -> str:
    """The environment, the devices, the backends, and with a model the choice for each kind of linear with every refusal."""
    packages = ", ".join(f"{name} {version or '(not installed)'}" for name, version in data["packages"].items())
    pairs = [
        ("python", f"{data['python']} on {data['system']}"),
        ("packages", packages),
        ("hub cache", f"{data['cache']}, {size(data['cache_free'])} free on its disk"),
    ]
    if data["forced"]:
        pairs.append(("forced backend", data["forced"]))
    devices = [
        [d["name"], d["description"], size(d["memory"]), size(d["available"]), "yes" if d["bfloat16"] else "no", " ".join(d["flags"])]
        for d in data["devices"]
    ]
    backends = [[backend["name"], backend["unavailable"] or "works here"] for backend in data["backends"]]
    parts = [facts(pairs), "", table(["device", "what it is", ">memory", ">free", "bf16", "features"], devices)]
    parts += ["", table(["backend", "state"], backends)]
    if data["model"] is not None:
        parts += ["", f"{data['model']}: {data['format']}", "", _linear_table(data["linears"])]
    return "\n".join(parts)


def _linear_table(linears: Sequence[Mapping[str, Any]]) -> str:
    rows: list[list[Any]] = []
    refusals: dict[tuple[str, str], list[str]] = {}
    for linear in linears:
        example = linear["example"].rsplit(".", 1)[-1]
        kind = f"{linear['bits']} bits, group {linear['group_size']}, {'sym' if linear['sym'] else 'asym'}"
        shape, place = f"{linear['out_features']}x{linear['in_features']}", f"{linear['device']} {linear['dtype']}"
        rows.append([example, shape, linear["count"], kind, place, linear["chosen"] or "NONE"])
        for decision in linear["decisions"]:
            if decision["refusal"] is not None:
                refusals.setdefault((decision["backend"], decision["refusal"]), []).append(f"{example} on {linear['device']}")
    lines = [table(["like", ">shape", ">count", "stored as", "on", "backend"], rows)]
    if refusals:
        lines.append("")
    lines += [f"{backend} refuses {', '.join(names)}: {reason}" for (backend, reason), names in refusals.items()]
    return "\n".join(lines)
