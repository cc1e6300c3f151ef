"""Building a transformers model without its weights, and finding each parameter's name in the checkpoint.

This file and its neighbours in gptqkit.hf hold everything that knows transformers; the names below that are not public API are covered by
a contract test, which fails when a release moves them: `conversion_mapping.get_model_conversion_mapping`,
`core_model_loading.{rename_source_key, WeightRenaming, WeightConverter, MergeModulelist, Concatenate}`, `pytorch_utils.Conv1D`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM
from transformers.pytorch_utils import Conv1D

from gptqkit.checkpoint.files import read_json
from gptqkit.core.errors import InputError
from gptqkit.hf.experts import replace_experts
from gptqkit.hf.names import model_names

_DOWNLOAD = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py", "LICENSE*"]


def resolve_model(model: str, *, trust_remote_code: bool = False) -> Path:
    """The local folder of a model: `model` itself, or the download of a hub id. Raises InputError when neither works."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"{model} is a file; expected a model folder or a hub id such as org/name")
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise InputError(f"{model} is neither a folder here nor a hub id of the form org/name")
    patterns = _DOWNLOAD if trust_remote_code else [p for p in _DOWNLOAD if p != "*.py"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except LocalEntryNotFoundError as error:
        raise InputError(f"{model} is not a folder here, not in the local cache, and the hub cannot be reached ({error})") from None
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise InputError(f"{model} is not a folder here and could not be downloaded: {error}") from None


def load_config(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The model's transformers configuration. Raises InputError when it is missing, names no architecture or is no causal LM."""
    raw = read_json(folder / "config.json")
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise InputError(f"{folder / 'config.json'} has no model_type; it is not a transformers model configuration")
    if not raw.get("architectures"):
        raise InputError(f'{folder / "config.json"} names no "architectures"; add the class that wrote it, e.g. ["LlamaForCausalLM"]')
    if raw.get("auto_map") and not trust_remote_code:
        raise InputError(f"{folder} brings its own Python code; read it, then allow it with --trust-remote-code")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, TypeError, OSError, AttributeError) as error:
        raise InputError(f"{folder / 'config.json'}: transformers does not accept it: {str(error).splitlines()[0]}") from None


def auto_class(config: Any) -> Any:
    """The transformers class that builds the language model of a configuration: the causal LM; or what answers a text with another, or
    reads images too, where only that exists or where it wrote the checkpoint."""
    kind, written_by = type(config), getattr(config, "architectures", None) or []
    if "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return AutoModelForCausalLM
    for other in (AutoModelForSeq2SeqLM, AutoModelForImageTextToText):
        model: Any = other._model_mapping.get(kind, None)
        if model is not None and (kind not in AutoModelForCausalLM._model_mapping or model.__name__ in written_by):
            return other
    return AutoModelForCausalLM


def build_skeleton(config: Any, dtype: torch.dtype, *, trust_remote_code: bool = False) -> Any:
    """The causal LM with every parameter on the meta device and every buffer computed; in eval mode, without gradients.

    A `quantization_config` is left out: this is the architecture, and weights are put in as plain tensors. Stacked experts are taken apart
    into linears (experts.py).
    """
    plain = type(config).from_dict({key: value for key, value in config.to_dict().items() if key != "quantization_config"})
    for key in ("_name_or_path", "name_or_path"):
        if trust_remote_code and hasattr(config, key):
            setattr(plain, key, getattr(config, key))
    try:
        with _parameters_on_meta():
            model = auto_class(plain).from_config(plain, dtype=dtype, trust_remote_code=trust_remote_code)
    except (ValueError, RuntimeError) as error:
        raise InputError(f"{config.model_type} cannot be built as a language model: {str(error).splitlines()[0]}") from None
    replace_experts(model, visit_all=True)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def checkpoint_names(model: Any, names: Iterable[str]) -> dict[str, str]:
    """Parameter or buffer name in `model` -> name in the checkpoint, through transformers' own renaming rules.

    Checkpoint names that the model has no place for are left out. Raises InputError when loading would have to merge or split
    tensors, which needs more than a name.
    """
    state = model.state_dict()
    found: dict[str, str] = {}
    for name, target, merged in model_names(model, names):
        if merged and target in state:
            raise InputError(
                f"tensor {name}: {type(model).__name__} merges such tensors into {target} when it loads; "
                "this version quantizes only what a checkpoint stores linear by linear"
            )
        if target in state:
            found[target] = name
    return found


def is_conv1d(module: nn.Module) -> bool:
    """True for GPT-2's Conv1D, a linear that stores its weight as [in, out]."""
    return isinstance(module, Conv1D)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice from transformers while inside."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Moves each parameter to the meta device as it is registered. Buffers stay: rotary tables and the like are computed, not loaded."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        register(self, name, param)
        stored = self._parameters[name]
        if stored is not None and not stored.is_meta:
            self._parameters[name] = nn.Parameter(stored.to("meta"), requires_grad=False)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def hub_cache() -> Path:
    """Where hub downloads go on this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(os.fspath(HF_HUB_CACHE))


def transformers_version() -> str:
    """The version of transformers that is installed."""
    return version("transformers")
