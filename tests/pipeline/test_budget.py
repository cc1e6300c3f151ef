"""Bit budgets in a whole run: what is measured, what is chosen, what is written, and that resuming changes nothing."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, token_ids
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.algorithms.gptq import solve_group
from gptqkit.core.events import Event
from gptqkit.formats.patterns import FUSED
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.activations import Activations
from gptqkit.pipeline.sensitivity import Measuring, Sensitivity, choose_tokens, measure
from gptqkit.pipeline.units import find_units
from gptqkit.planner.budget import reference

SMALL: dict[str, Any] = {"calibration": token_ids(32, 32), "samples": 24, "seqlen": 32, "dtype": "float32"}
CONFIG = QuantConfig(target_bits=3.6)
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "llama", num_hidden_layers=3)


def digests(folder: Path) -> dict[str, str]:
    files = [*folder.glob("*.safetensors"), folder / "config.json"]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def task_for(folder: Path, config: QuantConfig, room: int = 1 << 30, emit: Callable[[Event], None] = lambda event: None) -> Measuring:
    model = StreamedModel.open(folder, device=CPU, dtype=torch.float32)
    tokens = choose_tokens([torch.tensor(ids) for ids in token_ids(24, 32)], 128, CPU)

    def place(count: int, name: str) -> Activations:
        return Activations(count, device=CPU, place=CPU)

    return Measuring(
        model=model, config=config, target_bits=config.target_bits or 0, units=find_units(model, config), tokens=tokens, paused=True,
        room=room, place=place, emit=emit,
    )  # fmt: skip


def measured(task: Measuring, known: dict[str, Sensitivity] | None = None) -> dict[str, Sensitivity]:
    return {name: value for part in measure(task, known or {}) for name, value in part.items()}


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors"])
def test_the_checkpoint_has_what_the_budget_says(form: str, model: Path, tmp_path: Path) -> None:
    run = gptqkit.quantize(model, tmp_path / "out", QuantConfig(target_bits=3.6, format=form), **SMALL)
    budget = run.budget
    assert budget is not None
    weights = sum(record.shape[0] * record.shape[1] for record in run.linears)
    stored = sum(
        gptqkit.QuantConfig(bits=r.bits, group_size=r.group_size).spec("").bits_per_weight * r.shape[0] * r.shape[1] for r in run.linears
    )
    assert 3.4 < budget.bits_per_weight <= 3.6
    assert budget.bits_per_weight == pytest.approx(stored / weights)
    assert len({(record.bits, record.group_size) for record in run.linears}) > 1
    assert sum(line.share for line in budget.lines) == pytest.approx(1)
    assert sum(line.linears for line in budget.lines) == len(run.linears)
    found = {entry.name: (entry.bits, entry.group_size) for entry in gptqkit.inspect(tmp_path / "out").linears}
    assert found == {record.name: (record.bits, record.group_size) for record in run.linears}
    for name, spec in found.items():
        prefix, _, leaf = name.rpartition(".")
        assert all(spec == found[f"{prefix}.{part}"] for parts in FUSED.values() if leaf in parts for part in parts)
    verification = gptqkit.verify(tmp_path / "out", against=model)
    assert verification.ok
    assert not any("must have one spec" in str(verdict.reasons) for verdict in verification.engines)
    record = json.loads((tmp_path / "out" / "gptqkit" / "run.json").read_text())
    assert record["budget"]["lines"][0]["unit"] == "model.layers.0.self_attn.{q_proj,k_proj,v_proj}"
    assert record["config"]["target_bits"] == 3.6
    assert record["config"]["rules"] == []
    assert run.check is not None
    assert run.check.kl is not None
    assert 0.2 < run.check.kl / budget.kl < 5


def test_measured_units_are_what_a_whole_model_shows(model: Path) -> None:
    """The oracle: transformers' model in float32, one unit solved on the same tokens and put in, KL on the probe tokens."""
    task = task_for(model, CONFIG)
    found = measured(task)
    whole: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    probe, fit = torch.cat(task.tokens.probe), torch.cat(task.tokens.fit)
    for name in ("model.layers.0.self_attn.{q_proj,k_proj,v_proj}", "model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj"):
        unit = next(unit for unit in task.units if unit.name == name)
        linears = [whole.get_submodule(linear) for linear in unit.linears]
        seen: list[torch.Tensor] = []
        hook = linears[0].register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].flatten(0, 1)))
        with torch.no_grad():
            whole(fit)
            hook.remove()
            before = log_softmax(whole(probe).logits, -1)
            gram_II = seen[0].T @ seen[0] / seen[0].shape[0]
            weights = [linear.weight.detach().clone() for linear in linears]
            spec = reference(unit, 3.6)
            assert spec is not None
            solutions = solve_group(weights, gram_II, [spec] * len(weights), order="group-aware", damp=0.01, tokens=fit.numel())
            for linear, solution in zip(linears, solutions, strict=True):
                linear.weight.copy_(solution.weight.dequantize())
            after = log_softmax(whole(probe).logits, -1)
            for linear, weight in zip(linears, weights, strict=True):
                linear.weight.copy_(weight)
        kl = float((before.exp() * (before - after)).sum(-1).mean())
        assert found[name].kl == pytest.approx(kl, rel=0.05)
        assert found[name].losses[unit.options.index(spec)] == found[name].kl
        assert found[name].losses[unit.options.index(None)] == 0
        bits = [(option.bits_per_weight, loss) for option, loss in zip(unit.options, found[name].losses, strict=True) if option is not None]
        assert max(loss for width, loss in bits if width > 4) < min(loss for width, loss in bits if width < 3)


def test_passes_and_what_is_known_change_no_bit(model: Path) -> None:
    stages: list[str] = []
    at_once = measured(task_for(model, CONFIG))
    by_block = measured(task_for(model, CONFIG, room=1, emit=lambda event: stages.append(event.message) if event.kind == "stage" else None))
    assert by_block == at_once
    assert stages[1:] == ["measuring 4 of 12 units"] * 3
    names = list(at_once)
    known = {name: at_once[name] for name in (*names[:4], *names[6:])}
    assert measured(task_for(model, CONFIG), known) == {name: at_once[name] for name in names[4:6]}
    assert measured(task_for(model, CONFIG), at_once) == {}


class Killed(Exception):
    pass


def test_an_interrupted_measurement_goes_on_where_it_was(model: Path, tmp_path: Path) -> None:
    """Short of memory, so that activations wait on disk and measuring takes three passes; interrupted in the second."""
    stages: list[str] = []

    def stop(event: Event) -> None:
        stages.append(event.message)
        if stages.count("measuring 4 of 12 units") == 2:
            raise Killed

    whole = gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    with pytest.raises(Killed):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, memory=1, emit=stop, **SMALL)
    assert not (tmp_path / "out" / "config.json").exists()
    stages.clear()
    resumed = gptqkit.quantize(model, tmp_path / "out", CONFIG, memory=1, resume=True, emit=lambda e: stages.append(e.message), **SMALL)
    assert stages.count("measuring 4 of 12 units") == 2
    assert resumed.budget == whole.budget
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_after_measuring_a_resumed_run_does_not_measure_again(model: Path, tmp_path: Path) -> None:
    stages: list[str] = []

    def stop(event: Event) -> None:
        if event.message == "block 2 of 3" and "variants" not in event.data:
            raise Killed

    whole = gptqkit.quantize(model, tmp_path / "whole", CONFIG, **SMALL)
    with pytest.raises(Killed):
        gptqkit.quantize(model, tmp_path / "out", CONFIG, emit=stop, **SMALL)
    resumed = gptqkit.quantize(model, tmp_path / "out", CONFIG, resume=True, emit=lambda e: stages.append(e.message), **SMALL)
    assert not any(stage.startswith("measuring 1") for stage in stages)
    assert resumed.budget == whole.budget
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_rules_fix_linears_and_count(model: Path, tmp_path: Path) -> None:
    rules = ["layers.0.mlp.down_proj=skip", "layers.1.self_attn=bits:8,group_size:32", "layers.2.self_attn.q_proj=bits:4,group_size:64"]
    skips: list[str] = []
    run = gptqkit.quantize(
        model, tmp_path / "out", QuantConfig.from_dict({"target_bits": 5.5, "rules": rules}),
        emit=lambda event: skips.append(event.data["name"]) if event.kind == "skip" else None, **SMALL,
    )  # fmt: skip
    assert run.budget is not None
    lines = {line.unit: line for line in run.budget.lines}
    skipped = lines["model.layers.0.mlp.down_proj"]
    assert (skipped.bits, skipped.kl) == (None, None)
    assert skips == ["model.layers.0.mlp.down_proj.weight"]
    assert [lines[f"model.layers.1.self_attn.{part}_proj"].bits for part in "qkvo"] == [8] * 4
    assert lines["model.layers.2.self_attn.q_proj"].kl is None
    assert (lines["model.layers.2.self_attn.q_proj"].bits, lines["model.layers.2.self_attn.q_proj"].group_size) == (4, 64)
    assert lines["model.layers.2.self_attn.{k_proj,v_proj}"].kl is not None
    assert 5.2 < run.budget.bits_per_weight <= 5.5


def test_experts_of_a_layer_get_one_spec(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "moe", "qwen3_moe")
    run = gptqkit.quantize(folder, tmp_path / "out", QuantConfig(target_bits=3.4, format="compressed-tensors"), **SMALL)
    for layer in (0, 1):
        specs = {(r.bits, r.group_size) for r in run.linears if f"layers.{layer}.mlp.experts" in r.name}
        assert len(specs) == 1
    assert run.budget is not None
    assert [line.linears for line in run.budget.lines if line.unit.endswith("experts")] == [12, 12]
    vllm = next(verdict for verdict in gptqkit.verify(tmp_path / "out").engines if verdict.engine.startswith("vLLM"))
    assert vllm.accepts == "yes"


def test_a_plan_cannot_measure_and_says_so(model: Path) -> None:
    plan = gptqkit.plan(model, CONFIG, samples=8, seqlen=32)
    assert any("the run measures which linear needs how many bits" in event.message for event in plan.events)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in plan.linears)
    stored = sum(
        QuantConfig(bits=li.bits, group_size=li.group_size).spec("").bits_per_weight * li.shape[0] * li.shape[1] for li in plan.linears
    )
    assert 3.4 < stored / weights <= 3.6
    assert plan.peak_memory >= gptqkit.plan(model, QuantConfig(group_size=32), samples=8, seqlen=32).peak_memory


@pytest.mark.parametrize(("options", "words"), [
    ({"target_bits": 2.05}, "target_bits=2.05 cannot be reached: the least is 2.223 bits per weight"),
    ({"target_bits": 3, "rules": ["mlp=bits:8,group_size:32"]}, "rules fix 9 linears"),
    ({"target_bits": 3, "method": "rtn"}, "target_bits measures with calibration text, and method rtn reads none; use --method gptq"),
    ({"target_bits": 3, "rules": ["nothing=skip"]}, "matches no linear"),
    ({"target_bits": 1.5}, "target_bits=1.5; allowed: 2 to 16"),
    ({"target_bits": True}, "target_bits=True; allowed: 2 to 16"),
])  # fmt: skip
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    options: dict[str, Any], words: str, model: Path, tmp_path: Path
) -> None:
    with pytest.raises(InputError) as caught:
        gptqkit.quantize(model, tmp_path / "out", QuantConfig.from_dict(options), **SMALL)
    assert words in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_widths_that_a_format_cannot_hold_are_no_options(tmp_path: Path) -> None:
    """40 outputs fill whole words at 8 and 4 bits, not at 3 or 2."""
    folder = save_tiny(tmp_path / "model", num_hidden_layers=1, head_dim=20, num_attention_heads=2, num_key_value_heads=2)
    config = QuantConfig(target_bits=5)
    units = find_units(StreamedModel.open(folder, device=CPU, dtype=torch.float32), config)
    assert {spec.bits for spec in units[0].options if spec is not None} == {4, 8}
    assert {spec.group_size for spec in units[1].options if spec is not None} == {-1}
    odd = save_tiny(tmp_path / "odd", num_hidden_layers=1, head_dim=6, num_attention_heads=1, num_key_value_heads=1)
    with pytest.raises(InputError, match=r"gptq needs out_features to be a multiple of .*; or exclude it with --rule 'model"):
        gptqkit.plan(odd, config)
