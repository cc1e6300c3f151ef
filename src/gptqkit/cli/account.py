"""The table of what became of every parameter, which `plan`, `quantize` and `inspect` show."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptqkit.cli.output import size, table


def account_table(account: Mapping[str, Any]) -> str:
    """A row per rule, and the sum."""
    known = account["before"] is not None
    rows = [
        [row["state"], row["rule"], row["tensors"], count(row["parameters"]), _share(row["share"]), *_sizes(row, known=known)]
        for row in account["rows"]
    ]
    tensors = sum(row["tensors"] for row in account["rows"])
    rows.append(["the model", "", tensors, count(account["parameters"]), _share(1.0), *_sizes(account, known=known)])
    sizes = [">before", ">after"] if known else [">size"]
    return table(["", "rule", ">tensors", ">parameters", ">share", *sizes], rows)


def count(value: int) -> str:
    """
    >>> count(1_240_000_000), count(8_600_000), count(512)
    ('1.24 G', '8.6 M', '512')
    """
    if value < 100_000:
        return str(value)
    return f"{value / 1e9:.2f} G" if value >= 1e9 else f"{value / 1e6:.1f} M"


def _sizes(row: Mapping[str, Any], *, known: bool) -> list[str]:
    return [size(row["before"]), size(row["after"])] if known else [size(row["after"])]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"
