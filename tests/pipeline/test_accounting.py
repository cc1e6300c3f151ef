"""Every parameter is accounted for, and the plan's sizes are those of the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.tiny import save_tiny
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.accounting import Account
from gptqkit.pipeline.accounting import make_account
from gptqkit.pipeline.plan import prepare

CONFIG = QuantConfig(bits=4, group_size=32, method="rtn")


def rules(account: Account) -> dict[str, int]:
    return {f"{row.state}: {row.rule}": row.parameters for row in account.rows}


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen2_moe", "deepseek_v3", "bloom"])
def test_the_sum_is_the_model(family: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m", family)
    plan = gptqkit.plan(model, CONFIG)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    assert plan.account.parameters == sum(parameter.numel() for parameter in loaded.parameters())
    assert sum(row.share or 0 for row in plan.account.rows) == pytest.approx(1)
    assert plan.account.before == plan.size_before == TensorSource.open(model).nbytes
    assert plan.account.rows[0].state == "quantized"
    if family == "qwen2_moe":
        shared = {linear.name.rpartition(".")[2] for linear in plan.linears if ".shared_expert." in linear.name}
        assert shared == {"gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    "config",
    [
        CONFIG,
        QuantConfig(bits=3, group_size=-1, method="rtn", sym=False, format="gptq_v2"),
        QuantConfig(bits=5, group_size=64, method="rtn", sym=False, format="compressed-tensors"),
        QuantConfig(bits=8, group_size=32, method="rtn", format="compressed-tensors", rules=(gptqkit.Rule("layers.0.mlp", skip=True),)),
    ],
)
def test_planned_sizes_are_those_of_the_files(config: QuantConfig, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m")
    plan = gptqkit.plan(model, config)
    run = gptqkit.quantize(model, tmp_path / "out", config)
    written = TensorSource.open(tmp_path / "out")
    assert plan.size_after == written.nbytes
    assert run.account == plan.account
    assert json.loads((tmp_path / "out" / "gptqkit" / "run.json").read_text())["account"] == plan.account.to_dict()
    inspected = gptqkit.inspect(tmp_path / "out").account
    assert [(row.state, row.rule, row.parameters, row.after) for row in inspected.rows] == [
        (row.state, row.rule, row.parameters, row.after) for row in plan.account.rows
    ]


def test_without_a_record_inspect_goes_by_names(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "m")
    gptqkit.quantize(model, tmp_path / "out", CONFIG)
    gptqkit.convert(tmp_path / "out", tmp_path / "other", format="compressed-tensors")
    found = rules(gptqkit.inspect(tmp_path / "other").account)
    assert list(found) == ["quantized: 4 bits, groups of 32", "kept: embedding", "kept: output head", "kept: norm or small parameter"]
    assert set(rules(gptqkit.inspect(model).account)) == {
        "dense: matrix of a block", "dense: embedding", "dense: output head", "dense: norm or small parameter",
    }  # fmt: skip


@pytest.fixture
def with_more(tmp_path: Path) -> Path:
    """A model whose checkpoint also holds a layer that predicts the token after the next, and a second copy of its tied embedding."""
    folder = save_tiny(tmp_path / "m", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.2.eh_proj.weight": torch.randn(64, 128),
        "model.layers.2.mlp.down_proj.weight": torch.randn(64, 128),
        "model.layers.2.enorm.weight": torch.ones(64),
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_what_transformers_does_not_build_is_kept_and_told(format: str, with_more: Path, tmp_path: Path) -> None:
    config = QuantConfig(bits=4, group_size=32, method="rtn", format=format)
    run = gptqkit.quantize(with_more, tmp_path / "out", config)
    found = rules(run.account)
    assert found["not in the model: second copy of a tied weight"] == 256 * 64
    assert found["not in the model: not a parameter of the model"] == 2 * 64 * 128 + 64
    assert run.account.parameters == sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(with_more).parameters())
    told = [event for event in run.events if event.kind == "skip"]
    assert [event.data["names"] for event in told] == [["model.layers.2.eh_proj.weight", "model.layers.2.mlp.down_proj.weight"]]
    assert told[0].data["bytes"] == 2 * 64 * 128 * 4
    assert "2 weights (0.1 MB) are not part of LlamaForCausalLM" in told[0].message
    before, after = TensorSource.open(with_more), TensorSource.open(tmp_path / "out")
    for name in told[0].data["names"]:
        assert torch.equal(before.read(name), after.read(name))
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    left = quantization["ignore"] if format == "compressed-tensors" else list(quantization["dynamic"])
    assert any(("2" in name and "eh_proj" in name) or r"^model\.layers\.2(" in name for name in left), left
    assert gptqkit.verify(tmp_path / "out", against=with_more).ok


def test_strict_does_not_leave_unbuilt_weights(with_more: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--strict: .*model\.layers\.2\.eh_proj\.weight"):
        gptqkit.quantize(with_more, tmp_path / "out", CONFIG, strict=True)
    assert not (tmp_path / "out").exists()


def test_a_parameter_without_a_rule_stops_the_plan(tmp_path: Path) -> None:
    prepared = prepare(str(save_tiny(tmp_path / "m")), CONFIG)
    plan = prepared.plan
    with pytest.raises(InputError, match=r"accounts for \d+; first: model\.embed_tokens\.weight; please report"):
        make_account(prepared.model, plan.linears, plan.skipped, [tensor for tensor in plan.kept if "embed" not in tensor.name])


def test_a_large_parameter_that_is_no_linear_stops_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class WithTable(modeling_llama.LlamaMLP):
        def __init__(self, config: object) -> None:
            super().__init__(config)
            self.table = nn.Parameter(torch.zeros(64, 64))

    monkeypatch.setattr(modeling_llama, "LlamaMLP", WithTable)
    model = save_tiny(tmp_path / "m")
    with pytest.raises(InputError, match=r"model\.layers\.0\.mlp\.table \(64, 64\) is 10 % of its block and cannot be quantized"):
        gptqkit.quantize(model, tmp_path / "out", CONFIG)
    assert not (tmp_path / "out").exists()
