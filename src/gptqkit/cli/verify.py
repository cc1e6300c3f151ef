"""`gptqkit verify`: one call of `api.verify`; exit 1 when it does not hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptqkit import api
from gptqkit.cli.failures import guard
from gptqkit.cli.inspect import engine_table
from gptqkit.cli.options import Against, Checkpoint, Debug, Json
from gptqkit.cli.output import Answer, number, size, table
from gptqkit.cli.progress import Progress

WORST = 5
"""Linears shown of those that differ most from the original."""


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
    """A row per check, the linears that moved furthest, the engines, what is not quantized, and the verdict."""
    parts = [table(["check", "result", "found"], [[c["name"], "ok" if c["ok"] else "FAILED", c["detail"]] for c in data["checks"]])]
    if data["errors"]:
        furthest = sorted(data["errors"], key=lambda row: -row["error"])[:WORST]
        rows = [[row["name"], number(row["error"]), number(row["limit"])] for row in furthest]
        parts += ["", table(["furthest from the original", ">change", ">limit"], rows), "change: ||Q - W|| / ||W||"]
    parts += ["", engine_table(data["engines"])]
    if data["not_quantized"]:
        rows = [[d["name"], "x".join(map(str, d["shape"])), d["dtype"], size(d["nbytes"]), d["why"]] for d in data["not_quantized"]]
        parts += ["", table(["not quantized", ">shape", "dtype", ">size", "why"], rows)]
    failed, checks = sum(not check["ok"] for check in data["checks"]), len(data["checks"])
    return "\n".join([*parts, "", f"FAILED: {failed} of {checks} checks do not hold" if failed else f"ok: all {checks} checks hold"])
