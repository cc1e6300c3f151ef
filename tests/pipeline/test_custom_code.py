"""Models that bring their own code: refused until allowed, then like any other."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tests.tiny import token_ids

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.hf.skeleton import quiet_transformers

CODE = '''
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMixin
from transformers.modeling_outputs import CausalLMOutput


class TwinConfig(PretrainedConfig):
    model_type = "twin"

    def __init__(self, vocab_size=256, hidden_size=64, num_hidden_layers=2, **kwargs):
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        super().__init__(**kwargs)


class TwinBlock(nn.Module):
    """Two branches that read one norm, and a gate between them."""

    def __init__(self, config):
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.left = nn.Linear(config.hidden_size, 2 * config.hidden_size)
        self.right = nn.Linear(config.hidden_size, 2 * config.hidden_size, bias=False)
        self.out = nn.Linear(2 * config.hidden_size, config.hidden_size)

    def forward(self, hidden_states):
        normed = self.norm(hidden_states)
        return hidden_states + self.out(torch.tanh(self.left(normed)) * self.right(normed))


class TwinForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = TwinConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList([TwinBlock(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def set_input_embeddings(self, value):
        self.embed = value

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids, attention_mask=None, **kwargs):
        hidden = self.embed(input_ids)
        for block in self.blocks:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.lm_head(hidden))
'''
SMALL: dict[str, Any] = {"calibration": token_ids(), "samples": 8, "seqlen": 32, "dtype": "float32"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as its author would upload it."""
    model = tmp_path / "twin"
    model.mkdir()
    (model / "modeling_twin.py").write_text(CODE)
    auto_map = {"AutoConfig": "modeling_twin.TwinConfig", "AutoModelForCausalLM": "modeling_twin.TwinForCausalLM"}
    config = {"model_type": "twin", "architectures": ["TwinForCausalLM"], "auto_map": auto_map}
    (model / "config.json").write_text(json.dumps({**config, "vocab_size": 256, "hidden_size": 64, "num_hidden_layers": 2}))
    generator = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (256, 64), "lm_head.weight": (256, 64)}
    for block in ("blocks.0", "blocks.1"):
        shapes |= {f"{block}.norm.weight": (64,), f"{block}.norm.bias": (64,), f"{block}.left.weight": (128, 64)}
        shapes |= {
            f"{block}.left.bias": (128,),
            f"{block}.right.weight": (128, 64),
            f"{block}.out.weight": (64, 128),
            f"{block}.out.bias": (64,),
        }
    save_file({name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}, model / "model.safetensors")
    return model


def test_code_of_a_model_runs_only_when_allowed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="brings its own Python code; read it, then allow it with --trust-remote-code"):
        gptqkit.quantize(folder, tmp_path / "out", QuantConfig(group_size=32), **SMALL)
    run = gptqkit.quantize(folder, tmp_path / "out", QuantConfig(group_size=32), trust_remote_code=True, **SMALL)
    assert [record.name for record in run.linears] == [f"blocks.{i}.{leaf}" for i in (0, 1) for leaf in ("left", "right", "out")]
    assert (tmp_path / "out" / "modeling_twin.py").read_text() == CODE, "the checkpoint loads by itself"
    ids = torch.tensor(token_ids(2, 16, seed=5))
    with quiet_transformers(), torch.no_grad():
        model = gptqkit.load(tmp_path / "out", trust_remote_code=True)
        logits = model(ids).logits
        dense = gptqkit.load(tmp_path / "out", trust_remote_code=True).dequantize()
        assert (dense(ids).logits - logits).abs().max() <= 1e-5 * logits.abs().max()
        original = gptqkit.load(folder, trust_remote_code=True)
        assert 0 < (original(ids).logits - logits).abs().max() < 0.5 * logits.abs().max()
