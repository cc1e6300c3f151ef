"""The same on a CUDA device: loading there, moving there and back, and the static cache with its compiled forward."""

from __future__ import annotations

import pytest
import torch
from tests.integrations.checkpoints import Checkpoint, tokens

import gptqkit
from gptqkit.integrations.doctor import diagnose
from gptqkit.kernels.linear import QuantLinear

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def largest_difference(model: torch.nn.Module, checkpoint: Checkpoint) -> float:
    with torch.no_grad():
        return (model(tokens().to(model.device)).logits.cpu() - checkpoint.dense(tokens()).logits).abs().max().item()


def test_loads_onto_the_card_and_moves(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder, device="cuda")
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    assert largest_difference(model, llama) < 1e-3
    model.to("cpu")
    assert largest_difference(model, llama) < 1e-4
    model.to("cuda")
    module = next(module for module in model.modules() if isinstance(module, QuantLinear))
    assert module.prepared_codes.data_ptr() == module.qweight.data_ptr()
    assert module.scales.dtype == torch.float16
    assert largest_difference(model, llama) < 1e-3


def test_static_cache_generates_the_same(llama: Checkpoint) -> None:
    model = gptqkit.load(llama.folder, device="cuda", dtype=torch.float32)
    prompt = tokens(1).to("cuda")
    expected = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(prompt, max_new_tokens=8, do_sample=False, cache_implementation="static"), expected)


def test_doctor_answers_for_the_card(llama: Checkpoint) -> None:
    assert {(linear.device, linear.chosen) for linear in diagnose(llama.folder).linears} == {("cpu", "torch"), ("cuda", "torch")}
