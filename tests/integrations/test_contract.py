"""Every internal of transformers that gptqkit.hf.quantizer relies on. A failure here says what moved and what to look at.

Supported releases run this test at both ends of their range; a new release of transformers is first met here.
"""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from tests.integrations.checkpoints import build_model
from transformers import conversion_mapping, core_model_loading, initialization, modeling_utils, pytorch_utils
from transformers.integrations import moe
from transformers.quantizers import auto, base
from transformers.utils import quantization_config

from gptqkit.hf import quantizer
from gptqkit.hf.names import model_names

WHERE = f"transformers {transformers.__version__} changed it; adapt src/gptqkit/hf/quantizer.py"
EXPERTS = f"transformers {transformers.__version__} changed it; adapt src/gptqkit/hf/containers.py"


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (auto, "AUTO_QUANTIZER_MAPPING"),
        (auto, "AUTO_QUANTIZATION_CONFIG_MAPPING"),
        (auto, "LOADING_ATTRIBUTES_CONFIG_TYPES"),
        (auto, "AutoHfQuantizer"),
        (auto, "AutoQuantizationConfig"),
        (base, "HfQuantizer"),
        (quantization_config, "GPTQConfig"),
        (quantization_config, "CompressedTensorsConfig"),
        (quantization_config, "QuantizationMethod"),
        (conversion_mapping, "get_model_conversion_mapping"),
        (core_model_loading, "WeightConverter"),
        (core_model_loading, "WeightRenaming"),
        (core_model_loading, "rename_source_key"),
        (core_model_loading, "MergeModulelist"),
        (core_model_loading, "Concatenate"),
        (pytorch_utils, "Conv1D"),
    ],
)
def test_names_are_where_they_are_imported_from(owner: Any, name: str) -> None:
    assert hasattr(owner, name), f"{owner.__name__}.{name} is gone: {WHERE}"


def test_dispatch_tables_are_plain_dicts_with_our_methods() -> None:
    for table in (auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING):
        assert type(table) is dict, f"a table of quantizers is a {type(table).__name__}, so assigning to it may not do: {WHERE} (install)"
        assert {"gptq", "compressed-tensors"} <= table.keys(), f"a method is no longer in the tables: {WHERE} (_OURS)"


def test_tables_are_read_at_call_time_by_quant_method() -> None:
    read = inspect.getsource(auto.AutoQuantizationConfig.from_dict) + inspect.getsource(auto.AutoHfQuantizer.from_config)
    for expected in ("AUTO_QUANTIZATION_CONFIG_MAPPING[quant_method]", "AUTO_QUANTIZER_MAPPING[quant_method]", ".from_dict("):
        assert expected in read, f"dispatch no longer does {expected}: {WHERE} (install)"
    assert quantization_config.QuantizationMethod.GPTQ == "gptq", f"QuantizationMethod.GPTQ: {WHERE}"
    assert quantization_config.QuantizationMethod.COMPRESSED_TENSORS == "compressed-tensors", f"QuantizationMethod: {WHERE}"


def test_user_configurations_are_compared_by_class_name() -> None:
    merge = inspect.getsource(auto.AutoHfQuantizer.merge_quantization_configs)
    assert merge.count("__class__.__name__") >= 2, f"merge_quantization_configs compares otherwise now: {WHERE} (class names)"
    for ours, stock in (
        (quantizer.GPTQConfig, quantization_config.GPTQConfig),
        (quantizer.CompressedTensorsConfig, quantization_config.CompressedTensorsConfig),
    ):
        assert ours.__name__ == stock.__name__
        assert issubclass(ours, stock)
        assert stock in auto.LOADING_ATTRIBUTES_CONFIG_TYPES, f"{stock.__name__} has no loading attributes any more: {WHERE}"
        assert parameters(stock.from_dict) == ["config_dict", "return_unused_kwargs", "kwargs"], f"{stock.__name__}.from_dict: {WHERE}"


def test_hooks_exist_and_take_what_we_declare() -> None:
    hooks = base.HfQuantizer
    assert parameters(hooks.__init__) == ["self", "quantization_config", "kwargs"], f"HfQuantizer.__init__: {WHERE}"
    for name in ("_process_model_before_weight_loading", "_process_model_after_weight_loading"):
        assert parameters(getattr(hooks, name)) == ["self", "model", "kwargs"], f"HfQuantizer.{name}: {WHERE}"
    assert parameters(hooks._dequantize) == ["self", "model", "dtype"], f"HfQuantizer._dequantize: {WHERE}"
    assert isinstance(inspect.getattr_static(hooks, "is_trainable"), property), f"is_trainable is no property: {WHERE}"
    assert isinstance(inspect.getattr_static(hooks, "is_compileable"), property), f"is_compileable is no property: {WHERE}"
    assert callable(hooks.is_serializable), f"is_serializable is no method: {WHERE}"
    assert hooks.__abstractmethods__ <= {"is_serializable", "is_trainable"}, f"new abstract hooks {hooks.__abstractmethods__}: {WHERE}"
    assert not quantizer.Quantizer.__abstractmethods__
    assert "requires_calibration" in inspect.getsource(hooks.__init__), f"requires_calibration is not looked at: {WHERE}"
    assert '"dequantize", False' in inspect.getsource(hooks.postprocess_model), f"config.dequantize is not looked at: {WHERE}"


def test_loading_calls_the_hooks_with_the_files_of_the_checkpoint() -> None:
    source = inspect.getsource(modeling_utils.PreTrainedModel.from_pretrained)
    call = source[source.index("hf_quantizer.preprocess_model(") :][:400]
    assert "checkpoint_files=checkpoint_files" in call, f"preprocess_model gets no checkpoint_files: {WHERE}"
    assert "hf_quantizer.postprocess_model(" in source, f"postprocess_model is not called: {WHERE}"
    assert "**kwargs" in inspect.getsource(base.HfQuantizer.preprocess_model), f"preprocess_model drops its arguments: {WHERE}"


def test_loader_keeps_integers_and_takes_declared_dtypes() -> None:
    source = inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model)
    assert "empty_param.dtype" in source, f"the loader ignores the dtype of the model's parameter, so scales would be cast: {WHERE}"


def test_renaming_machinery_has_the_signature_we_call() -> None:
    expected = ["source_key", "weight_renamings", "weight_converters", "base_model_prefix", "meta_state_dict"]
    assert parameters(core_model_loading.rename_source_key)[:5] == expected, f"rename_source_key: {WHERE} (names.py: model_names)"
    assert parameters(conversion_mapping.get_model_conversion_mapping)[0] == "model", (
        f"get_model_conversion_mapping: {WHERE} (names.py: model_names)"
    )
    model = build_model("llama")
    assert list(model_names(model, ["layers.0.mlp.up_proj.weight"])) == [
        ("layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight", False)
    ], f"a base model's names do not get their prefix: {WHERE} (names.py: model_names)"


def test_models_say_what_is_tied_and_what_may_be_missing() -> None:
    model = build_model("llama-tied")
    assert dict(model.all_tied_weights_keys) == {"lm_head.weight": "model.embed_tokens.weight"}, f"all_tied_weights_keys: {WHERE}"
    assert hasattr(model, "_keys_to_ignore_on_load_missing"), f"_keys_to_ignore_on_load_missing: {WHERE} (_check_complete)"


def test_initialization_respects_the_flag_on_tensors() -> None:
    flagged = torch.zeros(3)
    flagged._is_hf_initialized = True
    initialization.normal_(flagged)
    assert not flagged.any(), f"_is_hf_initialized no longer protects a tensor: {WHERE} (_initialized)"


def test_expert_containers_describe_themselves() -> None:
    source = inspect.getsource(moe.use_experts_implementation)
    for flag in ("has_gate", "has_bias", "is_transposed", "is_concatenated"):
        assert f"self.{flag} = {flag}" in source, f"a container of experts no longer says {flag}: {EXPERTS} (refusal)"
    assert "_apply_gate" in source, f"containers have no _apply_gate any more: {EXPERTS} (Experts.combine)"
    experts = build_model("qwen3_moe").model.layers[0].mlp.experts
    assert parameters(type(experts).forward) == ["self", "hidden_states", "top_k_index", "top_k_weights"], f"experts' forward: {EXPERTS}"
    assert [name for name, _ in experts.named_parameters()] == ["gate_up_proj", "down_proj"], f"stacked parameters: {EXPERTS}"


def test_loading_asks_the_quantizer_for_its_rules_and_saving_reverts_them() -> None:
    taken = parameters(base.HfQuantizer.update_weight_conversions)
    assert taken in (["self", "weight_conversions", "model"], ["self", "weight_conversions"]), f"{WHERE} (experts)"  # 5.18; before it
    assert "hf_quantizer.update_weight_conversions(" in inspect.getsource(conversion_mapping.get_model_conversion_mapping), (
        f"{WHERE} (experts)"
    )
    assert "model._weight_conversions" in inspect.getsource(core_model_loading.convert_and_load_state_dict_in_model), (
        f"{WHERE} (_dequantize)"
    )
    assert "_weight_conversions" in inspect.getsource(core_model_loading.revert_weight_conversion), f"{WHERE} (_dequantize)"


def test_conv1d_stores_in_by_out() -> None:
    assert pytorch_utils.Conv1D(3, 5).weight.shape == (5, 3), f"Conv1D(out, in).weight is not [in, out]: {WHERE} (_place, _dense)"
