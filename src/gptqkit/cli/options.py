"""Options that several verbs share, each written once."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from gptqkit.core.errors import InputError

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
