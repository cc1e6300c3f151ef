"""A whole run on the card: the same recipe, the same quality as on the CPU, the same bytes every time."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch

import gptqkit
from gptqkit import InputError, QuantConfig, data
from gptqkit.algorithms.gptq import solve_group
from gptqkit.algorithms.gram import Gram
from gptqkit.core.config import LinearSpec
from gptqkit.core.events import Event

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
SIZE = {"samples": 64, "seqlen": 256}


def shards(folder: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.glob("*.safetensors"))]


@pytest.mark.parametrize("bits", [4, 3])
def test_as_good_as_on_the_cpu(bits: int, tmp_path: Path) -> None:
    kl = {}
    for device in ("cuda", "cpu"):
        gptqkit.quantize(data.model_folder(), tmp_path / device, QuantConfig(bits=bits), device=device, **SIZE)
        options = {"windows": 20, "seqlen": 256, "device": "cuda", "dtype": "float32"}
        kl[device] = gptqkit.evaluate(tmp_path / device, against=data.model_folder(), **options).kl
    assert kl["cuda"] == pytest.approx(kl["cpu"], rel=0.1)


def test_same_bytes_paused_replayed_and_resumed(tmp_path: Path) -> None:
    model = data.model_folder()
    gptqkit.quantize(model, tmp_path / "a", device="cuda", **SIZE)
    gptqkit.quantize(model, tmp_path / "b", device="cuda", **SIZE)

    def interrupt(event: Event) -> None:
        if event.kind == "block" and event.data["index"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gptqkit.quantize(model, tmp_path / "c", device="cuda", emit=interrupt, **SIZE)
    gptqkit.quantize(model, tmp_path / "c", device="cuda", resume=True, **SIZE)
    assert shards(tmp_path / "a") == shards(tmp_path / "b") == shards(tmp_path / "c")


def test_evaluates_as_on_the_cpu() -> None:
    results = [gptqkit.evaluate(data.model_folder(), windows=10, seqlen=256, device=device, dtype="float32") for device in ("cuda", "cpu")]
    assert results[0].perplexity == pytest.approx(results[1].perplexity, rel=1e-4)


@pytest.mark.parametrize("order", ["natural", "activation", "group-aware", "desc-act"])
@pytest.mark.parametrize("sym", [True, False])
def test_solver_agrees_with_the_cpu(order: str, sym: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x_MI = torch.randn(2048, 256, generator=generator) @ torch.randn(256, 256, generator=generator)
    weight_OI = torch.randn(128, 256, generator=generator)
    solutions = []
    for device in ("cpu", "cuda"):
        gram = Gram(256, device)
        gram.add(x_MI.to(device))
        solutions += solve_group([weight_OI.to(device)], gram.finish(), [LinearSpec(4, 64, sym)], order=order, damp=0.01)
    agreement = (solutions[0].weight.codes_OI == solutions[1].weight.codes_OI.cpu()).float().mean()
    assert agreement > 0.99, "sums in another order may tip a rounding here and there, no more"
    assert solutions[1].error == pytest.approx(solutions[0].error, rel=0.02)


def test_half_precision_gram_matches_float64() -> None:
    x_MI = torch.randn(5000, 300, generator=torch.Generator().manual_seed(0)).to("cuda", torch.bfloat16)
    x_MI[:, 7] *= 1000
    gram = Gram(300, "cuda")
    gram.add(x_MI)
    exact_II = x_MI.double().T @ x_MI.double() / 5000
    assert ((gram.finish().double() - exact_II).abs() / exact_II.diagonal().outer(exact_II.diagonal()).sqrt()).max() < 1e-5


def test_a_card_that_is_not_there_is_refused() -> None:
    with pytest.raises(InputError, match=r"sees \d+ CUDA devices; use --device cpu"):
        gptqkit.plan(data.model_folder(), device="cuda:99")
