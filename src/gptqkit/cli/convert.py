"""`gptqkit convert`: one call of `api.convert`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Checkpoint, Debug, Json, Out, Overwrite
from gptqkit.cli.output import Answer, facts, size
from gptqkit.cli.progress import Progress


@guard
def convert(
    model: Checkpoint,
    out: Out,
    format: Annotated[str, typer.Option(metavar="NAME", help="gptq, gptq_v2 or compressed-tensors.")],
    overwrite: Overwrite = False,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Rewrite a checkpoint in another format, losslessly.

    A tensor that the other format cannot hold is named, and nothing is written.

    \b
    Examples:
      gptqkit convert ./llama-4bit ./llama-ct --format compressed-tensors
      gptqkit convert ./llama-ct ./llama-4bit --format gptq --overwrite
    """
    with Progress() as emit:
        result = api.convert(model, out, format=format, overwrite=overwrite, emit=emit)
    data = result.to_dict()
    return Answer(data, describe_conversion(data, out))


def describe_conversion(data: Mapping[str, Any], out: str) -> str:
    change = f"{data['source_format']} to {data['format']}"
    return facts(
        [
            ("converted", f"{data['linears']} linears from {change}; {data['dense_tensors']} other tensors copied"),
            ("size", f"{size(data['bytes_before'])} -> {size(data['bytes_after'])}"),
            ("written to", f"{out} ({', '.join(data['files'])})"),
        ]
    )
