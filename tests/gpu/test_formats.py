"""Formats take and give weights on any device."""

from __future__ import annotations

import pytest
import torch
from tests.strategies import assert_same, make_weight

from gptqkit.core.config import LinearSpec
from gptqkit.formats import FORMATS
from gptqkit.formats.protocol import Format

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda fmt: fmt.name)
def test_same_tensors_as_on_the_cpu(fmt: Format, bits: int, sym: bool) -> None:
    weight = make_weight(bits=bits, group_size=32, out_features=64, in_features=96, sym=sym)
    expected = fmt.encode(weight)
    stored = fmt.encode(weight.to("cuda"))
    assert {name: tensor.device.type for name, tensor in stored.items()} == dict.fromkeys(expected, "cuda")
    assert all(torch.equal(stored[name].cpu(), tensor) for name, tensor in expected.items())
    back = fmt.decode(stored, LinearSpec(bits, 32, sym))
    assert back.codes_OI.device.type == "cuda"
    assert_same(back.to("cpu"), weight)
