"""`gptqkit bench quality`: our recipes and other tools on the same tokens. `gptqkit bench quantize`: time and memory on a known shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptqkit.cli.failures import guard
from gptqkit.cli.options import Debug, Device, Json, Memory, Model, parse_size
from gptqkit.cli.output import Answer, table, to_json
from gptqkit.cli.progress import Progress
from gptqkit.core.errors import InputError


@guard
def quality(
    model: Model,
    out: Annotated[str, typer.Option(metavar="DIR", help="Results are kept here, and not measured again.")] = "gptqkit-bench",
    python: Annotated[
        list[str] | None,
        typer.Option(metavar="TOOL=PATH", help="Interpreter of another tool: gptqmodel, llmcompressor, autoround, hqq. Repeatable."),
    ] = None,
    ours: Annotated[str, typer.Option(metavar="NAMES", help="Our presets and methods.")] = "rtn,plain,fast,best",
    bits: Annotated[str, typer.Option(metavar="LIST", help="Bit widths.")] = "4,3,2",
    group_size: Annotated[int, typer.Option(metavar="N", help="Columns that share a scale.")] = 128,
    seeds: Annotated[str, typer.Option(metavar="LIST", help="Each draws its own calibration.")] = "0,1,2",
    calibration: Annotated[
        str | None, typer.Option(metavar="FILE|DATASET", help="As for quantize. [default: the bundled text]", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(metavar="N", help="Tokens in each, and in a window of a text.")] = 512,
    text: Annotated[list[str] | None, typer.Option(metavar="FILE", help="Held-out text; repeatable. [default: the bundled one]")] = None,
    windows: Annotated[int, typer.Option(metavar="N", help="Windows of each text that are scored.")] = 60,
    threads: Annotated[int | None, typer.Option(metavar="N", help="For every tool. [default: all cores]")] = None,
    again: Annotated[list[str] | None, typer.Option(metavar="TOOL", help="Measure this row again, e.g. 'gptqkit fast'.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the checkpoints, in DIR/checkpoints.")] = False,
    device: Device = "auto",
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Compare our recipes with other tools: quality, time and memory.

    Each tool quantizes in a process of its own with its default options, on the same token ids, and all checkpoints are evaluated by us
    in float32. Another tool is run by the Python of an environment that holds it; without one, the report says how to get it.

    \b
    Examples:
      gptqkit bench quality ./llama
      gptqkit bench quality ./llama --bits 4 --seeds 0 --python gptqmodel=venvs/gptqmodel/bin/python
      gptqkit bench quality ./llama --ours plain,fast --text wiki.txt --text novels.txt --calibration texts.jsonl
    """
    from gptqkit.bench.run import bench_quality  # torch, which --help must not load

    with Progress() as emit:
        data = bench_quality(
            model, Path(out), pythons=_pythons(python or []), ours=_names(ours), bits=_numbers("--bits", bits), group_size=group_size,
            seeds=_numbers("--seeds", seeds), calibration=calibration, samples=samples, seqlen=seqlen, texts=[Path(t) for t in text or []],
            windows=windows, threads=threads, again=again or [], keep=keep, device=device, emit=emit,
        )  # fmt: skip
    return Answer(data, describe_quality(data, out))


@guard
def quantize(
    shape: Annotated[str, typer.Argument(metavar="SHAPE", help="llama-3-8b, llama-3-70b, qwen3-30b-a3b or tiny.")],
    work: Annotated[str, typer.Option(metavar="DIR", help="Where the random model and its result are put meanwhile.")] = "gptqkit-bench",
    blocks: Annotated[
        int | None, typer.Option(metavar="N", help="So many blocks; the rest is extrapolated. [default: all]", show_default=False)
    ] = None,
    presets: Annotated[str, typer.Option(metavar="NAMES", help="Of: plain, fast, best, rtn, hqq, awq.")] = "fast",
    bits: Annotated[int, typer.Option(metavar="N", help="Bit width.")] = 4,
    group_size: Annotated[int, typer.Option(metavar="N", help="Columns that share a scale.")] = 128,
    format_: Annotated[str, typer.Option("--format", metavar="NAME", help="Of the checkpoint.")] = "gptq",
    samples: Annotated[int, typer.Option(metavar="N", help="Calibration sequences.")] = 128,
    seqlen: Annotated[int, typer.Option(metavar="N", help="Tokens in each.")] = 2048,
    memory: Memory = None,
    phases: Annotated[bool, typer.Option("--phases/--no-phases", help="A second run that says what a block's time goes into.")] = True,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the random model, for the next time.")] = False,
    device: Device = "auto",
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Measure how long quantizing takes, and what memory, on a model of a known shape with random weights.

    Each run is a process of its own and counts from its first line of work to the published checkpoint, imports excluded.

    \b
    Examples:
      gptqkit bench quantize tiny --samples 8 --seqlen 256
      gptqkit bench quantize llama-3-8b --presets fast,best,rtn --json
      gptqkit bench quantize llama-3-70b --blocks 4
    """
    from gptqkit.bench.quantize import bench_quantize  # torch, which --help must not load
    from gptqkit.core.config import QuantConfig

    with Progress() as emit:
        data = bench_quantize(
            shape, Path(work), blocks=blocks, presets=_names(presets), config=QuantConfig(bits=bits, group_size=group_size, format=format_),
            samples=samples, seqlen=seqlen, device=device,
            memory=None if memory is None else parse_size("--memory", memory), breakdown=phases, keep=keep, emit=emit,
        )  # fmt: skip
    return Answer(data, describe_quantize(data))


def describe_quantize(data: Mapping[str, Any]) -> str:
    """A line for each preset, then what its blocks' time went into."""
    columns = ["preset", "whole run", f"all {data['of_blocks']} blocks", "a block", "device", "host"]
    cells, lines = [], []
    for row in data["rows"]:
        cells.append([
            row["preset"], f"{row['seconds']:.1f} s", f"{row['whole']:.1f} s", f"{row['block']:.3f} s",
            f"{row['device_bytes'] / 1e9:.2f} GB", f"{row['host_bytes'] / 1e9:.2f} GB",
        ])  # fmt: skip
        if row["phases"]:
            lines.append(f"{row['preset']}, a block: " + ", ".join(f"{name} {seconds:.3f} s" for name, seconds in row["phases"].items()))
    title = (
        f"{data['shape']}, {data['blocks']} blocks, {data['samples']} x {data['seqlen']} tokens, {data['device']}, torch {data['torch']}"
    )
    return "\n".join([title, table(columns, cells), *lines, to_json(data)])


def describe_quality(data: Mapping[str, Any], out: str) -> str:
    """The tables, where they are, and one line of JSON with all rows."""
    parts: list[str] = []
    for section in data["tables"]:
        parts += [section["title"], table(data["columns"], section["cells"]), ""]
    parts += [f"- {problem}" for problem in data["problems"]]
    parts += [f"written to {out}: {', '.join(data['files'])}", to_json({"benchmark": "quality", "rows": data["rows"]})]
    return "\n".join(parts)


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def _numbers(option: str, text: str) -> list[int]:
    try:
        found = [int(name) for name in _names(text)]
    except ValueError:
        raise InputError(f"{option} {text}: expected whole numbers, such as {option} 4,3,2") from None
    if not found:
        raise InputError(f"{option} names none; write it like {option} 4,3,2")
    return found


def _pythons(pairs: Sequence[str]) -> dict[str, Path]:
    found = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not path:
            raise InputError(f"--python {pair}: expected TOOL=PATH, such as --python gptqmodel=venvs/gptqmodel/bin/python")
        found[name.strip()] = Path(path).expanduser().absolute()
    return found
