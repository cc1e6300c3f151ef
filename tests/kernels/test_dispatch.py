"""Which kernel is chosen, and what is said when none will do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from gptqkit.core.errors import InputError
from gptqkit.kernels.dispatch import KERNELS, choose, decide, describe
from gptqkit.kernels.protocol import Request

FITS = Request(bits=4, group_size=128, sym=True, in_features=256, out_features=64, dtype=torch.bfloat16, device="cpu")


@pytest.fixture(autouse=True)
def no_forced_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GPTQKIT_BACKEND", raising=False)


def test_names_are_unique_and_the_last_kernel_refuses_nothing() -> None:
    assert len({kernel.name for kernel in KERNELS}) == len(KERNELS)
    for change in ({"device": "cuda"}, {"bits": 3}, {"dtype": torch.float64}, {"act_order": True}, {"out_features": 7}):
        assert KERNELS[-1].refuses(replace(FITS, **change)) is None


def test_the_fast_kernel_is_chosen_where_it_fits() -> None:
    assert choose(FITS).name == "cpu"
    assert choose(replace(FITS, group_size=-1)).name == "cpu"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"device": "cuda"}, "the device is cuda; it runs on cpu"),
        ({"bits": 3}, "bits=3; it handles 4"),
        ({"dtype": torch.float32}, "dtype float32; it handles bfloat16"),
        ({"act_order": True}, "columns are in activation order (g_idx); it needs contiguous groups"),
        ({"group_size": 48}, "groups of 48 columns; it handles 32, 64, 128, 256"),
        ({"in_features": 192}, "in_features=192 is not a multiple of the group size 128"),
        ({"out_features": 40}, "out_features=40 is not a multiple of 16"),
    ],
)
def test_refusals_name_the_value(change: dict, said: str) -> None:
    request = replace(FITS, **change)
    assert {d.kernel.name: d.refusal for d in decide(request)} == {"cpu": said, "torch": None}
    assert choose(request).name == "torch"


def test_a_backend_can_be_forced_by_argument_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose(FITS, "torch").name == "torch"
    monkeypatch.setenv("GPTQKIT_BACKEND", "torch")
    assert choose(FITS).name == "torch"
    assert choose(FITS, "cpu").name == "cpu"
    assert decide(FITS)[0].refusal == "the backend torch was asked for"


def test_unknown_backends_are_refused_with_the_names_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="backend='cuda'; allowed: cpu, torch"):
        choose(FITS, "cuda")
    monkeypatch.setenv("GPTQKIT_BACKEND", "marlin")
    with pytest.raises(InputError, match="GPTQKIT_BACKEND='marlin'; allowed: cpu, torch"):
        choose(FITS)


def test_a_failing_choice_prints_every_refusal() -> None:
    with pytest.raises(InputError) as caught:
        choose(replace(FITS, bits=3), "cpu", name="model.layers.0.mlp.up_proj")
    assert str(caught.value) == (
        "no backend can multiply with model.layers.0.mlp.up_proj (64 x 256, 3 bits, group size 128, sym, bfloat16 on cpu):\n"
        "  cpu      no: bits=3; it handles 4\n"
        "  torch    no: the backend cpu was asked for\n"
        "leave out backend='cpu' (and GPTQKIT_BACKEND) to let one be chosen"
    )
    assert describe(replace(FITS, sym=False, act_order=True)) == "64 x 256, 4 bits, group size 128, asym, activation order, bfloat16 on cpu"
