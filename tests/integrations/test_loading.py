"""Loading through gptqkit.load and through plain from_pretrained: every family, format, width and symmetry."""

from __future__ import annotations

import copy
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests.integrations.checkpoints import FAMILIES, Checkpoint, make_checkpoint, tokens, write_tensors
from torch import nn
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import gptqkit
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.integrations.transformers import enabled
from gptqkit.kernels.linear import QuantLinear


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens().to(next(model.parameters()).device)).logits.cpu()


def linears(model: torch.nn.Module) -> dict[str, QuantLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}


def assert_close(model: torch.nn.Module, checkpoint: Checkpoint, tolerance: float = 1e-5) -> None:
    expected = logits(checkpoint.dense)
    assert (logits(model) - expected).abs().max() <= tolerance * (expected.max() - expected.min())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_logits_of_the_dense_model(family: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family)
    model = gptqkit.load(checkpoint.folder)
    stems = {name.rpartition(".")[0] for name in checkpoint.tensors if name.endswith(".qweight")}
    assert len(linears(model)) == len(stems)
    assert_close(model, checkpoint)


COMBINATIONS = [
    ("gptq", 3, True), ("gptq", 4, False), ("gptq", 8, True), ("gptq_v2", 3, False), ("gptq_v2", 4, True), ("gptq_v2", 8, False),
    ("compressed-tensors", 3, True), ("compressed-tensors", 4, False), ("compressed-tensors", 5, False), ("compressed-tensors", 8, True),
]  # fmt: skip


@pytest.mark.parametrize(("format_name", "bits", "sym"), COMBINATIONS)
def test_every_format_loads_and_is_saved_bit_for_bit(format_name: str, bits: int, sym: bool, tmp_path: Path) -> None:
    family = "llama-tied" if bits == 3 else "gpt2" if bits == 8 else "qwen2"
    checkpoint = make_checkpoint(tmp_path / "model", family, format_name, LinearSpec(bits, 32, sym), dtype=torch.bfloat16)
    gptqkit.enable()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint.folder)
        assert model.dtype == torch.bfloat16
        # ATen's int4 kernel rounds the scale to bfloat16, the dense model each weight: both are a rounding away from the truth
        assert_close(model, checkpoint, 0.05)
        assert {module.kernel_name for module in linears(model).values()} == {"cpu" if bits == 4 else "torch"}
        model.save_pretrained(tmp_path / "again", max_shard_size="40KB")
        saved = {name: tensor for file in (tmp_path / "again").glob("*.safetensors") for name, tensor in load_file(file).items()}
        assert len(list((tmp_path / "again").glob("*.safetensors"))) > 1
        assert saved.keys() == checkpoint.tensors.keys()
        for name, tensor in checkpoint.tensors.items():
            assert saved[name].dtype == tensor.dtype, name
            assert torch.equal(saved[name], tensor), name
        before, after = (json.loads((folder / "config.json").read_text()) for folder in (checkpoint.folder, tmp_path / "again"))
        assert after["quantization_config"] == before["quantization_config"]
        assert after["quantization_config"]["unknown_key"] == {"a": 1}
        assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))
    finally:
        gptqkit.disable()


@pytest.mark.parametrize("format_name", ["gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon"])
def test_dequantize_gives_the_plain_model_back(family: str, format_name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", family, format_name)
    model = gptqkit.load(checkpoint.folder).dequantize()
    assert not linears(model)
    assert {type(m) for m in model.modules()} == {type(m) for m in checkpoint.dense.modules()}
    assert torch.equal(logits(model), logits(checkpoint.dense))
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense" / "config.json").read_text())
    assert torch.equal(logits(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")), logits(checkpoint.dense))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_maps(device_map: object, llama: Checkpoint) -> None:
    pytest.importorskip("accelerate")
    assert_close(gptqkit.load(llama.folder, device_map=device_map), llama)


def test_device_is_a_shorthand(llama: Checkpoint) -> None:
    assert_close(gptqkit.load(llama.folder, device="cpu"), llama)
    with pytest.raises(InputError, match="say the same thing"):
        gptqkit.load(llama.folder, device="cpu", device_map="auto")


def test_offloaded_linears_are_prepared_for_each_call_and_dropped(llama: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("accelerate")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = gptqkit.load(llama.folder, device_map=places, offload_folder=tmp_path)
    assert_close(model, llama)
    offloaded = [module for name, module in linears(model).items() if ".layers.1." in name]
    assert {module.kernel_name for module in offloaded} == {None}
    with pytest.raises(InputError, match=r"those of model\.layers\.1\.\S+ are offloaded"):
        model.dequantize()


@pytest.mark.parametrize("shards", [1, 3])
def test_base_model_names_and_shards(shards: int, llama: Checkpoint, tmp_path: Path) -> None:
    tensors = {name.removeprefix("model."): tensor for name, tensor in llama.tensors.items()}
    shutil.copytree(llama.folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    write_tensors(tmp_path / "model", tensors, shards)
    assert_close(gptqkit.load(tmp_path / "model"), llama)


def test_dtype_can_be_chosen(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    module = linears(model)["model.layers.0.mlp.up_proj"]
    assert (module.scales.dtype, module.dtype) == (torch.float16, torch.bfloat16)
    assert_close(model, llama, 0.05)


def test_backend_can_be_forced(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder, dtype=torch.bfloat16, backend="torch")
    assert {module.kernel_name for module in linears(model).values()} == {"torch"}
    with pytest.raises(InputError, match="backend='marlin'; allowed: cpu, torch"):
        gptqkit.load(llama.folder, backend="marlin")
    with pytest.raises(InputError, match=r"no backend can multiply with model\.layers\.0[\s\S]*dtype float32; it handles bfloat16"):
        gptqkit.load(llama.folder, backend="cpu")


def test_generate_and_static_cache(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder)
    expected = llama.dense.generate(tokens(1), max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(tokens(1), max_new_tokens=8, do_sample=False), expected)
    static = model.generate(tokens(1), max_new_tokens=8, do_sample=False, cache_implementation="static", disable_compile=True)
    assert torch.equal(static, expected)
    assert model.hf_quantizer.is_compileable
    assert model.hf_quantizer.is_trainable


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_whole_model_compiles_into_one_graph(dtype: torch.dtype, llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder, dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(tokens()).logits, logits(model), atol=1e-5 if dtype == torch.float32 else 0.02, rtol=0.01)


def test_copies_and_pickles(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(logits(other), logits(model))
        assert other.config.quantization_config.to_dict() == model.config.quantization_config.to_dict()


def test_packed_tensors_are_not_trainable_and_gradients_pass(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(name.endswith(("scales", "qweight", "qzeros", "g_idx")) for name in names)
    model(tokens(), labels=tokens()).loss.backward()
    llama.dense(tokens(), labels=tokens()).loss.backward()
    ours, theirs = model.model.embed_tokens.weight.grad, llama.dense.model.embed_tokens.weight.grad
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_biases_that_only_the_checkpoint_has_are_kept(llama: Checkpoint, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    shutil.copytree(llama.folder, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    write_tensors(tmp_path / "model", {**llama.tensors, f"{name}.bias": torch.ones(64)})
    model, dense = gptqkit.load(tmp_path / "model"), copy.deepcopy(llama.dense)
    dense.model.layers[0].mlp.down_proj.bias = nn.Parameter(torch.ones(64))
    torch.testing.assert_close(logits(model), logits(dense))


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`")
def test_plain_configurations_from_the_user_are_tolerated(llama: Checkpoint, tmp_path: Path) -> None:
    load = transformers.AutoModelForCausalLM.from_pretrained
    with enabled():
        model = load(llama.folder, dtype=torch.bfloat16, quantization_config=transformers.GPTQConfig(bits=4, backend="torch"))
        assert {module.kernel_name for module in linears(model).values()} == {"torch"}
        model = load(llama.folder, quantization_config=transformers.GPTQConfig(bits=4, backend="auto"))
        assert_close(model, llama)
        pytest.importorskip("compressed_tensors")
        checkpoint = make_checkpoint(tmp_path / "ct", "llama", "compressed-tensors", LinearSpec(4, 32, False))
        model = load(checkpoint.folder, quantization_config=transformers.CompressedTensorsConfig(dequantize=True))
    assert not linears(model)
    assert torch.equal(logits(model), logits(checkpoint.dense))
    assert not hasattr(model.config, "quantization_config")


def test_enable_is_idempotent_and_disable_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    configs, quantizers = dict(AUTO_QUANTIZATION_CONFIG_MAPPING), dict(AUTO_QUANTIZER_MAPPING)
    gptqkit.enable()
    gptqkit.enable()
    assert AUTO_QUANTIZER_MAPPING["gptq"] is AUTO_QUANTIZER_MAPPING["compressed-tensors"] is not quantizers["gptq"]
    with enabled():
        pass
    assert AUTO_QUANTIZER_MAPPING["gptq"] is not quantizers["gptq"]
    gptqkit.disable()
    gptqkit.disable()
    assert (configs, quantizers) == (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING)
    gptqkit.enable()
    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", "somebody else's")
    gptqkit.disable()
    assert AUTO_QUANTIZER_MAPPING.pop("gptq") == "somebody else's"
    AUTO_QUANTIZER_MAPPING["gptq"] = quantizers["gptq"]


def test_load_leaves_transformers_as_it_was(llama: Checkpoint) -> None:
    before = AUTO_QUANTIZER_MAPPING["gptq"]
    gptqkit.load(llama.folder)
    assert AUTO_QUANTIZER_MAPPING["gptq"] is before


def test_other_configurations_go_to_the_loader_that_was_there(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Other:
        def __init__(self, config: object, **kwargs: object) -> None:
            self.quantization_config = config

    monkeypatch.setitem(AUTO_QUANTIZER_MAPPING, "gptq", Other)
    auto = transformers.quantizers.auto.AutoHfQuantizer
    with enabled():
        made = auto.from_config({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}, pre_quantized=True)
        assert isinstance(made, Other)
        assert type(made.quantization_config) is transformers.GPTQConfig
        assert isinstance(auto.from_config(transformers.GPTQConfig(bits=4), pre_quantized=False), Other)
    assert "leaves this checkpoint to transformers' own loader: quantization_config: checkpoint_format='marlin'" in caplog.text
    if not transformers.utils.is_compressed_tensors_available():
        return
    float8 = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}}}
    with enabled():
        config = auto.merge_quantization_configs(
            {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": float8}, None
        )
    assert type(config) is transformers.CompressedTensorsConfig


def test_a_dense_model_simply_loads(llama: Checkpoint, tmp_path: Path) -> None:
    llama.dense.save_pretrained(tmp_path)
    assert torch.equal(logits(gptqkit.load(tmp_path)), logits(llama.dense))


def test_folders_as_autogptq_wrote_them(llama: Checkpoint, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(llama.folder, folder)
    config = json.loads((folder / "config.json").read_text())
    options = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "quantize_config.json").write_text(json.dumps(options))
    (folder / "model.safetensors").rename(folder / "gptq_model-4bit-32g.safetensors")
    model = gptqkit.load(folder)
    assert_close(model, llama)
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["quantization_config"] == {"quant_method": "gptq", **options}
    assert "transformers_weights" not in saved
    assert_close(gptqkit.load(tmp_path / "again"), llama)
