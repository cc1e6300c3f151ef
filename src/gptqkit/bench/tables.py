"""Results to rows, and rows to Markdown: one table for each bit width, group size and text."""

from __future__ import annotations

import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from gptqkit.bench.quality import Result
from gptqkit.bench.tools import BASELINE, Absent

COLUMNS = ("tool", ">bits/weight", ">perplexity", ">KL", ">±", ">KL / plain", ">same top", ">wall s", ">CPU s", ">peak MB", ">runs")
"""A title that starts with ">" is of a column of numbers."""

NOTE = (
    "KL to the original in nats per token, and perplexity, are means over the runs (one a seed); ± is the standard deviation of KL. "
    "Seconds are medians over the runs and peak memory is the highest, of the whole process, imports included. bits/weight counts scales "
    "and zero points. KL / plain is against textbook GPTQ (min-max grid, natural order) on the same seeds."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One tool at one bit width and group size on one text, over all seeds. `ratio` is None without runs of the baseline to compare with;
    `spread` with fewer than two runs. A row with an `error` has no figures."""

    text: str
    bits: int
    group_size: int
    tool: str
    runs: int
    error: str | None = None
    bits_per_weight: float | None = None
    linears: int | None = None
    perplexity: float | None = None
    kl: float | None = None
    spread: float | None = None
    ratio: float | None = None
    top1: float | None = None
    wall: float | None = None
    cpu: float | None = None
    peak_mb: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def summarize(results: Iterable[Result]) -> list[Row]:
    """One row for each text, bit width, group size and tool: the tools in the order of their results, the widest bits first."""
    grouped: dict[tuple[int, int, str], list[Result]] = {}
    for result in results:
        grouped.setdefault((result.bits, result.group_size, result.tool), []).append(result)
    texts = list(dict.fromkeys(text for runs in grouped.values() for run in runs for text in run.texts))
    rows = []
    for text in texts or ["-"]:
        for bits, group_size, tool in sorted(grouped, key=lambda key: (-key[0], key[1])):
            baseline = grouped.get((bits, group_size, BASELINE), [])
            rows.append(_row(text, grouped[(bits, group_size, tool)], baseline))
    return rows


def _row(text: str, runs: Sequence[Result], baseline: Sequence[Result]) -> Row:
    same: dict[str, Any] = {"text": text, "bits": runs[0].bits, "group_size": runs[0].group_size, "tool": runs[0].tool}
    done = [run for run in runs if run.error is None]
    if not done:
        return Row(**same, runs=0, error=runs[-1].error)
    kls = [run.texts[text]["kl"] for run in done]
    return Row(
        **same,
        runs=len(done),
        error=None if len(done) == len(runs) else f"{len(runs) - len(done)} of {len(runs)} runs failed: {_first_error(runs)}",
        bits_per_weight=done[0].bits_per_weight,
        linears=done[0].linears,
        perplexity=statistics.fmean(run.texts[text]["perplexity"] for run in done),
        kl=statistics.fmean(kls),
        spread=statistics.stdev(kls) if len(kls) > 1 else None,
        ratio=_ratio(text, done, [run for run in baseline if run.error is None]),
        top1=statistics.fmean(run.texts[text]["top1"] for run in done),
        wall=statistics.median(run.wall for run in done),
        cpu=statistics.median(run.cpu for run in done),
        peak_mb=max(run.peak_mb for run in done),
    )


def _ratio(text: str, runs: Sequence[Result], baseline: Sequence[Result]) -> float | None:
    """Mean KL over that of the baseline, on the seeds that both have; a run without calibration goes with every seed."""
    seeds = {run.seed for run in runs} & {run.seed for run in baseline}
    ours = [run.texts[text]["kl"] for run in runs if run.seed is None or run.seed in seeds]
    theirs = [run.texts[text]["kl"] for run in baseline if run.seed in seeds or runs[0].seed is None]
    return statistics.fmean(ours) / statistics.fmean(theirs) if ours and theirs else None


def _first_error(runs: Sequence[Result]) -> str:
    return next(run.error for run in runs if run.error is not None)


def sections(rows: Sequence[Row]) -> list[tuple[str, list[list[str]]]]:
    """A title and the cells of each table, in COLUMNS. A failed tool has dashes for figures, see `problems`."""
    found: dict[tuple[str, int, int], list[list[str]]] = {}
    for row in rows:
        found.setdefault((row.text, row.bits, row.group_size), []).append(_cells(row))
    return [(f"{bits} bits, {_groups(size)}, {text}", cells) for (text, bits, size), cells in found.items()]


def problems(rows: Sequence[Row], absent: Sequence[Absent]) -> list[str]:
    """What went wrong, what compares unequally, and what was not measured, one sentence each."""
    failed = [f"{row.tool} at {row.bits} bits, {_groups(row.group_size)}: {row.error}" for row in rows if row.error]
    most = max((row.linears or 0 for row in rows), default=0)
    fewer = [f"{row.tool} quantized {row.linears} linears, and others {most}" for row in rows if row.linears not in (None, most)]
    missing = [f"{tool.name} was not measured: {tool.reason}; to have it: {tool.install}" for tool in absent]
    return list(dict.fromkeys([*failed, *fewer, *missing]))


def _cells(row: Row) -> list[str]:
    if row.kl is None or row.perplexity is None or row.top1 is None:
        return [row.tool, "failed", *("-" for _ in COLUMNS[2:])]
    return [
        row.tool, _fixed(row.bits_per_weight, 3), _fixed(row.perplexity, 3 if row.perplexity < 1000 else 0), _fixed(row.kl, 4),
        _fixed(row.spread, 4), _fixed(row.ratio, 3), f"{100 * row.top1:.2f} %", _fixed(row.wall, 1), _fixed(row.cpu, 1),
        _fixed(row.peak_mb, 0), str(row.runs),
    ]  # fmt: skip


def _fixed(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _groups(size: int) -> str:
    return "a group a row" if size == -1 else f"groups of {size}"


def markdown(data: Mapping[str, Any], rows: Sequence[Row], absent: Sequence[Absent], plots: Sequence[Path]) -> str:
    """The whole report."""
    settings, computer = data["settings"], data["machine"]
    lines = [
        f"# Quality of quantized {settings['model']}",
        "",
        f"{settings['samples']} x {settings['seqlen']} calibration tokens ({settings['calibration']}), the same ids for every tool; "
        f"{settings['windows']} windows of {settings['seqlen']} tokens of each text; {settings['threads']} threads on "
        f"{settings['device']}. {computer['processor']}, {computer['cores']} cores, {computer['memory_gb']:.0f} GB, {computer['system']}; "
        f"the load average before a run was at most {data['load']:.1f}.",
        "",
        NOTE,
    ]
    for title, cells in sections(rows):
        lines += ["", f"## {title}", "", _markdown_table(cells)]
        lines += ["", f"The original's perplexity is {data['original'][title.rpartition(', ')[2]]:.3f}."] if data["original"] else []
    found = problems(rows, absent)
    if found:
        lines += ["", "## Failed, unequal or not measured", "", *(f"- {problem}" for problem in found)]
    lines += ["", "## Versions", "", *(f"- {tool}: {_versions(held)}" for tool, held in data["versions"].items())]
    lines += ["", *(f"![{plot.stem}]({plot.name})" for plot in plots)] if plots else []
    return "\n".join(lines) + "\n"


def _versions(held: Mapping[str, str]) -> str:
    return ", ".join(f"{package} {version}" for package, version in held.items())


def _markdown_table(cells: Sequence[Sequence[str]]) -> str:
    titles = [column.removeprefix(">") for column in COLUMNS]
    rule = ["---:" if column.startswith(">") else "---" for column in COLUMNS]
    return "\n".join("| " + " | ".join(row) + " |" for row in (titles, rule, *cells))


def machine() -> dict[str, Any]:
    """Processor, cores, memory and system, without the host's name."""
    processor = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.partition(":")[2].strip() for line in information.read_text().splitlines() if line.startswith("model name")]
        processor = names[0] if names else processor
    memory = psutil.virtual_memory().total / 1e9
    return {
        "processor": processor, "cores": psutil.cpu_count(), "memory_gb": memory, "system": platform.system(),
        "python": platform.python_version(),
    }  # fmt: skip
