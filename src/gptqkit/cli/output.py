"""What a verb answers with, and how numbers and tables become text.

A verb returns an `Answer`; `failures.guard` prints it, as text or as one JSON object. Text is plain: no colour, no box characters, fixed
columns, so that a terminal of 80 columns and a log file show the same thing.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike, fspath
from typing import Any

LOG_WIDTH = 200
"""Columns when the output is not a terminal: wide enough that nothing is folded, so that lines can be searched."""

TERMINAL_WIDTH = (80, 120)
_UNITS = ("B", "kB", "MB", "GB", "TB")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a verb found out.

    data    for --json
    text    for a person; an empty one prints nothing (the verb has streamed its output already)
    failed  a check that did not hold, as one sentence: printed on stderr, and the exit code is 1
    """

    data: Mapping[str, Any] = field(default_factory=dict)
    text: str = ""
    failed: str | None = None


def to_json(value: Any) -> str:
    """One line of strict JSON: paths become strings, tuples lists, NaN and infinities null."""
    return json.dumps(_plain(value), ensure_ascii=False, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, PathLike):
        return fspath(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Aligned text; a column whose title starts with ">" is right-aligned. Long cells are folded in a terminal, never cut.

    >>> print(table(["name", ">bits"], [["q_proj", 4], ["down_proj", 8]]))
    name       bits
    q_proj        4
    down_proj     8
    """
    from rich.table import Table  # rich costs 40 ms, and --help must stay quick

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    for title in columns:
        right = title.startswith(">")
        grid.add_column(title.removeprefix(">"), justify="right" if right else "left", no_wrap=right, overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    return _plain_text(grid)


def facts(pairs: Sequence[tuple[str, str]]) -> str:
    """A name and what is to be said about it, one a line; long values are folded under themselves."""
    from rich.table import Table

    grid = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, show_header=False)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in pairs:
        grid.add_row(name, value)
    return _plain_text(grid)


def _plain_text(renderable: Any) -> str:
    from rich.console import Console

    buffer = io.StringIO()
    console = Console(file=buffer, width=width(), color_system=None, markup=False, highlight=False, emoji=False, legacy_windows=False)
    console.print(renderable)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def width() -> int:
    """Columns of standard output."""
    if not sys.stdout.isatty():
        return LOG_WIDTH
    low, high = TERMINAL_WIDTH
    return min(max(shutil.get_terminal_size().columns, low), high)


def size(count: float | None) -> str:
    """Bytes in decimal units with three digits.

    >>> size(8397312), size(512), size(15_300_000_000)
    ('8.40 MB', '512 B', '15.3 GB')
    """
    if count is None:
        return "-"
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} {_UNITS[0]}" if unit == 0 else f"{_digits(value)} {_UNITS[unit]}"


def duration(seconds: float | None) -> str:
    """
    >>> duration(3.21), duration(75), duration(7384)
    ('3.2 s', '1 min 15 s', '2 h 3 min')
    """
    if seconds is None or not math.isfinite(seconds):
        return "-"
    if seconds < 59.5:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant digits without an exponent where that is readable; "-" for None.

    >>> number(0.035514), number(1234.5), number(29.663, 5), number(0.00000123)
    ('0.0355', '1234', '29.663', '1.23e-06')
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -5:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def _digits(value: float) -> str:
    return f"{value:.2f}" if value < 9.995 else f"{value:.1f}" if value < 99.95 else f"{value:.0f}"
