"""Options that several verbs share, each written once."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from gptqkit.core.errors import InputError
from gptqkit.core.recipe import shipped_recipes

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a hub id.")]
Checkpoint = Annotated[str, typer.Argument(metavar="MODEL", help="The folder of a quantized checkpoint.")]
Out = Annotated[str, typer.Argument(metavar="OUT", help="The folder to write; must be new or empty (see --overwrite).")]
Against = Annotated[
    str | None, typer.Option("--against", metavar="ORIGINAL", help="The original model to compare with: a folder or a hub id.")
]
Device = Annotated[str, typer.Option("--device", metavar="DEVICE", help="auto, cpu, cuda, cuda:1. [default: auto]", show_default=False)]
Dtype = Annotated[
    str, typer.Option("--dtype", metavar="DTYPE", help="auto, float32, bfloat16, float16. [default: auto]", show_default=False)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.", show_default=False)
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what OUT holds.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything else on stderr.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of a failure.", show_default=False)]

Bits = Annotated[int | None, typer.Option(metavar="N", help="2 to 8. [default: 4]")]
GroupSize = Annotated[
    int | None, typer.Option(metavar="N", help="Columns that share a scale: 32, 64, 128, 256, or -1 for a row. [default: 128]")
]
TargetBits = Annotated[
    float | None,
    typer.Option(metavar="X", help="Mean bits per weight, e.g. 3.5: bits and groups of each linear are chosen by measurement."),
]
Sym = Annotated[bool | None, typer.Option("--sym/--asym", help="Symmetric grid, or zero points. [default: sym]")]
Method = Annotated[
    str | None,
    typer.Option(metavar="NAME", help="How codes are chosen: gptq, awq, awq+gptq; without calibration hqq, rtn. [default: gptq]"),
]
LmHead = Annotated[int | None, typer.Option(metavar="N", help="Quantize the output head as well, to N bits. [default: kept]")]
Preset = Annotated[
    str | None, typer.Option(metavar="NAME", help="How much work goes into it: plain (textbook GPTQ), fast, best. [default: fast]")
]
SignedScales = Annotated[
    bool | None,
    typer.Option("--signed-scales/--no-signed-scales", help="Symmetric scales may be negative. [default: signed]"),
]
Format = Annotated[str | None, typer.Option(metavar="NAME", help="How they are stored: gptq, gptq_v2, compressed-tensors. [default: gptq]")]
Calibration = Annotated[
    str | None, typer.Option(metavar="FILE|DATASET", help="jsonl, json, txt, csv, parquet, or a hub id. [default: the bundled text]")
]
Samples = Annotated[int | None, typer.Option(metavar="N", help="Calibration sequences. [default: 128]")]
Seqlen = Annotated[int | None, typer.Option(metavar="N", help="Tokens in each. [default: 2048]")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Which sequences are drawn. [default: 0]")]
Order = Annotated[str | None, typer.Option(metavar="NAME", help="Column order: natural, activation, group-aware. [default: group-aware]")]
DescAct = Annotated[bool | None, typer.Option("--desc-act", help="Groups follow the activation order; many engines refuse it.")]
CalibrateAllExperts = Annotated[
    bool | None, typer.Option("--calibrate-all-experts", help="Solve every expert with all tokens of its layer, not only its own.")
]
Damp = Annotated[float | None, typer.Option(metavar="X", help="Damping, as a fraction of the Gram diagonal. [default: 0.01]")]
RuleOptions = Annotated[
    list[str] | None, typer.Option(metavar="RULE", help="'REGEX=bits:8,group_size:32' or 'REGEX=skip'; repeatable, first match wins.")
]
RecipeName = Annotated[
    str | None, typer.Option(metavar="NAME|FILE", help=f"{', '.join(shipped_recipes())}, or a YAML file; typed options override it.")
]
Memory = Annotated[
    str | None, typer.Option(metavar="SIZE", help="Memory for activations, e.g. 8GB; the rest goes to disk. [default: half the free]")
]
"""What `quantize` and `plan` share: None where nothing was typed, so that a recipe can say it."""

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?b?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(option: str, text: str) -> int:
    """Bytes from "8GB" (decimal), "8GiB" (binary) or "8000000000". Raises InputError naming `option`.

    >>> parse_size("--memory", "8GB"), parse_size("--memory", "1.5 GiB"), parse_size("--memory", "512m")
    (8000000000, 1610612736, 512000000)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or float(match[1]) == 0:
        raise InputError(f"{option} {text}: not a size; write it like 8GB, 512MB or 1.5GiB")
    unit = match[2].lower().removesuffix("b")
    return int(float(match[1]) * (1024 if unit.endswith("i") else 1000) ** _POWERS[unit.removesuffix("i")])
