"""Models that read a text with one list of blocks and write another with a second: both are quantized, the encoder first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.tiny import token_ids
from torch.nn.functional import log_softmax
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import gptqkit
from gptqkit import InputError, QuantConfig
from gptqkit.checkpoint.quantized import QuantizedCheckpoint
from gptqkit.core.events import Event
from gptqkit.evaluation.perplexity import compare
from gptqkit.hf.skeleton import auto_class, quiet_transformers
from gptqkit.models.streamed import StreamedModel

_TOKENS = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "d_model": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {**_TOKENS, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
    "bart": {
        **_TOKENS, "encoder_layers": 2, "decoder_layers": 3, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    },
}  # fmt: skip
BLOCKS = {"t5": ("encoder.block.0", "decoder.block.1"), "bart": ("model.encoder.layers.1", "model.decoder.layers.2")}
SMALL: dict[str, Any] = {"calibration": token_ids(), "samples": 8, "seqlen": 32, "dtype": "float32"}
CONFIG = QuantConfig(group_size=32)
IDS = torch.tensor(token_ids(2, 16, seed=5))


def save(folder: Path, family: str) -> Path:
    torch.manual_seed(0)
    model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(family, **CONFIGS[family]), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3 / parameter.shape[-1] ** 0.25)
    model.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, decoder_input_ids=IDS).logits


@pytest.mark.parametrize(("family", "preset"), [("t5", "fast"), ("bart", "fast"), ("t5", "best")])
def test_both_stacks_are_quantized_and_load(family: str, preset: str, tmp_path: Path) -> None:
    original = save(tmp_path / "original", family)
    run = gptqkit.quantize(original, tmp_path / "out", QuantConfig(group_size=32, preset=preset), **SMALL)
    names = [record.name for record in run.linears]
    assert all(any(name.startswith(block) for name in names) for block in BLOCKS[family])
    assert all(record.tokens for record in run.linears)
    assert run.check is not None
    assert gptqkit.verify(tmp_path / "out", against=original).ok
    checkpoint = QuantizedCheckpoint.open(tmp_path / "out")
    with quiet_transformers():
        loaded = gptqkit.load(tmp_path / "out")
        whole: Any = AutoModelForSeq2SeqLM.from_pretrained(original, dtype=torch.float32)
        before = logits(whole)
        for name in names:
            whole.get_submodule(name).weight.data.copy_(checkpoint.read_linear(name).dequantize())
        assert (logits(loaded) - logits(whole)).abs().max() <= 1e-4 * before.abs().max()
        assert loaded.generate(IDS, max_new_tokens=4, do_sample=False).shape[0] == len(IDS)
        kl = float(
            (log_softmax(before[:, :-1], -1).exp() * (log_softmax(before, -1) - log_softmax(logits(whole), -1))[:, :-1]).sum(-1).mean()
        )
    cpu = torch.device("cpu")
    subject, reference = (StreamedModel.open(folder, device=cpu, dtype=torch.float32) for folder in (tmp_path / "out", original))
    measured = compare(subject, reference, list(IDS)).kl
    assert measured == pytest.approx(kl, rel=1e-3, abs=1e-6), "streamed through both stacks, as transformers computes it whole"


def test_a_decoder_by_itself_is_a_causal_language_model(tmp_path: Path) -> None:
    """One configuration, two models: `architectures` says which."""
    config = AutoConfig.for_model("bart", **CONFIGS["bart"])
    assert auto_class(config) is AutoModelForCausalLM
    config.architectures = ["BartForConditionalGeneration"]
    assert auto_class(config) is AutoModelForSeq2SeqLM
    assert auto_class(AutoConfig.for_model("t5", **CONFIGS["t5"])) is AutoModelForSeq2SeqLM


@pytest.mark.parametrize("finished", [1, 3])
def test_a_killed_run_goes_on_in_either_stack(finished: int, tmp_path: Path) -> None:
    original = save(tmp_path / "original", "t5")
    gptqkit.quantize(original, tmp_path / "whole", CONFIG, **SMALL)

    class Killed(Exception):
        pass

    def stop(event: Event) -> None:
        if event.kind == "block" and event.message == f"block {finished} of 4":
            raise Killed

    with pytest.raises(Killed):
        gptqkit.quantize(original, tmp_path / "out", CONFIG, emit=stop, **SMALL)
    gptqkit.quantize(original, tmp_path / "out", CONFIG, resume=True, **SMALL)
    for path in sorted((tmp_path / "whole").glob("*.safetensors")):
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def test_bit_budgets_say_that_they_do_not_measure_two_stacks(tmp_path: Path) -> None:
    original = save(tmp_path / "original", "t5")
    with pytest.raises(InputError, match="does not measure models with an encoder and a decoder; use --bits"):
        gptqkit.quantize(original, tmp_path / "out", QuantConfig(target_bits=3.5), **SMALL)
