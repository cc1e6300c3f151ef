"""doctor: the machine, the backends, and the decision for each linear shape of a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.integrations.checkpoints import Checkpoint, make_checkpoint

import gptqkit
from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.integrations.doctor import diagnose
from gptqkit.kernels.dispatch import KERNELS
from gptqkit.kernels.linear import QuantLinear


def test_the_machine_without_a_model() -> None:
    found = diagnose()
    assert torch.__version__.startswith(found.packages["torch"])
    assert found.devices[0].name == "cpu"
    assert 0 < found.devices[0].available <= found.devices[0].memory
    assert found.cache_free > 0
    assert [(backend.name, backend.unavailable) for backend in found.backends] == [(kernel.name, None) for kernel in KERNELS]
    assert (found.model, found.linears) == (None, ())
    assert json.loads(json.dumps(found.to_dict()))["devices"][0]["name"] == "cpu"


@pytest.mark.parametrize("format_name", ["gptq", "compressed-tensors"])
def test_the_decisions_are_those_that_loading_makes(format_name: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "qwen2", format_name, dtype=torch.bfloat16)
    found = [linear for linear in diagnose(checkpoint.folder).linears if linear.device == "cpu"]
    model = gptqkit.load(checkpoint.folder)
    assert sum(linear.count for linear in found) == 14
    assert {(linear.out_features, linear.in_features, linear.bias) for linear in found} == {
        (64, 64, True), (32, 64, True), (64, 64, False), (96, 64, False), (64, 96, False),
    }  # fmt: skip
    for linear in found:
        module = model.get_submodule(linear.example)
        assert isinstance(module, QuantLinear)
        assert (module.kernel_name, str(module.dtype)) == (linear.chosen, f"torch.{linear.dtype}")


def test_refusals_are_listed_in_order(llama: Checkpoint) -> None:
    first = diagnose(llama.folder).to_dict()["linears"][0]
    refusals = [
        {"backend": "cpu", "refusal": "dtype float32; it handles bfloat16"},
        {"backend": "torch", "refusal": None},
    ]
    assert (first["device"], first["chosen"], first["decisions"]) == ("cpu", "torch", refusals)


def test_a_forced_backend_shows(llama: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPTQKIT_BACKEND", "cpu")
    found = diagnose(llama.folder)
    assert (found.forced, found.linears[0].chosen) == ("cpu", None)
    assert found.linears[0].decisions[-1] == ("torch", "the backend cpu was asked for")


def test_models_that_cannot_be_diagnosed(llama: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a folder here nor a hub id"):
        diagnose(tmp_path / "nowhere")
    llama.dense.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="is not quantized"):
        diagnose(tmp_path)


def test_widths_are_told_apart(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(tmp_path / "model", "llama", "compressed-tensors", LinearSpec(3, -1, False))
    found = diagnose(checkpoint.folder)
    assert {(linear.bits, linear.group_size, linear.sym, linear.act_order) for linear in found.linears} == {(3, -1, False, False)}
