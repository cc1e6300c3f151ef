"""Mixture-of-experts models from the plan to the loaded model, and experts that calibration hardly or never reaches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

import gptqkit
from gptqkit import QuantConfig, Rule
from gptqkit.algorithms import gptq
from gptqkit.checkpoint.inspect import inspect_checkpoint
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.checkpoint.source import TensorSource
from gptqkit.core.events import Event
from gptqkit.hf.skeleton import build_skeleton, checkpoint_names, quiet_transformers
from gptqkit.kernels.linear import QuantLinear

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "deepseek_v3", "nemotron_h")
CONFIG = QuantConfig(bits=4, group_size=32)
SMALL: dict[str, Any] = {"calibration": token_ids(), "samples": 12, "seqlen": 32}
IDS = torch.tensor(token_ids(2, 16, seed=5))


def put(model: Any, name: str, value: torch.Tensor) -> None:
    """Writes the linear `name` of the model with experts taken apart into transformers' model."""
    owner, is_expert, rest = name.removesuffix(".weight").partition(".experts.")
    if not is_expert:
        model.get_submodule(owner).weight.data.copy_(value)
        return
    index, part = rest.split(".")
    stacked = model.get_submodule(f"{owner}.experts")
    if hasattr(stacked, part):
        getattr(stacked, part).data[int(index)] = value
    else:
        stacked.gate_up_proj.data[int(index)].chunk(2)[part == "up_proj"].copy_(value)


def dense_logits(original: Path, quantized: Path) -> torch.Tensor:
    """Of transformers' own model with every quantized linear replaced by its dequantized value."""
    checkpoint = QuantizedCheckpoint.open(quantized)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    disk = checkpoint_names(build_skeleton(model.config, torch.float32), [f"{name}.weight" for name in checkpoint.linears])
    assert len(disk) == len(checkpoint.linears)
    for name, disk_name in disk.items():
        put(model, name, checkpoint.read_linear(disk_name.removesuffix(".weight")).dequantize())
    with torch.no_grad():
        return model(IDS).logits


def loaded(folder: Path) -> Any:
    with quiet_transformers():
        return gptqkit.load(folder, dtype=torch.float32)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("format", ["gptq", "compressed-tensors"])
def test_quantized_loaded_and_saved_again(family: str, format: str, tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", family)
    out = tmp_path / "out"
    run = gptqkit.quantize(model, out, QuantConfig(bits=4, group_size=32, format=format), **SMALL)
    assert run.check is not None
    assert gptqkit.verify(out, against=model).ok
    quantized = loaded(out)
    assert sum(isinstance(module, QuantLinear) for module in quantized.modules()) == len(run.linears)
    expected = dense_logits(model, out)
    with torch.no_grad():
        assert (quantized(IDS).logits - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())
    assert quantized.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 20)
    quantized.save_pretrained(tmp_path / "again")
    before, after = TensorSource.open(out), TensorSource.open(tmp_path / "again")
    assert sorted(before.names) == sorted(after.names)
    assert all(torch.equal(before.read(name), after.read(name)) for name in before.names)
    dense = quantized.dequantize()
    dense.save_pretrained(tmp_path / "dense")
    assert sorted(TensorSource.open(tmp_path / "dense").names) == sorted(TensorSource.open(model).names)
    with torch.no_grad():
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)(IDS).logits
    assert (again - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_routers_stay_in_full_precision_and_the_configuration_names_them(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen2_moe")
    run = gptqkit.quantize(model, tmp_path / "out", QuantConfig(method="rtn", group_size=32, format="compressed-tensors"))
    unquantized = [f"model.layers.{n}.mlp.{name}" for n in (0, 1) for name in ("gate", "shared_expert_gate")]
    reasons = {tensor.name: tensor.reason for tensor in gptqkit.plan(model, CONFIG).kept}
    assert [reasons[f"{name}.weight"] for name in unquantized] == ["router", "linear of one output"] * 2
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["ignore"] == ["lm_head", *unquantized]
    assert inspect_checkpoint(tmp_path / "out").specs[0]["linears"] == len(run.linears) == 2 * (4 + 3 + 4 * 3)


def test_skipped_experts_load_beside_quantized_ones(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "mixtral")
    rules = (Rule(r"layers\.0\.block_sparse_moe\.experts\.2\.", skip=True), Rule(r"experts\.1\.w2$", bits=8))
    gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=4, group_size=32, rules=rules), **SMALL)
    quantized = loaded(tmp_path / "out")
    assert type(quantized.model.layers[0].mlp.experts.get_submodule("2.up_proj")) is torch.nn.Linear
    assert quantized.model.layers[1].mlp.experts.get_submodule("1.down_proj").spec.bits == 8
    expected = dense_logits(model, tmp_path / "out")
    with torch.no_grad():
        assert (quantized(IDS).logits - expected).abs().max() <= 1e-4 * (expected.max() - expected.min())


def test_same_bytes_whatever_the_memory(tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_experts=3)
    gptqkit.quantize(model, tmp_path / "paused", CONFIG, **SMALL)
    gptqkit.quantize(model, tmp_path / "replayed", CONFIG, memory=1_000, **SMALL)
    assert gptqkit.plan(model, CONFIG, samples=12, seqlen=32).memory.paused
    assert not gptqkit.plan(model, CONFIG, samples=12, seqlen=32, memory=1_000).memory.paused
    paused, replayed = TensorSource.open(tmp_path / "paused"), TensorSource.open(tmp_path / "replayed")
    assert all(torch.equal(paused.read(name), replayed.read(name)) for name in paused.names)


def one_sided(folder: Path, loud: float = 50.0) -> Path:
    """A model whose router sends every token to experts 0 and 1 of four, by a channel that is `loud` in every token."""
    model = AutoModelForCausalLM.from_pretrained(save_tiny(folder / "random", "qwen3_moe"), dtype=torch.float32)
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 0] = loud
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[:, 0] = torch.tensor([9.0, 8.0, -8.0, -9.0])
    model.save_pretrained(folder / "model")
    return folder / "model"


def test_experts_that_no_token_reaches_are_quantized_well_and_reported(tmp_path: Path) -> None:
    model, events = one_sided(tmp_path), []
    run = gptqkit.quantize(model, tmp_path / "out", QuantConfig(bits=3, group_size=32), emit=events.append, **SMALL)
    rounded = gptqkit.quantize(model, tmp_path / "rtn", QuantConfig(bits=3, group_size=32, method="rtn"))
    experts = [record for record in run.linears if ".experts." in record.name]
    assert {record.name.split(".experts.")[1][0]: record.tokens for record in experts} == {"0": 384, "1": 384, "2": 0, "3": 0}
    for record in experts:
        reached = record.name.split(".experts.")[1][0] in "01"
        said = f"no calibration tokens were routed here, fewer than the {record.shape[1]} features of its input"
        assert (said in " ".join(record.events)) is not reached
    fallbacks = {event.data["name"] for event in events if isinstance(event, Event) and event.kind == "fallback"}
    assert {record.name for record in experts if record.tokens == 0} <= fallbacks
    checkpoint, source, plain = (
        QuantizedCheckpoint.open(tmp_path / "out"),
        TensorSource.open(model),
        QuantizedCheckpoint.open(tmp_path / "rtn"),
    )
    assert len(rounded.linears) == len(run.linears)
    unreached = [record.name for record in experts if record.tokens == 0]
    change = {False: 0.0, True: 0.0}
    for name in unreached:
        weight = source.read(f"{name}.weight")
        for folder in (checkpoint, plain):
            value = folder.read_linear(name).dequantize()
            assert bool(value.isfinite().all())
            assert bool((value != 0).any(dim=1).all())
            change[folder is plain] += float((value - weight).norm() / weight.norm()) / len(unreached)
    assert change[False] < 2 * change[True], "calibrated on other tokens, it must stay about as close as rounding does"


def layer_errors(model: Path, folder: Path, layer: int) -> dict[str, float]:
    """By expert, the error of its output on tokens of its layer relative to that output, in the original's block on its own tokens."""
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    seen: list[torch.Tensor] = []
    stacked = original.model.layers[layer].mlp.experts
    hook = stacked.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        original(torch.tensor(token_ids(16, 32, seed=11)))
    hook.remove()
    tokens, checkpoint, source = seen[0].reshape(-1, seen[0].shape[-1]), QuantizedCheckpoint.open(folder), TensorSource.open(model)
    errors = {}
    for index in range(4):
        name = f"model.layers.{layer}.mlp.experts.{index}"
        outputs = []
        for read in (lambda leaf, name=name: source.read(f"{name}.{leaf}.weight"),
                     lambda leaf, name=name: checkpoint.read_linear(f"{name}.{leaf}").dequantize()):  # fmt: skip
            inner = torch.nn.functional.silu(tokens @ read("gate_proj").T) * (tokens @ read("up_proj").T)
            outputs.append(inner @ read("down_proj").T)
        errors[str(index)] = float((outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum())
    return errors


@pytest.mark.parametrize("everything", [False, True])
def test_unreached_experts_compute_better_than_rounded_ones(everything: bool, tmp_path: Path) -> None:
    """On tokens of their layer, which the router of another text might send them: the error beside that of rounding to nearest."""
    model, events = one_sided(tmp_path, loud=3.0), []
    many: dict[str, Any] = {"calibration": token_ids(66, 32), "samples": 64, "seqlen": 32}
    config = QuantConfig(bits=3, group_size=32, calibrate_all_experts=everything)
    run = gptqkit.quantize(model, tmp_path / "out", config, emit=events.append, **many)
    gptqkit.quantize(model, tmp_path / "rtn", QuantConfig(bits=3, group_size=32, method="rtn"))
    for layer in range(2):
        solved, rounded = layer_errors(model, tmp_path / "out", layer), layer_errors(model, tmp_path / "rtn", layer)
        assert all(0 < solved[index] < rounded[index] / 10 for index in "23"), (solved, rounded)
    spreads = [(spread.experts, spread.least, spread.most, spread.under, spread.never) for spread in run.coverage]
    assert spreads == [(4, 0, 2048, 2, 2)] * 2
    record = json.loads((tmp_path / "out" / "gptqkit" / "run.json").read_text())
    assert [block["never"] for block in record["coverage"]] == [2, 2]
    said = [event.message for event in events if isinstance(event, Event) and event.kind == "note" and "experts saw" in event.message]
    few = "4 experts saw 0 to 2048 calibration tokens, median 1024; 2 saw fewer than they have features, 2 of them none"
    assert said == [f"block 1: {few}", f"block 2: {few}"]
    words = "all 2048 tokens of its layer were shown to it" if everything else "tokens of its layer were added"
    assert sum(words in " ".join(record.events) for record in run.linears) == 2 * 2 * 3


def test_all_experts_share_one_factorization_of_what_they_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the tokens of a layer, not one for each expert; and the forward goes where the router sends it."""
    model, sizes = save_tiny(tmp_path / "model", "qwen3_moe", num_hidden_layers=1), []
    factorize = gptq.factorize

    def counting(gram_II: torch.Tensor, *args: Any, **options: Any) -> Any:
        sizes.append(gram_II.shape[0])
        return factorize(gram_II, *args, **options)

    monkeypatch.setattr(gptq, "factorize", counting)
    runs = {}
    for everything in (False, True):
        sizes.clear()
        runs[everything] = gptqkit.quantize(
            model, tmp_path / f"{everything}", QuantConfig(bits=4, group_size=32, calibrate_all_experts=everything), **SMALL
        )
        # q k v, o, then gate and up of four experts or of all at once; and what down reads, which is 32 wide
        assert sizes.count(64) == (3 if everything else 6)
        assert sizes.count(32) == 4
    assert [record.tokens for record in runs[True].linears] == [record.tokens for record in runs[False].linears]


@pytest.mark.parametrize("options", [{"preset": "best"}, {"method": "awq+gptq"}, {"method": "awq"}])
def test_all_experts_with_other_methods_whatever_the_memory(options: dict[str, Any], tmp_path: Path) -> None:
    model = save_tiny(tmp_path / "model", "qwen3_moe", num_experts=3)
    config = QuantConfig(bits=4, group_size=32, calibrate_all_experts=True, **options)
    for name, memory in (("paused", None), ("replayed", 1_000)):
        gptqkit.quantize(model, tmp_path / name, config, memory=memory, **SMALL)
    paused, replayed = TensorSource.open(tmp_path / "paused"), TensorSource.open(tmp_path / "replayed")
    assert all(torch.equal(paused.read(name), replayed.read(name)) for name in paused.names)
    assert gptqkit.verify(tmp_path / "paused", against=model).ok
