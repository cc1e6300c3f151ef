"""The whole of `gptqkit bench quality`: measure, summarise, and write what a reader wants to see.

OUT/results.jsonl   one line a run; what is there is not run again       OUT/quality.md     the tables
OUT/settings.json   what all results of the folder have in common        OUT/quality.json   the same for machines
OUT/logs/           what each child said                                 OUT/*.png          the plots, when matplotlib is there
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gptqkit.bench.plots import draw
from gptqkit.bench.quality import Request, Result, describe_settings, measure
from gptqkit.bench.tables import COLUMNS, machine, markdown, problems, sections, summarize
from gptqkit.bench.tools import Tool, our_tools, peer_tools
from gptqkit.checkpoint.files import write_json, write_text
from gptqkit.core.config import QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event
from gptqkit.data import heldout_text
from gptqkit.hf.skeleton import resolve_model
from gptqkit.models.device import resolve_device


def bench_quality(
    model: str,
    out: Path,
    *,
    pythons: Mapping[str, Path],
    ours: Sequence[str],
    bits: Sequence[int],
    group_size: int,
    seeds: Sequence[int],
    calibration: str | None,
    samples: int,
    seqlen: int,
    texts: Sequence[Path],
    windows: int,
    threads: int | None,
    again: Sequence[str],
    keep: bool,
    device: str,
    emit: Emit,
) -> dict[str, Any]:
    """Measures what `out` does not hold yet and writes the report of all that it holds. See cli/bench.py for the options.

    Raises InputError before any work for options that cannot be. A tool that fails, or is not there, is in the report.
    """
    for width in bits:
        QuantConfig(bits=width, group_size=group_size)  # says which values are allowed
    for name, value in (("samples", samples), ("windows", windows), ("threads", threads or 1)):
        if value < 1:
            raise InputError(f"--{name} {value}; allowed: 1 or more")
    others, absent = peer_tools(pythons)
    tools = [*our_tools(ours), *others]
    if not tools:
        raise InputError("nothing to measure: --ours names none of our recipes, and no --python another tool")
    unknown = [name for name in again if name not in {tool.name for tool in tools}]
    if unknown:
        raise InputError(f"--again {unknown[0]!r}; measured are: {', '.join(tool.name for tool in tools)}")
    request = Request(
        folder=resolve_model(model), out=out, tools=tools, bits=bits, group_size=group_size, seeds=seeds, calibration=calibration,
        samples=samples, seqlen=seqlen, texts=texts or [heldout_text()], windows=windows, threads=threads or os.cpu_count() or 1,
        device=str(resolve_device(device)), again=again, keep=keep,
    )  # fmt: skip
    results = measure(request, emit)
    rows = summarize(results)
    absent = [tool for tool in absent if tool.name not in {result.tool for result in results}]
    data: dict[str, Any] = {
        "benchmark": "quality", "settings": describe_settings(request), "machine": machine(), "versions": _versions(tools, results),
        "original": _original(results), "load": max((result.load for result in results), default=0.0),
    }  # fmt: skip
    try:
        plots = draw(rows, out)
    except InputError as error:
        plots = []
        emit(Event("warning", str(error)))
    write_text(out / "quality.md", markdown(data, rows, absent, plots))
    data["rows"] = [row.to_dict() for row in rows]
    data["problems"] = problems(rows, absent)
    write_json(out / "quality.json", data)
    tables = [{"title": title, "cells": cells} for title, cells in sections(rows)]
    files = ["quality.md", "quality.json", "results.jsonl", *(plot.name for plot in plots)]
    return {**data, "columns": COLUMNS, "tables": tables, "files": files}


def _original(results: Sequence[Result]) -> dict[str, float]:
    """The original's perplexity of each text."""
    return {text: scores["reference_perplexity"] for result in results for text, scores in result.texts.items()}


def _versions(tools: Sequence[Tool], results: Sequence[Result]) -> dict[str, dict[str, str]]:
    """Of every tool that has results; the last one's where they differ."""
    return {**{tool.name: dict(tool.versions) for tool in tools}, **{result.tool: result.versions for result in results}}
