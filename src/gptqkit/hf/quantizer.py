"""How `from_pretrained` is made to load quantized checkpoints with our modules. The only file that knows transformers' quantizers.

transformers dispatches on `config.json: quantization_config.quant_method` through two plain dicts, one of configuration classes and one
of quantizer classes. It refuses to register a name twice, so `install` replaces the entries of `gptq` and `compressed-tensors` and
`uninstall` puts back what was there. A configuration that the binding does not claim goes to the class that was there before.

What happens in one `from_pretrained` call:

    configuration   from_dict keeps the raw mapping, so that keys transformers has no field for survive save_pretrained. The classes
                    bear transformers' own names, because it compares class names when a user passes a configuration as well.
    before loading  the model is on the meta device; modules whose packed tensors are in the checkpoint's headers are replaced, named by
                    transformers' own renaming rules; tensors that the model needs and the checkpoint lacks are an error here, where
                    transformers would initialise them randomly and go on. Stacked experts are taken apart first (experts.py).
    loading         transformers fills the Parameters by name. They are declared in the file's dtypes, so nothing is cast.
    after loading   the binding prepares the modules.

This package may not import kernels or formats (imports point down), so both come in through a `Binding`, which
gptqkit.integrations.transformers implements. tests/integrations/test_contract.py asserts every internal this file relies on.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import CompressedTensorsConfig as StockCompressedTensorsConfig
from transformers.utils.quantization_config import GPTQConfig as StockGPTQConfig
from transformers.utils.quantization_config import QuantizationMethod

from gptqkit.core.errors import InputError
from gptqkit.hf.containers import containers
from gptqkit.hf.experts import replace_experts
from gptqkit.hf.names import conversions, model_names, renames_stack
from gptqkit.hf.skeleton import auto_class

PLAIN_LINEARS = ("FalconLinear",)
"""Subclasses of nn.Linear whose forward is x @ weight.T + bias, written differently."""

_SHOWN = 4
"""How many names of a long list an error message spells out."""


@dataclass(frozen=True, slots=True)
class Place:
    """The linear that a quantized module takes the place of: `name` in the model, its dense shape and dtype, its bias or None."""

    name: str
    out_features: int
    in_features: int
    dtype: torch.dtype
    bias: nn.Parameter | None


class Binding(Protocol):
    """What this file needs from formats and kernels. Picklable: loaded models carry it."""

    def claims(self, config: Mapping[str, Any]) -> bool:
        """Whether checkpoints with this `quantization_config` are ours to load."""

    def read(self, config: Mapping[str, Any], files: Sequence[str]) -> tuple[set[str], dict[str, Any]]:
        """The names of all tensors in the files, and an opaque description of each quantized linear by its checkpoint name."""

    def build(self, packed: Any, place: Place, backend: str | None) -> nn.Module:
        """The module for one description, its checkpoint tensors on the meta device, `place.bias` as its `bias`."""

    def owns(self, module: nn.Module) -> bool:
        """Whether `build` made the module."""

    def finish(self, module: nn.Module) -> None:
        """Called once its tensors are loaded (or offloaded)."""

    def dequantize(self, module: nn.Module, dtype: torch.dtype | None) -> Tensor:
        """The dense weight [O, I] of a module that `build` made."""

    def backend(self, name: str | None) -> str | None:
        """The backend to force, given the `backend` of a configuration that the user passed to from_pretrained."""


class _KeepsEveryKey:
    """A configuration that is its raw mapping: attributes for reading, and the very same mapping when it is saved."""

    raw: dict[str, Any]

    def __init__(self, **raw: Any) -> None:
        self.__dict__.update(raw)
        self.raw = copy.deepcopy(raw)

    def to_dict(self) -> dict[str, Any]:
        return copy.deepcopy(self.raw)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    def __iter__(self) -> Iterator[tuple[str, Any]]:
        yield from self.to_dict().items()


class GPTQConfig(_KeepsEveryKey, StockGPTQConfig):
    """transformers' GPTQConfig for checkpoints that gptqkit loads."""

    backend: str | None = None
    max_input_length: int | None = None

    def __init__(self, **raw: Any) -> None:
        super().__init__(**raw)
        self.quant_method = QuantizationMethod.GPTQ

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return _from_dict(cls, "gptq", config_dict, return_unused_kwargs, kwargs)


class CompressedTensorsConfig(_KeepsEveryKey, StockCompressedTensorsConfig):
    """transformers' CompressedTensorsConfig for checkpoints that gptqkit loads; does not need the compressed-tensors package."""

    dequantize: bool = False
    use_optimized_inference: bool = False
    quantization_config: Any = None

    def __init__(self, **raw: Any) -> None:
        super().__init__(**raw)
        self.quant_method = QuantizationMethod.COMPRESSED_TENSORS

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        return _from_dict(cls, "compressed-tensors", config_dict.get("quantization_config", config_dict), return_unused_kwargs, kwargs)


class Quantizer(HfQuantizer):
    """transformers' hooks around loading, saving and dequantizing; see the module's docstring."""

    requires_calibration = True  # a model that is not quantized yet is not for this class: the base class says so

    def __new__(cls, quantization_config: Any = None, **kwargs: Any) -> Any:
        if quantization_config is None or isinstance(quantization_config, _KeepsEveryKey):
            return super().__new__(cls)
        return _previous(AUTO_QUANTIZER_MAPPING, quantization_config.quant_method)(quantization_config, **kwargs)

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if _installed is None:
            raise InputError("gptqkit.enable() was undone while a model was being loaded; load it again")
        self.binding = _installed.binding
        self.dense_classes: dict[str, type[nn.Module]] = {}
        self.experts: list[str] = []
        self.stacking: list[Any] = []
        self.unstacking: list[Any] = []
        self.prepared: Any = None

    @property
    def is_trainable(self) -> bool:
        """Gradients flow through the quantized linears to adapters before and beside them; the packed weights stay as they are."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        if not checkpoint_files:
            raise InputError("a quantized model is loaded from its files; state_dict= cannot be passed with it")
        self.prepared = model
        tensor_names, packed = self.binding.read(self.quantization_config.to_dict(), [str(file) for file in checkpoint_files])
        self.experts = replace_experts(model, visit_all=False, among=_apart(model, tensor_names, packed))
        backend = self.binding.backend(getattr(self.quantization_config, "backend", None))
        for stem, target in _linear_names(model, packed).items():
            place = _place(model, stem, target, has_bias=f"{stem}.bias" in tensor_names)
            self.dense_classes[target] = type(model.get_submodule(target))
            module = self.binding.build(packed[stem], place, backend)
            module.__dict__["weight"] = _initialized(place.dtype)
            model.set_submodule(target, module)
        _check_complete(model, tensor_names, [f"{target}." for target in self.dense_classes])
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Quantized experts stay apart: where transformers would stack them, each is found by a renaming instead.

        transformers before 5.18 does not say for which model: it is the one that was prepared last.
        """
        stock = super().update_weight_conversions(weight_conversions, *([] if model is None else [model]))
        own = conversions(stock, model if model is not None else self.prepared)
        self.stacking = [rule for rule in stock if not _among(rule, own) or renames_stack(rule, self.prepared if model is None else model)]
        self.unstacking = [rule for rule in own if not _among(rule, stock)]
        return own

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.prepared = None
        for module in model.modules():
            if self.binding.owns(module):
                self.binding.finish(module)
        if getattr(self.quantization_config, "dequantize", False):
            self._dequantize(model)
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        quantized = {name: module for name, module in model.named_modules() if self.binding.owns(module)}
        for name, module in quantized.items():
            if any(parameter.is_meta for parameter in module.parameters()):
                raise InputError(f"dequantize() needs all tensors in memory, but those of {name} are offloaded; load it without offloading")
        for name, module in quantized.items():
            weight_OI = self.binding.dequantize(module, dtype if isinstance(dtype, torch.dtype) else None)
            dense = _dense(self.dense_classes.get(name, nn.Linear), weight_OI, getattr(module, "bias", None))
            model.set_submodule(name, _with_hook(module, dense))
        for name in self.experts:
            experts = model.get_submodule(name)
            model.set_submodule(name, _with_hook(experts.get_submodule("0.down_proj"), experts.stacked()))
        if self.experts:  # what save_pretrained undoes: from now on, transformers' own stacking again
            kept = [rule for rule in model._weight_conversions if not _among(rule, [*self.unstacking, *self.stacking])]
            model._weight_conversions = [*kept, *self.stacking]
            self.experts = []
        return model


@dataclass(frozen=True, slots=True)
class _Installed:
    binding: Binding
    configs: dict[str, Any]
    quantizers: dict[str, Any]


_OURS: dict[str, type] = {"gptq": GPTQConfig, "compressed-tensors": CompressedTensorsConfig}
_STOCK: dict[str, type] = {"gptq": StockGPTQConfig, "compressed-tensors": StockCompressedTensorsConfig}
_installed: _Installed | None = None


def install(binding: Binding) -> bool:
    """Takes over transformers' entries. False, and nothing done, when that is so already."""
    global _installed
    if _installed is not None:
        return False
    _installed = _Installed(
        binding, {key: AUTO_QUANTIZATION_CONFIG_MAPPING[key] for key in _OURS}, {key: AUTO_QUANTIZER_MAPPING[key] for key in _OURS}
    )
    for key, config_class in _OURS.items():
        AUTO_QUANTIZATION_CONFIG_MAPPING[key] = config_class
        AUTO_QUANTIZER_MAPPING[key] = Quantizer
    return True


def uninstall() -> None:
    """Puts back what `install` found, except where somebody else has taken over since."""
    global _installed
    if _installed is None:
        return
    for key, config_class in _OURS.items():
        if AUTO_QUANTIZATION_CONFIG_MAPPING[key] is config_class:
            AUTO_QUANTIZATION_CONFIG_MAPPING[key] = _installed.configs[key]
        if AUTO_QUANTIZER_MAPPING[key] is Quantizer:
            AUTO_QUANTIZER_MAPPING[key] = _installed.quantizers[key]
    _installed = None


def from_pretrained(model: str | Path, config_keys: Mapping[str, Any], **kwargs: Any) -> Any:
    """`from_pretrained` of the `auto_class`, with `config_keys` added to config.json. Raises InputError where a file cannot be opened."""
    try:
        passed = {key: value for key, value in kwargs.items() if key in ("revision", "trust_remote_code", "code_revision")}
        config = kwargs["config"] if "config" in kwargs else AutoConfig.from_pretrained(model, **passed)
        for key, value in config_keys.items():
            setattr(config, key, value)
            kwargs["config"] = config
        return auto_class(config).from_pretrained(model, **kwargs)
    except OSError as error:
        raise InputError(f"{model} cannot be loaded: {error}") from error


def _from_dict(cls: Any, method: str, config: Mapping[str, Any], return_unused: bool, kwargs: dict[str, Any]) -> Any:
    if _installed is None or not _installed.binding.claims(config):
        return _previous(AUTO_QUANTIZATION_CONFIG_MAPPING, method).from_dict(dict(config), return_unused_kwargs=return_unused, **kwargs)
    made = cls(**config)
    unused = {key: value for key, value in kwargs.items() if not hasattr(made, key)}
    made.__dict__.update({key: value for key, value in kwargs.items() if key not in unused})
    return (made, unused) if return_unused else made


def _previous(mapping: Mapping[str, Any], method: Any) -> Any:
    """The class that was there before us; when we are not installed, the one that is there, or transformers' own."""
    key = str(getattr(method, "value", method))
    if _installed is not None:
        return (_installed.quantizers if mapping is AUTO_QUANTIZER_MAPPING else _installed.configs)[key]
    return _STOCK[key] if mapping[key] is _OURS[key] else mapping[key]


def _among(rule: Any, rules: Iterable[Any]) -> bool:
    return any(rule is other for other in rules)


def _apart(model: Any, tensor_names: Iterable[str], packed: Iterable[str]) -> list[str]:
    """The containers of experts that the checkpoint holds one by one: all, where loading would stack quantized linears."""
    found = containers(model)
    if any(merged for _, _, merged in model_names(model, [f"{stem}.weight" for stem in packed])):
        return found
    targets = [target for _, target, _ in model_names(model, tensor_names)] if found else []
    return [name for name in found if any(re.match(rf"{re.escape(name)}\.\d+\.", target) for target in targets)]


def _linear_names(model: Any, packed: Mapping[str, Any]) -> dict[str, str]:
    """Checkpoint name of each quantized linear -> its name in the model. Those the model has no place for are left to the load report."""
    state = model.state_dict()
    found = {}
    for name, target, merged in model_names(model, [f"{stem}.weight" for stem in packed]):
        stem = name.removesuffix(".weight")
        if merged:
            raise InputError(
                f"{stem} is quantized, but {type(model).__name__} merges it with others into {target}, which gptqkit cannot take apart"
            )
        if target in state:
            found[stem] = target.removesuffix(".weight")
    if packed and not found:
        raise InputError(f"none of the {len(packed)} quantized linears of the checkpoint ({_some(packed)}) is in {type(model).__name__}")
    return found


def _place(model: Any, stem: str, target: str, *, has_bias: bool) -> Place:
    module = model.get_submodule(target)
    kind = type(module)
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
    elif isinstance(module, nn.Linear) and (kind.forward is nn.Linear.forward or kind.__name__ in PLAIN_LINEARS):
        out_features, in_features = module.weight.shape
    else:
        raise InputError(f"{stem} is quantized, but {target} of {type(model).__name__} is a {kind.__name__}, not a plain linear")
    bias = module.bias
    if bias is None and has_bias:  # AutoGPTQ wrote (zero) biases where the model has none
        bias = nn.Parameter(torch.empty(out_features, dtype=module.weight.dtype, device=module.weight.device))
    return Place(target, out_features, in_features, module.weight.dtype, bias)


def _initialized(dtype: torch.dtype) -> Tensor:
    """What a quantized module shows as `weight`: GPT-2's _init_weights looks at children's weights without asking while loading, and T5
    asks for its dtype in every forward."""
    stand_in = torch.empty(0, dtype=dtype)
    stand_in._is_hf_initialized = True  # type: ignore[attr-defined]
    return stand_in


def _check_complete(model: Any, tensor_names: set[str], quantized: list[str]) -> None:
    """Raises InputError for tensors of the model that no tensor of the checkpoint fills."""
    renamed = list(model_names(model, tensor_names))
    loaded = {target for _, target, _ in renamed}
    merges = any(merged for *_, merged in renamed)  # then a target's name is only the first of several: check the quantized linears
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    missing = sorted(
        name
        for name in model.state_dict()
        if name not in loaded
        and not (name in tied and (tied[name] in loaded or merges))
        and not any(tied_to == name and source in loaded for source, tied_to in tied.items())
        and not any(pattern.search(name) for pattern in ignored)
        and (not merges or any(name.startswith(prefix) for prefix in quantized))
    )
    if missing:
        raise InputError(
            f"the checkpoint lacks {len(missing)} tensors that {type(model).__name__} needs: {_some(missing)}; "
            "a shard is missing, or config.json belongs to another model"
        )


def _dense(kind: type[nn.Module], weight_OI: Tensor, bias: nn.Parameter | None) -> nn.Module:
    """A plain layer of the class that was there before."""
    out_features, in_features = weight_OI.shape
    with torch.device("meta"):
        if kind is Conv1D:
            layer: Any = Conv1D(out_features, in_features)
        else:
            layer = kind(in_features, out_features, bias=bias is not None)
    values_O = torch.zeros(out_features) if bias is None else bias.detach()
    layer.weight = nn.Parameter(weight_OI.T.contiguous() if kind is Conv1D else weight_OI)
    if layer.bias is not None:
        layer.bias = nn.Parameter(values_O.to(device=weight_OI.device, dtype=weight_OI.dtype))
    return layer


def _with_hook(old: nn.Module, new: nn.Module) -> nn.Module:
    """Moves accelerate's hook, which feeds a module that lies on another device than its neighbours."""
    hook = getattr(old, "_hf_hook", None)
    if hook is None:
        return new
    from accelerate.hooks import add_hook_to_module

    return add_hook_to_module(new, hook)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:_SHOWN]) + (", ..." if len(listed) > _SHOWN else "")
