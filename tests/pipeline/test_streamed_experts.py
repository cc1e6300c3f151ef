"""Experts are in memory one at a time, whatever passes through the block, and nothing comes out different for it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import save_tiny, token_ids
from torch import nn

import gptqkit
from gptqkit import QuantConfig, Rule
from gptqkit.models import supply
from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel
from gptqkit.pipeline.memory import BATCH_TOKENS

CPU = torch.device("cpu")
SMALL: dict[str, Any] = {"calibration": token_ids(), "samples": 12, "seqlen": 32, "device": "cpu"}
CONFIGS = {
    "fast": {},
    "rtn": {"method": "rtn"},
    "best": {"preset": "best", "rules": (Rule(r"experts\.3\.up", skip=True),)},
    "awq+gptq": {"method": "awq+gptq"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("models") / "qwen3_moe", "qwen3_moe", num_experts=6)


@pytest.fixture
def most_held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], dict[int, int]]:
    """By block object, the most experts that had weights at the same time, looked at whenever one gets some."""
    counts: dict[int, int] = {}
    fill = supply.ExpertSupply._fill

    def counting(self: supply.ExpertSupply, name: str, value: torch.Tensor) -> None:
        fill(self, name, value)
        values = {known: self._block.get_submodule(known.removesuffix(".weight")).weight for known in self.names}
        # While scales are tuned, weights are plain tensors made from them.
        loaded = {known.rsplit(".", 2)[0] for known, value in values.items() if isinstance(value, nn.Parameter) and not value.is_meta}
        counts[id(self._block)] = max(counts.get(id(self._block), 0), len(loaded))

    monkeypatch.setattr(supply.ExpertSupply, "_fill", counting)
    return lambda: counts


def digest(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("memory", [None, 1000])
@pytest.mark.parametrize("name", CONFIGS)
def test_one_expert_at_a_time_and_the_same_bytes_as_with_all(
    model: Path, name: str, memory: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_held: Callable[[], dict[int, int]]
) -> None:
    monkeypatch.setitem(BATCH_TOKENS, "cpu", 64)  # several batches: with one there is nothing to tune by
    config = QuantConfig(bits=4, group_size=32, **CONFIGS[name])
    gptqkit.quantize(model, tmp_path / "streamed", config, memory=memory, **SMALL)
    assert set(most_held().values()) == {1}
    most_held().clear()
    monkeypatch.setattr(supply, "HELD", 100)
    gptqkit.quantize(model, tmp_path / "whole", config, memory=memory, **SMALL)
    assert max(most_held().values()) == 6
    assert digest(tmp_path / "streamed") == digest(tmp_path / "whole")


def test_batches_in_step_read_each_expert_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedModel.open(model, device=CPU, dtype=torch.float32)
    reads: list[str] = []
    read = StreamedModel.read_parameter

    def counting(self: StreamedModel, name: str) -> torch.Tensor:
        reads.append(name)
        return read(self, name)

    monkeypatch.setattr(StreamedModel, "read_parameter", counting)
    calls = CallStore()
    with torch.inference_mode():
        with streamed.loaded_outside():
            hidden = [streamed.embed(torch.tensor(token_ids(2, 16, seed=seed)), seed, calls) for seed in range(5)]
        called = [calls.get(batch, 0) for batch in range(5)]
        with streamed.loaded_block(0) as block:
            reads.clear()
            expected = [call.run(block, x_BTH) for call, x_BTH in zip(called, hidden, strict=True)]
            assert len(reads) == 5 * 6 * 3, "one after the other, every batch needs all experts again"
            for tokens, passes in ((10**9, 1), (64, 3), (1, 5)):
                reads.clear()
                monkeypatch.setattr(supply, "STEP_TOKENS", tokens)
                made: list[torch.Tensor] = [torch.empty(0)] * 5
                supply.run_in_step(block, called, hidden, made)
                assert len(reads) == passes * 6 * 3
                assert all(torch.equal(a, b) for a, b in zip(made, expected, strict=True))
        assert all(parameter.is_meta for parameter in block.parameters())


def test_an_error_on_the_way_ends_the_forwards_that_wait(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    streamed = StreamedModel.open(model, device=CPU, dtype=torch.float32)
    calls = CallStore()
    ended: list[int] = []
    with torch.inference_mode():
        with streamed.loaded_outside():
            hidden = [streamed.embed(torch.tensor(token_ids(2, 16, seed=seed)), seed, calls) for seed in range(3)]
        with streamed.loaded_block(0) as block:

            def broken(name: str) -> torch.Tensor:
                raise OSError("the disk is gone")

            block.register_forward_hook(lambda module, inputs, output: ended.append(1))
            monkeypatch.setattr(StreamedModel, "read_parameter", lambda self, name: broken(name))
            with pytest.raises(OSError, match="the disk is gone"):
                supply.run_in_step(block, [calls.get(batch, 0) for batch in range(3)], hidden, hidden)
    assert not ended
    assert not any(module._forward_pre_hooks for module in block.modules())
    assert all(parameter.is_meta for parameter in block.parameters())
