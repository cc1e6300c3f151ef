"""QuantLinear: what it keeps, what it shares, and that it survives moving, casting, copying, pickling and compiling."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from tests.kernels.test_conformance import random_weight
from torch import nn

from gptqkit.core.config import LinearSpec
from gptqkit.core.errors import InputError
from gptqkit.formats import get_format
from gptqkit.kernels.linear import QuantLinear


def linear(
    format_name: str = "gptq_v2", *, bits: int = 4, sym: bool = True, dtype: torch.dtype = torch.float32, backend: str | None = None
) -> QuantLinear:
    weight = random_weight(64, 128, bits=bits, group_size=32, sym=sym)
    layout = get_format(format_name)
    module = QuantLinear(
        128, 64, format=layout, spec=LinearSpec(bits, 32, sym), tensors=layout.encode(weight), dtype=dtype, backend=backend,
        bias=nn.Parameter(torch.linspace(-1, 1, 64, dtype=dtype)), name="block.up",
    )  # fmt: skip
    module.prepare()
    return module


def dense(module: QuantLinear, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, module.dequantize(x.dtype), module.bias)


@pytest.mark.parametrize("format_name", ["gptq_v2", "compressed-tensors"])
@pytest.mark.parametrize("sym", [True, False])
def test_the_torch_backend_shares_the_checkpoints_memory(format_name: str, sym: bool) -> None:
    module = linear(format_name, sym=sym, bits=3 if format_name == "compressed-tensors" else 4)
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    copied = {key for key, buffer in module.named_buffers() if buffer.untyped_storage().data_ptr() not in own}
    assert copied == (set() if sym else {"prepared_zero"})
    x = torch.randn(2, 3, 128)
    torch.testing.assert_close(module(x), dense(module, x), atol=1e-5, rtol=1e-5)


def test_state_dict_is_the_checkpoints() -> None:
    module = linear("gptq_v2")
    assert sorted(module.state_dict()) == ["bias", "g_idx", "qweight", "qzeros", "scales"]
    assert not any(parameter.requires_grad for name, parameter in module.named_parameters() if name != "bias")


def test_casting_changes_the_arithmetic_and_not_the_scales() -> None:
    module = linear("gptq_v2")
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    module.to(torch.bfloat16)
    assert module.dtype == torch.bfloat16
    assert module.bias.dtype == torch.bfloat16
    assert module.kernel_name == "cpu"
    module.float()
    assert module.kernel_name == "torch"
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        assert module.state_dict()[name].dtype == before[name].dtype
        assert torch.equal(module.state_dict()[name], before[name])


def test_moving_to_where_it_is_keeps_the_state_and_meta_drops_it() -> None:
    module = linear()
    state = module.prepared_codes
    module.to("cpu")
    assert module.prepared_codes is state
    module.to("meta")
    assert module.kernel_name is None
    with pytest.raises(InputError, match=r"block\.up has no tensors yet"):
        module(torch.randn(1, 128))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_share_nothing_and_compute_the_same(how: str) -> None:
    module = linear(dtype=torch.bfloat16)
    if how == "deepcopy":
        other = copy.deepcopy(module)
    else:
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    x = torch.randn(3, 128).bfloat16()
    assert other.kernel_name == module.kernel_name == "cpu"
    assert other.qweight.data_ptr() != module.qweight.data_ptr()
    assert other.prepared_codes.data_ptr() == other.qweight.data_ptr()
    assert torch.equal(other(x), module(x))


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 3), (torch.float32, 4), (torch.bfloat16, 4)])
def test_compiles_into_one_graph(dtype: torch.dtype, bits: int) -> None:
    module = linear("gptq_v2", bits=bits, dtype=dtype, sym=False)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (2, 5):
        x = torch.randn(rows, 128).to(dtype)
        torch.testing.assert_close(compiled(x), module(x))
    x = torch.randn(4, 128).to(dtype).requires_grad_()
    compiled(x).sum().backward()
    torch.testing.assert_close(x.grad[0].float(), module.dequantize(dtype).sum(0).float(), atol=0.05, rtol=0.02)


def test_other_input_dtypes_are_cast_and_cast_back() -> None:
    module = linear(dtype=torch.bfloat16)
    x = torch.randn(2, 128)
    assert module(x).dtype == torch.float32
    torch.testing.assert_close(module(x), module(x.bfloat16()).float())


def test_messages_name_the_linear() -> None:
    with pytest.raises(InputError, match=r"no backend can multiply with block\.up"):
        linear(backend="cpu")
    layout = get_format("gptq")
    tensors, spec = layout.encode(random_weight(64, 128, bits=4, group_size=32, sym=True)), LinearSpec(4, 32, True)
    module = QuantLinear(128, 32, format=layout, spec=spec, tensors=tensors, bias=None, dtype=torch.float32, name="block.up")
    with pytest.raises(InputError, match=r"block\.up: the checkpoint holds a weight of 64 x 128, the model has 32 x 128"):
        module.prepare()
