"""quantization_config: what is written describes every linear, what is read is checked, and the patterns suit the engines."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptqkit import __version__
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.formats import detect, get_format

W4 = LinearSpec(4, 128, True)
W8 = LinearSpec(8, 32, True)
LINEARS = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
NAMES = [f"model.layers.{layer}.{linear}" for layer in range(12) for linear in LINEARS]


def gptq_config(specs: dict[str, LinearSpec], skipped: list[str] | None = None, **details: Any) -> dict[str, Any]:
    return get_format("gptq").config(specs, skipped or [], desc_act=False, details=details)


def vllm_override(config: dict[str, Any], name: str) -> Any:
    """How vLLM looks a name up in `dynamic`: first match wins; False means not quantized, None means no exception."""
    for key, values in config.get("dynamic", {}).items():
        if key.startswith("-:") and re.match(key[2:], name):
            return False
        if not key.startswith("-:") and re.match(key.removeprefix("+:"), name):
            return values
    return None


def test_a_uniform_model_has_the_plain_config_that_every_engine_reads() -> None:
    config = gptq_config(dict.fromkeys(NAMES, W4), ["lm_head"], damp_percent=0.05, base="llama")
    assert config == {
        "quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True, "checkpoint_format": "gptq", "format": "gptq",
        "damp_percent": 0.05, "true_sequential": True, "static_groups": False, "lm_head": False,
        "meta": {"base": "llama", "quantizer": [f"gptqkit:{__version__}"]},
    }  # fmt: skip


def test_patterns_are_written_for_the_units_that_vllm_asks_about() -> None:
    specs = dict.fromkeys(NAMES, W4)
    specs.update({name: W8 for name in NAMES if "down_proj" in name})
    specs.update({name: W8 for name in NAMES if ".3.self_attn" in name})
    specs.update({name: W8 for name in NAMES if ".5.mlp.gate" in name or ".5.mlp.up" in name})
    config = gptq_config({name: spec for name, spec in specs.items() if ".7." not in name}, [name for name in NAMES if ".7." in name])
    eight = {"bits": 8, "group_size": 32, "sym": True}
    for name in ("mlp.down_proj",):
        assert all(vllm_override(config, f"model.layers.{layer}.{name}") == eight for layer in range(12) if layer != 7)
    assert vllm_override(config, "model.layers.3.self_attn.qkv_proj") == eight
    assert vllm_override(config, "model.layers.4.self_attn.qkv_proj") is None
    assert vllm_override(config, "model.layers.5.mlp.gate_up_proj") == eight
    assert vllm_override(config, "model.layers.5.mlp.down_proj") == eight
    assert vllm_override(config, "model.layers.6.mlp.gate_up_proj") is None
    assert vllm_override(config, "model.layers.7.self_attn.qkv_proj") is False
    assert vllm_override(config, "model.layers.7.mlp.down_proj") is False
    assert vllm_override(config, "model.layers.10.mlp.gate_up_proj") is None
    assert len(config["dynamic"]) == 4


@given(st.lists(st.sampled_from([W4, W4, W8, LinearSpec(3, -1, False), None]), min_size=len(NAMES), max_size=len(NAMES)), st.booleans())
@settings(max_examples=60, deadline=None)
def test_both_kinds_of_config_give_every_linear_its_spec_back(choice: list[LinearSpec | None], flat: bool) -> None:
    names = [name.replace("self_attn.", "").replace("mlp.", "") for name in NAMES] if flat else NAMES
    specs = {name: spec for name, spec in zip(names, choice, strict=True) if spec}
    skipped = [name for name, spec in zip(names, choice, strict=True) if not spec]
    for fmt in ("gptq", "compressed-tensors"):
        if not specs:
            continue
        config = get_format(fmt).config(specs, skipped, desc_act=False, details={})
        assert get_format(fmt).specs(config, list(specs)) == specs
        for name in skipped:
            with pytest.raises(InputError, match=re.escape(name)):
                get_format(fmt).specs(config, [name])


def test_compressed_tensors_config() -> None:
    fmt = get_format("compressed-tensors")
    one = fmt.config(dict.fromkeys(NAMES, W4), ["model.layers.0.x"], desc_act=False, details={"order": "group-aware"})
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert one["config_groups"]["group_0"]["weights"] == {
        "num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128, "dynamic": False, "actorder": "static"
    }  # fmt: skip
    assert one["ignore"] == ["lm_head", "model.layers.0.x"]
    specs = {name: LinearSpec(5, -1, False) if "down" in name else W4 for name in NAMES}
    two = fmt.config(specs, [], desc_act=False, details={})
    assert two["config_groups"]["group_1"]["targets"] == [r"re:^model\.layers\.(?:0|1|2|3|4|5|6|7|8|9|10|11)\.mlp\.down_proj$"]
    assert two["config_groups"]["group_1"]["weights"]["strategy"] == "channel"


def test_detect_tells_the_versions_and_the_writers_apart() -> None:
    assert detect({"quant_method": "gptq"}).name == "gptq"
    assert detect({"bits": 4, "group_size": 128, "desc_act": False}).name == "gptq"
    assert detect({"quant_method": "gptq", "checkpoint_format": "gptq_v2"}).name == "gptq_v2"
    assert detect({"quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:4.0"]}}) != get_format("gptq")
    assert detect({"quant_method": "gptq", "meta": {"quantizer": ["gptqkit:0.1"]}}) == get_format("gptq")
    assert detect({"quant_method": "compressed-tensors", "format": "pack-quantized"}).name == "compressed-tensors"
    with pytest.raises(InputError, match=r"quant_method='awq'; gptqkit reads quant_method gptq \(checkpoint_format gptq or gptq_v2\)"):
        detect({"quant_method": "awq"})
    with pytest.raises(InputError, match="checkpoint_format='marlin' with quant_method='gptq'"):
        detect({"quant_method": "gptq", "checkpoint_format": "marlin"})
    with pytest.raises(InputError, match="format='float-quantized' with quant_method='compressed-tensors'"):
        detect({"quant_method": "compressed-tensors", "format": "float-quantized"})


@pytest.mark.parametrize(
    ("fmt", "config", "message"),
    [
        ("gptq", {"group_size": 128}, "bits=None; allowed: an integer from 2 to 8"),
        ("gptq", {"bits": True}, "bits=True; allowed"),
        ("gptq", {"bits": 4, "group_size": 0}, "group_size=0; allowed: an integer from 1"),
        ("gptq", {"bits": 4, "sym": "yes"}, "sym='yes'; allowed: true, false"),
        ("gptq", {"bits": 4, "dynamic": ["x"]}, "expected a mapping of patterns"),
        ("gptq", {"bits": 4, "dynamic": {"+:(": {}}}, "is not a regular expression"),
        ("gptq", {"bits": 4, "dynamic": {"+:x": 3}}, "maps to 3; expected options"),
        ("compressed-tensors", {}, "config_groups=None"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 4}}}, "ignore": 3}, "ignore=3"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"group_size": "x"}}}}, "group_size='x'"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": []}}}, "config_groups.g has no targets"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"type": "float"}}}}, "reads integer weights"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "input_activations": {}}}}, "quantizes input activations"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["x"], "weights": {"num_bits": 4}}}}, "no config group has model"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"strategy": "tensor"}}}}, "strategy='tensor'"),
        ("compressed-tensors", {"config_groups": {"g": {"targets": ["Linear"], "weights": {"num_bits": 16}}}}, "num_bits=16"),
    ],
)
def test_hostile_configs_are_input_errors(fmt: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        get_format(fmt).specs(config, ["model.layers.0.x"])
