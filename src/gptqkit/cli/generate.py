"""`gptqkit generate`: one prompt, streamed to the terminal as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gptqkit import api
from gptqkit.cli.failures import complain, guard
from gptqkit.cli.options import Checkpoint, Debug, Device, Dtype, Json
from gptqkit.cli.output import Answer, duration, number


@guard
def generate(
    model: Checkpoint,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="At most this many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(metavar="X", help="0: always the most likely token.")] = 0.7,
    top_p: Annotated[float, typer.Option(metavar="X", help="Sample among the most likely tokens that add up to X.")] = 0.95,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed gives the same text.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    backend: Annotated[
        str | None, typer.Option(metavar="NAME", help="Force one by name, see `gptqkit doctor MODEL`. [default: the first that fits]")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> Answer:
    """Continue a prompt with a quantized model.

    \b
    Examples:
      gptqkit generate ./llama-4bit --prompt "Once upon a time"
      gptqkit generate ./llama-4bit --prompt "2 + 2 =" --temperature 0 --max-new-tokens 8
      gptqkit generate ./llama-4bit --prompt "The sea" --backend torch --json
    """
    from gptqkit.hf.generate import generate_text  # imports transformers, which --help must not
    from gptqkit.hf.skeleton import quiet_transformers
    from gptqkit.hf.tokenizer import load_tokenizer
    from gptqkit.models.device import resolve_device

    tokenizer = load_tokenizer(Path(model))
    with quiet_transformers():
        loaded = api.load(model, device=resolve_device(device), dtype=None if dtype == "auto" else dtype, backend=backend)
    if not json:
        _write(prompt)
    result = generate_text(
        loaded, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
        write=None if json else _write,
    )  # fmt: skip
    if not json:
        _write("\n")
        speed = number(result.tokens / result.seconds) if result.seconds else "-"
        complain(f"{result.tokens} tokens in {duration(result.seconds)}, {speed} tokens/s")
    return Answer(result.to_dict())


def _write(text: str) -> None:
    print(text, end="", flush=True)
    sys.stdout.flush()
