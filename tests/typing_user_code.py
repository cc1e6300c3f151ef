"""A user's program, for the type checker: it must pass `mypy --strict` and is never run.

What a user writes most is here, so that a signature that gets worse to use fails the build.
"""

from __future__ import annotations

from pathlib import Path

import gptqkit
from gptqkit import CheckFailed, GptqkitError, InputError, QuantConfig, ResourceError, Rule
from gptqkit.core.events import Event


def listener(event: Event) -> None:
    kind: str = event.kind
    message: str = event.message
    del kind, message


def quantize_and_prove(model: str, out: Path) -> float:
    config = QuantConfig(bits=4, group_size=128, rules=(Rule("down_proj", bits=8), Rule.parse("lm_head=skip")))
    plan = gptqkit.plan(model, config, samples=64, seqlen=512)
    size: int = plan.size_after
    try:
        run = gptqkit.quantize(model, out, config, calibration=["one text", "another"], seed=1, emit=listener)
    except ResourceError:
        run = gptqkit.quantize(model, out, config, calibration="texts.jsonl", resume=True)
    except InputError as error:
        raise SystemExit(str(error)) from error
    record: dict[str, object] = run.to_dict()
    del size, record
    result = gptqkit.evaluate(out, against=model, text="heldout.txt", windows=10)
    perplexity: float = result.perplexity
    return perplexity


def store_and_use(out: Path, other: Path) -> str:
    try:
        conversion: dict[str, object] = gptqkit.convert(out, other, format="compressed-tensors").to_dict()
        verification = gptqkit.verify(other)
        if not verification.ok:
            raise CheckFailed("the copy is not sound")
    except GptqkitError as error:
        raise SystemExit(error.exit_code) from error
    found: dict[str, object] = gptqkit.inspect(other).to_dict()
    del conversion, found
    gptqkit.enable()
    model = gptqkit.load(out, device="cpu", backend="torch")
    gptqkit.disable()
    return str(model)


def configure(values: dict[str, object]) -> dict[str, object]:
    spec = QuantConfig.from_dict(values).spec("model.layers.0.mlp.down_proj")
    bits: int | None = None if spec is None else spec.bits
    return {**QuantConfig().to_dict(), "bits": bits}


VERSION: str = gptqkit.__version__
