"""The two pictures of the benchmark: KL against bits per weight, and KL against seconds. Both axes of quality are logarithmic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptqkit.bench.tables import Row
from gptqkit.core.errors import InputError

_MARKS = "osD^vPX*<>hp"
_PANEL = (4.8, 4.0)
"""Inches."""


def draw(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Writes kl-bits.png, a panel for each text, and kl-seconds.png, a panel for each bit width too. Raises InputError without
    matplotlib; draws nothing when there are no figures."""
    try:
        from matplotlib.figure import Figure  # an optional extra, here and below
    except ImportError:
        raise InputError("plots need matplotlib: pip install 'gptqkit[bench]'") from None
    figures = [row for row in rows if row.kl]
    if not figures:
        return []
    texts, widths = list(dict.fromkeys(row.text for row in figures)), sorted({row.bits for row in figures}, reverse=True)
    styles = {tool: _style(number) for number, tool in enumerate(dict.fromkeys(row.tool for row in figures))}

    by_bits = Figure(figsize=(_PANEL[0] * len(texts), _PANEL[1]), layout="constrained")
    for axes, text in zip(by_bits.subplots(1, len(texts), squeeze=False)[0], texts, strict=True):
        _panel(axes, [row for row in figures if row.text == text], styles, lambda row: row.bits_per_weight, joined=True)
        axes.set(title=text, xlabel="bits per quantized weight", ylabel="KL, nats per token")
        _logarithmic(axes, "y")

    by_time = Figure(figsize=(_PANEL[0] * len(widths), _PANEL[1] * len(texts)), layout="constrained")
    for line, text in zip(by_time.subplots(len(texts), len(widths), squeeze=False), texts, strict=True):
        for axes, bits in zip(line, widths, strict=True):
            _panel(axes, [row for row in figures if (row.text, row.bits) == (text, bits)], styles, lambda row: row.wall, joined=False)
            axes.set(title=f"{text}, {bits} bits", xlabel="seconds to quantize", ylabel="KL, nats per token")
            _logarithmic(axes, "xy")

    written = []
    for figure, name in ((by_bits, "kl-bits.png"), (by_time, "kl-seconds.png")):
        handles, labels = figure.axes[0].get_legend_handles_labels()
        columns = 2 * len(figure.axes) // (1 if figure is by_bits else len(texts))
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False, fontsize="small")
        figure.savefig(folder / name, dpi=130)
        written.append(folder / name)
    return written


def _style(number: int) -> dict[str, Any]:
    return {"color": f"C{number % 10}", "marker": _MARKS[number % len(_MARKS)]}


def _panel(axes: Any, rows: Sequence[Row], styles: dict[str, Any], place: Callable[[Row], float | None], *, joined: bool) -> None:
    """One mark a row; a tool's marks are joined by a line. Every tool gets a legend entry, so that panels share one."""
    for tool, style in styles.items():
        points = sorted((place(row), row.kl, row.spread or 0.0) for row in rows if row.tool == tool and place(row) is not None)
        x, y, spread = zip(*points, strict=True) if points else ((), (), ())
        axes.errorbar(x, y, yerr=spread, label=tool, linestyle="-" if joined else "none", linewidth=1, markersize=5, capsize=2, **style)
    axes.grid(visible=True, which="both", alpha=0.2)


def _logarithmic(axes: Any, directions: str) -> None:
    """Logarithmic scales labelled 0.02, 0.05, 0.1 … instead of with powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for direction in directions:
        axes.set(**{f"{direction}scale": "log"})
        axis = axes.xaxis if direction == "x" else axes.yaxis
        low, high = axis.get_view_interval()
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 7, 8, 9)))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
