"""A streamed model computes what transformers computes, whatever the family, whole or sharded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests.tiny import FAMILIES, save_tiny, token_ids
from transformers import AutoModelForCausalLM

from gptqkit.core.errors import InputError
from gptqkit.models.standin import CallStore
from gptqkit.models.streamed import StreamedModel

CPU = torch.device("cpu")


def logits(model: StreamedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    calls = CallStore()
    with torch.inference_mode():
        with model.loaded_outside():
            hidden = model.embed(ids_BT, 0, calls)
        for index in range(model.block_count):
            with model.loaded_block(index) as block:
                hidden = calls.get(0, index).run(block, hidden)
        with model.loaded_outside():
            return model.head(ids_BT, hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_transformers(family: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", family, shard="60KB")
    ids_BT = torch.tensor(token_ids(2, 24))
    model = StreamedModel.open(folder, device=CPU, dtype=torch.float32)
    got = logits(model, ids_BT)
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_BT).logits
    assert torch.equal(got, expected)
    assert all(p.is_meta for p in model.skeleton.parameters())


@pytest.mark.parametrize("tied", [True, False])
def test_tied_and_untied_heads(tied: bool, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=tied)
    ids_BT = torch.tensor(token_ids(1, 8))
    got = logits(StreamedModel.open(folder, device=CPU, dtype=torch.float32), ids_BT)
    assert torch.equal(got, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids_BT).logits)


def test_equal_calls_are_kept_once() -> None:
    calls = CallStore()
    from gptqkit.models.standin import Call

    for batch in range(3):
        calls.put(batch, 0, Call((), {"mask": torch.ones(4, 4), "scale": (torch.zeros(2), None)}))
    assert calls.nbytes == 4 * 16 + 4 * 2
    assert calls.get(0, 0).kwargs["mask"] is calls.get(2, 0).kwargs["mask"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama", tie_word_embeddings=False)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(InputError, match=r"holds no tensor for model\.layers\.2\.\S+, which LlamaForCausalLM needs"):
        StreamedModel.open(folder, device=CPU, dtype=torch.float32)


def test_a_misshapen_tensor_is_named(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", "llama")
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"intermediate_size": 128', '"intermediate_size": 192'))
    with pytest.raises(InputError, match=r"gate_proj\.weight has shape \[128, 64\]; LlamaForCausalLM needs \[192, 64\]"):
        StreamedModel.open(folder, device=CPU, dtype=torch.float32)
