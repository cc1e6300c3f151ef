"""Models whose checkpoints store experts stacked, from the plan to a dense model again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, token_ids

import gptqkit
from gptqkit import QuantConfig, Rule
from gptqkit.checkpoint.source import TensorSource
from gptqkit.hf.skeleton import quiet_transformers

FAMILIES = ("gpt_oss", "granitemoe", "llama4_text")
SMALL: dict[str, Any] = {"calibration": token_ids(), "samples": 8, "seqlen": 32, "dtype": "float32"}
IDS = torch.tensor(token_ids(2, 16, seed=5))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    source = TensorSource.open(folder)
    return {name: source.read(name) for name in source.names}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_experts_are_written_one_by_one_and_loaded_so(family: str, tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "original", family)
    run = gptqkit.quantize(original, tmp_path / "out", QuantConfig(group_size=32), **SMALL)
    experts = [record.name for record in run.linears if ".experts." in record.name]
    assert len(experts) == 2 * 4 * 3
    assert not any("experts.gate_up_proj" in name or "input_linear" in name for name in TensorSource.open(tmp_path / "out").names)
    assert gptqkit.verify(tmp_path / "out", against=original).ok
    with quiet_transformers(), torch.no_grad():
        model = gptqkit.load(tmp_path / "out")
        logits = model(IDS).logits
        assert torch.isfinite(logits).all()
        model.save_pretrained(tmp_path / "again")
        assert same(tensors(tmp_path / "again"), tensors(tmp_path / "out"))
        dense = gptqkit.load(tmp_path / "out").dequantize()
        assert (dense(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        dense.save_pretrained(tmp_path / "dense")
    before, after = TensorSource.open(original), TensorSource.open(tmp_path / "dense")
    assert sorted(before.names) == sorted(after.names), "a dense model again, as transformers stores it"
    for name in before.names:
        a, b = before.read(name).float(), after.read(name).float()
        assert a.shape == b.shape
        assert (a - b).norm() <= 0.15 * a.norm(), name


@pytest.mark.parametrize("family", FAMILIES)
def test_a_layer_whose_experts_are_skipped_keeps_its_stacks(family: str, tmp_path: Path) -> None:
    original = save_tiny(tmp_path / "original", family)
    config = QuantConfig(
        group_size=32, rules=(Rule(r"layers\.0\..*experts\.", skip=True), Rule(r"layers\.1\..*experts\.2\.up_proj", skip=True))
    )
    gptqkit.quantize(original, tmp_path / "out", config, **SMALL)
    before, after = tensors(original), tensors(tmp_path / "out")
    stacked = [name for name in before if "layers.0." in name and before[name].ndim == 3]
    assert len(stacked) == 2
    assert all(torch.equal(before[name], after[name]) for name in stacked)
    assert sum(name.endswith("experts.2.up_proj.weight") for name in after) == 1
    assert gptqkit.verify(tmp_path / "out", against=original).ok
    with quiet_transformers(), torch.no_grad():
        model, dense = gptqkit.load(tmp_path / "out"), gptqkit.load(tmp_path / "out").dequantize()
        logits = model(IDS).logits
        assert (dense(IDS).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
