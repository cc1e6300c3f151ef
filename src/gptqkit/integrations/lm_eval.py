"""lm-eval's tasks on a model that runs on our kernels. Needs the extra: pip install 'gptqkit[eval]'."""

from __future__ import annotations

from typing import Any

from gptqkit.core.errors import InputError
from gptqkit.hf.skeleton import quiet_transformers, resolve_model
from gptqkit.hf.tokenizer import load_tokenizer
from gptqkit.integrations.transformers import load_model
from gptqkit.models.device import resolve_device


def run_tasks(
    model: str, tasks: list[str], *, device: str = "auto", dtype: str = "auto", trust_remote_code: bool = False, limit: int | None = None
) -> dict[str, dict[str, float]]:
    """Task -> metric -> value, through `lm_eval.models.huggingface.HFLM`. Raises InputError: extra missing, unknown task."""
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(f"--tasks needs lm-eval ({error}); install it with: pip install 'gptqkit[eval]'") from None
    manager = TaskManager()
    unknown = [task for task in tasks if not manager.match_tasks([task])]
    if unknown:
        raise InputError(f"--tasks {','.join(unknown)}: no such task; `lm-eval ls tasks` lists them")
    folder = resolve_model(model, trust_remote_code=trust_remote_code)
    allowed: dict[str, Any] = {"trust_remote_code": True} if trust_remote_code else {}
    with quiet_transformers():
        loaded = load_model(folder, device=resolve_device(device), dtype=None if dtype == "auto" else dtype, **allowed)
    results: dict[str, Any] = lm_eval.simple_evaluate(
        model=HFLM(pretrained=loaded, tokenizer=load_tokenizer(folder)), tasks=tasks, limit=limit, task_manager=manager
    )
    return {
        task: {metric: float(value) for metric, value in scores.items() if isinstance(value, (int, float))}
        for task, scores in results["results"].items()
    }
