"""`gptqkit inspect`: one call of `api.inspect`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.account import account_table, count
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Checkpoint, Debug, Json
from gptqkit.cli.output import Answer, facts, number, size, table


@guard
def inspect(
    model: Checkpoint,
    linears: Annotated[bool, typer.Option("--linears", help="List every linear, not one row per kind.")] = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Say what a checkpoint holds, and who can serve it.

    \b
    Examples:
      gptqkit inspect ./llama-4bit
      gptqkit inspect ./llama-4bit --linears
      gptqkit inspect ./llama-4bit --json
    """
    data = api.inspect(model).to_dict()
    return Answer(data, describe_inspection(data, linears))


def describe_inspection(data: Mapping[str, Any], every: bool) -> str:
    """Totals, the linears (all of them, or a row per kind), what is not quantized, and each engine's verdict."""
    architecture = ", ".join(data["architectures"]) or "no architecture named"
    pairs = [
        ("format", data["format"] + (f", written by {', '.join(data['quantizer'])}" if data["quantizer"] else "")),
        ("model", f"{data['model_type'] or 'unknown'} ({architecture}), {data['dtype'] or '-'}"),
        ("size", f"{size(data['nbytes'])}, {number(data['bits_per_weight'])} bits per weight over {count(data['parameters'])} weights"),
    ]
    if data["linear_bits_per_weight"] is not None:
        pairs.append(("quantized", f"{len(data['linears'])} linears at {number(data['linear_bits_per_weight'])} bits per weight"))
    if data["linears"]:
        pairs.append(("not quantized", _dense_line(data)))
    parts = [facts(pairs), "", account_table(data["account"])]
    if data["linears"]:
        parts += ["", _linear_table(data["linears"]) if every else _kind_table(data["linears"])]
    if data["engines"]:
        parts += ["", engine_table(data["engines"])]
    return "\n".join(parts)


def engine_table(engines: Sequence[Mapping[str, Any]]) -> str:
    """A row per engine: whether it takes the checkpoint, and if not, why."""
    rows = [[e["engine"], e["accepts"], "; ".join(reason["reason"] for reason in e["reasons"])] for e in engines]
    return table(["engine", "accepts", "because"], rows)


def _dense_line(data: Mapping[str, Any]) -> str:
    largest = sorted(data["not_quantized"], key=lambda row: -row["nbytes"])
    if not largest:
        return "nothing"
    more = f" and {len(largest) - 1} smaller tensors" if len(largest) > 1 else ""
    return f"{size(data['not_quantized_nbytes'])}: {largest[0]['name']} ({size(largest[0]['nbytes'])}){more}"


def _kind_table(linears: Sequence[Mapping[str, Any]]) -> str:
    kinds: Counter[tuple[Any, ...]] = Counter()
    for row in linears:
        shape = f"{row['out_features']}x{row['in_features']}"
        kinds[(row["name"].rsplit(".", 1)[-1], shape, row["bits"], row["group_size"], "yes" if row["sym"] else "no", row["g_idx"])] += 1
    return table(["linear", ">shape", ">bits", ">group", "sym", "g_idx", ">count"], [[*kind, many] for kind, many in kinds.items()])


def _linear_table(linears: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in linears:
        shape = f"{row['out_features']}x{row['in_features']}"
        rows.append([row["name"], shape, row["bits"], row["group_size"], "yes" if row["sym"] else "no", size(row["nbytes"])])
    return table(["linear", ">shape", ">bits", ">group", "sym", ">size"], rows)
