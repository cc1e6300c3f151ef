"""`gptqkit verify`: one call of `api.verify`; exit 1 when it does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Against, Checkpoint, Debug, Json
from gptqkit.cli.output import Answer
from gptqkit.cli.progress import Progress


@guard
def verify(model: Checkpoint, against: Against = None, json: Json = False, debug: Debug = False) -> Answer:
    """Check that a quantized checkpoint is sound.

    Complete, in range, finite, consistent with its config, and which engines accept it. Exit code 1 when it does not hold.

    \b
    Examples:
      gptqkit verify ./llama-4bit
      gptqkit verify ./llama-4bit --against ./llama
    """
    with Progress() as emit:
        result = api.verify(model, against=against, emit=emit)
    data = result.to_dict()
    return Answer(data, describe_verification(data), None if result.ok else f"{model} does not verify")


def describe_verification(data: Mapping[str, Any]) -> str:
    return "ok" if data["ok"] else "FAILED"
