"""`gptqkit demo`: the bundled model through the whole tool, offline, in about a minute.

It quantizes llama-tiny at 4 and at 3 bits, measures both against the original, and lets all three continue the same sentence.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from gptqkit import api, data
from gptqkit.cli.failures import guard
from gptqkit.cli.options import Debug, Json
from gptqkit.cli.output import Answer, number, percent, size, table, to_json, width
from gptqkit.cli.progress import Progress
from gptqkit.core.config import QuantConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Emit, Event

MARKER = "gptqkit-demo.json"
"""Says that a folder is the demo's own, and may be replaced by the next one."""

PROMPT = "The old man looked at the sea and"
NEW_TOKENS = 60
SAMPLES, SEQLEN = 64, 512
WINDOWS = 24
GROUP_SIZE = 64


@guard
def demo(
    out: Annotated[str, typer.Option(metavar="DIR", help="The folder to write; replaced when an earlier demo wrote it.")] = "gptqkit-demo",
    bits: Annotated[list[int] | None, typer.Option(metavar="N", help="Repeatable. [default: 4 and 3]")] = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """See it work on a small bundled model, offline.

    Quantizes it at 4 and 3 bits, measures what was lost, and lets all three models continue a sentence. Under two minutes.

    \b
    Examples:
      gptqkit demo
      gptqkit demo --out /tmp/demo --bits 8 --bits 2
    """
    widths = list(dict.fromkeys(bits or (4, 3)))
    configs = [QuantConfig(bits=width, group_size=GROUP_SIZE) for width in widths]
    folder = Path(out)
    claim_folder(folder)
    with Progress() as emit:
        rows = [_original(emit)]
        for config in configs:
            rows.append(_quantized(folder / f"{config.bits}bit", config, emit))
    return Answer({"out": out, "prompt": PROMPT, "results": rows}, describe_demo(rows, folder))


def claim_folder(folder: Path) -> None:
    """Makes the folder, marked as the demo's own. Raises InputError when it holds something else."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--out {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise InputError(f"--out {folder} holds files that the demo did not write; name a new folder, or empty this one")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).write_text(to_json({"written_by": "gptqkit demo"}) + "\n", encoding="utf-8")


def _original(emit: Emit) -> dict[str, Any]:
    folder = data.model_folder()
    emit(Event("stage", "measuring the original", {"name": "original"}))
    result = api.evaluate(folder, windows=WINDOWS, emit=emit)
    return {
        "name": "original", "folder": None, "size": _weights_size(folder), "bits_per_weight": 16.0,
        "perplexity": result.perplexity, "kl": 0.0, "top1": 1.0, "text": _continued(folder),
    }  # fmt: skip


def _quantized(out: Path, config: QuantConfig, emit: Emit) -> dict[str, Any]:
    original = data.model_folder()
    emit(Event("stage", f"quantizing to {config.bits} bits", {"name": "quantize"}))
    run = api.quantize(original, out, config, samples=SAMPLES, seqlen=SEQLEN, overwrite=True, emit=emit)
    emit(Event("stage", f"measuring {config.bits} bits", {"name": "measure"}))
    result = api.evaluate(out, against=original, windows=WINDOWS, emit=emit)
    return {
        "name": f"{config.bits} bits", "folder": str(out), "size": _weights_size(out), "bits_per_weight": run.bits_per_weight,
        "perplexity": result.perplexity, "kl": result.kl, "top1": result.top1, "text": _continued(out),
    }  # fmt: skip


def _continued(folder: Path) -> str:
    # these import transformers, which --help must not
    from gptqkit.hf.generate import generate_text
    from gptqkit.hf.skeleton import quiet_transformers
    from gptqkit.hf.tokenizer import load_tokenizer

    with quiet_transformers():
        model = api.load(folder)
    return generate_text(model, load_tokenizer(folder), PROMPT, max_new_tokens=NEW_TOKENS).text


def describe_demo(rows: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """The table, the passages, and what to type next."""
    columns = ["model", ">size", ">bits/weight", ">perplexity", ">KL", ">same top token"]
    cells = []
    for row in rows:
        quality = [number(row["perplexity"], 4), number(row["kl"]), percent(row["top1"])]
        cells.append([row["name"], size(row["size"]), number(row["bits_per_weight"]), *quality])
    lines = [table(columns, cells)]
    lines += ["size counts the whole file; embeddings, a quarter of this tiny model, stay as they are. KL in nats per token."]
    for row in rows:
        lines += ["", f"{row['name']}:", _folded(PROMPT + row["text"])]
    first = next((row["folder"] for row in rows if row["folder"]), str(folder))
    lines += ["", "Next:", f'  gptqkit generate {first} --prompt "{PROMPT}"', "  gptqkit quantize YOUR-MODEL YOUR-FOLDER"]
    return "\n".join(lines)


def _weights_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _folded(text: str) -> str:
    return textwrap.fill(" ".join(text.split()), min(width(), 80), initial_indent="  ", subsequent_indent="  ")
