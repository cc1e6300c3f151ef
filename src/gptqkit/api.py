"""The public functions. Each one checks its input, calls the one module that does the work, and returns a value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptqkit.core.config import QuantConfig
from gptqkit.core.events import Emit, silent

if TYPE_CHECKING:
    from gptqkit.checkpoint.convert import Conversion
    from gptqkit.checkpoint.inspect import Inspection
    from gptqkit.core.recipe import RecipeUse
    from gptqkit.evaluation.perplexity import Evaluation
    from gptqkit.evaluation.verify import Verification
    from gptqkit.pipeline.plan import Plan
    from gptqkit.pipeline.run import Run

Calibration = str | Path | Sequence[Any] | Iterable[Any]
"""A file (jsonl, json, txt, csv, parquet), a hub dataset id, or a sequence of texts, token-id lists, chat messages or dicts."""


def quantize(
    model: str | Path,
    out: str | Path,
    config: QuantConfig | None = None,
    *,
    calibration: Calibration | None = None,
    samples: int = 128,
    seqlen: int = 2048,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    trust_remote_code: bool = False,
    recipe: RecipeUse | None = None,
    emit: Emit = silent,
) -> Run:
    """Quantizes `model` (a folder or a hub id) into the folder `out` and checks what was written.

    calibration        None uses the bundled text; own-domain text is better. Not read when the method needs none
    samples, seqlen    how many sequences of how many tokens; seqlen is cut to the model's context with a warning event
    device, dtype      "auto": the first CUDA device, else the CPU; bfloat16 where the device computes it natively, else float32
    memory             bytes the activations may take in memory before they go to disk; None: half of what is available
    resume, overwrite  what to do when `out` holds an unfinished run, or anything else
    strict             leaving any linear unquantized without a rule that says so is an error
    recipe             for the record only: the recipe that the options were taken from (`QuantConfig.from_recipe` reads one)

    Returns the run's record: errors per linear, sizes, times, peaks, and the numeric check. Raises InputError (bad input; before
    any long work), ResourceError (memory or disk; resumable), CheckFailed (`strict`, or the written checkpoint does not read back).

    >>> run = quantize("MODEL", "OUT", QuantConfig(bits=4), calibration="calibration.jsonl")   # doctest: +SKIP
    >>> run.check.kl                                                                            # doctest: +SKIP
    0.0355
    """
    from gptqkit.pipeline.run import Job, run_job

    job = Job(
        model=str(model), out=Path(out), config=config or QuantConfig(), calibration=calibration, samples=samples, seqlen=seqlen, seed=seed,
        device=device, dtype=dtype, memory=memory, resume=resume, overwrite=overwrite, strict=strict, trust_remote_code=trust_remote_code,
        recipe=recipe,
    )  # fmt: skip
    return run_job(job, emit)


def plan(
    model: str | Path,
    config: QuantConfig | None = None,
    *,
    samples: int = 128,
    seqlen: int = 2048,
    device: str = "auto",
    dtype: str = "auto",
    memory: int | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What `quantize` would do: every linear and its spec, what stays, sizes before and after, predicted peak memory and time.

    Reads config.json and the headers of the weights; computes nothing. Raises InputError for anything `quantize` would refuse.
    """
    from gptqkit.pipeline.plan import make_plan

    return make_plan(
        str(model), config or QuantConfig(), samples=samples, seqlen=seqlen, device=device, dtype=dtype, memory=memory,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def evaluate(
    model: str | Path,
    *,
    against: str | Path | None = None,
    text: str | Path | None = None,
    windows: int = 60,
    seqlen: int = 512,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    emit: Emit = silent,
) -> Evaluation:
    """Perplexity of a checkpoint, quantized or not; with `against`, also KL(original‖model) per token in nats and top-1 agreement.

    The text is tokenised as one stream without special tokens and cut into `windows` windows of `seqlen` tokens; None uses the bundled
    held-out text. Blocks are streamed, so neither model is ever whole in memory. dtype "auto" is float32 on a CPU.
    """
    from gptqkit.evaluation.perplexity import evaluate_checkpoint

    return evaluate_checkpoint(
        str(model), against=None if against is None else str(against), text=text, windows=windows, seqlen=seqlen, device=device,
        dtype=dtype, trust_remote_code=trust_remote_code, emit=emit,
    )  # fmt: skip


def verify(model: str | Path, *, against: str | Path | None = None, emit: Emit = silent) -> Verification:
    """Checks a quantized checkpoint: complete, in range, finite, consistent with its config, and which engines accept it.

    With `against`, each dequantized linear is compared with the original's. The result's `ok` is the verdict.
    """
    from gptqkit.evaluation.verify import verify_checkpoint

    return verify_checkpoint(Path(model), against=None if against is None else str(against), emit=emit)


def inspect(model: str | Path) -> Inspection:
    """What a checkpoint holds: bits, groups, format, bits per weight, each linear, what is not quantized, who can serve it."""
    from gptqkit.checkpoint.inspect import inspect_checkpoint

    return inspect_checkpoint(Path(model))


def convert(model: str | Path, out: str | Path, *, format: str, overwrite: bool = False, emit: Emit = silent) -> Conversion:
    """Rewrites a quantized checkpoint in another format, losslessly, or raises InputError naming the tensor that cannot be held."""
    from gptqkit.checkpoint.convert import convert_checkpoint

    return convert_checkpoint(Path(model), Path(out), format=format, overwrite=overwrite, emit=emit)


def load(model: str | Path, *, device: Any = None, dtype: Any = None, backend: str | None = None, **kwargs: Any) -> Any:
    """A transformers model from a quantized checkpoint, on our kernels. `kwargs` go to `AutoModelForCausalLM.from_pretrained`.

    backend forces one of the kernels by name; None takes the first that accepts each linear (`gptqkit doctor MODEL` prints why).
    """
    from gptqkit.integrations.transformers import load_model

    return load_model(model, device=device, dtype=dtype, backend=backend, **kwargs)


def enable() -> None:
    """Makes `AutoModelForCausalLM.from_pretrained` load gptq and compressed-tensors checkpoints with our kernels. Idempotent."""
    from gptqkit.integrations.transformers import enable as enable_integration

    enable_integration()


def disable() -> None:
    """Undoes `enable`."""
    from gptqkit.integrations.transformers import disable as disable_integration

    disable_integration()
