"""AutoGPTQ's two classes over gptqkit, so that its scripts run with only the import changed.

    from gptqkit.compat.auto_gptq import AutoGPTQForCausalLM, BaseQuantizeConfig

    model = AutoGPTQForCausalLM.from_pretrained("facebook/opt-125m", BaseQuantizeConfig(bits=4, group_size=128, desc_act=False))
    model.quantize([tokenizer(text) for text in texts])
    model.save_quantized("opt-125m-4bit")
    model = AutoGPTQForCausalLM.from_quantized("opt-125m-4bit", device="cuda:0", use_marlin=True)

Differences that a script may notice: `from_pretrained` loads nothing (the model is streamed by `quantize`); the result of `quantize` lies
in a temporary folder (TMPDIR decides where) until `save_quantized` copies it; the switches that chose an engine (use_exllama, use_marlin,
use_triton, …) choose nothing, because a backend is chosen for each linear, which is logged once for each switch.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from gptqkit import api
from gptqkit.calibration.records import documents_of
from gptqkit.checkpoint.files import read_json, writing
from gptqkit.compat.old_layout import standard_view
from gptqkit.compat.once import LOGGER, say_once
from gptqkit.compat.quantize_config import BaseQuantizeConfig
from gptqkit.core.errors import InputError
from gptqkit.core.events import Event
from gptqkit.hf.skeleton import load_config, resolve_model

__all__ = ["AutoGPTQForCausalLM", "BaseGPTQForCausalLM", "BaseQuantizeConfig"]

_ENGINE = (
    "use_triton", "use_tritonv2", "use_marlin", "use_exllama", "use_qigen", "use_cuda_fp16", "disable_exllama", "disable_exllamav2",
    "exllama_config", "warmup_triton", "autotune_warmup_after_quantized",
)  # fmt: skip
_FUSION = ("inject_fused_attention", "inject_fused_mlp")
_MEMORY = ("max_memory", "device_map", "low_cpu_mem_usage", "offload_folder", "torch_dtype", "dtype", "cache_examples_on_gpu", "batch_size")
_HUB = (
    "cache_dir", "force_download", "proxies", "resume_download", "local_files_only", "use_auth_token", "token", "revision", "subfolder",
    "_commit_hash", "_raise_exceptions_for_missing_entries",
)  # fmt: skip
_PASSED_ON = ("device_map", "max_memory", "offload_folder", "attn_implementation", *(name for name in _HUB if name != "use_auth_token"))
_LEVELS = {"warning": logging.WARNING, "fallback": logging.WARNING, "skip": logging.WARNING, "linear": logging.DEBUG}


class AutoGPTQForCausalLM:
    """The two ways to a model: `from_pretrained` to quantize it, `from_quantized` to use it."""

    def __init__(self) -> None:
        raise InputError("AutoGPTQForCausalLM is not made directly; use AutoGPTQForCausalLM.from_pretrained(…) or .from_quantized(…)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        quantize_config: BaseQuantizeConfig | Mapping[str, Any],
        max_memory: Any = None,
        trust_remote_code: bool = False,
        **model_init_kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """A model to call `quantize` on. Only remembers its arguments; raises InputError for those that cannot be followed."""
        name = str(pretrained_model_name_or_path)
        given = {"max_memory": max_memory, **model_init_kwargs}
        for key, value in given.items():
            if key in _HUB:
                _refuse_hub(key, value, name)
            elif key in _MEMORY:
                _say_unneeded(key, value, "the model is streamed block by block, in the data type that suits the device")
            else:
                say_once(f"from_pretrained({key}=…) has no effect")
        config = quantize_config if isinstance(quantize_config, BaseQuantizeConfig) else BaseQuantizeConfig.from_dict(quantize_config)
        config.quant_config()
        if os.path.isdir(name) and not os.path.isfile(os.path.join(name, "config.json")):
            raise InputError(f"{name} has no config.json; expected a model folder or a hub id")
        return BaseGPTQForCausalLM(config, source=name, trust_remote_code=trust_remote_code)

    @classmethod
    def from_quantized(
        cls,
        model_name_or_path: str | Path,
        device_map: Any = None,
        max_memory: Any = None,
        device: str | int | torch.device | None = None,
        low_cpu_mem_usage: bool = False,
        use_triton: bool = False,
        inject_fused_attention: bool = False,
        inject_fused_mlp: bool = False,
        use_cuda_fp16: bool = True,
        quantize_config: BaseQuantizeConfig | Mapping[str, Any] | None = None,
        model_basename: str | None = None,
        use_safetensors: bool = True,
        trust_remote_code: bool = False,
        warmup_triton: bool = False,
        trainable: bool = False,
        **kwargs: Any,
    ) -> BaseGPTQForCausalLM:
        """A quantized model, ready to generate: on `device`, else as `device_map` says, else on the first GPU, else on the CPU.

        Reads folders with AutoGPTQ's old file names as well. `trainable` takes the backend that has gradients. Raises InputError for
        what cannot be followed, and for whatever `gptqkit.load` refuses.
        """
        if not use_safetensors:
            raise InputError("use_safetensors=False: only safetensors files are ever read; leave it out")
        switches = {
            "use_triton": use_triton, "warmup_triton": warmup_triton, "inject_fused_attention": inject_fused_attention,
            "inject_fused_mlp": inject_fused_mlp, "use_cuda_fp16": None if use_cuda_fp16 else False,
        }  # fmt: skip
        passed = _loading_options({**kwargs, **switches, "device_map": device_map, "max_memory": max_memory})
        if device is None and device_map is None:
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
        if isinstance(device, int):
            device = f"cuda:{device}"
        name = str(model_name_or_path)
        recipe = quantize_config.to_dict() if isinstance(quantize_config, BaseQuantizeConfig) else quantize_config
        view = _view(name, model_basename, recipe)
        backend = "torch" if trainable else None
        model = api.load(view.name if view else name, device=device, backend=backend, trust_remote_code=trust_remote_code, **passed)
        config = BaseQuantizeConfig.from_dict(_stored_config(model))
        config.model_name_or_path = name
        return BaseGPTQForCausalLM(config, model=model, trust_remote_code=trust_remote_code, view=view)


class BaseGPTQForCausalLM:
    """What AutoGPTQ's methods return: a model that is to be quantized, or is. Attributes it does not have are those of `model`."""

    def __init__(
        self,
        quantize_config: BaseQuantizeConfig,
        *,
        source: str | None = None,
        model: Any = None,
        trust_remote_code: bool = False,
        view: TemporaryDirectory[str] | None = None,
    ) -> None:
        self.quantize_config = quantize_config
        self._source = source
        self._model = model
        self._trust_remote_code = trust_remote_code
        # Temporary folders live as long as the object: transformers may read a checkpoint's files again.
        self._view = view
        self._result: TemporaryDirectory[str] | None = None
        self._config: Any = None

    def quantize(self, examples: Sequence[Any], batch_size: int = 1, use_triton: bool = False, **switches: Any) -> Any:
        """Quantizes on `examples`: lists of token ids, or dicts with input_ids and attention_mask as lists or tensors.

        Every example is used whole (up to the model's context); padding is removed by the mask. Returns the record of the run, see
        `gptqkit.quantize`. Raises InputError for examples that are no token ids.
        """
        if self.quantized:
            raise InputError("the model is quantized already; start again from AutoGPTQForCausalLM.from_pretrained")
        for key, value in {"batch_size": None if batch_size == 1 else batch_size, "use_triton": use_triton, **switches}.items():
            _say_switch("quantize", key, value)
        sequences = _token_ids(examples)
        result = TemporaryDirectory(prefix="gptqkit-")
        run = api.quantize(
            str(self._source), Path(result.name) / "checkpoint", self.quantize_config.quant_config(), calibration=sequences,
            samples=len(sequences), seqlen=max(map(len, sequences)), trust_remote_code=self._trust_remote_code, emit=_log,
        )  # fmt: skip
        self._result = result
        return run

    def save_quantized(
        self,
        save_dir: str | Path,
        use_safetensors: bool = True,
        safetensors_metadata: Mapping[str, str] | None = None,
        checkpoint_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes the checkpoint into a folder, replacing an earlier quantized one there. Raises InputError before `quantize`."""
        if not use_safetensors:
            raise InputError("use_safetensors=False: only safetensors files are ever written; leave it out")
        if not self.quantized:
            raise InputError("nothing to save: call .quantize(examples) first")
        if safetensors_metadata:
            say_once("save_quantized(safetensors_metadata=…) has no effect; what was done is recorded in gptqkit/run.json and README.md")
        for key in kwargs:
            say_once(f"save_quantized({key}=…) has no effect")
        target = Path(save_dir)
        self._check_target(target)
        if checkpoint_format not in (None, self.quantize_config.checkpoint_format):
            self._save_as(target, str(checkpoint_format))
        elif self._result is not None:
            _copy(Path(self._result.name) / "checkpoint", target)
        else:
            self.model.save_pretrained(target)
        self.quantize_config.model_name_or_path = str(target)

    def save_pretrained(self, save_dir: str | Path, **kwargs: Any) -> None:
        """As `save_quantized`."""
        self.save_quantized(save_dir, **kwargs)

    def push_to_hub(self, *args: Any, **kwargs: Any) -> None:
        """Refused: this package never uploads."""
        raise InputError("push_to_hub is not done here; save_quantized('FOLDER'), then: hf upload OWNER/NAME FOLDER")

    @property
    def quantized(self) -> bool:
        return self._result is not None or self._model is not None

    @property
    def model(self) -> Any:
        """The transformers model; after `quantize` it is loaded when it is first asked for. Raises InputError before."""
        if self._model is None:
            if self._result is None:
                raise InputError("nothing is loaded before .quantize(examples); to run the original, load it with transformers")
            device = "cuda:0" if torch.cuda.is_available() else "cpu"
            folder = Path(self._result.name) / "checkpoint"
            self._model = api.load(folder, device=device, trust_remote_code=self._trust_remote_code)
        return self._model

    @property
    def config(self) -> Any:
        """The transformers configuration, of the original before `quantize`."""
        if self.quantized:
            return self.model.config
        if self._config is None:
            folder = resolve_model(str(self._source), trust_remote_code=self._trust_remote_code)
            self._config = load_config(folder, trust_remote_code=self._trust_remote_code)
        return self._config

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def device(self) -> torch.device:
        return self.model.device if self.quantized else torch.device("cpu")

    @property
    def hf_device_map(self) -> Any:
        """Which part is on which device, or None if the model is on one."""
        return getattr(self.model, "hf_device_map", None) if self.quantized else None

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with torch.inference_mode():
            return self.model.generate(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def to(self, *args: Any, **kwargs: Any) -> BaseGPTQForCausalLM:
        """Moves the model. Before `quantize` there is nothing to move, which scripts do out of habit."""
        if self.quantized:
            self.model.to(*args, **kwargs)
        return self

    def eval(self) -> BaseGPTQForCausalLM:
        return self.train(False)

    def train(self, mode: bool = True) -> BaseGPTQForCausalLM:
        if self.quantized:
            self.model.train(mode)
        return self

    def __getattr__(self, name: str) -> Any:
        # Private names stay here: pickle and copy ask for some before __init__ has run, and `model` would then ask for itself.
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.model, name)

    def _check_target(self, target: Path) -> None:
        """Refuses to write over another model: the original, or any folder of weights that is not a quantized checkpoint."""
        if self._source is not None and target.exists() and os.path.isdir(self._source) and target.samefile(self._source):
            raise InputError(f"save_quantized({str(target)!r}) would write over the original model; choose another folder")
        if not target.is_dir() or not any(target.glob("*.safetensors")):
            return
        config = read_json(target / "config.json") if (target / "config.json").is_file() else None
        if not isinstance(config, dict) or "quantization_config" not in config:
            raise InputError(f"{target} holds the weights of another model; choose an empty folder or an earlier result")

    def _save_as(self, target: Path, checkpoint_format: str) -> None:
        with TemporaryDirectory(prefix="gptqkit-") as folder:
            origin = Path(folder) / "checkpoint"
            if self._result is not None:
                origin = Path(self._result.name) / "checkpoint"
            else:
                self.model.save_pretrained(origin)
            api.convert(origin, target, format=checkpoint_format, overwrite=True)


def _token_ids(examples: Sequence[Any]) -> list[list[int]]:
    """One list of ids for each sequence. Raises InputError for anything else, with the remedy."""
    if isinstance(examples, (str, Mapping)) or len(examples) == 0:
        raise InputError("quantize(examples): expected a list of token-id lists or of dicts with input_ids, at least one")
    sequences = []
    for index, example in enumerate(examples):
        where = f"examples[{index}]"
        for document in documents_of(example, where):
            if document.kind != "token ids":
                raise InputError(f"{where} is {document.kind}; tokenize first: model.quantize([tokenizer(text) for text in texts])")
            sequences.append(document.content)
    return sequences


def _loading_options(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that loading understands, by its names; every other one is said to have no effect."""
    options: dict[str, Any] = {}
    for key, value in given.items():
        if key in ("torch_dtype", "dtype"):
            options["dtype"] = value
        elif key == "use_auth_token":
            options["token"] = value
        elif key in _PASSED_ON:
            options[key] = value
        else:
            _say_switch("from_quantized", key, value)
    return {key: value for key, value in options.items() if value is not None}


def _say_switch(verb: str, key: str, value: Any) -> None:
    """Says once what became of a switch that was given."""
    if value is None or (value is False and key not in ("use_cuda_fp16", "cache_examples_on_gpu", "use_exllama")):
        return
    if key in _ENGINE:
        say_once(f"{key}={value!r}: the fastest backend is chosen for each linear instead; `gptqkit doctor MODEL` prints which, and why")
    elif key in _FUSION:
        say_once(f"{key}={value!r} has no effect: attention and MLP run as transformers defines them, on our kernels")
    elif key in _MEMORY:
        _say_unneeded(key, value, "memory is planned by gptqkit itself")
    else:
        say_once(f"{verb}({key}={value!r}) has no effect")


def _say_unneeded(key: str, value: Any, reason: str) -> None:
    if value is not None:
        say_once(f"{key}={value!r} is not needed: {reason}")


def _refuse_hub(key: str, value: Any, name: str) -> None:
    if value and not os.path.isdir(name):
        raise InputError(
            f"from_pretrained({key}={value!r}) is not supported for a hub id; download first, and pass the folder: "
            f"huggingface_hub.snapshot_download({name!r}, {key}={value!r})"
        )


def _view(name: str, basename: str | None, recipe: Mapping[str, Any] | None) -> TemporaryDirectory[str] | None:
    if os.path.isdir(name):
        return standard_view(Path(name), basename, None if recipe is None else dict(recipe))
    if basename not in (None, "model"):
        download = f"huggingface_hub.snapshot_download({name!r})"
        raise InputError(f"model_basename={basename!r} with a hub id; download first, and pass the folder: {download}")
    if recipe is not None:
        say_once("from_quantized(quantize_config=…) has no effect for a hub id: the config in the repository is used")
    return None


def _stored_config(model: Any) -> dict[str, Any]:
    stored = model.config.quantization_config
    return dict(stored) if isinstance(stored, Mapping) else stored.to_dict()


def _copy(source: Path, target: Path) -> None:
    """Copies a finished checkpoint; config.json comes last, so a folder with one is whole. Weights of an earlier result go first."""
    with writing(target):
        target.mkdir(parents=True, exist_ok=True)
        for stale in (target / "config.json", target / "model.safetensors.index.json", *target.glob("*.safetensors")):
            stale.unlink(missing_ok=True)
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=lambda folder, names: ["config.json"] if Path(folder) == source else [])
        shutil.copyfile(source / "config.json", target / "config.json")


def _log(event: Event) -> None:
    level = _LEVELS.get(event.kind, logging.INFO)
    LOGGER.log(level, event.message)
