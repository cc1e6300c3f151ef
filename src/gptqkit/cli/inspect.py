"""`gptqkit inspect`: one call of `api.inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Checkpoint, Debug, Json
from gptqkit.cli.output import Answer


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
    return str(data["format"])
