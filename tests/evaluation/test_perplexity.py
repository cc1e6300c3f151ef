"""The streamed evaluation equals a plain one in transformers, and refuses what cannot be compared."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tests.tiny import save_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

import gptqkit
from gptqkit import InputError, data

MODEL = data.model_folder()


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    gptqkit.quantize(MODEL, out, gptqkit.QuantConfig(bits=3, method="rtn"))
    return out


def test_equals_the_definition(quantized: Path) -> None:
    result = gptqkit.evaluate(quantized, against=MODEL, windows=4, seqlen=64, device="cpu")
    text = data.heldout_text().read_text(encoding="utf-8").replace("\x00", "\n")
    ids = AutoTokenizer.from_pretrained(MODEL)(text, add_special_tokens=False)["input_ids"][: 4 * 64]
    ids = torch.tensor(ids).view(4, 64)
    with torch.no_grad():
        original = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
        model = gptqkit.load(quantized, dtype=torch.float32)(ids).logits[:, :-1].double().log_softmax(-1)
    nll = -model.gather(-1, ids[:, 1:, None]).mean()
    kl = (original.exp() * (original - model)).sum(-1).mean()
    assert (result.tokens, result.windows, result.seqlen) == (4 * 63, 4, 64)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-4)
    assert result.kl == pytest.approx(kl.item(), rel=1e-4)
    assert result.top1 == pytest.approx((original.argmax(-1) == model.argmax(-1)).float().mean().item())


def test_a_model_has_no_distance_from_itself() -> None:
    result = gptqkit.evaluate(MODEL, against=MODEL, windows=2, seqlen=32)
    assert (result.kl, result.top1) == (0, 1)
    assert result.perplexity == result.reference_perplexity
    alone = gptqkit.evaluate(MODEL, windows=2, seqlen=32)
    assert (alone.perplexity, alone.kl, alone.top1) == (result.perplexity, None, None)


def test_what_cannot_be_evaluated(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a file; --text takes a UTF-8 text file"):
        gptqkit.evaluate(MODEL, text=tmp_path / "nothing.txt")
    (tmp_path / "short.txt").write_text("A short text.")
    with pytest.raises(InputError, match=r"has \d+ tokens; one window of --seqlen 512 needs 512"):
        gptqkit.evaluate(MODEL, text=tmp_path / "short.txt")
    with pytest.raises(InputError, match=r"longer than the model's context of \d+"):
        gptqkit.evaluate(MODEL, seqlen=100_000)
    with pytest.raises(InputError, match="KL needs the same vocabulary"):
        gptqkit.evaluate(MODEL, against=save_tiny(tmp_path / "other"))
    with pytest.raises(InputError, match="neither a folder here nor a hub id"):
        gptqkit.evaluate("no/such/model")
