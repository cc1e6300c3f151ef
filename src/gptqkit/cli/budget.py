"""How a bit budget was spent, as a table: units of a kind that got the same in one row, block by block in run.json."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from gptqkit.cli.output import number, percent, table

FULL = 16
"""Stands for the bits of what stays as it is."""


def describe_budget(budget: Mapping[str, Any]) -> str:
    """`budget` as run.json holds it."""
    rows: dict[tuple[int, str, int, int, bool], list[Mapping[str, Any]]] = {}
    kinds: dict[str, int] = {}
    for line in budget["lines"]:
        kind = _kind(line["unit"])
        chosen = (line["bits"] or FULL, line["group_size"] or 0)
        rows.setdefault((kinds.setdefault(kind, len(kinds)), kind, *chosen, line["kl"] is None), []).append(line)
    cells = []
    for (_, kind, bits, group, fixed), lines in sorted(rows.items(), key=lambda row: row[0]):
        loss = "by a rule" if fixed else number(sum(line["kl"] for line in lines))
        share = percent(sum(line["share"] for line in lines))
        cells.append([kind, _ranges(line["block"] for line in lines), "full" if bits == FULL else bits, group or "-", loss, share])
    title = (
        f"Bit budget of {budget['target_bits']:g}: {number(budget['bits_per_weight'], 4)} bits per weight, "
        f"estimated KL {number(budget['kl'])} (measured on {budget['tokens']} tokens)"
    )
    legend = "KL: to the original, with only these quantized; share: of the size of all linears"
    return "\n".join([title, table(["linears", "blocks", ">bits", ">group", ">KL", ">share"], cells), legend])


def _kind(unit: str) -> str:
    """What follows the block's number.

    >>> _kind("model.layers.3.self_attn.{q_proj,k_proj,v_proj}")
    'self_attn.{q_proj,k_proj,v_proj}'
    """
    parts = unit.split(".")
    at = next((place for place, part in enumerate(parts) if part.isdigit()), -1)
    return ".".join(parts[at + 1 :])


def _ranges(blocks: Iterable[int]) -> str:
    """
    >>> _ranges([0, 1, 2, 5, 7, 8])
    '0-2 5 7-8'
    """
    runs: list[list[int]] = []
    for block in sorted(set(blocks)):
        if runs and runs[-1][1] == block - 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return " ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
