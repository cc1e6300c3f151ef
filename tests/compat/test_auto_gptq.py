"""Scripts written for AutoGPTQ: the calls they make, in the order they make them, on the bundled model."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, TextGenerationPipeline

import gptqkit
from gptqkit.compat.auto_gptq import AutoGPTQForCausalLM, BaseGPTQForCausalLM, BaseQuantizeConfig
from gptqkit.compat.once import say_once
from gptqkit.core.errors import InputError
from gptqkit.data import heldout_text, model_folder

ORIGINAL = str(model_folder())


@pytest.fixture(autouse=True)
def _nothing_said_yet() -> None:
    say_once.cache_clear()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(ORIGINAL)


@pytest.fixture(scope="module")
def examples(tokenizer: Any) -> list[Any]:
    text = heldout_text().read_text(encoding="utf-8")
    return [tokenizer(text[start : start + 300], return_tensors="pt") for start in range(0, 3600, 300)]


@pytest.fixture(scope="module")
def saved(examples: list[Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The script of the AutoGPTQ readme up to save_quantized."""
    quantize_config = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False, damp_percent=0.01)
    model = AutoGPTQForCausalLM.from_pretrained(ORIGINAL, quantize_config)
    model.quantize(examples, use_triton=False, batch_size=1)
    folder = tmp_path_factory.mktemp("compat") / "opt-4bit"
    model.save_quantized(str(folder), use_safetensors=True)
    return folder


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def logits(model: Any) -> torch.Tensor:
    return model(torch.arange(1, 33)[None]).logits


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "gptqkit" and record.levelno == logging.WARNING]


def test_what_is_saved_is_a_standard_checkpoint(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())["quantization_config"]
    assert (config["bits"], config["group_size"], config["desc_act"], config["quant_method"]) == (4, 128, False, "gptq")
    assert (saved / "quantize_config.json").is_file()
    assert torch.equal(logits(AutoGPTQForCausalLM.from_quantized(saved, device="cpu")), logits(gptqkit.load(saved, device="cpu")))


def test_loading_and_generating_as_scripts_do(saved: Path, tokenizer: Any) -> None:
    model = AutoGPTQForCausalLM.from_quantized(str(saved), device="cpu", use_exllama=True, exllama_config={"version": 2})
    inputs = tokenizer("The history of", return_tensors="pt").to(model.device)
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    assert output.shape == (1, inputs.input_ids.shape[1] + 8)
    assert torch.equal(output, model.model.generate(**inputs, max_new_tokens=8, do_sample=False))
    assert model.eval() is model
    assert model.to("cpu") is model
    assert model.quantized
    assert model.config.hidden_size == 256
    assert model.model_type == "llama"
    assert model.hf_device_map is None
    assert model.num_parameters() > 0
    assert model.quantize_config.bits == 4
    assert not hasattr(model, "no_such_attribute")


def test_in_a_pipeline(saved: Path, tokenizer: Any) -> None:
    pipeline = TextGenerationPipeline(model=AutoGPTQForCausalLM.from_quantized(saved, device="cpu"), tokenizer=tokenizer, device="cpu")
    assert len(pipeline("The river", max_new_tokens=4)[0]["generated_text"]) > len("The river")


def test_each_engine_switch_is_explained_once(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        AutoGPTQForCausalLM.from_quantized(saved, device="cpu", use_marlin=True, use_triton=True, inject_fused_attention=True)
    said = warnings(caplog)
    assert len(said) == 3
    assert any(line.startswith("use_marlin=True: the fastest backend is chosen for each linear") for line in said)
    assert any(line.startswith("inject_fused_attention=True has no effect") for line in said)


def test_default_switches_say_nothing(saved: Path, caplog: pytest.LogCaptureFixture) -> None:
    AutoGPTQForCausalLM.from_quantized(
        saved, device="cpu", use_triton=False, use_cuda_fp16=True, inject_fused_mlp=False, disable_exllama=False, low_cpu_mem_usage=False,
        trust_remote_code=False, warmup_triton=False, use_safetensors=True, model_basename=None, quantize_config=None, max_memory=None,
    )  # fmt: skip
    assert warnings(caplog) == []


def test_trainable_has_gradients(saved: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(saved, device="cpu", trainable=True)
    embeds = torch.randn(1, 4, 256, dtype=model.dtype, requires_grad=True)
    model(inputs_embeds=embeds).logits.float().sum().backward()
    assert embeds.grad is not None
    assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize(("static_groups", "sorted_groups"), [(False, False), (True, True)])
def test_desc_act_stores_groups_and_static_groups_do_not(
    examples: list[Any], tmp_path: Path, static_groups: bool, sorted_groups: bool
) -> None:
    config = BaseQuantizeConfig(bits=4, group_size=32, desc_act=True, static_groups=static_groups)
    model = AutoGPTQForCausalLM.from_pretrained(ORIGINAL, config)
    model.quantize([example["input_ids"][0].tolist() for example in examples[:4]])
    model.save_pretrained(tmp_path)
    groups = [tensor for name, tensor in tensors(tmp_path).items() if name.endswith("q_proj.g_idx")]
    assert groups
    assert all(torch.equal(group, group.sort().values) is sorted_groups for group in groups)
    assert json.loads((tmp_path / "quantize_config.json").read_text())["desc_act"] is not static_groups


def test_the_quantized_model_works_before_it_is_saved(examples: list[Any], tokenizer: Any) -> None:
    model = AutoGPTQForCausalLM.from_pretrained(ORIGINAL, BaseQuantizeConfig(bits=8))
    assert not model.quantized
    assert model.to("cpu").eval().config.hidden_size == 256
    model.quantize([{"input_ids": example["input_ids"][0].tolist()} for example in examples[:3]])
    assert model.generate(**tokenizer("The", return_tensors="pt").to(model.device), max_new_tokens=2).shape[0] == 1
    with pytest.raises(InputError, match="the model is quantized already"):
        model.quantize(examples)


def test_saving_again_replaces_the_earlier_result(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "again"
    shutil.copytree(saved, folder)
    (folder / "model.safetensors").write_bytes(b"stale")
    model = AutoGPTQForCausalLM.from_quantized(saved, device="cpu")
    model.save_quantized(folder)
    again = AutoGPTQForCausalLM.from_quantized(folder, device="cpu")
    assert torch.equal(logits(again), logits(model))


def test_saving_in_the_other_gptq_format(saved: Path, tmp_path: Path) -> None:
    model = AutoGPTQForCausalLM.from_quantized(saved, device="cpu")
    model.save_quantized(tmp_path / "v2", checkpoint_format="gptq_v2")
    assert json.loads((tmp_path / "v2" / "config.json").read_text())["quantization_config"]["checkpoint_format"] == "gptq_v2"
    assert torch.equal(logits(gptqkit.load(tmp_path / "v2", device="cpu")), logits(model))


@pytest.mark.parametrize("basename", [None, "gptq_model-4bit-128g"])
def test_old_file_names(saved: Path, tmp_path: Path, basename: str | None) -> None:
    save_file(tensors(saved), tmp_path / "gptq_model-4bit-128g.safetensors", metadata={"format": "pt"})
    config = json.loads((saved / "config.json").read_text())
    recipe = config.pop("quantization_config")
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "quantize_config.json").write_text(json.dumps({key: recipe[key] for key in ("bits", "group_size", "desc_act", "sym")}))
    before = sorted(path.name for path in tmp_path.iterdir())
    model = AutoGPTQForCausalLM.from_quantized(tmp_path, model_basename=basename, device="cpu")
    assert torch.equal(logits(model), logits(gptqkit.load(saved, device="cpu")))
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    (tmp_path / "quantize_config.json").unlink()
    given = BaseQuantizeConfig(bits=4, group_size=128, desc_act=False)
    assert torch.equal(logits(AutoGPTQForCausalLM.from_quantized(tmp_path, quantize_config=given, device="cpu")), logits(model))
    with pytest.raises(InputError, match=r"has no quantization config .*pass quantize_config="):
        AutoGPTQForCausalLM.from_quantized(tmp_path, device="cpu")


def test_save_refuses_to_write_over_another_model(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(ORIGINAL, tmp_path / "original")
    model = AutoGPTQForCausalLM.from_quantized(saved, device="cpu")
    with pytest.raises(InputError, match="holds the weights of another model; choose an empty folder"):
        model.save_quantized(tmp_path / "original")
    fresh = BaseGPTQForCausalLM(BaseQuantizeConfig(), source=str(tmp_path / "original"), model=model.model)
    with pytest.raises(InputError, match="would write over the original model"):
        fresh.save_quantized(tmp_path / "original")
    assert (tmp_path / "original" / "model.safetensors").stat().st_size > 8_000_000


def test_refusals_name_the_remedy(saved: Path, examples: list[Any]) -> None:
    config = BaseQuantizeConfig(group_size=128)
    model = AutoGPTQForCausalLM.from_pretrained(ORIGINAL, config)
    with pytest.raises(InputError, match=r"call \.quantize\(examples\) first"):
        model.save_quantized("anywhere")
    with pytest.raises(InputError, match=r"nothing is loaded before \.quantize\(examples\)"):
        _ = model.model
    with pytest.raises(InputError, match=r"examples\[0\] is text; tokenize first"):
        model.quantize(["a text"])
    with pytest.raises(InputError, match="at least one"):
        model.quantize([])
    with pytest.raises(InputError, match="hf upload OWNER/NAME FOLDER"):
        model.push_to_hub("owner/name")
    with pytest.raises(InputError, match="only safetensors files are ever read"):
        AutoGPTQForCausalLM.from_quantized(saved, use_safetensors=False)
    with pytest.raises(InputError, match=r"checkpoint_format='marlin'; allowed: gptq, gptq_v2"):
        AutoGPTQForCausalLM.from_pretrained(ORIGINAL, BaseQuantizeConfig(checkpoint_format="marlin"))
    with pytest.raises(InputError, match=r"group_size=100; allowed: 32, 64, 128, 256, -1"):
        AutoGPTQForCausalLM.from_pretrained(ORIGINAL, BaseQuantizeConfig(group_size=100))
    with pytest.raises(InputError, match=r"revision='main'\) is not supported for a hub id; download first"):
        AutoGPTQForCausalLM.from_pretrained("owner/name", config, revision="main")
    with pytest.raises(InputError, match=r"use AutoGPTQForCausalLM\.from_pretrained"):
        AutoGPTQForCausalLM()


def test_config_round_trip(saved: Path, tmp_path: Path) -> None:
    stored = BaseQuantizeConfig.from_pretrained(saved)
    assert (stored.bits, stored.group_size, stored.desc_act) == (4, 128, False)
    config = BaseQuantizeConfig.from_dict({"w_bit": 3, "q_group_size": 64, "desc_act": False, "from_the_future": [1]})
    assert (config.bits, config.group_size) == (3, 64)
    config.model_name_or_path = str(tmp_path)
    config.save_pretrained(tmp_path / "new")
    written = json.loads((tmp_path / "new" / "quantize_config.json").read_text())
    assert written["from_the_future"] == [1]
    assert written["model_name_or_path"] is None
    config.model_name_or_path = None
    assert BaseQuantizeConfig.from_pretrained(tmp_path / "new") == config
    with pytest.raises(InputError, match="is not a quantized model"):
        BaseQuantizeConfig.from_pretrained(ORIGINAL)


def test_config_defaults_are_those_of_autogptq() -> None:
    config = BaseQuantizeConfig()
    assert (config.bits, config.group_size, config.damp_percent, config.desc_act, config.static_groups) == (4, -1, 0.01, True, False)
    assert (config.sym, config.true_sequential, config.model_name_or_path, config.model_file_base_name) == (True, True, None, None)
    assert config.quant_config().column_order == "desc-act"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 5}, "bits=5; allowed: 2, 3, 4, 8"),
        ({"group_size": 0}, "group_size=0; allowed: -1"),
        ({"damp_percent": 1.0}, "damp_percent=1.0; allowed: above 0 and below 1"),
    ],
)
def test_config_values_out_of_range(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        BaseQuantizeConfig(**options)


def test_true_sequential_false_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    config = BaseQuantizeConfig(true_sequential=False)
    config.quant_config()
    config.quant_config()
    assert len(warnings(caplog)) == 1
