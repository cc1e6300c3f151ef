"""`gptqkit doctor`: one call of `integrations.doctor.diagnose`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from gptqkit.cli.failures import guard
from gptqkit.cli.options import Debug, Json
from gptqkit.cli.output import Answer


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
    return str(data)
