"""Every offered combination of bits, symmetry, group size, order and format: quantize, load in transformers, compare logits.

One model carries many combinations: each of its blocks gets another (bits, sym, group size) by a rule, and the model is quantized once per
order and format. The reference is the same architecture in plain transformers with the dequantized weights.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny, token_ids
from transformers import AutoModelForCausalLM

import gptqkit
from gptqkit import QuantConfig, Rule
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.core.config import GROUP_SIZES

BITS = {"gptq": (2, 3, 4, 8), "gptq_v2": (2, 3, 4, 8), "compressed-tensors": (2, 3, 4, 5, 6, 7, 8)}
ORDERS = ("natural", "activation", "group-aware", "desc-act")
OFFERED = [(f, o) for f in BITS for o in ORDERS if not (f == "compressed-tensors" and o == "desc-act")]
IDS = torch.tensor(token_ids(2, 16, seed=5))


def dense_logits(original: Path, quantized: Path) -> torch.Tensor:
    checkpoint = QuantizedCheckpoint.open(quantized)
    model = AutoModelForCausalLM.from_pretrained(original, dtype=torch.float32)
    with torch.no_grad():
        for name in checkpoint.linears:
            model.get_submodule(name).weight.copy_(checkpoint.read_linear(name).dequantize())
        return model(IDS).logits


def config_of(format: str, order: str, **options: object) -> QuantConfig:
    desc_act = order == "desc-act"
    return QuantConfig(format=format, order=None if desc_act else order, desc_act=desc_act, **options)  # type: ignore[arg-type]


def assert_round_trips(model: Path, out: Path, config: QuantConfig) -> QuantizedCheckpoint:
    gptqkit.quantize(model, out, config, calibration=token_ids(8, 64), samples=6, seqlen=64)
    expected = dense_logits(model, out)
    with torch.no_grad():
        got = gptqkit.load(out, dtype=torch.float32)(IDS).logits
    assert (got - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())
    return QuantizedCheckpoint.open(out)


@pytest.mark.slow
@pytest.mark.parametrize(("format", "order"), OFFERED)
def test_every_combination(format: str, order: str, tmp_path: Path) -> None:
    specs = list(product(BITS[format], (True, False), GROUP_SIZES))
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": len(specs)}
    model = save_tiny(tmp_path / "model", "llama", **shape)
    rules = tuple(Rule(rf"layers\.{i}\.", bits=bits, group_size=group, sym=sym) for i, (bits, sym, group) in enumerate(specs))
    checkpoint = assert_round_trips(model, tmp_path / "out", config_of(format, order, rules=rules))
    for i, (bits, sym, group) in enumerate(specs):
        spec = checkpoint.linears[f"model.layers.{i}.mlp.down_proj"]
        assert (spec.bits, spec.sym, spec.group_size) == (bits, sym, group)


@pytest.mark.parametrize(("format", "order"), OFFERED)
def test_uniform_checkpoints(format: str, order: str, tmp_path: Path) -> None:
    """The ordinary case, where the configuration has no exceptions; symmetric and asymmetric in turn."""
    model = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=order == "natural")
    assert_round_trips(model, tmp_path / "out", config_of(format, order, bits=4, group_size=32, sym=order != "activation"))
